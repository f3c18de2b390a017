"""A tiny LM-SPT on a tiny Whisper's encoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny_lmspt import SPECTRAL
from tiny_teachers import save_speech_teacher

from codec import Codec, CodecConfig
from codec.distillation.ctc_reader import BLANK, STEPS, CodeRecognizer, RecognizerNetwork
from codec.modules.ssl_encoders import WhisperEncoder, config_for_whisper, load_whisper

FRAMES = replace(SPECTRAL.spectral, window=640, hop=160, strides=(2, 2))
LM_SPT = replace(
    SPECTRAL,
    spectral=FRAMES,
    lmspt=replace(
        SPECTRAL.lmspt,
        semantic="whisper",
        semantic_subtraction=False,
        whisper=replace(SPECTRAL.lmspt.whisper, adapter_width=8, adapter_depth=1),
        auxiliary=replace(SPECTRAL.lmspt.auxiliary, kind="none"),
    ),
)


def tiny_semantic(folder: Path) -> tuple[Codec, str]:
    """The codec, and the folder of its Whisper."""
    whisper = save_speech_teacher(folder / "whisper", "whisper")
    config: CodecConfig = config_for_whisper(whisper, LM_SPT)
    torch.manual_seed(0)
    codec = Codec(config)
    assert isinstance(codec.encoder.semantic, WhisperEncoder)
    load_whisper(codec.encoder.semantic, whisper)
    codec.train()(0.3 * torch.randn(2, 1, 40 * config.hop_length))
    return codec.eval(), whisper


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def one_hot_recognizer(letters: str) -> CodeRecognizer:
    """Code 0 is a blank, 1 the word separator, 2 the first letter, ...; in a frame's first step."""
    torch.manual_seed(0)
    size = len(letters) + 2
    reader = CodeRecognizer(RecognizerNetwork(size, 8, letters), torch.eye(size))

    def log_probs(codes: np.ndarray) -> torch.Tensor:
        probs = torch.full((len(codes), STEPS, size), 0.01 / size)
        probs[:, 1:, BLANK] = 0.99
        probs[torch.arange(len(codes)), 0, torch.from_numpy(codes.astype(np.int64))] = 0.99
        return (probs / probs.sum(-1, keepdim=True)).log().flatten(0, 1)

    reader.log_probs = log_probs
    return reader

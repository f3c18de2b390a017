"""A tiny LM-SPT on a tiny Whisper's encoder."""

from dataclasses import replace
from pathlib import Path

import torch
from tiny_lmspt import SPECTRAL

from codec import Codec, CodecConfig
from codec.modules.ssl_encoders import WhisperEncoder, architecture_of, load_whisper
from tests.codec.distillation.test_teachers_speech_teachers import save

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
    whisper = save(folder / "whisper", "whisper")
    config: CodecConfig = architecture_of(whisper, LM_SPT)
    torch.manual_seed(0)
    codec = Codec(config)
    assert isinstance(codec.encoder.semantic, WhisperEncoder)
    load_whisper(codec.encoder.semantic, whisper)
    codec.train()(0.3 * torch.randn(2, 1, 40 * config.hop_length))
    return codec.eval(), whisper


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))

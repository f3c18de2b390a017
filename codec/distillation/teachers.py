"""Frozen pretrained models whose hidden states a codec learns from.

Speech teachers: HuBERT, WavLM, wav2vec2 and the encoder of Whisper (codec/speech_teachers.py). Text
teachers: BERT, ELECTRA, MiniLM and the like. All are transformers' models, by hub id or from a
folder.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codec.folder import check_source
from codec.speech_teachers import (
    Features,
    Frozen,
    SpeechTeacher,
    WaveTeacher,
    WhisperTeacher,
    choose_layer,
)

__all__ = [
    "Features",
    "SpeechTeacher",
    "TextStates",
    "TextTeacher",
    "has_bf16",
    "in_small_letters",
    "load_speech_teacher",
    "load_text_teacher",
    "loading",
    "network_dtype",
    "quiet",
]

logger = logging.getLogger(__name__)

SPEECH_KINDS = ("hubert", "wavlm", "wav2vec2", "whisper")
TEXT_KINDS = ("bert", "electra", "distilbert")


class TextStates(NamedTuple):
    """One state a word, and the sentence's: the state of the first position, [CLS]."""

    words: Float[Tensor, "W D"]
    sentence: Float[Tensor, " D"]


class TextTeacher(Frozen):
    """Words to one state each, of `dimension`; `layer` says of which layer.

    Texts of more word pieces than the model has positions are seen in windows of whole words; the
    sentence's state is then the mean of the windows'. Of a word longer than that the first pieces
    count, and a word without any piece is the unknown word. A text all in capitals is read in small
    letters: transcripts are often so, and a model that tells them apart knows few such words.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, *, name: str, layer: str) -> None:
        super().__init__(network)
        config: Any = network.config
        self.name, self.layer, self.tokenizer = name, layer, tokenizer
        self.dimension = int(config.hidden_size)
        self.max_pieces = min(int(config.max_position_embeddings), tokenizer.model_max_length)

    def forward(self, texts: Sequence[Sequence[str]]) -> list[TextStates]:
        """The states of each text's words (none for a text without words) and its sentence's.

        A word's state is the mean of its word pieces'; the sentence's is that of [CLS].
        """
        read = map(in_small_letters, texts)
        windows = [(row, *window) for row, words in enumerate(read) for window in self._cut(words)]
        words: list[list[Tensor]] = [[] for _ in texts]
        sentences: list[list[Tensor]] = [[] for _ in texts]
        for start in range(0, len(windows), 32):
            batch = windows[start : start + 32]
            for (row, _, sizes), states in zip(batch, self._run(batch), strict=True):
                sentences[row].append(states[0])
                pieces = states[1 : 1 + sum(sizes)].split(sizes)
                words[row] += [piece.mean(0) for piece in pieces]
        empty = torch.zeros(0, self.dimension, device=self.place["device"])
        return [
            TextStates(torch.stack(states) if states else empty, torch.stack(sentence).mean(0))
            for states, sentence in zip(words, sentences, strict=True)
        ]

    def padded(self, texts: Sequence[str], num_frames: int) -> Float[Tensor, "B T D"]:
        """DM-Codec's states as released: word piece i at frame i, [PAD]'s states after the text.

        Where the model has fewer positions than there are frames, which the released code does not
        survive, the last position's state stands on the rest.
        """
        positions = min(num_frames, self.max_pieces)
        encoded = self.tokenizer(
            [in_small_letters([text])[0] for text in texts], padding="max_length",
            max_length=positions, truncation=True, return_tensors="pt",
        )  # fmt: skip
        states = self._hidden(encoded["input_ids"], encoded["attention_mask"])
        rest = states[:, -1:].expand(-1, num_frames - positions, -1)
        return torch.cat([states, rest], dim=1)

    def _cut(self, words: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Windows of word pieces, with the number of pieces of each of their words."""
        limit = self.max_pieces - 2
        windows: list[tuple[list[int], list[int]]] = [([], [])]
        for pieces in self._pieces(words):
            if len(windows[-1][0]) + len(pieces) > limit:
                windows.append(([], []))
            windows[-1][0].extend(pieces[:limit])
            windows[-1][1].append(len(pieces[:limit]))
        return [window for window in windows if window[0] or len(windows) == 1]

    def _pieces(self, words: Sequence[str]) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        if words:
            encoded = self.tokenizer(
                list(words), is_split_into_words=True, add_special_tokens=False, verbose=False
            )
            numbered = zip(encoded.word_ids(), encoded["input_ids"], strict=True)
            for word, pieces in groupby(numbered, key=lambda pair: pair[0]):
                found[word] = [piece for _, piece in pieces]
        unknown = [self.tokenizer.unk_token_id]
        return [found.get(word, unknown) for word in range(len(words))]

    def _run(self, windows: Sequence[tuple[int, list[int], list[int]]]) -> Float[Tensor, "B T D"]:
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        rows = [torch.tensor([first, *pieces, last]) for _, pieces, _ in windows]
        padding = self.tokenizer.pad_token_id
        tokens = pad_sequence(rows, batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return self._hidden(tokens, mask)

    @torch.no_grad()
    def _hidden(
        self, tokens: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        device = self.place["device"]
        output = self.network(
            tokens.to(device), attention_mask=mask.to(device), output_hidden_states=True
        )
        return choose_layer(output.hidden_states, self.layer)


def load_speech_teacher(
    model: str, *, layer: str = "mean", device: str | torch.device = "cpu", half: bool = True
) -> SpeechTeacher:
    """HuBERT, WavLM, wav2vec2 or Whisper's encoder, by hub id or from a transformers folder.

    `layer`: "mean" of all hidden states, the embeddings included; "last"; or a number, 0 for the
    embeddings. `half`: see `network_dtype`. Raises ValueError when the model is not there or of no
    known kind, or has no such layer.
    """
    config = _config(model, SPEECH_KINDS, "speech")
    is_whisper = config.model_type == "whisper"
    _check_layer(layer, config.encoder_layers if is_whisper else config.num_hidden_layers, model)
    if is_whisper:
        teacher: SpeechTeacher = WhisperTeacher(
            _network(model, config).encoder, name=model, layer=layer
        )
    else:
        if getattr(config, "add_adapter", False):
            config.add_adapter = False  # It would lower the frame rate.
        network = _network(model, config)
        teacher = WaveTeacher(network, name=model, layer=layer, normalize=_normalizes(model))
    return teacher.to(device, network_dtype(device, half))


def load_text_teacher(
    model: str, *, layer: str = "mean", device: str | torch.device = "cpu", half: bool = True
) -> TextTeacher:
    """BERT, ELECTRA, DistilBERT, MiniLM; `layer`, `half` and errors as in `load_speech_teacher`."""
    from transformers import AutoTokenizer

    config = _config(model, TEXT_KINDS, "text")
    _check_layer(layer, config.num_hidden_layers, model)
    with loading(model, "text teacher"):
        tokenizer = AutoTokenizer.from_pretrained(model)
    if not tokenizer.is_fast:
        raise ValueError(f"{model}: has no tokenizer.json; save its fast tokenizer in the folder")
    teacher = TextTeacher(_network(model, config), tokenizer, name=model, layer=layer)
    return teacher.to(device, network_dtype(device, half))


def has_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: emulated, it is slower than float32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def network_dtype(device: str | torch.device, half: bool = True) -> torch.dtype:
    """What frozen networks compute in: with `half` bfloat16 where the hardware multiplies it.

    A GPU without it gets float16, a CPU float32; float32 as well without `half`.
    """
    if not half:
        return torch.float32
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def in_small_letters(words: Sequence[str]) -> list[str]:
    """The words of a text, lower case where all of it is in capitals."""
    shouted = " ".join(words).isupper()
    return [word.lower() if shouted else word for word in words]


def _check_layer(layer: str, num_layers: int, model: str) -> None:
    if layer not in ("mean", "last") and not (layer.isdecimal() and int(layer) <= num_layers):
        raise ValueError(
            f"{model}: layer must be mean, last, or a number from 0 (the embeddings) to "
            f"{num_layers}, got {layer!r}"
        )


def _config(model: str, kinds: Sequence[str], purpose: str) -> Any:
    from transformers import AutoConfig

    with loading(model, f"{purpose} teacher"):
        config = AutoConfig.from_pretrained(model)
    if config.model_type not in kinds:
        raise ValueError(
            f"{model}: a {config.model_type} model cannot be a {purpose} teacher; "
            f"these kinds can: {', '.join(kinds)}"
        )
    return config


def _network(model: str, config: Any) -> Any:
    from transformers import AutoModel

    with loading(model, "speech or text teacher"):
        loaded: Any = AutoModel.from_pretrained(
            model, config=config, dtype=torch.float32, output_loading_info=True
        )
    network, info = loaded
    unused = ("pooler", "masked_spec_embed", "decoder.")
    if lacking := sorted(key for key in info["missing_keys"] if not key.startswith(unused)):
        raise ValueError(f"{model}: its weights lack {', '.join(lacking[:3])}; fetch it again")
    return network


@contextmanager
def loading(model: str, purpose: str) -> Iterator[None]:
    """Quietly; ValueError in one line for whatever transformers and tokenizers raise."""
    check_source(model)
    try:
        with quiet():
            yield
    except Exception as error:  # tokenizers raises bare ones
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{model}: cannot be loaded as a {purpose}; give a hub id (owner/name) or a folder "
            f"that transformers saved: {reason}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' remarks about what is meant so, its bars and tables to itself."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _normalizes(model: str) -> bool:
    """Whether the model was trained on waves of zero mean and unit variance."""
    from transformers import Wav2Vec2FeatureExtractor

    try:
        settings, _ = Wav2Vec2FeatureExtractor.get_feature_extractor_dict(model)
    except (OSError, ValueError):
        logger.warning("%s: no preprocessor_config.json; waves are normalised", model)
        return True
    return bool(settings.get("do_normalize", True))

"""Frozen pretrained models whose hidden states a codec learns from.

Speech teachers: HuBERT, WavLM, wav2vec2 and the encoder of Whisper
(codec/distillation/teachers.py). Text
teachers: BERT, ELECTRA, MiniLM and the like. All are transformers' models, by hub id or from a
folder.

Frozen speech encoders that take a batch of any lengths: HuBERT, WavLM, wav2vec2, Whisper's.

They wrap transformers' models, which `codec.teachers` loads. An item of a padded batch gets the
features that it gets alone, whatever stands beside it.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codec.audio import mel_filterbank
from codec.io import check_source

logger = logging.getLogger(__name__)


WINDOW_SECONDS = 30
# Whisper's front end: Hann windows of 25 ms every 10 ms, and two of its frames to one feature.
MEL_WINDOW, MEL_HOP = 400, 160


class Features(NamedTuple):
    """A teacher's view of a batch: values (B,T,D) in float32, and each item's frames (B,)."""

    values: Float[Tensor, "B T D"]
    lengths: Int[Tensor, " B"]


class Frozen(nn.Module):
    """No parameter learns, and no `train()` of a model around it turns its dropout on."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    @property
    def place(self) -> dict[str, Any]:
        parameter = next(self.network.parameters())
        return {"device": parameter.device, "dtype": parameter.dtype}


class SpeechTeacher(Frozen):
    """Waves to features, `frame_rate` a second, of `dimension`; `layer` says of which layer.

    Whoever needs no gradient to the wave calls it under `torch.no_grad()`. Recordings of more than
    30 s are seen in the fewest windows of at most 30 s, as equal as possible, one after another.
    """

    def __init__(
        self, network: nn.Module, *, name: str, layer: str, hop_length: int, receptive_field: int
    ) -> None:
        super().__init__(network)
        config: Any = network.config
        self.name, self.layer = name, layer
        self.sample_rate, self.dimension = 16_000, int(config.hidden_size)
        self.hop_length, self.receptive_field = hop_length, receptive_field
        self.frame_rate = self.sample_rate / hop_length
        self.window_frames = WINDOW_SECONDS * self.sample_rate // hop_length

    def num_frames(self, samples: int) -> int:
        """Features of so many samples; fewer than a feature needs are padded with zeros to one."""
        return max(1, 1 + (samples - self.receptive_field) // self.hop_length)

    def forward(
        self, wave: Float[Tensor, "B 1 S"], lengths: Int[Tensor, " B"] | None = None
    ) -> Features:
        """Waves at `sample_rate`, in [-1, 1], of which `lengths` samples count. Differentiable."""
        samples = [wave.shape[-1]] * len(wave) if lengths is None else lengths.tolist()
        items = [self._scaled(row[:count]) for row, count in zip(wave[:, 0], samples, strict=True)]
        frames = [self.num_frames(count) for count in samples]
        pieces: list[list[Tensor]] = [[] for _ in items]
        for spans in zip_longest(*(self._spans(count) for count in frames)):
            rows = [row for row, span in enumerate(spans) if span]
            windows = []
            for row in rows:
                first, stop = spans[row]
                end = None  # The samples after the last feature count for normalisation.
                if stop < frames[row]:
                    end = (stop - 1) * self.hop_length + self.receptive_field
                windows.append(self._filled(items[row][first * self.hop_length : end]))
            counts = [len(window) for window in windows]
            states = self._states(pad_sequence(windows, batch_first=True), counts)
            for row, values in zip(rows, choose_layer(states, self.layer), strict=True):
                first, stop = spans[row]
                pieces[row].append(values[: stop - first])
        values = pad_sequence([torch.cat(parts) for parts in pieces], batch_first=True)
        return Features(values, torch.tensor(frames, device=values.device))

    def _spans(self, frames: int) -> list[tuple[int, int]]:
        size = math.ceil(frames / math.ceil(frames / self.window_frames))
        return [(first, min(first + size, frames)) for first in range(0, frames, size)]

    def _scaled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        return wave.float()

    def _filled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " s"]:
        return nn.functional.pad(wave, (0, max(0, self.receptive_field - len(wave))))

    def _states(self, waves: Float[Tensor, "B S"], lengths: list[int]) -> Sequence[Tensor]:
        """Hidden states (B,T,D): the embeddings, then each layer's, the last as the model ends."""
        raise NotImplementedError


class WaveTeacher(SpeechTeacher):
    """HuBERT, WavLM, wav2vec2: convolutions over the wave, then a Transformer."""

    def __init__(self, network: nn.Module, *, name: str, layer: str, normalize: bool) -> None:
        config: Any = network.config
        hop, field = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        super().__init__(network, name=name, layer=layer, hop_length=hop, receptive_field=field)
        self.normalize = normalize
        self.network.encoder.layers = needed_layers(self.network.encoder.layers, layer)
        self._norm: _ItemNorm | None = None
        if config.feat_extract_norm == "group":
            first = self.network.feature_extractor.conv_layers[0]
            self._norm = first.layer_norm = _ItemNorm(first.layer_norm)

    def _scaled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        wave = wave.float()
        if not self.normalize or len(wave) == 0:
            return wave
        return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()

    def _states(self, waves: Float[Tensor, "B S"], lengths: list[int]) -> Sequence[Tensor]:
        mask = None
        if min(lengths) < waves.shape[1]:
            counts = torch.tensor(lengths, device=waves.device)
            mask = (torch.arange(waves.shape[1], device=waves.device) < counts[:, None]).long()
        if self._norm is not None:
            config = self.network.config
            kernel, stride = config.conv_kernel[0], config.conv_stride[0]
            self._norm.lengths = None if mask is None else (mask.sum(1) - kernel) // stride + 1
        with warnings.catch_warnings():
            # WavLM adds a mask of truth values to position scores; torch does it, and complains.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            output = self.network(
                waves.to(**self.place), attention_mask=mask, output_hidden_states=True
            )
        if self.layer.isdecimal() and int(self.layer) < self.network.config.num_hidden_layers:
            return output.hidden_states
        # Models with a norm after the last layer end with it.
        return (*output.hidden_states[:-1], output.last_hidden_state)


class _ItemNorm(nn.Module):
    """A GroupNorm over the time of each channel that leaves out the padding of an item.

    The models that have one were trained without a mask: padding would change every frame.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        assert norm.num_groups == norm.num_channels
        self.norm = norm
        self.lengths: Int[Tensor, " B"] | None = None

    def forward(self, latent: Float[Tensor, "B C T"]) -> Float[Tensor, "B C T"]:
        if self.lengths is None:
            return self.norm(latent)
        counts = self.lengths[:, None, None]
        counted = torch.arange(latent.shape[-1], device=latent.device) < counts
        exact = latent.float()
        centred = exact - (exact * counted).sum(-1, keepdim=True) / counts
        variance = (centred.square() * counted).sum(-1, keepdim=True) / counts
        normed = (centred * (variance + self.norm.eps).rsqrt()).to(latent.dtype)
        return normed * self.norm.weight[:, None] + self.norm.bias[:, None]


class WhisperTeacher(SpeechTeacher):
    """Whisper's encoder on as many frames as there are, where its own forward wants 30 s.

    `per_item` False: the log-mel's floor is the batch's, see `log_mel`; that couples its items.
    `first` is the position that each item's first frame is said to have (B,), for training what
    must not depend on it; None: 0, as everywhere else.
    """

    first: Int[Tensor, " B"] | None = None

    def __init__(self, network: nn.Module, *, name: str, layer: str, per_item: bool = True) -> None:
        hop = 2 * MEL_HOP
        super().__init__(network, name=name, layer=layer, hop_length=hop, receptive_field=hop)
        config = self.network.config
        self.per_item, self.num_layers = per_item, int(config.encoder_layers)
        self.network.layers = needed_layers(self.network.layers, layer)
        self.window_frames = min(self.window_frames, int(config.max_source_positions))

    def num_frames(self, samples: int) -> int:
        """Features of so many samples: one for each 20 ms that has begun."""
        return max(1, math.ceil(samples / self.hop_length))

    def _filled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " s"]:
        return nn.functional.pad(
            wave, (0, self.num_frames(len(wave)) * self.hop_length - len(wave))
        )

    def _states(self, waves: Float[Tensor, "B S"], lengths: list[int]) -> Sequence[Tensor]:
        network, place = self.network, self.place
        num_mels = self.network.config.num_mel_bins
        mel = log_mel(waves.to(place["device"]), num_mels, per_item=self.per_item)
        frames = torch.tensor(lengths, device=mel.device) // self.hop_length
        counted = torch.arange(mel.shape[-1] // 2, device=mel.device) < frames[:, None]
        # The first convolution would look into the padding where an item alone has none.
        mel = mel * counted.repeat_interleave(2, dim=1)[:, None]
        hidden = nn.functional.gelu(network.conv1(mel.to(place["dtype"])))
        hidden = nn.functional.gelu(network.conv2(hidden))
        hidden = rearrange(hidden, "b d t -> b t d")
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if self.first is not None:
            positions = positions + self.first.to(hidden.device)[:, None]
        # What is beyond the last position is padding.
        last = len(network.embed_positions.weight) - 1
        hidden = hidden + network.embed_positions.weight[positions.clamp(max=last)]
        mask = None
        if min(lengths) < waves.shape[1]:
            lowest = torch.finfo(hidden.dtype).min
            mask = (~counted)[:, None, None, :].to(hidden.dtype) * lowest
        states = [hidden]
        for layer in network.layers:
            states.append(layer(states[-1], mask))
        if len(states) == self.num_layers + 1:
            states[-1] = network.layer_norm(states[-1])
        return states


def log_mel(
    wave: Float[Tensor, "B S"], num_mels: int, *, per_item: bool = True
) -> Float[Tensor, "B M T"]:
    """Whisper's input, S / 160 frames, for waves at 16 kHz of a multiple of 320 samples.

    Zeros follow the wave, as where Whisper pads to 30 s. Values more than 8 below an item's own
    maximum are raised to that; `per_item` False takes the batch's, as openai/whisper does.
    """
    assert wave.shape[-1] % (2 * MEL_HOP) == 0
    half, num_frames = MEL_WINDOW // 2, wave.shape[-1] // MEL_HOP
    wave = nn.functional.pad(wave.float(), (0, half + MEL_HOP))
    wave = nn.functional.pad(wave[:, None], (half, 0), mode="reflect")[:, 0]
    spectrum = torch.stft(
        wave, MEL_WINDOW, MEL_HOP, window=torch.hann_window(MEL_WINDOW, device=wave.device),
        center=False, return_complex=True,
    )  # fmt: skip
    power = spectrum.real.square() + spectrum.imag.square()
    filters = mel_filterbank(
        sample_rate=16_000, num_mels=num_mels, window=MEL_WINDOW, slaney_scale=True
    )
    mel = (filters.T.to(wave.device) @ power).clamp(min=1e-10).log10()
    # Two frames more than are returned look at the wave's end: the maximum may lie in them.
    loudest = mel.amax(dim=(1, 2), keepdim=True) if per_item else mel.max()
    mel = torch.maximum(mel, loudest - 8)
    return (mel[..., :num_frames] + 4) / 4


def choose_layer(states: Sequence[Tensor], layer: str) -> Float[Tensor, "B T D"]:
    if layer == "mean":
        return torch.stack([state.float() for state in states]).mean(0)
    return states[-1 if layer == "last" else int(layer)].float()


def needed_layers(layers: nn.ModuleList, layer: str) -> nn.ModuleList:
    """The layers up to the chosen one: those after it would cost time and memory for nothing."""
    return layers[: max(1, int(layer))] if layer.isdecimal() else layers  # pyright: ignore


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

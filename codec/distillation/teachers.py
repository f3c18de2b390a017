"""Frozen pretrained teachers: waves or words in, hidden states out.

Speech teachers: HuBERT, WavLM, wav2vec2 and Whisper's encoder. Text teachers: BERT, ELECTRA,
DistilBERT, MiniLM. All are transformers' models, by hub id or from a folder.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from codec.audio import mel_filterbank
from codec.io import check_source
from codec.program import quiet_transformers
from codec.transcripts import lowercase_if_all_caps, lowercase_words
from codec.weights import check_layers, check_sizes, weights_of

logger = logging.getLogger(__name__)


SPEECH_KINDS = ("hubert", "wavlm", "wav2vec2", "whisper")
TEXT_KINDS = ("bert", "electra", "distilbert")
WINDOW_SECONDS = 30
# Whisper's log-mel: Hann windows of 25 ms every 10 ms; the encoder's stride is two mel frames.
MEL_WINDOW, MEL_HOP = 400, 160
TEXT_BATCH = 32


class Features(NamedTuple):
    """Hidden states of a batch of waves."""

    values: Float[Tensor, "B T D"]
    """In float32; zeros in padding."""
    lengths: Int[Tensor, " B"]
    """Frames of each item."""


class TextStates(NamedTuple):
    """Hidden states of a text: one for each word, and the sentence's, that of [CLS]."""

    words: Float[Tensor, "W D"]
    sentence: Float[Tensor, " D"]


class FrozenTeacher(nn.Module):
    """A network without gradients for its weights, always in evaluation mode (no dropout)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the weights."""
        return next(self.network.parameters()).dtype


class SpeechTeacher(FrozenTeacher):
    """Waves at `sample_rate` to hidden states of `layer`, `frame_rate` Hz x `dimension`.

    An item of a padded batch gets the features that it gets alone. Recordings of more than 30 s are
    encoded in the fewest windows of at most 30 s, of almost equal length. Differentiable with
    respect to the wave: call it under `torch.no_grad()` where no gradient is needed.
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
        """Number of features of a wave of `samples`, at least one: short waves are zero-padded."""
        return max(1, 1 + (samples - self.receptive_field) // self.hop_length)

    def forward(
        self,
        wave: Float[Tensor, "B 1 S"],
        lengths: Int[Tensor, " B"] | None = None,
        offsets: Int[Tensor, " B"] | None = None,
    ) -> Features:
        """Features of waves in [-1, 1] at `sample_rate`.

        Args:
            lengths: samples of each item without padding; None: S.
            offsets: Whisper only, see `WhisperTeacher`.
        """
        samples = [wave.shape[-1]] * len(wave) if lengths is None else lengths.tolist()
        items = [self._scaled(row[:count]) for row, count in zip(wave[:, 0], samples, strict=True)]
        frames = [self.num_frames(count) for count in samples]
        pieces: list[list[Tensor]] = [[] for _ in items]
        for spans in zip_longest(*(self._spans(count) for count in frames)):
            rows = [row for row, span in enumerate(spans) if span]
            windows = []
            for row in rows:
                first, stop = spans[row]
                end = None  # The last window includes the samples behind the last feature.
                if stop < frames[row]:
                    end = (stop - 1) * self.hop_length + self.receptive_field
                windows.append(self._filled(items[row][first * self.hop_length : end]))
            counts = [len(window) for window in windows]
            positions = None if offsets is None else offsets[rows]
            states = self._states(pad_sequence(windows, batch_first=True), counts, positions)
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

    def _states(
        self,
        waves: Float[Tensor, "B S"],
        lengths: list[int],
        offsets: Int[Tensor, " B"] | None = None,
    ) -> Sequence[Tensor]:
        """Hidden states (B,T,D): the embeddings, then each layer's, the last one normalized."""
        raise NotImplementedError


class WaveTeacher(SpeechTeacher):
    """HuBERT, WavLM, wav2vec2: convolutions over the wave, then a Transformer.

    `normalize`: scale each wave to zero mean and unit variance first.
    """

    def __init__(self, network: nn.Module, *, name: str, layer: str, normalize: bool) -> None:
        config: Any = network.config
        hop, field = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        super().__init__(network, name=name, layer=layer, hop_length=hop, receptive_field=field)
        self.normalize = normalize
        self.network.encoder.layers = needed_layers(self.network.encoder.layers, layer)
        self._norm: _MaskedGroupNorm | None = None
        if config.feat_extract_norm == "group":
            first = self.network.feature_extractor.conv_layers[0]
            self._norm = first.layer_norm = _MaskedGroupNorm(first.layer_norm)

    def _scaled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        wave = wave.float()
        if not self.normalize or len(wave) == 0:
            return wave
        return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()

    def _states(
        self,
        waves: Float[Tensor, "B S"],
        lengths: list[int],
        offsets: Int[Tensor, " B"] | None = None,
    ) -> Sequence[Tensor]:
        mask = None
        if min(lengths) < waves.shape[1]:
            counts = torch.tensor(lengths, device=waves.device)
            mask = (torch.arange(waves.shape[1], device=waves.device) < counts[:, None]).long()
        if self._norm is not None:
            config = self.network.config
            kernel, stride = config.conv_kernel[0], config.conv_stride[0]
            self._norm.lengths = None if mask is None else (mask.sum(1) - kernel) // stride + 1
        with warnings.catch_warnings():
            # WavLM adds a boolean mask to a float position bias; torch warns and converts it.
            warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask")
            output = self.network(
                waves.to(self.device, self.dtype), attention_mask=mask, output_hidden_states=True
            )
        if self.layer.isdecimal() and int(self.layer) < self.network.config.num_hidden_layers:
            return output.hidden_states
        # Models with a final layer norm apply it only to last_hidden_state.
        return (*output.hidden_states[:-1], output.last_hidden_state)


class _MaskedGroupNorm(nn.Module):
    """GroupNorm with one group per channel (statistics over time) that ignores padding.

    Models with this norm were trained without padding, which would change every frame.
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
        centered = exact - (exact * counted).sum(-1, keepdim=True) / counts
        variance = (centered.square() * counted).sum(-1, keepdim=True) / counts
        normed = (centered * (variance + self.norm.eps).rsqrt()).to(latent.dtype)
        return normed * self.norm.weight[:, None] + self.norm.bias[:, None]


class WhisperTeacher(SpeechTeacher):
    """Whisper's encoder on waves of any length (transformers' own takes exactly 30 s).

    `per_item` False: the log-mel has the floor of the batch (`whisper_log_mel`): items depend on
    each other. `offsets` of `forward` are the positions of the items' first frames in the
    30 s window (default 0), for training that must not depend on the position.
    """

    def __init__(self, network: nn.Module, *, name: str, layer: str, per_item: bool = True) -> None:
        hop = 2 * MEL_HOP
        super().__init__(network, name=name, layer=layer, hop_length=hop, receptive_field=hop)
        config = self.network.config
        self.per_item, self.num_layers = per_item, int(config.encoder_layers)
        self.network.layers = needed_layers(self.network.layers, layer)
        self.window_frames = min(self.window_frames, int(config.max_source_positions))

    def num_frames(self, samples: int) -> int:
        """Number of features of a wave of `samples`: one for each 20 ms or part of it."""
        return max(1, math.ceil(samples / self.hop_length))

    def _filled(self, wave: Float[Tensor, " S"]) -> Float[Tensor, " s"]:
        return nn.functional.pad(
            wave, (0, self.num_frames(len(wave)) * self.hop_length - len(wave))
        )

    def _states(
        self,
        waves: Float[Tensor, "B S"],
        lengths: list[int],
        offsets: Int[Tensor, " B"] | None = None,
    ) -> Sequence[Tensor]:
        network = self.network
        mel = whisper_log_mel(
            waves.to(self.device), network.config.num_mel_bins, per_item=self.per_item
        )
        frames = torch.tensor(lengths, device=mel.device) // self.hop_length
        counted = torch.arange(mel.shape[-1] // 2, device=mel.device) < frames[:, None]
        # The first convolution's receptive field reaches into the padding: zero it.
        mel = mel * counted.repeat_interleave(2, dim=1)[:, None]
        hidden = nn.functional.gelu(network.conv1(mel.to(self.dtype)))
        hidden = nn.functional.gelu(network.conv2(hidden))
        hidden = rearrange(hidden, "b d t -> b t d")
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if offsets is not None:
            positions = positions + offsets.to(hidden.device)[:, None]
        # Positions beyond the last one occur only in padding.
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


def whisper_log_mel(
    wave: Float[Tensor, "B S"], num_mels: int, *, per_item: bool = True
) -> Float[Tensor, "B M T"]:
    """Whisper's input features, T = S / 160 frames at 100 Hz (arXiv 2212.04356, section 2.2).

    The wave is at 16 kHz, S a multiple of 320, and is continued by zeros, as Whisper pads it to
    30 s. Values are clamped to 8 below the maximum of the item (`per_item`) or of the batch, as
    openai/whisper does.
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
    # The maximum includes the two frames behind the end, whose windows overlap the wave.
    loudest = mel.amax(dim=(1, 2), keepdim=True) if per_item else mel.max()
    mel = torch.maximum(mel, loudest - 8)
    return (mel[..., :num_frames] + 4) / 4


def choose_layer(states: Sequence[Tensor], layer: str) -> Float[Tensor, "B T D"]:
    """One of the hidden states by `layer`: "mean" of all, "last", or a number, in float32."""
    if layer == "mean":
        return torch.stack([state.float() for state in states]).mean(0)
    return states[-1 if layer == "last" else int(layer)].float()


def needed_layers(layers: nn.ModuleList, layer: str) -> nn.ModuleList:
    """The layers up to the chosen one; later ones do not change its output."""
    return layers[: max(1, int(layer))] if layer.isdecimal() else layers  # pyright: ignore


class TextTeacher(FrozenTeacher):
    """Words to one hidden state each, of `layer` and `dimension` features.

    Texts of more word pieces than the model has positions are split into windows at words; the
    sentence's state is the mean over windows. Words longer than a window are truncated, words
    without a piece become the unknown token. Texts all in capitals are lower-cased, see
    codec/transcripts.py.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, *, name: str, layer: str) -> None:
        super().__init__(network)
        config: Any = network.config
        self.name, self.layer, self.tokenizer = name, layer, tokenizer
        self.dimension = int(config.hidden_size)
        self.max_pieces = min(int(config.max_position_embeddings), tokenizer.model_max_length)

    def forward(self, texts: Sequence[Sequence[str]]) -> list[TextStates]:
        """States of each text: means over the pieces of each word, and the state of [CLS]."""
        texts = [lowercase_words(words) for words in texts]
        windows = [
            (row, *window) for row, words in enumerate(texts) for window in self._split(words)
        ]
        words: list[list[Tensor]] = [[] for _ in texts]
        sentences: list[list[Tensor]] = [[] for _ in texts]
        for start in range(0, len(windows), TEXT_BATCH):
            batch = windows[start : start + TEXT_BATCH]
            for (row, _, sizes), states in zip(batch, self._run(batch), strict=True):
                sentences[row].append(states[0])
                pieces = states[1 : 1 + sum(sizes)].split(sizes)
                words[row] += [piece.mean(0) for piece in pieces]
        empty = torch.zeros(0, self.dimension, device=self.device)
        return [
            TextStates(torch.stack(states) if states else empty, torch.stack(sentence).mean(0))
            for states, sentence in zip(words, sentences, strict=True)
        ]

    def padded(self, texts: Sequence[str], num_frames: int) -> Float[Tensor, "B T D"]:
        """States as in DM-Codec's released code: word piece i at frame i, then those of [PAD].

        Frames beyond the model's last position (an error in the released code) repeat its state.
        """
        positions = min(num_frames, self.max_pieces)
        encoded = self.tokenizer(
            [lowercase_if_all_caps(text, min_words=1) for text in texts], padding="max_length",
            max_length=positions, truncation=True, return_tensors="pt",
        )  # fmt: skip
        states = self._hidden(encoded["input_ids"], encoded["attention_mask"])
        rest = states[:, -1:].expand(-1, num_frames - positions, -1)
        return torch.cat([states, rest], dim=1)

    def _split(self, words: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Windows of word pieces, and the number of pieces of each word in them."""
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
        output = self.network(
            tokens.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
        )
        return choose_layer(output.hidden_states, self.layer)


def load_speech_teacher(
    model: str, *, layer: str = "mean", device: str | torch.device = "cpu", half: bool = True
) -> SpeechTeacher:
    """Loads HuBERT, WavLM, wav2vec2 or Whisper's encoder.

    Args:
        model: hub id or a folder that transformers saved.
        layer: "mean" of all hidden states, the embeddings included; "last"; or a number, 0 for the
            embeddings.
        half: see `network_dtype`.

    Raises:
        ValueError: the model is missing, of an unknown kind, or has no such layer.
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
            config.add_adapter = False  # An adapter lowers the frame rate.
        network = _network(model, config)
        teacher = WaveTeacher(network, name=model, layer=layer, normalize=_normalizes(model))
    return teacher.to(device, network_dtype(device, half))


def load_text_teacher(
    model: str, *, layer: str = "mean", device: str | torch.device = "cpu", half: bool = True
) -> TextTeacher:
    """Loads BERT, ELECTRA, DistilBERT or MiniLM; arguments and errors as `load_speech_teacher`."""
    from transformers import AutoTokenizer

    config = _config(model, TEXT_KINDS, "text")
    _check_layer(layer, config.num_hidden_layers, model)
    with loading(model, "text teacher"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(f"{model}: has no tokenizer.json; save its fast tokenizer in the folder")
    teacher = TextTeacher(_network(model, config), tokenizer, name=model, layer=layer)
    return teacher.to(device, network_dtype(device, half))


def has_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (emulation is slower than float32)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def network_dtype(device: str | torch.device, half: bool = True) -> torch.dtype:
    """The dtype of frozen networks: float32, or with `half` bfloat16 where the hardware has it.

    With `half` but without bfloat16 in hardware: float16 on a GPU, float32 on a CPU.
    """
    if not half:
        return torch.float32
    if has_bf16(device):
        return torch.bfloat16
    return torch.float16 if torch.device(device).type == "cuda" else torch.float32


def _check_layer(layer: str, num_layers: int, model: str) -> None:
    if layer not in ("mean", "last") and not (layer.isdecimal() and int(layer) <= num_layers):
        raise ValueError(
            f"{model}: layer must be mean, last, or a number from 0 (the embeddings) to "
            f"{num_layers}, got {layer!r}"
        )


def _config(model: str, kinds: Sequence[str], purpose: str) -> Any:
    from transformers import AutoConfig

    with loading(model, f"{purpose} teacher"):
        check_layers(Path(model))
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    if config.model_type not in kinds:
        raise ValueError(
            f"{model}: a {config.model_type} model cannot be a {purpose} teacher; "
            f"these kinds can: {', '.join(kinds)}"
        )
    return config


def _network(model: str, config: Any) -> Any:
    from transformers import AutoModel

    with loading(model, "speech or text teacher"):
        check_sizes(
            lambda: AutoModel.from_config(config, trust_remote_code=False), weights_of(Path(model))
        )
        loaded: Any = AutoModel.from_pretrained(
            model,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
    network, info = loaded
    unused = ("pooler", "masked_spec_embed", "decoder.")
    if lacking := sorted(key for key in info["missing_keys"] if not key.startswith(unused)):
        raise ValueError(f"{model}: its weights lack {', '.join(lacking[:3])}; fetch it again")
    return network


@contextmanager
def loading(model: str, purpose: str) -> Iterator[None]:
    """Turns every exception of transformers and tokenizers into a ValueError of one line that
    begins with the model."""
    check_source(model)
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # tokenizers raises bare Exceptions.
        if isinstance(error, ValueError) and str(error).startswith(f"{model}: "):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{model}: cannot be loaded as a {purpose}; give a hub id (owner/name) or a folder "
            f"that transformers saved: {reason}"
        ) from error


def _normalizes(model: str) -> bool:
    """Whether the model was trained on waves of zero mean and unit variance."""
    from transformers import Wav2Vec2FeatureExtractor

    try:
        settings, _ = Wav2Vec2FeatureExtractor.get_feature_extractor_dict(model)
    except (OSError, ValueError):
        logger.warning("%s: no preprocessor_config.json; waves are normalized", model)
        return True
    return bool(settings.get("do_normalize", True))

"""Frozen configurations of the speech language model. The defaults are the smoke configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from codec.io import fits_type

CHECKS = ("loop", "silence", "early", "leak", "mismatch")
"""Values of `SamplingConfig.checks`."""
TTSTextForm = Literal["tokens", "characters", "phonemes"]
ASRTextForm = Literal["tokens", "characters"]
SpeechForm = Literal["codes", "bpe"]

RENAMED_FIELDS: Mapping[str, Mapping[str, str]] = {
    "TextConfig": {"spoken": "tts_form", "written": "asr_form"},
    "SpeechFormConfig": {"model": "bpe_model", "spoken": "tts_form", "heard": "asr_form"},
    "NARConfig": {
        "kernel": "conv_kernel",
        "neighbours": "label_smoothing_neighbors",
        "reference": "prompt_matching",
    },
    "SamplingConfig": {
        "tries": "max_attempts",
        "candidates": "num_candidates",
        "window": "repetition_window",
        "threshold": "repetition_threshold",
    },
}
"""Old names in JSON files of saved voices -> fields, by class. Read by `from_json`."""
REMOVED_FIELDS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "NARConfig": {"masked": (False,)},
    "SamplingConfig": {"nar_iterations": (1,), "cache": ("dynamic", "static")},
}
"""Fields of older versions -> values that are read and ignored; others raise ValueError."""

MAX_SEED = 2**62
"""Retries and candidates add to a seed, which torch holds in 64 bits."""
Config = TypeVar("Config")


def check_seed(seed: int, what: str = "the seed") -> None:
    """Raises ValueError for a seed of generation that is out of range.

    Args:
        what: its name, for the message.
    """
    if abs(seed) > MAX_SEED:
        raise ValueError(f"{what} must be within -2**62 .. 2**62, got {seed}")


def from_json(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """A configuration from a JSON object, which has lists for tuples and may have old names.

    Raises:
        TypeError: for an unknown key.
        ValueError: for a value that is not allowed or of another type, and for a removed feature
            that is in use.
    """
    renamed = RENAMED_FIELDS.get(cls.__name__, {})
    removed = REMOVED_FIELDS.get(cls.__name__, {})
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in removed:
            found[renamed.get(key, key)] = tuple(value) if isinstance(value, list) else value
        elif value not in removed[key]:
            raise ValueError(
                f"{key} is {value!r}: this feature was removed; use {removed[key][0]!r}, or an "
                "older version of parlance"
            )
    hints = get_type_hints(cls)
    for key, value in found.items():
        if key in hints and not fits_type(value, hints[key]):
            raise ValueError(f"{key}: {value!r} is not of type {hints[key]}")
    return cls(**found)


def _positive(**values: float | int) -> None:
    for name, value in values.items():
        if not value > 0:  # Nor nan.
            raise ValueError(f"{name} must be positive, got {value}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """For values from JSON files; the recipes check types themselves."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _share(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """LoRA adapters on frozen weights; the embedding rows of new tokens are trained in full."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    targets: tuple[str, ...] = ()
    """Names of the adapted linear layers, such as q_proj; empty: all but the LM head."""

    def __post_init__(self) -> None:
        _positive(**{"lora.rank": self.rank, "lora.alpha": self.alpha})
        _share(**{"lora.dropout": self.dropout})


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Sampling weight of each training task."""

    tts: float = 1.0
    """Text to codes of codebook 1."""
    asr: float = 1.0
    """Codes to text."""
    continuation: float = 0.0
    """Codes alone: speech continuation without a text."""
    text: float = 0.0
    """Text alone, against forgetting of the LLM's text ability; needs `texts`. Its weight counts
    positions, because text sequences are longer than utterances."""

    def __post_init__(self) -> None:
        weights = (self.tts, self.asr, self.continuation, self.text)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"tasks: weights must not be negative nor all zero, got {weights}")
        if sum(weights) == self.text:
            raise ValueError("tasks: text alone trains no speech model; give another task a weight")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Form of the AR's text input (TTS) and output (ASR)."""

    normalize: bool = True
    """Write numbers and abbreviations out in words (English) before TTS."""
    tts_form: TTSTextForm = "tokens"
    """Text input of TTS: the LLM's tokens; its tokens of single characters (about three times as
    many, for little training data); or phonemes (extra `phonemes`)."""
    asr_form: ASRTextForm = "tokens"
    """Text output of ASR: the LLM's tokens; or characters, as the tokens of their UTF-8 bytes where
    the LLM's tokenizer is byte-level (decoding is restricted to these)."""
    interleaved: bool = False
    """Interleave words and speech: in TTS each word's text precedes its codes (ELLA-V, arXiv
    2401.07333), in ASR the words follow each stretch of speech. For little training data; needs
    word boundaries."""

    def __post_init__(self) -> None:
        _one_of("text.tts_form", self.tts_form, get_args(TTSTextForm))
        _one_of("text.asr_form", self.asr_form, get_args(ASRTextForm))


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechFormConfig:
    """Form of the AR's speech input (ASR) and output (TTS): codes of codebook 1 or BPE pieces."""

    bpe_model: str | None = None
    """Acoustic BPE model (a file of recipes/train_units.py) for the form `bpe`; null: none."""
    tts_form: SpeechForm = "codes"
    """Speech output of TTS and continuation."""
    asr_form: SpeechForm = "codes"
    """Speech input of ASR."""

    def __post_init__(self) -> None:
        _one_of("speech.tts_form", self.tts_form, get_args(SpeechForm))
        _one_of("speech.asr_form", self.asr_form, get_args(SpeechForm))
        if self.bpe_model is None and "bpe" in (self.tts_form, self.asr_form):
            raise ValueError("speech.bpe_model is null: name the file of recipes/train_units.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class ARConfig:
    """The AR, a model of codebook 1: a pretrained text LLM with an extended vocabulary."""

    base: str = "models/smollm2-135m-instruct"
    """The text LLM: hub id, local folder, or a .gguf file."""
    num_layers: int | None = None
    """Keep only the LLM's first N layers; null keeps all."""
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """LoRA adapters; null: full fine-tuning."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    """Sampling weights of the tasks."""
    text: TextConfig = field(default_factory=TextConfig)
    """Form of text."""
    speech: SpeechFormConfig = field(default_factory=SpeechFormConfig)
    """Form of speech."""
    init_scale: float = 1.0
    """Scale of the new embedding rows' initial covariance: 1 is that of the old rows, 0 puts all
    new rows at the old rows' mean."""
    letter_init: str | None = None
    """Initialize speech embeddings from letter embeddings: a file of recipes/make_clips.py with
    each code's share of letters (a BPE merge gets its codes' mean); null: random rows. For the text
    form `characters` and a semantic codebook 1."""
    start_from: str | None = None
    """Folder ar/ of a fully fine-tuned voice to train further, with the same LLM, layers and
    codebook 1; null: start from the LLM with new rows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        if not self.base:
            raise ValueError("ar.base is empty; name a hub id, a folder or a .gguf file")
        if self.num_layers is not None:
            _positive(**{"ar.num_layers": self.num_layers})
        if self.start_from is not None and self.lora is not None:
            raise ValueError(
                "ar.start_from continues full fine-tuning, ar.lora trains adapters: set one of the "
                "two to null"
            )
        if self.init_scale < 0:
            raise ValueError(f"ar.init_scale must not be negative, got {self.init_scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NARConfig:
    """The non-autoregressive model of codebooks 2 to Q: a bidirectional Transformer."""

    codebook_sizes: tuple[int, ...] = ()
    """Entries of every codebook, the first included; empty: those of the token shards."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads per layer."""
    width: int = 256
    """Features per position."""
    feedforward: int = 1024
    """Features inside a feed-forward block."""
    dropout: float = 0.1
    """Dropout on embeddings, attention output and feed-forward blocks."""
    prompt_share: tuple[float, float] = (0.1, 0.5)
    """Range of the training prompt's length, a uniformly random share of the utterance."""
    prompt_frames: int = 150
    """Maximum length of a training prompt, in frames."""
    stage_decay: float = 1.0
    """A training step predicts codebook 2 and one of codebooks 3 to Q, sampled with probabilities
    that fall by this factor from each codebook to the next; 1: uniformly (USLM). The lower ones
    carry most of the speaker identity (LOG.md). Also applies to dev losses over all codebooks."""
    conv_kernel: int = 0
    """Kernel size, in frames, of a depthwise convolution before each layer, over text and speech
    separately (Conformer, arXiv 2005.08100). Odd; 0: none."""
    prompt_matching: bool = False
    """Each frame attends to the prompt's frames that are similar in the lower codebooks (after
    kNN-VC, arXiv 2305.18975), which provides the speaker."""
    text_dropout: float = 0.0
    """Share of training utterances without a text, for voice conversion and continuation; 0.1 is a
    good value. 1: the NAR never has a text, which is faster, and enough for a semantic codebook
    1."""
    from_codec: bool = False
    """Initialize code embeddings and output heads from the codec's codebook entries, projected at
    random; else at random. With ten hours of speech the loss fell two to three times as fast at
    first (LOG.md)."""
    label_smoothing_neighbors: float = 0.0
    """With from_codec: label smoothing over similar codebook entries; the value is the perplexity
    of the target distribution, which falls with the entries' distance. 0: none."""

    def __post_init__(self) -> None:
        _positive(
            **{
                "nar.num_layers": self.num_layers,
                "nar.num_heads": self.num_heads,
                "nar.width": self.width,
                "nar.feedforward": self.feedforward,
            }
        )
        _share(**{"nar.dropout": self.dropout, "nar.text_dropout": self.text_dropout})
        if not 0 < self.stage_decay <= 1:
            raise ValueError(f"nar.stage_decay must be within (0, 1], got {self.stage_decay}")
        low, high = self.prompt_share
        if not 0 <= low <= high < 1:
            raise ValueError(f"nar.prompt_share must rise within [0, 1), got {self.prompt_share}")
        if self.conv_kernel and not self.conv_kernel % 2:
            raise ValueError(f"nar.conv_kernel must be odd, or 0 for none, got {self.conv_kernel}")
        neighbors = self.label_smoothing_neighbors
        if neighbors and (neighbors <= 1 or not self.from_codec):
            raise ValueError(
                "nar.label_smoothing_neighbors must be 0, or more than 1 with nar.from_codec, got "
                f"{neighbors}"
            )
        if self.prompt_frames < 0:
            raise ValueError(f"nar.prompt_frames must not be negative, got {self.prompt_frames}")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"nar.width {self.width} must be a multiple of twice nar.num_heads {self.num_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NARConfig":
        """From a config.json; keys that are not of this class are ignored."""
        known = {f.name for f in fields(cls)} | {
            *RENAMED_FIELDS["NARConfig"],
            *REMOVED_FIELDS["NARConfig"],
        }
        return from_json(cls, {key: value for key, value in values.items() if key in known})


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Length-bucketed or packed batches under a budget of positions."""

    positions: int = 2048
    """Maximum positions of a micro-batch on one rank, padding included: longest row times rows."""
    max_items: int = 64
    """Maximum items of a micro-batch."""
    packed: int | None = None
    """Row length for packing: several items per row under a block-diagonal mask (AR only); null:
    one item per row, rows bucketed by length."""

    def __post_init__(self) -> None:
        _positive(**{"batch.positions": self.positions, "batch.max_items": self.max_items})
        if self.packed is not None and not 0 < self.packed <= self.positions:
            raise ValueError(f"batch.packed {self.packed} must be in 1..{self.positions}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Generation settings: sampling, length bounds, checks, retries and best-of-N.

    Sampling is repetition-aware (VALL-E 2, arXiv 2406.05370) with CosyVoice's defaults.
    """

    greedy: bool = False
    """Greedy decoding; retries sample all the same."""
    temperature: float = 1.0
    """Softmax temperature; lower is less random."""
    top_p: float = 0.8
    """Nucleus sampling: smallest set of tokens with this total probability."""
    top_k: int = 25
    """Maximum size of the nucleus."""
    repetition_window: int = 10
    """Number of recent tokens in which repetition-aware sampling counts the sampled token."""
    repetition_threshold: float = 0.1
    """A token with at least this share of the window is resampled from the full distribution."""
    frames_per_token: tuple[float, float] = (2.0, 20.0)
    """Length bounds, in frames per text token at 25 Hz; scaled to the codec's frame rate."""
    spare_seconds: float = 2.0
    """Added to the upper length bound, for silence around short texts."""
    loop_seconds: float = 2.0
    """A pattern that repeats for this long is a loop."""
    max_attempts: int = 3
    """Maximum attempts per item; a failed one is retried with another seed."""
    checks: tuple[str, ...] = CHECKS
    """Failures besides empty and truncated speech. loop: a repeated pattern; silence: more than
    `silence_seconds`; early: an end long before the text's; leak: the prompt's words repeated;
    mismatch: other words than the text's, by the model's own ASR."""
    silence_seconds: float = 2.0
    """Maximum length of silence."""
    num_candidates: int = 1
    """Best-of-N: generate N candidates and keep the one whose text has the highest likelihood under
    the model's own ASR. Cost: N times the AR's work, and one ASR pass over the candidates."""
    nar_temperature: float = 0.0
    """Softmax temperature of the NAR; 0: greedy."""

    def __post_init__(self) -> None:
        _positive(
            **{
                "sampling.temperature": self.temperature,
                "sampling.top_p": self.top_p,
                "sampling.top_k": self.top_k,
                "sampling.loop_seconds": self.loop_seconds,
                "sampling.max_attempts": self.max_attempts,
                "sampling.silence_seconds": self.silence_seconds,
                "sampling.num_candidates": self.num_candidates,
            }
        )
        _share(
            **{
                "sampling.top_p": self.top_p,
                "sampling.repetition_threshold": self.repetition_threshold,
            }
        )
        low, high = self.frames_per_token
        if not 0 <= low <= high:
            raise ValueError(
                f"sampling.frames_per_token must rise from at least 0, got {self.frames_per_token}"
            )
        if min(self.repetition_window, self.spare_seconds, self.nar_temperature) < 0:
            raise ValueError(
                "sampling: repetition_window, spare_seconds and nar_temperature must not be "
                "negative"
            )
        if unknown := set(self.checks) - set(CHECKS):
            raise ValueError(
                f"sampling.checks: no check {sorted(unknown)[0]!r}; there are {', '.join(CHECKS)}"
            )

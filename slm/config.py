"""Frozen configurations of the speech language model. The defaults are the smoke configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

CHECKS = ("loop", "silence", "early", "leak")
"""What `SamplingConfig.checks` may name."""
Spoken = Literal["tokens", "characters", "phonemes"]
Written = Literal["tokens", "characters"]
SpeechForm = Literal["codes", "bpe"]


def _positive(**values: float | int) -> None:
    for name, value in values.items():
        if not value > 0:  # Nor nan.
            raise ValueError(f"{name} must be positive, got {value}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """For what comes from a file; recipes check the values that they are given."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _share(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Low-rank adapters beside frozen weights; the new tokens' rows are trained whole."""

    rank: int = 16
    """Inner dimension of an adapter."""
    alpha: float = 32.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before an adapter."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as q_proj; empty: every one but the head."""

    def __post_init__(self) -> None:
        _positive(**{"lora.rank": self.rank, "lora.alpha": self.alpha})
        _share(**{"lora.dropout": self.dropout})


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """How often each task is trained, relative to the others."""

    tts: float = 1.0
    """Text to codes."""
    asr: float = 1.0
    """Codes to text."""
    continuation: float = 0.0
    """Codes alone: speech that goes on by itself."""
    text: float = 0.0
    """Text alone, so that the LLM does not forget it; needs `texts`. Its weight counts positions,
    because pieces of texts are longer than utterances."""

    def __post_init__(self) -> None:
        weights = (self.tts, self.asr, self.continuation, self.text)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"tasks: weights must not be negative nor all zero, got {weights}")
        if sum(weights) == self.text:
            raise ValueError("tasks: text alone makes no speech model; weigh another task")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """In which form the model reads and writes text."""

    normalize: bool = True
    """Numbers and abbreviations are spelt out (English)."""
    spoken: Spoken = "tokens"
    """What speech is made from: the LLM's own tokens; its tokens of single characters, about
    three times as many, meant for little data; or phonemes (extra `phonemes`)."""
    written: Written = "tokens"
    """What speech is transcribed to: characters are the tokens of their bytes, and are chosen from
    these alone, where the LLM's tokenizer is byte-level."""
    interleaved: bool = False
    """TTS goes word by word, each word's text right before its codes (ELLA-V, arXiv 2401.07333),
    and ASR by stretches of speech, the words behind each: for little data; needs `edges`."""

    def __post_init__(self) -> None:
        _one_of("text.spoken", self.spoken, get_args(Spoken))
        _one_of("text.written", self.written, get_args(Written))


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitsConfig:
    """In which form the model hears and makes codebook 1."""

    model: str | None = None
    """Acoustic BPE: a file of recipes/train_units.py, for what is `bpe` below; null: none."""
    spoken: SpeechForm = "codes"
    """What TTS and continuation make."""
    heard: SpeechForm = "codes"
    """What ASR hears."""

    def __post_init__(self) -> None:
        _one_of("units.spoken", self.spoken, get_args(SpeechForm))
        _one_of("units.heard", self.heard, get_args(SpeechForm))
        if self.model is None and "bpe" in (self.spoken, self.heard):
            raise ValueError("units.model is null: name the file of recipes/train_units.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class ARConfig:
    """The autoregressive model of codebook 1: a pretrained text LLM with an extended vocabulary."""

    base: str = "models/smollm2-135m-instruct"
    """The text LLM: hub id, local folder, or a .gguf file."""
    num_layers: int | None = None
    """Keep only the LLM's first layers (miniatures); null keeps all."""
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """Adapters; null trains every weight."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    """Mixing weights."""
    text: TextConfig = field(default_factory=TextConfig)
    """The form of text."""
    units: UnitsConfig = field(default_factory=UnitsConfig)
    """The form of speech."""
    init_scale: float = 1.0
    """Spread of the new rows: 1 draws them like the old rows, 0 puts them at the old rows' mean."""
    letters: str | None = None
    """What codes say (a file of recipes/make_clips.py): the new rows begin as their letters'
    (a merge's as the mean of its codes'); null: as they are drawn. For characters, and codebooks
    that hold what is said."""
    start_from: str | None = None
    """The folder ar/ of a voice whose every weight was trained, to train it further: one of the
    same LLM, layers and codebook 1; null: the LLM as it is, with new rows."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""

    def __post_init__(self) -> None:
        if not self.base:
            raise ValueError("ar.base is empty; name a hub id, a folder or a .gguf file")
        if self.num_layers is not None:
            _positive(**{"ar.num_layers": self.num_layers})
        if self.start_from is not None and self.lora is not None:
            raise ValueError(
                "ar.start_from goes on with every weight, and ar.lora trains adapters beside them: "
                "set one of the two to null"
            )
        if self.init_scale < 0:
            raise ValueError(f"ar.init_scale must not be negative, got {self.init_scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NARConfig:
    """The non-autoregressive model of codebooks 2 to Q: a bidirectional Transformer."""

    codebook_sizes: tuple[int, ...] = ()
    """Entries of every codebook, the first included; empty: as the token shards say."""
    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 4
    """Attention heads of a layer."""
    width: int = 256
    """Features of a position."""
    feedforward: int = 1024
    """Features inside a layer's feed-forward part."""
    dropout: float = 0.1
    """Of embeddings, attention output and feed-forward part."""
    prompt_share: tuple[float, float] = (0.1, 0.5)
    """In training the prompt is this share of an utterance's start, drawn uniformly."""
    prompt_frames: int = 150
    """No training prompt is longer."""
    stage_decay: float = 1.0
    """Of codebooks 3 to Q, of which a training step has one, each is drawn so many times as often
    as the one below it; 1: all alike (USLM). The lower ones tell most of the voice (LOG.md).
    Dev losses over all codebooks are drawn so, too."""
    masked: bool = False
    """Some codes of the predicted codebook are given, others asked for (MaskGIT), so that decoding
    can go in several iterations; else all are asked for at once (USLM)."""
    kernel: int = 0
    """Frames of a convolution in front of each layer, over text and speech apart (Conformer, arXiv
    2005.08100): what is near need not be found by attention. Odd; 0: none."""
    reference: bool = False
    """A frame is also shown what the prompt's frames have that sound like it (after kNN-VC, arXiv
    2305.18975): the speaker need not be found by the layers."""
    text_dropout: float = 0.0
    """In training so many utterances have no text, so that the NAR can do without one (voice
    conversion, speech that goes on by itself); 0.1 is a good share. 1: it never has one, which is
    quicker, and enough where codebook 1 says the words."""
    from_codec: bool = False
    """The codes' embeddings and heads begin as the codec's own entries, projected at random; else
    as random ones. In a trial with ten hours of speech the loss fell two to three times
    as fast at first (LOG.md)."""
    neighbours: float = 0.0
    """With from_codec: in training a code's label is shared among so many of its codebook's entries
    (the perplexity of the shares), the nearer the more, as they sound alike; 0: the code alone."""

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
        if self.kernel and not self.kernel % 2:
            raise ValueError(f"nar.kernel must be odd, or 0 for none, got {self.kernel}")
        if self.neighbours and (self.neighbours <= 1 or not self.from_codec):
            raise ValueError(
                "nar.neighbours must be more than 1, and needs nar.from_codec; 0: the code alone, "
                f"got {self.neighbours}"
            )
        if self.prompt_frames < 0:
            raise ValueError(f"nar.prompt_frames must not be negative, got {self.prompt_frames}")
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"nar.width {self.width} must be a multiple of twice nar.num_heads {self.num_heads}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NARConfig":
        """From a config.json, which has lists where tuples were."""
        known = {f.name for f in fields(cls)} & values.keys()
        held: dict[str, Any] = {key: values[key] for key in known}
        for key, value in held.items():
            held[key] = tuple(value) if isinstance(value, list) else value
        return cls(**held)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """Length-bucketed or packed batches under a budget of positions."""

    positions: int = 2048
    """Padded positions of one micro-batch on one rank: longest row times number of rows."""
    max_items: int = 64
    """Most items of a micro-batch."""
    packed: int | None = None
    """Length of rows that hold several items, none of which sees another (AR only); null: one item
    a row, and rows of like lengths together."""

    def __post_init__(self) -> None:
        _positive(**{"batch.positions": self.positions, "batch.max_items": self.max_items})
        if self.packed is not None and not 0 < self.packed <= self.positions:
            raise ValueError(f"batch.packed {self.packed} must be in 1..{self.positions}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with warm-up and a cosine, and when to log, evaluate and save."""

    steps: int = 20
    """Optimiser steps."""
    lr: float = 1e-3
    """Highest learning rate."""
    warmup_steps: int = 5
    """Steps of linear rise."""
    final_lr_share: float = 0.1
    """The cosine ends at this share of lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages."""
    weight_decay: float = 0.01
    """Applied to matrices, not to vectors."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm; 0: never."""
    accumulate: int = 1
    """Micro-batches of a step on each rank."""
    log_every: int = 5
    """Steps."""
    eval_every: int = 10
    """Steps."""
    eval_batches: int = 16
    """Most micro-batches of one evaluation on each rank."""
    save_every: int = 10
    """Steps."""

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every", "eval_every", "eval_batches", "save_every"):
            _positive(**{f"optim.{name}": getattr(self, name)})
        _positive(**{"optim.lr": self.lr})
        _share(**{"optim.final_lr_share": self.final_lr_share})
        if min(self.steps, self.warmup_steps, self.weight_decay, self.clip_norm) < 0:
            raise ValueError(
                "optim: steps, warmup_steps, weight_decay and clip_norm must not be negative"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Generation. Repetition-aware sampling as VALL-E 2 describes it, defaults as CosyVoice's."""

    greedy: bool = False
    """Take the likeliest token; a retry samples all the same."""
    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 0.8
    """The nucleus: the likeliest tokens that together have this probability."""
    top_k: int = 25
    """No more than so many of them."""
    window: int = 10
    """Tokens back that are searched for the drawn one."""
    threshold: float = 0.1
    """A token that fills this share of the window is drawn again from the whole distribution."""
    frames_per_token: tuple[float, float] = (2.0, 20.0)
    """Bounds of the speech in frames per text token at 25 frames a second; scaled to the codec."""
    spare_seconds: float = 2.0
    """Added to the upper bound, for silence around few words."""
    loop_seconds: float = 2.0
    """A pattern that repeats itself for so long is a loop."""
    tries: int = 3
    """A failed generation is made again under a new seed, until so many were made."""
    checks: tuple[str, ...] = ("loop", "silence", "early", "leak")
    """What is a failure besides what is empty or cut: a loop; silence for longer than
    `silence_seconds`; an end long before the text's; the prompt's words said again."""
    silence_seconds: float = 2.0
    """A longer stretch of silence is a failure."""
    candidates: int = 1
    """So many are made, and the one is kept whose text the model's own ASR finds the likeliest:
    that many times the AR's work, and one pass of ASR over them."""
    cache: Literal["dynamic", "static"] = "dynamic"
    """The cache of keys and values grows with the sequence, or has its full size from the start."""
    nar_iterations: int = 1
    """Passes of the NAR for each codebook, the surest codes first; more than 1 needs a NAR that was
    trained with nar.masked."""
    nar_temperature: float = 0.0
    """Of the NAR's codes; 0 takes the likeliest."""

    def __post_init__(self) -> None:
        _positive(
            **{
                "sampling.temperature": self.temperature,
                "sampling.top_p": self.top_p,
                "sampling.top_k": self.top_k,
                "sampling.loop_seconds": self.loop_seconds,
                "sampling.tries": self.tries,
                "sampling.silence_seconds": self.silence_seconds,
                "sampling.candidates": self.candidates,
                "sampling.nar_iterations": self.nar_iterations,
            }
        )
        _share(**{"sampling.top_p": self.top_p, "sampling.threshold": self.threshold})
        low, high = self.frames_per_token
        if not 0 <= low <= high:
            raise ValueError(
                f"sampling.frames_per_token must rise from at least 0, got {self.frames_per_token}"
            )
        if min(self.window, self.spare_seconds, self.nar_temperature) < 0:
            raise ValueError(
                "sampling: window, spare_seconds and nar_temperature must not be negative"
            )
        if unknown := set(self.checks) - set(CHECKS):
            raise ValueError(
                f"sampling.checks: no check {sorted(unknown)[0]!r}; there are {', '.join(CHECKS)}"
            )

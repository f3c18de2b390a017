"""Frozen configurations of training: losses, teachers, crops, optimizer."""

from dataclasses import dataclass, field, fields
from typing import Literal

from codec.config import at_least, one_of


@dataclass(frozen=True, kw_only=True, slots=True)
class MelScaleConfig:
    """One resolution of the mel loss."""

    window: int = 1024
    """Samples of the STFT window."""
    hop: int = 240
    """Samples between frames."""
    num_mels: int = 80
    """Mel bins."""
    weight: float = 1.0
    """Weight of this resolution in the mel loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossWeights:
    """Weights of the losses; one of weight 0 is not computed."""

    wave: float = 0.0
    """Absolute difference of samples."""
    mel: float = 1.0
    """Log-mel difference at several resolutions."""
    magnitude: float = 1.0
    """Relative STFT magnitude difference."""
    stoi: float = 0.0
    """1 less the short-time objective intelligibility (STOI)."""
    commitment: float = 0.25
    """Squared distance of the latent to its codebook entries: a mean over codebooks and
    dimensions, as in the released code; 2410.15017, equation 9, has their sum."""
    codebook: float = 0.0
    """Distance of the entries to the latent, where codebooks are trained by gradient."""
    adversarial: float = 0.0
    """Logits of the discriminators on generated waves."""
    feature: float = 0.0
    """Distance of the discriminators' features."""
    distill: float = 0.0
    """Distance of projected codebooks to teacher features (`distill` names the teachers)."""
    resynthesis: float = 0.0
    """Distance of Whisper's features of the speech and of its resynthesis from semantic codes."""

    def __post_init__(self) -> None:
        for each in fields(self):
            at_least(0, **{f"losses__weights__{each.name}": getattr(self, each.name)})
        if not (self.wave or self.mel or self.magnitude):
            raise ValueError("losses.weights: one of wave, mel and magnitude must not be 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The generator's losses and their forms."""

    weights: LossWeights = field(default_factory=LossWeights)
    """Weights by name."""
    mel_scales: tuple[MelScaleConfig, ...] = (
        MelScaleConfig(window=2048, hop=512, num_mels=160),
        MelScaleConfig(window=1024, hop=256, num_mels=100),
        MelScaleConfig(window=512, hop=128, num_mels=64),
        MelScaleConfig(window=256, hop=64, num_mels=32),
    )
    """Resolutions of the mel loss."""
    mel_form: Literal["speechtokenizer", "lmspt"] = "speechtokenizer"
    """Natural logs of HTK mels, or log10 of squared Slaney mels whose frames are centered."""
    mel_l2_weight: float = 0.0
    """Weight of the L2 norm of the log-mel difference (the root of its mean square), added to the
    L1 norm (the mean of its magnitude). The papers' is 1 (2410.15017, equation 5), the released
    code's 0."""
    mel_linear_weight: float = 0.0
    """Weight of the absolute difference of the mels before the logarithm (LM-SPT's: 1)."""
    magnitude_windows: tuple[int, ...] = (2048, 512, 128)
    """STFT windows of the relative magnitude loss; the hop is a quarter of each."""
    adversarial_form: Literal["least_squares", "hinge"] = "least_squares"
    """The released code's form is least squares, the papers' hinge."""
    normalize_features: bool = False
    """Divide each feature-matching term by the mean magnitude of the real features (the papers)."""
    match_scores: bool = True
    """Feature matching includes the last layers, which are the logits (LM-SPT's: false)."""

    def __post_init__(self) -> None:
        one_of(("speechtokenizer", "lmspt"), losses__mel_form=self.mel_form)
        at_least(0, losses__mel_linear_weight=self.mel_linear_weight)

    @property
    def needs_discriminators(self) -> bool:
        """Whether the generator is trained against discriminators."""
        return bool(self.weights.adversarial or self.weights.feature)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorConfig:
    """Period and scale discriminators of HiFi-GAN (arXiv 2010.05646), STFT ones of EnCodec
    (2210.13438), multi-band STFT ones of Descript's codec (2306.06546)."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Samples per row of each multi-period discriminator; empty: none."""
    extra_period: bool = False
    """Pad waves whose length is a multiple of a period by one more period, as Descript's code
    does."""
    num_scales: int = 3
    """Multi-scale discriminators, each at half the rate of the one before; 0: none."""
    stft_windows: tuple[int, ...] = (1024, 2048, 512, 256, 128)
    """Windows of the multi-scale STFT discriminators, the hop a quarter of each and each at least
    8; empty: none."""
    stft_filters: int = 32
    """Channels of the STFT discriminators."""
    band_windows: tuple[int, ...] = ()
    """Windows of the multi-band STFT discriminators, the hop a quarter of each and each at least
    128; empty: none."""
    normalize_input: bool = False
    """Remove each wave's mean and scale it to a peak of 0.8 (LM-SPT)."""
    width_divisor: int = 1
    """Divides the published channel counts of all but the STFT discriminators (miniatures)."""

    def __post_init__(self) -> None:
        at_least(0, discriminators__num_scales=self.num_scales)
        at_least(
            1,
            discriminators__periods=self.periods,
            discriminators__stft_filters=self.stft_filters,
            discriminators__width_divisor=self.width_divisor,
        )
        # Below 8 the spectrum, below 98 the lowest band (a tenth of the bins) is one bin before its
        # last stride, where torch 2.11's bfloat16 convolution on CPUs leaves weight gradients
        # uninitialized. 128 is the next power of two.
        at_least(8, discriminators__stft_windows=self.stft_windows)
        at_least(128, discriminators__band_windows=self.band_windows)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeechTeacherConfig:
    """A self-supervised or recognition model whose features are distilled (2308.16692, 3.3)."""

    model: str = ""
    """HuBERT, WavLM, wav2vec2 or Whisper by hub id or folder; empty: no speech teacher."""
    layer: str = "mean"
    """Hidden states used as targets: mean of all, last, or one by its number."""
    weight: float = 1.0
    """Weight of this teacher (lambda_SM of 2410.15017, equation 11); 0: its loss is left out."""
    objective: Literal["d_axis", "t_axis", "units"] = "d_axis"
    """Cosine over time per feature, L1 and cosine per frame, or pseudo-labels' cross-entropy."""
    cosine_weight: float = 1.0
    """Weight of the cosine term of t_axis, added to its L1 term."""
    codebooks: Literal["first", "mean", "last"] = "first"
    """Entry that is projected to the teacher: codebook 1's, the mean of all, or the last one's."""
    units: str = ""
    """Centroids of recipes/make_units.py, for the objective units."""

    def __post_init__(self) -> None:
        one_of(("d_axis", "t_axis", "units"), distill__speech__objective=self.objective)
        one_of(("first", "mean", "last"), distill__speech__codebooks=self.codebooks)
        _check_layer("distill.speech.layer", self.layer)
        _check_weights("speech", self)
        if self.model and (self.objective == "units") != bool(self.units):
            raise ValueError(
                "distill.speech.units names the centroids of the objective units: set both or none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTeacherConfig:
    """A masked language model over the transcript (2410.15017, section 3.2)."""

    model: str = ""
    """BERT, ELECTRA or MiniLM-like by hub id or folder; empty: no text teacher."""
    layer: str = "mean"
    """Hidden states used as targets: mean of all, last, or one by its number."""
    weight: float = 1.0
    """Weight of this teacher (lambda_LM of 2410.15017, equation 11); 0: its loss is left out."""
    objective: Literal["d_axis", "t_axis"] = "d_axis"
    """Cosine over time per feature, or L1 and cosine per frame."""
    cosine_weight: float = 1.0
    """Weight of the cosine term of t_axis, added to its L1 term."""
    codebooks: Literal["first", "mean", "last"] = "first"
    """Entry that is projected to the teacher: codebook 1's, the mean of all, or the last one's."""
    align: Literal["ctc", "global", "index"] = "ctc"
    """Each word's state over its own frames, the sentence's state on every frame, or word piece i
    on frame i (what DM-Codec's released code does, for comparison)."""
    transcriber: str = ""
    """wav2vec2-CTC or Whisper by hub id or folder, for the words and their times."""
    language: str = "en"
    """Language of a multilingual Whisper."""

    def __post_init__(self) -> None:
        one_of(("d_axis", "t_axis"), distill__text__objective=self.objective)
        one_of(("first", "mean", "last"), distill__text__codebooks=self.codebooks)
        one_of(("ctc", "global", "index"), distill__text__align=self.align)
        _check_layer("distill.text.layer", self.layer)
        _check_weights("text", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillConfig:
    """Teachers. Where both are named, their weighted sum is halved, also if one has weight 0
    (2410.15017, equation 11)."""

    speech: SpeechTeacherConfig = field(default_factory=SpeechTeacherConfig)
    """Speech teacher."""
    text: TextTeacherConfig = field(default_factory=TextTeacherConfig)
    """Text teacher."""
    shared_head: bool = False
    """One projection for both teachers, which need the same width: DM-Codec's W (2410.15017,
    section 2.1), also in its released code."""
    cache: str = ""
    """Folder of recipes/cache_teachers.py; empty: the teachers run during training.

    A cache has features of entire recordings and by default of their own transcripts; during
    training the teachers get the crop alone, and the words are those recognized in it.
    """
    bfloat16: bool = True
    """Teachers compute in bfloat16 where the hardware does."""

    def __post_init__(self) -> None:
        if self.shared_head and not self.combined:
            raise ValueError("distill.shared_head is for two teachers: name both, or leave it out")
        if self.cache and not self.any:
            raise ValueError("distill.cache holds teachers' features, but distill names no teacher")
        if self.text.model and not (self.text.transcriber or self.cache):
            raise ValueError(
                "distill.text.transcriber names no model: the text teacher needs one that "
                "recognizes the words, or distill.cache"
            )

    @property
    def any(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.speech.model or self.text.model)

    @property
    def combined(self) -> bool:
        """Whether both teachers are named: their losses are combined by equation 11."""
        return bool(self.speech.model and self.text.model)

    @property
    def active(self) -> dict[str, SpeechTeacherConfig | TextTeacherConfig]:
        """The named teachers whose weight is not 0, by name."""
        teachers = {"speech": self.speech, "text": self.text}
        return {name: each for name, each in teachers.items() if each.model and each.weight}


def _check_layer(name: str, layer: str) -> None:
    if layer not in ("mean", "last") and not layer.isdecimal():
        raise ValueError(f"{name} must be mean, last, or a number from 0 up, got {layer!r}")


def _check_weights(name: str, teacher: SpeechTeacherConfig | TextTeacherConfig) -> None:
    for key in ("weight", "cosine_weight"):
        at_least(0, **{f"distill__{name}__{key}": getattr(teacher, key)})


@dataclass(frozen=True, kw_only=True, slots=True)
class ResynthesisConfig:
    """LM-SPT's distillation: Whisper's features of a resynthesis from the semantic codes alone
    (2506.16738, section 3.2)."""

    model: str = ""
    """Whisper by hub id or folder; empty: no resynthesis."""
    layer: str = "last"
    """Hidden states to compare: mean of all, last, or one by its number."""
    decoder: Literal["auxiliary", "main"] = "auxiliary"
    """Decoder of the semantic codes: the auxiliary one of the family lmspt, or the codec's own."""
    stop_gradient: bool = False
    """Only the decoder gets a gradient of this loss, not encoder and codebook: with the auxiliary
    decoder the codec is trained as without resynthesis."""
    distance: Literal["mse", "l1"] = "mse"
    """Distance between the features of original and resynthesis."""
    mask: bool = True
    """Compare the frames of speech alone; or all 1500 of 30 s (released code)."""
    per_item: bool = True
    """Floor the resynthesis' log-mels per item; or per batch (released code)."""
    bfloat16: bool = True
    """Whisper computes in bfloat16 where the hardware does."""

    def __post_init__(self) -> None:
        one_of(("auxiliary", "main"), resynthesis__decoder=self.decoder)
        one_of(("mse", "l1"), resynthesis__distance=self.distance)
        _check_layer("resynthesis.layer", self.layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """Crops of recordings for training, and recordings for validation."""

    seconds: float = 1.2
    """Length of a training crop; shorter recordings are padded with zeros."""
    batch_size: int = 16
    """Crops per process and step."""
    num_workers: int = 0
    """Loader processes per rank."""
    max_validation_seconds: float = 10.0
    """Validation recordings are truncated to this length."""
    num_validation: int = 32
    """Recordings of the dev list that a validation uses."""

    def __post_init__(self) -> None:
        # A mel loss of 2048 samples needs more than half of them to reflect.
        at_least(0.1, data__seconds=self.seconds)
        at_least(0.1, data__max_validation_seconds=self.max_validation_seconds)
        at_least(1, data__batch_size=self.batch_size)
        at_least(0, data__num_workers=self.num_workers, data__num_validation=self.num_validation)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its schedule, and when to log, evaluate and save."""

    steps: int = 20
    """Optimizer steps."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 5
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "decay"] = "cosine"
    """After the warm-up: a cosine to `final_lr_share`, or `decay` once every `decay_steps`."""
    final_lr_share: float = 0.1
    """Learning rate at the last step over the peak, at the end of the cosine."""
    decay: float = 0.98
    """Factor of the schedule decay."""
    decay_steps: int = 1000
    """Steps between two decays."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Coefficients of AdamW's moving averages."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices, not on vectors."""
    clip_norm: float = 1.0
    """Gradients are clipped to this norm; 0: never."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped because their loss or gradient is not finite; one more
    ends the training. 0: the first one does. May differ when a run is resumed."""
    accumulate: int = 1
    """Micro-batches of a step on each rank."""
    log_every: int = 5
    """Steps between logged metrics."""
    eval_every: int = 10
    """Steps between evaluations."""
    save_every: int = 10
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        at_least(
            1,
            optim__accumulate=self.accumulate,
            optim__log_every=self.log_every,
            optim__eval_every=self.eval_every,
            optim__save_every=self.save_every,
            optim__decay_steps=self.decay_steps,
        )
        one_of(("cosine", "decay"), optim__schedule=self.schedule)
        if not 0 < self.decay <= 1:
            raise ValueError(f"optim.decay must lie in (0, 1], got {self.decay}")
        at_least(
            0,
            optim__steps=self.steps,
            optim__lr=self.lr,
            optim__weight_decay=self.weight_decay,
            optim__warmup_steps=self.warmup_steps,
            optim__final_lr_share=self.final_lr_share,
            optim__clip_norm=self.clip_norm,
            optim__max_skipped_steps=self.max_skipped_steps,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedOptimConfig(OptimConfig):
    """Optimizer of one model on batches of targets (codec/training/supervised.py)."""

    eval_batches: int = 16
    """Maximum micro-batches of an evaluation on each rank."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        at_least(1, optim__eval_batches=self.eval_batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecOptimConfig(OptimConfig):
    """Optimizers of a codec and its discriminators."""

    steps: int = 200
    """Optimizer steps."""
    discriminator_lr: float = 1e-4
    """Peak learning rate of the discriminators."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Coefficients of AdamW's moving averages, for generator and discriminators."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices alone: not on biases, gains, Snake's slopes and entries of
    codebooks that are trained by gradient."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    final_lr_share: float = 0.05
    """Learning rate at the last step over the peak, at the end of the cosine."""
    discriminator_start: int = 0
    """First step that trains the discriminators and has adversarial losses."""
    log_every: int = 10
    """Steps between logged metrics."""
    eval_every: int = 500
    """Steps between validations."""
    save_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        OptimConfig.__post_init__(self)
        at_least(1, optim__steps=self.steps)
        at_least(
            0,
            optim__discriminator_lr=self.discriminator_lr,
            optim__discriminator_start=self.discriminator_start,
        )

"""Teachers' targets for a batch of crops, at the codec's frame rate."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from codec.audio import resample_batch
from codec.config import CodecConfig
from codec.distillation.objectives import Target, average_over_frames, word_states_over_frames
from codec.modules.layers import ceil_div
from codec.training.config import DistillConfig
from codec.training.data import Crops

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from codec.distillation.word_alignment import Word


class Teachers:
    """The teachers of a configuration, computed during training or read from a feature cache.

    `widths` holds the features of each teacher's targets, "speech" and "text" (or the number of
    pseudo-labels).

    Raises:
        ValueError: a model, the cache or the centroids are missing or do not match.
    """

    def __init__(self, config: DistillConfig, codec: CodecConfig, device: str | torch.device):
        self.config, self.device = config, torch.device(device)
        self.sample_rate, self.hop_length = codec.sample_rate, codec.hop_length
        self.frame_rate = codec.sample_rate / codec.hop_length
        self.cache: Any = None
        self.speech: Any = None
        self.text: Any = None
        self.transcriber: Any = None
        self.centroids: Tensor | None = None
        self.widths: dict[str, int] = {}
        if config.cache:
            from codec.distillation.feature_cache import FeatureCache

            self.cache = FeatureCache.open(
                config.cache,
                **{name: (each.model, each.layer) for name, each in config.active.items()},
            )
        if "speech" in config.active:
            self._load_speech()
        if "text" in config.active:
            self._load_text()

    def known(self, cuts: Sequence["Cut"]) -> list["Cut"]:
        """The cuts that have targets: all, or without those that the cache lists as skipped.

        Raises:
            ValueError: the cache lacks other cuts.
        """
        missing = set(self.cache.missing(cuts)) if self.cache else set()
        unusable = missing & self.cache.skipped if missing else set()
        if missing - unusable:
            raise ValueError(
                f"{self.config.cache}: lacks {len(missing)} of {len(cuts)} recordings (the first: "
                f"{min(missing - unusable)}); make it with recipes/cache_teachers.py for these cuts"
            )
        if unusable:
            logger.warning(
                "%d recordings are left out: the cache lists them as skipped", len(unusable)
            )
        return [cut for cut in cuts if cut.id not in unusable]

    def __call__(self, crops: Crops) -> dict[str, Target]:
        """Targets by teacher, of T = ceil(S / hop_length) frames."""
        targets = {}
        if "speech" in self.config.active:
            targets["speech"] = self._speech_target(crops)
        if "text" in self.config.active:
            targets["text"] = self._text_target(crops)
        return targets

    def _load_speech(self) -> None:
        config = self.config.speech
        if self.cache is None:
            from codec.distillation.teachers import load_speech_teacher

            self.speech = load_speech_teacher(
                config.model, layer=config.layer, device=self.device, half=self.config.bfloat16
            )
        facts = self.cache.facts["speech"] if self.cache else vars(self.speech)
        self.widths["speech"], self.speech_rate = facts["dimension"], facts["frame_rate"]
        if config.units:
            self.centroids = _read_centroids(
                Path(config.units), config.model, config.layer, self.widths["speech"],
                self.frame_rate,
            ).to(self.device)  # fmt: skip
            self.widths["speech"] = len(self.centroids)

    def _load_text(self) -> None:
        config = self.config.text
        if self.cache is None or config.align == "index":
            from codec.distillation.teachers import load_text_teacher

            self.text = load_text_teacher(
                config.model, layer=config.layer, device=self.device, half=self.config.bfloat16
            )
        if self.cache is None:
            from codec.distillation.word_alignment import load_transcriber

            self.transcriber = load_transcriber(
                config.transcriber,
                device=self.device,
                half=self.config.bfloat16,
                language=config.language,
            )
        facts = self.cache.facts["text"] if self.cache else vars(self.text)
        self.widths["text"] = facts["dimension"]

    @torch.no_grad()
    def _speech_target(self, crops: Crops) -> Target:
        if self.cache is not None:
            seconds = crops.lengths / self.sample_rate
            pieces = [
                self.cache.speech(cut, start, float(length))
                for cut, start, length in zip(crops.ids, crops.starts, seconds, strict=True)
            ]
            lengths = torch.tensor([len(piece) for piece in pieces]).to(self.device)
            values = pad_sequence(pieces, batch_first=True).to(self.device).float()
        else:
            wave, samples = self._resampled(self.speech, crops)
            values, lengths = self.speech(wave, samples)
        seconds = crops.lengths.cpu() / self.sample_rate
        difference = float((lengths.cpu() / self.speech_rate - seconds).abs().max())
        if difference > 2 / self.speech_rate:
            raise ValueError(
                f"a teacher's features are {difference:.2f} s longer or shorter than the audio: "
                f"they must be (frames, features), {self.speech_rate:g} frames a second"
            )
        frames = ceil_div(crops.wave.shape[-1], self.hop_length)
        target = average_over_frames(values, lengths, self.speech_rate, frames, self.frame_rate)
        if self.centroids is None:
            return target
        distances = torch.cdist(target.values, self.centroids.expand(len(values), -1, -1))
        return Target(distances.argmin(2), target.mask)

    @torch.no_grad()
    def _text_target(self, crops: Crops) -> Target:
        frames = ceil_div(crops.wave.shape[-1], self.hop_length)
        words, states, sentences = self._words(crops)
        if self.config.text.align == "index":
            texts = [" ".join(word.text for word in each) for each in words]
            values = self.text.padded(texts, frames).to(self.device)
            return Target(
                values, torch.ones(values.shape[:2], dtype=torch.bool, device=self.device)
            )
        inside = ceil_div(crops.lengths, self.hop_length).to(self.device)
        if self.config.text.align == "global":
            values = repeat(torch.stack(sentences), "b d -> b t d", t=frames)
            has_words = torch.tensor([len(each) > 0 for each in words], device=self.device)
            mask = torch.arange(frames, device=self.device) < inside.unsqueeze(1)
            return Target(values, mask & has_words.unsqueeze(1))
        aligned = [
            word_states_over_frames(_spans(each).to(self.device), state, frames, self.frame_rate)
            for each, state in zip(words, states, strict=True)
        ]
        return Target(*(torch.cat(each) for each in zip(*aligned, strict=True)))

    def _words(self, crops: Crops) -> tuple[list[list["Word"]], list[Tensor], list[Tensor]]:
        """Words of each crop with times within it, their states (W,D), and the sentence's (D,)."""
        if self.cache is None:
            wave, lengths = self._resampled(self.transcriber, crops)
            words = self.transcriber.words(wave, lengths)
            if self.config.text.align == "index":
                return words, [], []
            texts = self.text([[word.text for word in each] for each in words])
            return words, [each.words for each in texts], [each.sentence for each in texts]
        words, states, sentences = [], [], []
        for cut, start, length in zip(crops.ids, crops.starts, crops.lengths, strict=True):
            cached, seconds = self.cache.text(cut), float(length) / self.sample_rate
            kept = [
                index
                for index, word in enumerate(cached.words)
                if word.end > start and word.start < start + seconds
            ]
            words.append(
                [
                    word._replace(start=max(0.0, word.start - start), end=word.end - start)
                    for word in (cached.words[index] for index in kept)
                ]
            )
            states.append(cached.states[kept].to(self.device).float())
            sentences.append(cached.sentence.to(self.device).float())
        return words, states, sentences

    def _resampled(
        self, model: Any, crops: Crops
    ) -> tuple[Float[Tensor, "B 1 S"], Int[Tensor, " B"]]:
        """The crops and their lengths at a model's sample rate."""
        wave = crops.wave.to(self.device)
        lengths = crops.lengths.to(self.device)
        if model.sample_rate == self.sample_rate:
            return wave, lengths
        wave = resample_batch(wave, self.sample_rate, model.sample_rate)
        lengths = ceil_div(lengths * model.sample_rate, self.sample_rate)
        return wave, lengths.clamp(max=wave.shape[-1])


def _spans(words: list["Word"]) -> Float[Tensor, "W 2"]:
    return torch.tensor([[word.start, word.end] for word in words]).reshape(-1, 2)


def _read_centroids(
    file: Path, model: str, layer: str, width: int, frame_rate: float
) -> Float[Tensor, "K D"]:
    """The k-means centroids of recipes/make_units.py; ValueError: of another teacher or rate."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file}: no such file; recipes/make_units.py makes it")
    try:
        with safe_open(file, "pt") as opened:
            facts, centroids = opened.metadata() or {}, opened.get_tensor("centroids")
    except SafetensorError as error:
        raise ValueError(f"{file}: corrupted file of centroids ({error}); make it again") from error
    made_of = (Path(facts.get("teacher", "")).resolve(), facts.get("layer"), centroids.shape[-1])
    if made_of != (Path(model).resolve(), layer, width):
        raise ValueError(
            f"{file}: centroids of {facts.get('teacher')}, layer {facts.get('layer')}, width "
            f"{centroids.shape[-1]}, but distill.speech names {model}, layer {layer}, width "
            f"{width}; run recipes/make_units.py with that one"
        )
    if abs(float(facts.get("frame_rate", 0)) - frame_rate) > 1e-3:
        raise ValueError(
            f"{file}: centroids at {facts.get('frame_rate')} Hz, but the codec has "
            f"{frame_rate:g} Hz; make them with frame_rate={frame_rate:g}"
        )
    return centroids

"""What the teachers say of a batch of crops, frame by frame at the codec's rate."""

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
from codec.data import Crops
from codec.distill import Target, match_rate, states_over_frames
from codec.layers import ceil_div
from codec.train_config import DistillConfig

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from lhotse.cut import Cut

    from codec.words import Word


class Teachers:
    """The teachers of a configuration, run beside the codec or read from a cache.

    `widths` holds, by teacher ("speech", "text"), the features of its targets (or the number of
    units). Raises `ValueError` when a model, the cache or the units are missing or do not fit.
    """

    def __init__(self, config: DistillConfig, codec: CodecConfig, device: str | torch.device):
        self.config, self.device = config, torch.device(device)
        self.sample_rate, self.hop_length = codec.sample_rate, codec.hop_length
        self.frame_rate = codec.sample_rate / codec.hop_length
        self.cache: Any = None
        self.speech: Any = None
        self.text: Any = None
        self.transcriber: Any = None
        self.units: Tensor | None = None
        self.widths: dict[str, int] = {}
        if config.cache:
            from codec.feature_cache import FeatureCache

            named = {"speech": config.speech, "text": config.text}
            self.cache = FeatureCache.open(
                config.cache,
                **{name: (each.model, each.layer) for name, each in named.items() if each.model},
            )
        if config.speech.model:
            self._load_speech()
        if config.text.model:
            self._load_text()

    def known(self, cuts: Sequence["Cut"]) -> list["Cut"]:
        """The cuts whose targets can be had: all, or those that the cache holds.

        What the cache lists as unusable is left out with a warning; any other cut that it lacks
        is a `ValueError`.
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
                "%d recordings are left out: the cache could not use them", len(unusable)
            )
        return [cut for cut in cuts if cut.id not in unusable]

    def __call__(self, crops: Crops) -> dict[str, Target]:
        """Targets by teacher, T = ceil(S / hop_length) frames or one more or less."""
        targets = {}
        if self.config.speech.model:
            targets["speech"] = self._speech_target(crops)
        if self.config.text.model:
            targets["text"] = self._text_target(crops)
        return targets

    def _load_speech(self) -> None:
        config = self.config.speech
        if self.cache is None:
            from codec.teachers import load_speech_teacher

            self.speech = load_speech_teacher(
                config.model, layer=config.layer, device=self.device, half=self.config.half
            )
        facts = self.cache.facts["speech"] if self.cache else vars(self.speech)
        self.widths["speech"], self.speech_rate = facts["dimension"], facts["frame_rate"]
        if config.units:
            self.units = _read_units(Path(config.units), config.model, config.layer)
            self.units = self.units.to(self.device)
            self.widths["speech"] = len(self.units)

    def _load_text(self) -> None:
        config = self.config.text
        if self.cache is None or config.align == "index":
            from codec.teachers import load_text_teacher

            self.text = load_text_teacher(
                config.model, layer=config.layer, device=self.device, half=self.config.half
            )
        if self.cache is None:
            from codec.words import load_transcriber

            if not config.transcriber:
                raise ValueError(
                    "distill.text.transcriber names no model: the text teacher needs one that "
                    "hears the words, or distill.cache"
                )
            self.transcriber = load_transcriber(
                config.transcriber, device=self.device, half=self.config.half
            )
        facts = vars(self.text) if self.text else self.cache.facts["text"]
        self.widths["text"] = facts["dimension"]

    @torch.no_grad()
    def _speech_target(self, crops: Crops) -> Target:
        if self.cache is not None:
            pieces = [
                self.cache.speech(cut, start, float(length) / self.sample_rate)
                for cut, start, length in zip(crops.ids, crops.starts, crops.lengths, strict=True)
            ]
            lengths = torch.tensor([len(piece) for piece in pieces])
            longest = round(crops.wave.shape[-1] / self.sample_rate * self.speech_rate)
            values = pad_sequence(pieces, batch_first=True).to(self.device).float()
            values = torch.nn.functional.pad(values, (0, 0, 0, max(0, longest - values.shape[1])))
        else:
            wave, lengths = self._heard_by(self.speech, crops)
            values, lengths = self.speech(wave, lengths)
        values = match_rate(values, self.speech_rate, self.frame_rate)
        # A frame counts where the teacher hears sound in all of it, and in the item's last frame.
        lengths = (
            (lengths.to(self.device) * self.frame_rate / self.speech_rate).round().clamp(min=1)
        )
        mask = torch.arange(values.shape[1], device=self.device) < lengths.unsqueeze(1)
        if self.units is not None:
            distances = torch.cdist(values, repeat(self.units, "k d -> b k d", b=len(values)))
            return Target(distances.argmin(2), mask)
        return Target(values, mask)

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
            spoken = torch.tensor([len(each) > 0 for each in words], device=self.device)
            mask = torch.arange(frames, device=self.device) < inside.unsqueeze(1)
            return Target(values, mask & spoken.unsqueeze(1))
        aligned = [
            states_over_frames(_spans(each).to(self.device), state, frames, self.frame_rate)
            for each, state in zip(words, states, strict=True)
        ]
        values, masks = zip(*aligned, strict=True)
        return Target(torch.stack(values), torch.stack(masks))

    def _words(self, crops: Crops) -> tuple[list[list["Word"]], list[Tensor], list[Tensor]]:
        """The words of each crop with times inside it, their states, and the sentence's state."""
        if self.cache is None:
            wave, lengths = self._heard_by(self.transcriber, crops)
            words = self.transcriber.words(wave, lengths)
            if self.config.text.align == "index":
                return words, [], []
            told = self.text([[word.text for word in each] for each in words])
            return words, [each.words for each in told], [each.sentence for each in told]
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

    def _heard_by(
        self, listener: Any, crops: Crops
    ) -> tuple[Float[Tensor, "B 1 S"], Int[Tensor, " B"]]:
        """The crops at a model's own sample rate."""
        wave = crops.wave.to(self.device)
        lengths = crops.lengths.to(self.device)
        if listener.sample_rate == self.sample_rate:
            return wave, lengths
        wave = resample_batch(wave, self.sample_rate, listener.sample_rate)
        lengths = ceil_div(lengths * listener.sample_rate, self.sample_rate)
        return wave, lengths.clamp(max=wave.shape[-1])


def _spans(words: list["Word"]) -> Float[Tensor, "W 2"]:
    return torch.tensor([[word.start, word.end] for word in words]).reshape(-1, 2)


def _read_units(file: Path, model: str, layer: str) -> Float[Tensor, "K D"]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file}: no such file; recipes/make_units.py makes it")
    try:
        with safe_open(file, "pt") as opened:
            made_with, units = opened.metadata() or {}, opened.get_tensor("centroids")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole file of units ({error}); make it again") from error
    found = (made_with.get("teacher"), made_with.get("layer"))
    if found != (model, layer):
        raise ValueError(
            f"{file}: units of {found[0]}, layer {found[1]}, but distill.speech names {model}, "
            f"layer {layer}; make units of that one"
        )
    return units

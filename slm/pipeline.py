"""Voice: text and a prompt recording to a wave, a wave to text. A codec, an AR and a NAR as one.

Its folder:

    codec/   ar/   nar/     the models (no nar/ where the codec has one codebook, or for ASR alone)
    prompts/NAME.json       codes, transcript and credit of each shipped prompt
    README.md               the card
"""

import hashlib
import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from codec import load_codec, read_audio, write_audio
from codec.audio import check_name as check_name
from codec.audio import check_wave, stream_audio
from slm.ar import SpeechLM, digest_of
from slm.config import SamplingConfig
from slm.generate import (
    Request,
    generate,
    restrict_context,
    speech_bounds,
    text_bound,
    text_only,
)
from slm.nar import NAR
from slm.pieces import split_at_quiet
from slm.prompts import (
    Coverage,
    Prompt,
    asr_context,
    has_words,
    join_texts,
    load_prompts,
    tts_context,
)
from slm.speaking import SILENCE_RMS, Models, Speech, Utterance, decode, speak

logger = logging.getLogger(__name__)


class Transcript(NamedTuple):
    """What a recording says."""

    text: str
    failure: str | None
    """None, or what is wrong with it after the last try: empty, loop or cut."""


class Voice:
    """Speaks and transcribes. Everything that a person can get wrong raises ValueError."""

    def __init__(
        self,
        models: Models,
        prompts: dict[str, Prompt] | None = None,
        *,
        sampling: SamplingConfig | None = None,
        longest_prompt: float = 15.0,
        folder: Path | None = None,
    ):
        """`longest_prompt` in seconds: a longer recording is cut there."""
        self.models = models
        self.codec, self.lm, self.nar, self.coverage = models
        self.prompts = prompts or {}
        self.sampling = sampling or SamplingConfig()
        self.longest_prompt = longest_prompt
        self.folder = folder
        stamp = self.codec.stamp
        self.lm.vocabulary.check_codec(stamp, "codec/")
        if self.nar is not None and self.nar.config.codebook_sizes != stamp.codebook_sizes:
            raise ValueError(
                f"nar/ predicts codebooks of {self.nar.config.codebook_sizes} entries, but the "
                f"codec has {stamp.codebook_sizes}"
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        base: str | Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Voice":
        """A voice from its folder or a hub id. `base`: where its text LLM is, if it has moved."""
        folder = _local(path_or_hub_id)
        for part in ("codec", "ar"):
            if not (folder / part).is_dir():
                raise ValueError(f"{folder}: not a voice folder, {part}/ is missing")
        codec = load_codec(folder / "codec", device)
        lm = SpeechLM.load(folder / "ar", base, dtype).to(device)
        nar = NAR.load(folder / "nar", dtype).to(device) if (folder / "nar").is_dir() else None
        coverage = Coverage.load(folder / "ar")
        models = Models(codec, lm, nar, coverage)
        return cls(models, load_prompts(folder / "prompts"), folder=folder)

    @cached_property
    def digest(self) -> str:
        """16 hex digits over all its models."""
        models = [self.lm.lm, *([self.nar] if self.nar is not None else [])]
        parts = [self.codec.stamp.digest, *map(digest_of, models)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the voice, prompts that were added included."""
        assert self.folder is not None, "recipes/tts.py writes a voice that was never loaded"
        folder = Path(folder)
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        self.lm.save_origin(folder / "ar", self.folder / "ar")
        for name, prompt in self.prompts.items():
            prompt.save(folder / "prompts", name)

    def tts(
        self,
        text: str,
        prompt: Float[np.ndarray, " S"] | Path | Prompt | str,
        prompt_text: str | None = None,
        seed: int = 0,
    ) -> Speech:
        """Says `text` in the voice of `prompt`: a wave at the codec's sample rate, the path of a
        recording, codes, or the name of a shipped prompt. Without `prompt_text` the model
        transcribes the prompt itself."""
        return self.speak([self.prepare(text, self.prompt(prompt, prompt_text), seed)])[0]

    def tts_batch(
        self, texts: Sequence[str], prompts: Sequence[Prompt], seeds: Sequence[int] | None = None
    ) -> list[Speech]:
        """Many at once; each is what `tts` gives alone under its seed."""
        seeds = seeds if seeds is not None else [0] * len(texts)
        return self.speak([self.prepare(*one) for one in zip(texts, prompts, seeds, strict=True)])

    def prompt(
        self, prompt: Float[np.ndarray, " S"] | Path | Prompt | str, prompt_text: str | None = None
    ) -> Prompt:
        """Codes and transcript of a prompt; see `tts`."""
        if prompt_text is not None and not has_words(prompt_text):
            raise ValueError(
                f"the prompt's text {prompt_text!r} has no words; give what the prompt says, or "
                "leave it out"
            )
        if isinstance(prompt, Prompt):
            return prompt if prompt_text is None else replace(prompt, text=prompt_text)
        if isinstance(prompt, str):
            if prompt not in self.prompts:
                known = ", ".join(sorted(self.prompts)) or "none"
                raise ValueError(f"no prompt is named {prompt!r}; this voice has: {known}")
            return self.prompt(self.prompts[prompt], prompt_text)
        if isinstance(prompt, Path):
            prompt = read_audio(prompt, self.codec.sample_rate)
        _check(prompt, "the prompt")
        most = round(self.longest_prompt * self.codec.sample_rate)
        if len(prompt) > most:
            logger.warning(
                "the prompt has %.1f s; its first %g s are used, and transcribed by the model",
                len(prompt) / self.codec.sample_rate, self.longest_prompt,
            )  # fmt: skip
            prompt, prompt_text = prompt[:most], None
        (codes,) = self._encode([prompt])
        if prompt_text is None:
            if self.lm.origin.get("tasks", {}).get("asr", 1.0) == 0:
                raise ValueError("this voice cannot transcribe the prompt; give --prompt-text")
            ((prompt_text, failure),) = self.transcripts([codes[0]])
            if failure is not None or not has_words(prompt_text):
                raise ValueError("the prompt could not be transcribed; give --prompt-text")
            logger.info("the prompt says: %s", prompt_text)
        return Prompt(codes=codes, text=prompt_text)

    def prepare(self, text: str, prompt: Prompt, seed: int = 0) -> Utterance:
        """Checks a text, and what the models will be given. Raises ValueError.

        A prompt that is a continuation has no transcript: `text` holds its words as well.
        """
        self.lm.check_task("tts")
        if self.nar is None and self.codec.num_codebooks > 1:
            raise ValueError("this voice has no nar/: it transcribes, but cannot speak")
        self.coverage.check(text)
        prompt.check(self.codec.codebook_sizes)
        if not prompt.continuation:
            self.coverage.check(prompt.text, "the prompt's text")
        alphabet = self.lm.alphabet
        joined, alone = alphabet.text_ids("tts", [join_texts(prompt.text, text), text])
        num_tokens = len(alone)
        speech = alphabet.speech_ids("tts", prompt.codes[0])
        context = tts_context(alphabet.vocabulary, joined, speech)
        least, most = speech_bounds(num_tokens, self.codec.frame_rate, self.sampling)
        spoken = prompt.codes.shape[1]
        if prompt.continuation:
            least, most = max(0, least - spoken), max(1, most - spoken)
        most = restrict_context(self.lm.max_positions, context, least, most, "text")
        self.coverage.check_length(spoken, least, self.codec.frame_rate)
        return Utterance(text=text, prompt=prompt, context=context, bounds=(least, most), seed=seed)

    def speak(self, utterances: Sequence[Utterance]) -> list[Speech]:
        """One batch through the AR, the NAR and the codec."""
        return speak(self.models, utterances, self.sampling)

    @staticmethod
    def save(speech: Speech, path: str | Path) -> None:
        """Writes what was said; the file is whole or absent."""
        write_audio(path, speech.wave, speech.sample_rate)

    def asr(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of waves (S,) at the codec's sample rate, in one batch."""
        for wave in waves:
            _check(wave, "the recording", allow_silence=True)
        if any(len(wave) > self._longest_piece() for wave in waves):
            return [self.asr_stream([wave]) for wave in waves]
        return self.transcribe([codes[0] for codes in self._encode(waves)])

    def asr_file(self, path: str | Path, batch: int = 8) -> str:
        """Transcript of a recording of any length, `batch` pieces at a time."""
        return self.asr_stream(stream_audio(path, self.codec.sample_rate), batch)

    def asr_stream(self, blocks: Iterable[np.ndarray], batch: int = 8) -> str:
        """Transcript of a recording that comes in blocks (S,); any length in bounded memory."""
        texts: list[str] = []
        waiting: list[np.ndarray] = []
        for piece in split_at_quiet(blocks, self._longest_piece()):
            if float(np.abs(piece).max(initial=0.0)) < SILENCE_RMS:
                continue
            waiting.append(piece)
            if len(waiting) == batch:
                texts += self.transcribe([codes[0] for codes in self._encode(waiting)])
                waiting = []
        if waiting:
            texts += self.transcribe([codes[0] for codes in self._encode(waiting)])
        return " ".join(text for text in texts if text)

    def _longest_piece(self) -> int:
        """Samples of the longest stretch that is transcribed at once: as in training, or 1 s."""
        seconds = max(1.0, self.coverage.longest_frames / self.codec.frame_rate)
        room = self.lm.max_positions / (self.codec.frame_rate + 8.0)
        return int(min(seconds, room) * self.codec.sample_rate)

    @torch.inference_mode()
    def _encode(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Codes (Q, T) of each wave."""
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = torch.zeros(len(waves), 1, int(lengths.max()))
        for row, wave in enumerate(waves):
            batch[row, 0, : len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, np.float32))
        device = self.codec.device
        codes = self.codec.encode(batch.to(device), lengths.to(device))
        return [
            item[:, :length].cpu().numpy()
            for item, length in zip(codes.codes, codes.lengths.tolist(), strict=True)
        ]

    def transcribe(self, first: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of codes of codebook 1, each (T,); those that failed as well."""
        return [made.text for made in self.transcripts(first)]

    def transcripts(self, first: Sequence[np.ndarray]) -> list[Transcript]:
        """Transcripts of codes of codebook 1, each (T,), and what is wrong with them."""
        self.lm.check_task("asr")
        alphabet, rate = self.lm.alphabet, self.codec.frame_rate
        requests = []
        for codes in first:
            context = asr_context(alphabet.vocabulary, alphabet.speech_ids("asr", codes))
            most = text_bound(len(codes), rate)
            most = restrict_context(self.lm.max_positions, context, 1, most, "recording")
            requests.append(Request(context=context, min_tokens=0, max_tokens=most, seed=0))
        likeliest = replace(self.sampling, greedy=True)
        made = generate(self.lm, requests, text_only(self.lm), likeliest)
        failed = [one.failure for one in made if one.failure is not None]
        if failed:
            logger.warning(
                "%d of %d transcripts failed: %s", len(failed), len(made), ", ".join(failed)
            )
        return [Transcript(alphabet.text_of(one.tokens), one.failure) for one in made]

    def decode(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        """The wave of the new part. The prompt is decoded before it, so that it starts clean."""
        return decode(self.models.codec, prompt, new)


def _check(wave: np.ndarray, name: str, *, allow_silence: bool = False) -> None:
    if wave.ndim != 1:
        raise ValueError(f"{name}: give samples of one channel (S,), not shape {wave.shape}")
    check_wave(wave, name, allow_silence=allow_silence)


def _local(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.is_absolute() or str(path_or_hub_id).count("/") != 1:
        raise ValueError(f"{path_or_hub_id}: no such voice folder, nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such voice folder, and not to be had from the hub either "
            f"({type(error).__name__}); check the name"
        ) from error

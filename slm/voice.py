"""Voice: text to a wave, a wave to text or to another voice. A codec, an AR and a NAR as one.

Its folder:

    codec/   ar/   nar/     the models (no nar/ where the codec has one codebook, or for ASR alone)
    prompts/NAME.json       codes, transcript and credit of each shipped prompt
    sampling.json           how it speaks, where it was saved with other settings
    README.md               the card

From a text and a prompt to what the models are given, checked.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torchaudio.functional import edit_distance

from codec import load_codec, read_audio, write_audio
from codec.audio import check_name as check_name
from codec.audio import check_wave, stream_audio
from codec.io import sha256_of
from slm.config import SamplingConfig
from slm.data.interleaving import script_of
from slm.data.sequences import (
    NO_FORCED_TOKENS,
    Coverage,
    Prompt,
    has_words,
    in_small_letters,
    join_texts,
    load_prompts,
    tts_context,
)
from slm.export.voice_folder import load_sampling, ship, write_extras
from slm.generation.asr import (
    Transcript,
    as_one,
    audible,
    encode,
    hear,
    hear_pieces,
    split_at_quiet,
)
from slm.generation.checks import is_empty
from slm.generation.conversion import convert, go_on, listen
from slm.generation.long_form import Passage, Piece, join, joined, room_behind, split_text
from slm.generation.rerank import can_transcribe, transcripts
from slm.generation.sampling import restrict_speech, speech_bounds
from slm.generation.streaming import stream
from slm.generation.tts import Models, Speech, Utterance, decode, synthesize
from slm.models.ar import SpeechLM, digest_of
from slm.models.nar import NAR
from slm.tokenization.text_normalization import normalize

logger = logging.getLogger(__name__)


WORDS_PER_SECOND = 2.7
"""Of read English."""
PROMPT_SHARE = 1 / 2
"""A prompt has no more of the longest training utterance: the rest is for what is said."""


def longest_prompt(seconds: float, models: Models) -> float:
    """Seconds of a prompt that speech can follow: as many as told, or a share of the longest
    training utterance."""
    longest = models.coverage.longest_frames / models.lm.vocabulary.codec.frame_rate
    return min(seconds, longest * PROMPT_SHARE)


def beginning(wave: Float[np.ndarray, " S"], most: int) -> Float[np.ndarray, " s"]:
    """At most so many samples, cut where it is quiet: half a word would be no word of the text."""
    return wave if len(wave) <= most else next(split_at_quiet([wave], most))


def prepare(
    models: Models, text: str, prompt: Prompt, seed: int, sampling: SamplingConfig
) -> Utterance:
    """One utterance; see `Voice.prepare`."""
    lm, codec = models.lm, models.codec
    check_speaks(models)
    check_text(models, text)
    prompt.check(codec.codebook_sizes)
    if not prompt.continuation:
        check_text(models, prompt.text, "the prompt's text")
    tokenizer = lm.tokenizer
    (ids,) = tokenizer.text_ids("tts", [join_texts(prompt.text, text)])
    speech = tokenizer.speech_ids("tts", prompt.codes[0])
    context = tts_context(tokenizer.vocabulary, ids, speech)
    num_tokens = tokenizer.num_tokens(text)
    least, most = speech_bounds(num_tokens, codec.frame_rate, sampling)
    spoken = prompt.codes.shape[1]
    if prompt.continuation:
        least, most = max(0, least - spoken), max(1, most - spoken)
    script = NO_FORCED_TOKENS
    if tokenizer.text.interleaved:
        # What has no letter is no word to say; the whole text has it.
        words = [word for word in tokenizer.spelt(text).split() if has_words(word)]
        if prompt.continuation:
            said = num_said(lm, tokenizer.in_words(text).split(), prompt.codes[0])
            words = words[min(said, len(words) - 1) :]
        lead, script = script_of(tokenizer, words)
        context += lead
    most = restrict_speech(lm, [*context, *script.ids], least, most, "text")
    models.coverage.check_length(spoken, least, codec.frame_rate)
    return Utterance(
        text=text, prompt=prompt, context=context, bounds=(least, most), seed=seed, script=script
    )


def num_said(lm: SpeechLM, words: Sequence[str], codes: Int[np.ndarray, " T"]) -> int:
    """How many of the words the codes, which begin with them, have said: as many as are the
    likest to what the model itself hears in them; one that does not hear goes by their time."""
    if not can_transcribe(lm):
        seconds = len(codes) / lm.vocabulary.codec.frame_rate
        return min(round(seconds * WORDS_PER_SECOND), len(words))
    heard = transcripts(lm, [codes])[0].lower()
    begun = [" ".join(words[:count]).lower() for count in range(len(words) + 1)]
    distances = [edit_distance(text, heard) for text in begun]
    return min(range(len(begun)), key=lambda count: distances[count])


def passage(
    models: Models, text: str, prompt: Prompt, seed: int, sampling: SamplingConfig
) -> Passage:
    """A text of any length; see `Voice.passage`."""
    check_speaks(models)
    check_text(models, text)
    prompt.check(models.codec.codebook_sizes)
    pieces = [Piece(text, 0.0)]
    if not prompt.continuation:
        fits = room_behind(prompt, models, sampling)
        # What is said at once stays as it is.
        pieces = pieces if fits(text) else split_text(text, fits)
    utterances = [prepare(models, piece.text, prompt, seed, sampling) for piece in pieces]
    return Passage(text, utterances, [piece.pause for piece in pieces])


def check_speaks(models: Models) -> None:
    """Raises ValueError for models that only transcribe."""
    models.lm.check_task("tts")
    if models.nar is None and models.codec.num_codebooks > 1:
        raise ValueError("this voice has no nar/: it transcribes, but cannot speak")


def check_text(models: Models, text: str, what: str = "the text") -> None:
    """Numbers and abbreviations are words by the time that the model reads them, and capitals
    alone small letters."""
    text = in_small_letters(text)
    spelt_out = normalize(text) if models.lm.tokenizer.text.normalize else text
    models.coverage.check(spelt_out, what)


Sound = Float[np.ndarray, " S"] | Path | Prompt | str
"""A wave at the codec's sample rate, a recording's path, codes, or the name of a shipped prompt."""


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
        """`longest_prompt` in seconds: a longer recording is cut there, or where it leaves no room
        for a text behind it."""
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
        models = Models(codec, lm, nar, Coverage.load(folder / "ar"))
        prompts = load_prompts(folder / "prompts")
        return cls(models, prompts, sampling=load_sampling(folder), folder=folder)

    @cached_property
    def digest(self) -> str:
        """16 hex digits over all its models."""
        models = [self.lm.lm, *([self.nar] if self.nar is not None else [])]
        parts = [self.codec.stamp.digest, *map(digest_of, models)]
        return sha256_of(" ".join(parts), 16)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the voice with its sampling and the prompts that were added; the card names them,
        unless it was edited. An earlier voice in the folder is replaced. Raises ValueError for a
        folder of other things."""
        source = self.folder
        assert source is not None, (
            "recipes/lib/voice_training.py writes a voice that was never loaded"
        )

        def finish(copy: Path) -> None:
            if copy != source.resolve():
                self.lm.save_origin(copy / "ar", source / "ar")
            write_extras(copy, self.lm, self.coverage, self.prompts, self.sampling)

        ship(source, Path(folder), finish)

    def tts(
        self, text: str, prompt: Sound, prompt_text: str | None = None, seed: int = 0
    ) -> Speech:
        """Says `text` in the voice of `prompt`. Without `prompt_text` the model transcribes the
        prompt itself.

        A text that is longer than what the model was trained on is said in pieces, which are joined
        with pauses; `codes` are those of the pieces then, without the pauses."""
        return self.say([self.passage(text, self.prompt(prompt, prompt_text), seed)])[0]

    def tts_batch(
        self, texts: Sequence[str], prompts: Sequence[Sound], seeds: Sequence[int] | None = None
    ) -> list[Speech]:
        """Many at once; each is what `tts` gives alone under its seed."""
        seeds = seeds if seeds is not None else [0] * len(texts)
        if not len(texts) == len(prompts) == len(seeds):
            raise ValueError(
                f"{len(texts)} texts, {len(prompts)} prompts and {len(seeds)} seeds; give one of "
                "each for every text"
            )
        known = [self.prompt(prompt) for prompt in prompts]
        return self.say([self.passage(*one) for one in zip(texts, known, seeds, strict=True)])

    def stream(
        self,
        text: str,
        prompt: Sound,
        prompt_text: str | None = None,
        seed: int = 0,
        chunk_seconds: float = 0.5,
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """`tts` as it is being made: waves that follow each other, the first one early.

        What has been heard cannot be taken back: nothing is tried again, checked or chosen from
        several candidates; a failure is logged."""
        passage = self.passage(text, self.prompt(prompt, prompt_text), seed)
        return self.stream_passage(passage, chunk_seconds)

    def stream_passage(
        self, passage: Passage, chunk_seconds: float = 0.5
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """`stream` for what is checked and encoded already."""
        if not 0 < chunk_seconds < float("inf"):
            raise ValueError(f"chunk_seconds must be positive and finite, got {chunk_seconds:g}")
        waves = [self._chunks(one, chunk_seconds) for one in passage.utterances]
        return join(list(zip(waves, passage.pauses, strict=True)), self.codec.sample_rate)

    def _chunks(self, utterance: Utterance, seconds: float) -> Iterator[np.ndarray]:
        for chunk in stream(self.models, utterance, self.sampling, seconds):
            yield chunk.wave
            if chunk.failure is not None:
                logger.warning("%r: %s", utterance.text, chunk.failure)

    def convert(
        self,
        source: Float[np.ndarray, " s"] | Path,
        target: Sound,
        source_text: str | None = None,
        target_text: str | None = None,
    ) -> Speech:
        """What `source` says, in the voice of `target`: codebook 1 is the source's, the NAR makes
        the others. A source of any length, as long as it was.

        The texts help a NAR that takes any, for which the model transcribes what is not given if it
        can; a source that takes several pieces is then always transcribed."""
        if self.nar is None:
            raise ValueError(
                "this voice has no nar/, so it cannot convert; it takes a codec of two codebooks "
                "or more, whose first says what is said and whose others say who speaks"
            )
        if not isinstance(source, Path):
            _check(source, "the source", also=", or a Path")
        rate, prompt = self.codec.sample_rate, self._target(target, target_text)
        blocks = stream_audio(source, rate) if isinstance(source, Path) else [source]
        heard = listen(self.codec, blocks)

        codes, text = convert(
            self.models, heard, prompt, self._texts, self.sampling, source_text=source_text
        )
        wave = self.decode(codes[:, :0], codes)[: heard.num_samples]
        return Speech(
            wave=wave, codes=codes, text=text, prompt_text=prompt.text, sample_rate=rate,
            failure="empty" if is_empty(wave) else None, tries=1, seed=0,
        )  # fmt: skip

    def continue_speech(self, prompt: Sound, seconds: float, seed: int = 0) -> Speech:
        """Goes on from `prompt` without a text, for at most so many seconds. Raises ValueError for
        a voice that was not trained for it."""
        if isinstance(prompt, Prompt | str):
            known = self.prompt(prompt)
            known.check(self.codec.codebook_sizes)
            codes = known.codes
        else:
            # No text is joined to its own: all that the model holds may come before.
            codes = self._begin(prompt, self.longest_prompt)[0]
        return go_on(self.models, codes, seconds, self.sampling, seed)

    def prompt(self, prompt: Sound, prompt_text: str | None = None) -> Prompt:
        """Codes and transcript of a prompt; see `tts`."""
        if prompt_text is not None and not has_words(prompt_text):
            raise ValueError(
                f"the prompt's text {prompt_text!r} has no words; give what the prompt says, or "
                "leave it out"
            )
        if isinstance(prompt, str):
            prompt = self._shipped(prompt)
        if isinstance(prompt, Prompt):
            return prompt if prompt_text is None else replace(prompt, text=prompt_text)
        codes, prompt_text = self._begin(prompt, self._longest_prompt(), prompt_text)
        if prompt_text is None:
            if not can_transcribe(self.lm):
                raise ValueError("this voice cannot transcribe the prompt; give --prompt-text")
            (prompt_text,) = self._texts([codes[0]])
            if not prompt_text:
                raise ValueError("the prompt could not be transcribed; give --prompt-text")
            logger.info("the prompt says: %s", prompt_text)
        return Prompt(codes=codes, text=prompt_text)

    def _target(self, target: Sound, text: str | None) -> Prompt:
        """A prompt whose text is empty where nobody knows it."""
        if text is not None or isinstance(target, Prompt | str):
            prompt = self.prompt(target, text)
            prompt.check(self.codec.codebook_sizes)
            return prompt
        codes = self._begin(target, self._longest_prompt())[0]
        used = self.nar is not None and self.nar.takes_texts
        return Prompt(codes=codes, text=self._texts([codes[0]])[0] if used else "")

    def _longest_prompt(self) -> float:
        return longest_prompt(self.longest_prompt, self.models)

    def _shipped(self, name: str) -> Prompt:
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            also = f"; a recording is given as Path({name!r})" if Path(name).suffix else ""
            raise ValueError(f"no prompt is named {name!r}; this voice has: {known}{also}")
        return self.prompts[name]

    def _begin(
        self, prompt: Any, seconds: float, text: str | None = None
    ) -> tuple[np.ndarray, str | None]:
        """Codes (Q, T) of a recording's first seconds, and its text if it is still theirs."""
        rate = self.codec.sample_rate
        wave = read_audio(prompt, rate) if isinstance(prompt, Path) else prompt
        _check(wave, "the prompt")
        begin = beginning(wave, max(1, round(seconds * rate)))
        if len(begin) == len(wave):
            return encode(self.codec, [wave])[0], text
        if text is not None and not can_transcribe(self.lm):
            raise ValueError(
                f"the prompt has {len(wave) / rate:.1f} s and is cut, but this voice cannot "
                f"transcribe what is left; give at most {seconds:.1f} s with their text"
            )
        logger.warning(
            "the prompt has %.1f s; its first %.1f s are used%s",
            len(wave) / rate, len(begin) / rate,
            "" if text is None
            else "; the text that was given is of all of it and is not used",
        )  # fmt: skip
        return encode(self.codec, [begin])[0], None

    def _texts(self, first: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of codes of codebook 1; empty where there is none to be had."""
        if not can_transcribe(self.lm):
            return [""] * len(first)
        return [
            text if failure is None and has_words(text) else ""
            for text, failure in self.transcripts(first)
        ]

    def prepare(self, text: str, prompt: Prompt, seed: int = 0) -> Utterance:
        """Checks a text, and what the models will be given. Raises ValueError; also for a text that
        is too long to be said at once.

        A prompt that is a continuation has no transcript: `text` holds its words as well.
        """
        return prepare(self.models, text, prompt, seed, self.sampling)

    def passage(self, text: str, prompt: Prompt, seed: int = 0) -> Passage:
        """`prepare` for texts of any length: what is too long for the model comes in pieces.

        The words behind a continuation cannot be told from its own, so that it is not split.
        """
        return passage(self.models, text, prompt, seed, self.sampling)

    def check_text(self, text: str, what: str = "the text") -> None:
        """Raises ValueError for a text with nothing to say, or in an unknown script."""
        check_text(self.models, text, what)

    def say(self, passages: Sequence[Passage], batch: int = 8) -> list[Speech]:
        """What was said of each, `batch` pieces at a time."""
        utterances = [one for passage in passages for one in passage.utterances]
        speeches: list[Speech] = []
        for start in range(0, len(utterances), batch):
            speeches += self.speak(utterances[start : start + batch])
        told = iter(speeches)
        return [joined(one, [next(told) for _ in one.utterances]) for one in passages]

    def speak(self, utterances: Sequence[Utterance]) -> list[Speech]:
        """One batch through the AR, the NAR and the codec."""
        return synthesize(self.models, utterances, self.sampling)

    @staticmethod
    def save(speech: Speech, path: str | Path) -> None:
        """Writes what was said; the file is whole or absent."""
        write_audio(path, speech.wave, speech.sample_rate)

    def asr(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of waves (S,) at the codec's sample rate; that of silence is empty."""
        self.lm.check_task("asr")
        for wave in waves:
            _check(wave, "the recording", also=" (asr_file takes a path)", allow_silence=True)
        heard = [list(audible([wave], self._longest_piece())) for wave in waves]
        told = hear_pieces(self.codec, chain.from_iterable(heard), self.transcripts)
        return [as_one(islice(told, len(pieces))).text for pieces in heard]

    def asr_file(self, path: str | Path, batch: int = 8) -> str:
        """Transcript of a recording of any length, `batch` pieces at a time."""
        return self.hear_file(path, batch).text

    def asr_stream(self, blocks: Iterable[np.ndarray], batch: int = 8) -> str:
        """Transcript of a recording that comes in blocks (S,); any length in bounded memory."""
        return self.hear_stream(blocks, batch).text

    def hear_file(self, path: str | Path, batch: int = 8) -> Transcript:
        """`asr_file`, and what is wrong with the first piece that failed."""
        return self.hear_stream(stream_audio(path, self.codec.sample_rate), batch)

    def hear_stream(self, blocks: Iterable[np.ndarray], batch: int = 8) -> Transcript:
        """`asr_stream`, and what is wrong with the first piece that failed."""
        self.lm.check_task("asr")
        pieces = audible(blocks, self._longest_piece())
        return as_one(hear_pieces(self.codec, pieces, self.transcripts, batch))

    def _longest_piece(self) -> int:
        """Samples of the longest stretch that is transcribed at once: as in training, or 1 s."""
        seconds = max(1.0, self.coverage.longest_frames / self.codec.frame_rate)
        beside = 12.0 if self.lm.tokenizer.text.interleaved else 8.0
        room = self.lm.max_positions / (self.codec.frame_rate + beside)
        return int(min(seconds, room) * self.codec.sample_rate)

    def transcribe(self, first: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of codes of codebook 1, each (T,); those that failed as well."""
        return [made.text for made in self.transcripts(first)]

    def transcripts(self, first: Sequence[np.ndarray]) -> list[Transcript]:
        """Transcripts of codes of codebook 1, each (T,), and what is wrong with them."""
        return hear(self.lm, first)

    def decode(self, prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        """The wave of the new part. The prompt is decoded before it, so that it starts clean."""
        return decode(self.models.codec, prompt, new)


def _check(wave: Any, name: str, *, also: str = "", allow_silence: bool = False) -> None:
    if not isinstance(wave, np.ndarray):
        raise ValueError(f"{name}: give samples as a NumPy array{also}, not {repr(wave)[:60]}")
    if wave.dtype.kind != "f":
        raise ValueError(f"{name}: give samples from -1 to 1 as floats, not as {wave.dtype}")
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

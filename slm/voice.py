"""Voice: TTS, ASR, voice conversion and continuation with a codec, an AR and a NAR.

Its folder:

    codec/   ar/   nar/     the models (no nar/ if the codec has one codebook, or for ASR alone)
    prompts/NAME.json       codes, transcript and credit of each shipped prompt
    sampling.json           generation settings, if the voice was saved with its own
    README.md               the model card
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torchaudio.functional import edit_distance

from codec import load_codec, read_audio, write_audio
from codec.audio import check_name as check_name
from codec.audio import check_recording, stream_audio
from codec.io import sha256_of
from codec.program import software
from codec.transcripts import has_words
from slm.config import SamplingConfig, check_seed
from slm.data.coverage import Coverage
from slm.data.prompts import Prompt, load_prompts
from slm.export.voice_folder import (
    NO_CONVERSION,
    load_sampling,
    local_folder,
    ship,
    unknown_prompt,
    write_extras,
)
from slm.generation.asr import (
    Transcript,
    audible_pieces,
    encode,
    join_transcripts,
    split_at_quiet,
    transcribe,
    transcribe_pieces,
)
from slm.generation.checks import is_empty, is_empty_level, speech_level
from slm.generation.conversion import continue_speech, convert, encode_source
from slm.generation.long_form import (
    LongText,
    fits_behind,
    has_paragraphs,
    join,
    join_speeches,
    split_text,
)
from slm.generation.rerank import can_transcribe, transcripts
from slm.generation.sampling import restrict_speech, speech_bounds
from slm.generation.streaming import stream
from slm.generation.tts import Models, Speech, Utterance, decode, synthesize
from slm.generation.voice_activity import reason_without_speech
from slm.models.ar import SpeechLM, digest_of
from slm.models.nar import NAR
from slm.tokenization.markup import read_markup
from slm.tokenization.text_normalization import (
    NO_TEXT,
    NormalizedText,
    clean_text,
    remove_signs,
    unread_signs,
)

logger = logging.getLogger(__name__)

WORDS_PER_SECOND = 2.7
"""Speaking rate of read English."""
PROMPT_SHARE = 1 / 2
"""Maximum length of a prompt, as a share of the longest training utterance."""
PROMPT_TEXTS = 1024
"""Prompt texts whose normalized form is kept."""

Sound = Float[np.ndarray, " S"] | Path | Prompt | str
"""A wave at the codec's sample rate, a recording's path, codes, or the name of a shipped prompt."""


class Voice:
    """TTS, ASR, voice conversion and continuation. Every user error raises ValueError.

    `sampling` holds the generation settings, `prompts` the named prompts and `lexicon` respellings
    of words (in lower case); all may be changed.
    """

    def __init__(
        self,
        models: Models,
        prompts: dict[str, Prompt] | None = None,
        *,
        sampling: SamplingConfig | None = None,
        longest_prompt: float = 15.0,
        folder: Path | None = None,
    ):
        """
        Args:
            longest_prompt: longer recordings are truncated to this, in seconds, or to
                half of the longest training utterance.
            folder: where the voice was loaded from; `save_pretrained` copies it.

        Raises:
            ValueError: models of different codecs.
        """
        self.models = models
        self.codec, self.lm, self.nar, self.coverage = models
        self.prompts = prompts or {}
        self.sampling = sampling or SamplingConfig()
        self.lexicon: dict[str, str] = {}
        self.longest_prompt = longest_prompt
        self.folder = folder
        self._normalize_prompt = lru_cache(PROMPT_TEXTS)(
            lambda text: self.normalize(text, "the prompt's text")
        )
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
        """Loads a voice from its folder or a hub id.

        Args:
            base: folder or hub id of the text LLM, if it has moved since training.
            dtype: of the weights of LLM and NAR.

        Raises:
            ValueError: no such voice, a damaged file, or a missing text LLM.
        """
        folder = local_folder(path_or_hub_id)
        codec = load_codec(folder / "codec", device)
        lm = SpeechLM.load(folder / "ar", base, dtype).to(device)
        nar = NAR.load(folder / "nar", dtype).to(device) if (folder / "nar").is_dir() else None
        models = Models(codec, lm, nar, Coverage.load(folder / "ar"))
        prompts = load_prompts(folder / "prompts")
        return cls(models, prompts, sampling=load_sampling(folder), folder=folder)

    @cached_property
    def digest(self) -> str:
        """16 hex digits over the weights of all models."""
        models = [self.lm.lm, *([self.nar] if self.nar is not None else [])]
        parts = [self.codec.stamp.digest, *map(digest_of, models)]
        return sha256_of(" ".join(parts), 16)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copies the voice with its current sampling and prompts; replaces a voice in `folder`.

        The card lists the prompts, unless it was edited.

        Raises:
            ValueError: a folder that holds something else.
        """
        source = self.folder
        assert source is not None, "recipes/lib/voice_training.py writes new voices"

        def finish(copy: Path) -> None:
            if copy != source.resolve():
                self.lm.save_origin(copy / "ar", source / "ar")
            write_extras(copy, self.lm, self.coverage, self.prompts, self.sampling)

        ship(source, Path(folder), finish)

    # ---------------------------------------------------------------- TTS

    def tts(
        self, text: str, prompt: Sound, prompt_text: str | None = None, seed: int = 0
    ) -> Speech:
        """Zero-shot TTS: speech of `text` with the speaker of `prompt`.

        Returns a wave (S,) at the codec's sample rate and codes (Q, T), without the prompt. A text
        that is longer than the training utterances is generated in pieces, which are joined with
        pauses; `codes` are those of the pieces, without the pauses.

        Args:
            prompt_text: transcript of `prompt`; None: the model transcribes it.

        Raises:
            ValueError: a text without words or of an unknown script, and a prompt that the voice
                cannot use.
        """
        _check_request(text, seed)
        known = self.prompt(prompt, prompt_text)
        return self.synthesize([self.prepare_long(text, known, int(seed))])[0]

    def tts_batch(
        self, texts: Sequence[str], prompts: Sequence[Sound], seeds: Sequence[int] | None = None
    ) -> list[Speech]:
        """TTS of several texts in batches; each result equals `tts` alone under its seed.

        Raises:
            ValueError: as `tts`, and for lists of different lengths.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list, not the string {texts[:60]!r}")
        seeds = seeds if seeds is not None else [0] * len(texts)
        if not len(texts) == len(prompts) == len(seeds):
            raise ValueError(
                f"{len(texts)} texts, {len(prompts)} prompts and {len(seeds)} seeds; give one of "
                "each for every text"
            )
        for text, seed in zip(texts, seeds, strict=True):
            _check_request(text, seed)
        known = [self.prompt(prompt) for prompt in prompts]
        return self.synthesize(
            [self.prepare_long(*one) for one in zip(texts, known, map(int, seeds), strict=True)]
        )

    def stream(
        self,
        text: str,
        prompt: Sound,
        prompt_text: str | None = None,
        seed: int = 0,
        chunk_seconds: float = 0.5,
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """Streaming TTS: consecutive waves (S,), while codebook 1 is being generated.

        Without retries, best-of-N and most checks, because a chunk cannot be replaced; a failure
        is logged.

        Raises:
            ValueError: as `tts`, and for chunk_seconds that are not positive and finite.
        """
        _check_request(text, seed)
        long_text = self.prepare_long(text, self.prompt(prompt, prompt_text), int(seed))
        return self.stream_prepared(long_text, chunk_seconds)

    def normalize(self, text: str, what: str = "the text") -> NormalizedText:
        """The normalized text with its ids; markup is read before (slm/tokenization/markup.py).

        Raises:
            ValueError: a text without words, or of a script that training lacked, and a break
                whose time is no time.
        """
        marked = read_markup(clean_text(text), self.lexicon)
        if marked.removed:
            logger.warning("%s has tags that are removed: %s", what, " ".join(marked.removed))
        normalized = self.lm.tokenizer.normalize(marked.text)
        self.coverage.check(normalized.text, what)
        signs = unread_signs(normalized.text) if self.lm.tokenizer.text.normalize else []
        if signs:
            logger.warning("%s has signs that are not read: %s", what, " ".join(signs))
            without = remove_signs(normalized.text, signs)
            self.coverage.check(without, what)
            normalized = self.lm.tokenizer.from_normalized(without)
        self.coverage.log_unseen(normalized.text)
        return replace(normalized, original=text, pauses=marked.pauses, respelled=marked.respelled)

    def prepare(self, text: str | NormalizedText, prompt: Prompt, seed: int = 0) -> Utterance:
        """Checks a text and encodes the models' input.

        A prompt with `continuation` has no transcript: `text` includes its words.

        Raises:
            ValueError: as `tts`, and for a text that is too long to generate at once.
        """
        check_tts(self.models)
        text = self.normalize(text) if isinstance(text, str) else text
        prompt.check(self.codec.codebook_sizes)
        return self._utterance(text, prompt, seed)

    def prepare_long(self, text: str | NormalizedText, prompt: Prompt, seed: int = 0) -> LongText:
        """`prepare` for a text of any length, which is split at blank lines, and where necessary.

        The text of a prompt with `continuation` is never split.

        Raises:
            ValueError: as `tts`.
        """
        check_tts(self.models)
        text = self.normalize(text) if isinstance(text, str) else text
        prompt.check(self.codec.codebook_sizes)
        texts, pauses = [text], [0.0]
        if not prompt.continuation:
            prompt_text = self._normalize_prompt(prompt.text)
            fits = fits_behind(prompt, prompt_text, self.models, self.sampling)
            if has_paragraphs(text.text) or not fits(text):
                part_of = self.lm.tokenizer.from_normalized
                pieces = split_text(text.text, lambda part: fits(part_of(part)), text.pauses)
                texts = [replace(part_of(piece.text), respelled=text.respelled) for piece in pieces]
                pauses = [piece.pause for piece in pieces]
        utterances = [self._utterance(one, prompt, seed) for one in texts]
        return LongText(text=text, utterances=utterances, pauses=pauses)

    def _utterance(self, text: NormalizedText, prompt: Prompt, seed: int) -> Utterance:
        check_seed(seed)
        lm, frame_rate = self.lm, self.codec.frame_rate
        least, most = speech_bounds(text.num_tokens, frame_rate, self.sampling)
        num_prompt, prompt_text, num_prompt_words = prompt.codes.shape[1], NO_TEXT, None
        if prompt.continuation:
            least, most = max(0, least - num_prompt), max(1, most - num_prompt)
            num_prompt_words = lambda: num_words_in_prompt(lm, text.text.split(), prompt.codes[0])  # noqa: E731
        else:
            prompt_text = self._normalize_prompt(prompt.text)
        context = lm.format.tts_context(prompt_text, text, prompt.codes[0], num_prompt_words)
        most = restrict_speech(lm, context.ids, least, most, _name(text.text))
        self.coverage.check_length(num_prompt, least, frame_rate, f"the {_name(text.text)}")
        return Utterance(
            text=text, prompt=prompt, prompt_text=prompt_text, context=context.tokens,
            bounds=(least, most), seed=seed, forced=context.forced,
        )  # fmt: skip

    def synthesize(self, texts: Sequence[LongText], batch: int = 8) -> list[Speech]:
        """Speech of each prepared text, `batch` utterances at a time."""
        utterances = [one for text in texts for one in text.utterances]
        speeches: list[Speech] = []
        for start in range(0, len(utterances), batch):
            speeches += self.synthesize_batch(utterances[start : start + batch])
        made = iter(speeches)
        return [join_speeches(text, [next(made) for _ in text.utterances]) for text in texts]

    def synthesize_batch(self, utterances: Sequence[Utterance]) -> list[Speech]:
        """Speech of prepared utterances, in one batch."""
        return synthesize(self.models, utterances, self.sampling)

    def stream_prepared(
        self, text: LongText, chunk_seconds: float = 0.5, failures: list[str] | None = None
    ) -> Iterator[Float[np.ndarray, " _"]]:
        """`stream` for a prepared text; `failures` receives those of its parts."""
        if not 0 < chunk_seconds < float("inf"):
            raise ValueError(f"chunk_seconds must be positive and finite, got {chunk_seconds:g}")
        found = [] if failures is None else failures
        waves = [self._chunks(one, chunk_seconds, found) for one in text.utterances]
        return join(list(zip(waves, text.pauses, strict=True)), self.codec.sample_rate)

    def _chunks(
        self, utterance: Utterance, seconds: float, failures: list[str]
    ) -> Iterator[np.ndarray]:
        rate, codes = self.codec.sample_rate, utterance.prompt.codes
        level, failure = -math.inf, None
        for chunk in stream(self.models, utterance, self.sampling, seconds):
            yield chunk.wave
            level = max(level, speech_level(chunk.wave, rate))
            failure = chunk.failure
        prompt_level = speech_level(self.decode(codes[:, :0], codes), rate)
        if is_empty_level(level, prompt_level):
            failure = "empty"
        if failure is not None:
            failures.append(failure)
            logger.warning("%r: %s", utterance.text.original, failure)

    def save(self, speech: Speech, path: str | Path) -> None:
        """Writes the wave to an audio file with `tags`, atomically."""
        write_audio(path, speech.wave, speech.sample_rate, self.tags(speech.seed))

    def tags(self, seed: int) -> dict[str, str]:
        """Returns the metadata of generated files, for `write_audio`: that they are synthetic
        speech, the software with its version, this voice's digest, and the seed."""
        made = f"synthetic speech by {software()}; voice {self.digest}; seed {seed}"
        return {"software": software(), "comment": made}

    def decode(
        self, prompt: Int[np.ndarray, "Q P"], new: Int[np.ndarray, "Q T"]
    ) -> Float[np.ndarray, " S"]:
        """The wave of `new`, decoded behind `prompt` as context."""
        return decode(self.models.codec, prompt, new)

    # ---------------------------------------------------------------- prompts

    def prompt(self, prompt: Sound, prompt_text: str | None = None) -> Prompt:
        """Codes (Q, T) and transcript of a prompt.

        A recording that is too long is truncated at a pause, and transcribed anew.

        Args:
            prompt_text: its transcript; None: the model transcribes a recording.

        Raises:
            ValueError: an unknown name, an unreadable recording, one without speech, a transcript
                without words, or a voice without ASR where a transcript is missing.
        """
        if not isinstance(prompt_text, str | None):
            raise ValueError(f"prompt_text must be a string, not {repr(prompt_text)[:60]}")
        if prompt_text is not None and not has_words(prompt_text):
            raise ValueError(
                f"the prompt's text {prompt_text!r} has no words; give its transcript, or leave it "
                "out"
            )
        if isinstance(prompt, str):
            if prompt not in self.prompts:
                raise ValueError(unknown_prompt(prompt, self.prompts))
            prompt = self.prompts[prompt]
        if isinstance(prompt, Prompt):
            return prompt if prompt_text is None else replace(prompt, text=prompt_text)
        codes, prompt_text = self._encode_start(prompt, self._max_prompt_seconds, prompt_text)
        if prompt_text is None:
            if not can_transcribe(self.lm):
                raise ValueError("this voice cannot transcribe the prompt; give --prompt-text")
            (prompt_text,) = self._transcripts_or_empty([codes[0]])
            if not prompt_text:
                raise ValueError("the prompt could not be transcribed; give --prompt-text")
            logger.info("transcript of the prompt: %s", prompt_text)
        return Prompt(codes=codes, text=prompt_text)

    @property
    def _max_prompt_seconds(self) -> float:
        longest = self.coverage.longest_frames / self.codec.frame_rate
        return min(self.longest_prompt, longest * PROMPT_SHARE)

    def _encode_start(
        self, prompt: Any, seconds: float, text: str | None = None
    ) -> tuple[np.ndarray, str | None]:
        """Codes (Q, T) of a recording's first seconds, and its text if it was not truncated."""
        rate = self.codec.sample_rate
        wave = read_audio(prompt, rate) if isinstance(prompt, Path) else prompt
        _check_samples(wave, "the prompt")
        name = str(prompt) if isinstance(prompt, Path) else "the prompt"
        if (reason := reason_without_speech(wave, rate)) is not None:
            raise ValueError(f"{name}: no speech was found: {reason}; give a recording of a voice")
        start = truncate_at_pause(wave, max(1, round(seconds * rate)))
        if len(start) == len(wave):
            return encode(self.codec, [wave])[0], text
        if text is not None and not can_transcribe(self.lm):
            raise ValueError(
                f"the prompt has {len(wave) / rate:.1f} s and is truncated, but this voice cannot "
                f"transcribe the rest of it; give at most {seconds:.1f} s with their text"
            )
        logger.warning(
            "the prompt has %.1f s; its first %.1f s are used%s",
            len(wave) / rate, len(start) / rate,
            "" if text is None else "; its text is of all of it and is not used",
        )  # fmt: skip
        return encode(self.codec, [start])[0], None

    def _transcripts_or_empty(self, first: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of codes of codebook 1; empty where ASR fails or the voice has none."""
        if not can_transcribe(self.lm):
            return [""] * len(first)
        return [
            text if failure is None and has_words(text) else ""
            for text, failure in self.transcripts(first)
        ]

    # ---------------------------------------------------------------- conversion, continuation

    def convert(
        self,
        source: Float[np.ndarray, " s"] | Path,
        target: Sound,
        source_text: str | None = None,
        target_text: str | None = None,
    ) -> Speech:
        """Voice conversion: the words of `source` with the speaker of `target`.

        Codebook 1 is the source's, the NAR predicts the others. A source of any length; the result
        has its length.

        Args:
            source_text, target_text: transcripts, for a NAR that takes texts; the model transcribes
                what is missing, and a source that is converted in several pieces.

        Raises:
            ValueError: a voice without a NAR, and recordings that are unusable or have no speech.
        """
        if self.nar is None:
            raise ValueError(NO_CONVERSION)
        if not isinstance(source, Path):
            _check_samples(source, "the source", also=", or a Path")
        rate = self.codec.sample_rate
        if target_text is not None or isinstance(target, Prompt | str):
            prompt = self.prompt(target, target_text)
            prompt.check(self.codec.codebook_sizes)
        else:
            codes = self._encode_start(target, self._max_prompt_seconds)[0]
            known = self._transcripts_or_empty([codes[0]]) if self.nar.takes_texts else [""]
            prompt = Prompt(codes=codes, text=known[0])
        blocks = stream_audio(source, rate) if isinstance(source, Path) else [source]
        name = str(source) if isinstance(source, Path) else "the source"
        encoded = encode_source(self.codec, self._with_speech(blocks, name))
        codes, text = convert(
            self.models, encoded, prompt, self._transcripts_or_empty, self.sampling,
            source_text=source_text,
        )  # fmt: skip
        wave = self.decode(codes[:, :0], codes)[: encoded.num_samples]
        level = speech_level(self.decode(prompt.codes[:, :0], prompt.codes), rate)
        return Speech(
            wave=wave, codes=codes, text=text, prompt_text=prompt.text, sample_rate=rate,
            failure="empty" if is_empty(wave, rate, level) else None, tries=1, seed=0,
        )  # fmt: skip

    def _with_speech(self, blocks: Iterable[np.ndarray], name: str) -> Iterator[np.ndarray]:
        """The blocks of a recording. Raises ValueError behind the last one if none has speech."""
        reasons: list[str | None] = []
        for block in blocks:
            if None not in reasons:
                reasons.append(reason_without_speech(block, self.codec.sample_rate))
            yield block
        if None not in reasons:
            raise ValueError(
                f"{name}: no speech was found: {reasons[0]}; give a recording of a voice"
            )

    def continue_speech(self, prompt: Sound, seconds: float, seed: int = 0) -> Speech:
        """Continues a recording without a text, for at most `seconds`. Returns the new part.

        Raises:
            ValueError: a voice that was not trained on continuation, and an unusable prompt.
        """
        check_seed(seed)
        if isinstance(prompt, Prompt | str):
            known = self.prompt(prompt)
            known.check(self.codec.codebook_sizes)
            codes = known.codes
        else:
            # No text follows: the prompt may be as long as the context allows.
            codes = self._encode_start(prompt, self.longest_prompt)[0]
        return continue_speech(self.models, codes, seconds, self.sampling, seed)

    # ---------------------------------------------------------------- ASR

    def asr(self, waves: Sequence[np.ndarray]) -> list[str]:
        """Transcripts of waves (S,) at the codec's sample rate; empty where there is no speech.

        Raises:
            ValueError: a voice that was not trained on ASR, and arrays that are no waves.
        """
        self.lm.check_task("asr")
        if (isinstance(waves, np.ndarray) and waves.ndim == 1) or isinstance(waves, str | Path):
            raise ValueError(
                "the recording: give samples as a NumPy array in a list, [wave]; asr_file takes a "
                "path"
            )
        for wave in waves:
            _check_samples(
                wave, "the recording", also=" (asr_file takes a path)", allow_silence=True
            )
        pieces = [list(self._pieces_with_speech([wave], [])) for wave in waves]
        made = transcribe_pieces(self.codec, chain.from_iterable(pieces), self.transcripts)
        return [join_transcripts(islice(made, len(of_wave))).text for of_wave in pieces]

    def asr_file(self, path: str | Path, batch: int = 8) -> str:
        """Transcript of a recording of any length, `batch` pieces at a time."""
        return self.transcribe_file(path, batch).text

    def asr_stream(self, blocks: Iterable[np.ndarray], batch: int = 8) -> str:
        """Transcript of a recording given in blocks (S,); any length in bounded memory."""
        return self.transcribe_stream(blocks, batch).text

    def transcribe_file(self, path: str | Path, batch: int = 8) -> Transcript:
        """`asr_file`, with the failure of the first piece that failed."""
        if not isinstance(path, str | Path):
            raise ValueError(
                f"asr_file takes a path; asr takes samples in a list, not {repr(path)[:60]}"
            )
        return self.transcribe_stream(stream_audio(path, self.codec.sample_rate), batch)

    def transcribe_stream(self, blocks: Iterable[np.ndarray], batch: int = 8) -> Transcript:
        """`asr_stream`, with the failure of the first piece that failed; `empty` if no piece has
        speech (slm/generation/voice_activity.py)."""
        self.lm.check_task("asr")
        reasons: list[str] = []
        pieces = self._pieces_with_speech(blocks, reasons)
        made = join_transcripts(transcribe_pieces(self.codec, pieces, self.transcripts, batch))
        if reasons and not made.text and made.failure is None:
            return made._replace(failure="empty")
        return made

    def _pieces_with_speech(
        self, blocks: Iterable[np.ndarray], reasons: list[str]
    ) -> Iterator[np.ndarray]:
        """Pieces of a recording. Those without speech are skipped; `reasons` receives why."""
        for piece in audible_pieces(_checked(blocks), self._longest_piece):
            reason = reason_without_speech(piece, self.codec.sample_rate)
            if reason is None:
                yield piece
                continue
            reasons.append(reason)
            seconds = len(piece) / self.codec.sample_rate
            logger.warning("%.1f s without speech are not transcribed: %s", seconds, reason)

    def transcribe(self, first: Sequence[Int[np.ndarray, " _"]]) -> list[str]:
        """Transcripts of codes of codebook 1, each (T,); also those that failed."""
        return [made.text for made in self.transcripts(first)]

    def transcripts(self, first: Sequence[Int[np.ndarray, " _"]]) -> list[Transcript]:
        """`transcribe`, with failures."""
        return transcribe(self.lm, first)

    @property
    def _longest_piece(self) -> int:
        """Maximum samples transcribed at once: of the longest training utterance, at least 1 s."""
        seconds = max(1.0, self.coverage.longest_frames / self.codec.frame_rate)
        tokens_per_second = self.codec.frame_rate + self.lm.format.asr_tokens_per_second
        seconds = min(seconds, self.lm.max_positions / tokens_per_second)
        return int(seconds * self.codec.sample_rate)


def truncate_at_pause(wave: Float[np.ndarray, " S"], most: int) -> Float[np.ndarray, " s"]:
    """The first samples, at most `most`, up to a pause: half a word would match no word."""
    return wave if len(wave) <= most else next(split_at_quiet([wave], most))


def num_words_in_prompt(lm: SpeechLM, words: Sequence[str], codes: Int[np.ndarray, " T"]) -> int:
    """Returns the number of `words` in `codes` of codebook 1, which are the first ones' speech.

    The number whose words are closest to the model's own transcript; without ASR, by their length.
    """
    if not can_transcribe(lm):
        seconds = len(codes) / lm.vocabulary.codec.frame_rate
        return min(round(seconds * WORDS_PER_SECOND), len(words))
    transcript = transcripts(lm, [codes])[0].lower()
    starts = [" ".join(words[:count]).lower() for count in range(len(words) + 1)]
    distances = [edit_distance(text, transcript) for text in starts]
    return min(range(len(starts)), key=lambda count: distances[count])


def check_tts(models: Models) -> None:
    """Raises ValueError for a voice without TTS."""
    models.lm.check_task("tts")
    if models.nar is None and models.codec.num_codebooks > 1:
        raise ValueError("this voice has no nar/: it transcribes, but has no TTS")


def _name(text: str) -> str:
    """A text in a message: "text", or what it is if it is a single long word."""
    return "text" if len(text) <= 40 or len(text.split()) > 1 else f"word {text[:36] + '...'!r}"


def _check_request(text: Any, seed: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(
            f"the text must be a string, not {repr(text)[:60]}; tts_batch takes a list of texts"
        )
    if not isinstance(seed, int | np.integer):
        raise ValueError(f"seed must be an integer, not {repr(seed)[:60]}")


def _checked(blocks: Iterable[Any]) -> Iterator[np.ndarray]:
    for block in blocks:
        if not isinstance(block, np.ndarray) or block.size:
            _check_samples(block, "the recording", allow_silence=True)
        yield block


def _check_samples(wave: Any, name: str, *, also: str = "", allow_silence: bool = False) -> None:
    if not isinstance(wave, np.ndarray):
        raise ValueError(f"{name}: give samples as a NumPy array{also}, not {repr(wave)[:60]}")
    if wave.dtype.kind != "f":
        raise ValueError(f"{name}: give samples from -1 to 1 as floats, not as {wave.dtype}")
    if wave.ndim != 1:
        raise ValueError(f"{name}: give samples of one channel (S,), not shape {wave.shape}")
    check_recording(wave, name, allow_silence=allow_silence)

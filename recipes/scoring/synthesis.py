"""Synthesizes and transcribes evaluation items with a voice, and scores the results.

Shared by recipes/lib/voice_training.py (at the end of a training) and recipes/judge_voice.py.

Lists: `continuation` and `cross` (recipes/scoring/eval_items.py), and `textless`: speech
continuation from a prompt alone, where there is no reference text and speaker similarity is scored.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from codec import write_audio
from codec.io import sha256_of
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from codec.tokens import TokenRow, TokenShard
from codec.training.run import git_revision
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    ScoredUtterance,
    all_libraries,
    machine,
    rows_of,
    score_asr,
    score_tts,
)
from eval.text import whisper_normalize
from recipes.scoring.eval_items import EvalItem, codes_of, list_name
from recipes.scoring.judges import (
    Judges,
    digest_of_voice,
    load_judges,
    safe_name,
    state_of_files,
)
from recipes.scoring.speaker_similarity import SpeakerSimilarity
from slm.config import SamplingConfig
from slm.generation import checks
from slm.generation.sampling import CHECK_EVERY
from slm.tokenization.text_normalization import normalize as spell_out
from slm.voice import Speech, Voice

logger = logging.getLogger(__name__)

METRICS = (
    *("asr_wer", "asr_cer", "perplexity", "perplexity_all", "wer", "cer", "wrong"),
    *("similarity", "similarity_speaker", "similarity_others", "failure", "fault", "seconds"),
)
"""Columns of a table. `failure`: the voice reports one; `fault`: a check fails, whatever checks the
voice itself ran (`failed_checks`); `wrong`: the WER exceeds WRONG_WER."""
WRONG_WER = 0.5
RESULTS_FILE = "made.jsonl"
"""Results of a list so far, in the folder of its waves: the list resumes from them."""
TEXTLESS = "textless"
STANDARD = SamplingConfig()
"""Limits of `failed_checks`, the same for all settings of sampling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TTSEvalConfig:
    """Items to synthesize, and the models that score them."""

    num_items: int = 8
    """Number of dev items, evenly spaced over the list; 0: none."""
    prompt_seconds: float = 3.0
    """Length of a prompt: the beginning of the item (at most half of it), or another recording,
    which is truncated if it is much longer."""
    batch: int = 8
    """Items generated together."""
    judge: str | None = None
    """Folder of the Whisper model (CTranslate2) that transcribes for WER and CER; null: none."""
    speaker: str | None = None
    """Folder of the speaker encoder; null: no speaker similarity."""
    aligner: str | None = None
    """Hub id or folder of a model (CTC or Whisper) that aligns words, so that a prompt ends between
    two words; null: a prompt ends at a pause, and the judge's transcript decides which words it
    has."""
    sexes: str | None = None
    """JSON file, speaker to sex: `similarity_others` is to speakers of the same sex; null: to any
    others."""
    language: str = "en"
    """Of the texts, for the judge and the normalization of what is compared."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampling of the codes."""

    def __post_init__(self) -> None:
        if self.num_items < 0 or self.batch < 1 or self.prompt_seconds <= 0:
            raise ValueError("need num_items >= 0, batch >= 1 and prompt_seconds > 0")


class Scorers(NamedTuple):
    """The models that score synthesized speech."""

    judges: Judges
    similarity: SpeakerSimilarity | None = None
    """None: only the similarity to the prompt, if there is a speaker encoder."""
    language: str = "en"
    """Of the texts."""


class Result(NamedTuple):
    """The scores of one item."""

    scored: ScoredUtterance
    failed_checks: list[str]
    audio: str | None
    """Name of the wave; None if nothing was synthesized."""
    failure: str | None
    """Failed check that the voice reports, if any; "refused": the item cannot be synthesized."""
    attempts: int
    seed: int | None

    def to_record(self) -> dict[str, Any]:
        """Returns the line of RESULTS_FILE."""
        return {
            "scored": self.scored.to_record(), "faults": self.failed_checks, "audio": self.audio,
            "reported": self.failure, "tries": self.attempts, "seed": self.seed,
        }  # fmt: skip

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Result":
        """Returns the result of a line of RESULTS_FILE."""
        return cls(
            ScoredUtterance.from_record(record["scored"]), record["faults"], record["audio"],
            record["reported"], record["tries"], record["seed"],
        )  # fmt: skip


class ScoredList(NamedTuple):
    """A list of items and their results."""

    name: str
    items: list[EvalItem]
    results: list[Result]

    @property
    def scored(self) -> list[ScoredUtterance]:
        """Scores of the items, in their order."""
        return [result.scored for result in self.results]


def load_scorers(config: TTSEvalConfig, voice: Voice, dev: TokenShard) -> Scorers:
    """Loads the models that `config` names; speakers are those of `dev`."""
    judges = load_judges(config.judge, config.speaker, language=config.language)
    similarity = None
    if judges.embed is not None:
        sexes = Path(config.sexes) if config.sexes is not None else None
        similarity = SpeakerSimilarity(voice, dev, judges.embed, sexes)
    return Scorers(judges, similarity, config.language)


def provenance(
    config: Any, system: str, judges: Judges | None = None, model: str = "", language: str = "en"
) -> Provenance:
    """Returns the provenance of a run's rows.

    Args:
        config: a recipe's configuration, a dataclass with a `seed`.
        model: digest of the system that is scored.
    """
    return Provenance(
        part="tts",
        system=system,
        seed=config.seed,
        git=git_revision(),
        config=sha256_of(json.dumps(dataclasses.asdict(config), sort_keys=True), 16),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
        language=language,
    )


def synthesize_items(
    voice: Voice, name: str, items: Sequence[EvalItem], scorers: Scorers, folder: Path,
    origin: Provenance, batch: int = 8,
) -> ScoredList:  # fmt: skip
    """Synthesizes the items of the list `name` and scores them; writes FOLDER/NAME/ID.wav.

    Item i has the seed `origin.seed` + i. Each batch's results are stored, and a later call with
    the same items, voice, scorers and settings resumes from them.
    """
    folder, textless = folder / name, name == TEXTLESS
    key = _key_of(voice, items, scorers, origin, batch)
    results = _stored_results(folder / RESULTS_FILE, key)
    with tqdm(total=len(items), initial=len(results), desc=name, unit="item") as progress:
        for start in range(0, len(items), batch):
            part = items[start : start + batch]
            places = range(start, start + len(part))
            if results.keys() >= set(places):
                continue
            speeches = _generate(voice, part, origin.seed + start, textless=textless)
            for place, item, speech in zip(places, part, speeches, strict=True):
                progress.update(place not in results)
                results[place] = _score(voice, item, speech, scorers, folder, textless=textless)
            records = [{"key": key, "place": i, **results[i].to_record()} for i in places]
            append_json_lines(folder / RESULTS_FILE, records)
    return ScoredList(name, list(items), [results[place] for place in range(len(items))])


def _generate(
    voice: Voice, items: Sequence[EvalItem], seed: int, *, textless: bool
) -> list[Speech | None]:
    """Speech of each item; None where the voice refuses the item."""
    speeches: list[Speech | None] = [None] * len(items)
    prepared = []
    for index, item in enumerate(items):
        try:
            if textless:
                assert item.remainder is not None
                seconds = item.remainder.shape[1] / voice.codec.frame_rate
                speeches[index] = voice.continue_speech(item.prompt, seconds, seed + index)
            else:
                prepared.append((index, voice.prepare(item.text, item.prompt, seed + index)))
        except ValueError as error:
            logger.warning("%s was not synthesized: %s", item.id, error)
    if prepared:
        made = voice.synthesize_batch([utterance for _, utterance in prepared])
        for (index, _), speech in zip(prepared, made, strict=True):
            speeches[index] = speech
    return speeches


def _key_of(
    voice: Voice, items: Sequence[EvalItem], scorers: Scorers, origin: Provenance, batch: int
) -> str:
    """Digest of everything that the waves and their scores depend on."""
    files = scorers.similarity.files if scorers.similarity is not None else []
    inputs = [[item.id, item.text, item.prompt.text, item.prompt.codes.tolist()] for item in items]
    parts = [
        inputs, dataclasses.asdict(voice.sampling), batch, origin.seed, origin.git,
        origin.model, origin.judge, origin.speaker, origin.language, all_libraries(), machine(),
        state_of_files(files),
    ]  # fmt: skip
    return sha256_of(json.dumps(parts), 16)


def _stored_results(path: Path, key: str) -> dict[int, Result]:
    """Results under this key whose waves still exist, by place in the list.

    Removes those of other keys from the file, because their waves are about to be replaced.
    """
    found, kept = {}, []
    for line in read_appended(path):
        record = line.value
        audio = record["audio"]
        if record["key"] == key and (audio is None or (path.parent / audio).is_file()):
            found[record["place"]] = Result.from_record(record)
            kept.append(record)
    write_json_lines(path, kept)
    return found


def write_prompts(voice: Voice, items: Sequence[EvalItem], folder: Path) -> None:
    """Writes each item's prompt, decoded from its codes, to FOLDER/ID.wav."""
    for item in items:
        wave = voice.decode(item.prompt.codes[:, :0], item.prompt.codes)
        write_audio(folder / f"{safe_name(item.id)}.wav", wave, voice.codec.sample_rate)


def _score(
    voice: Voice, item: EvalItem, speech: Speech | None, scorers: Scorers, folder: Path, *,
    textless: bool,
) -> Result:  # fmt: skip
    """Writes the wave, and scores it; all words of a refused item are deletions."""
    if speech is None:
        nothing = item.prompt.codes[:, :0]
        scored, failed = score_codes(voice, item, nothing, scorers, "refused", textless=textless)
        return Result(scored, failed, None, "refused", 0, None)
    wave = speech.wave
    if item.prompt.continuation:
        wave = _decode_with_prompt(voice, item, speech.codes)
    name = f"{safe_name(item.id)}.wav"
    write_audio(folder / name, wave, voice.codec.sample_rate, voice.tags(speech.seed))
    scored, failed = score_codes(
        voice, item, speech.codes, scorers, speech.failure, textless=textless
    )
    scored = dataclasses.replace(scored, seed=speech.seed)
    return Result(scored, failed, name, speech.failure, speech.tries, speech.seed)


def score_codes(
    voice: Voice, item: EvalItem, codes: Int[np.ndarray, "Q T"], scorers: Scorers,
    failure: str | None = None, *, textless: bool = False,
) -> tuple[ScoredUtterance, list[str]]:  # fmt: skip
    """Returns the scores of codes that follow an item's prompt, and the names of failed checks.

    WER and CER of a continuation count the prompt's words too, since the text has them; similarity
    is of the new part alone. Without new codes nothing is credited for the prompt. `textless`: no
    words are scored, and no checks run.
    """
    rate, judges = voice.codec.sample_rate, scorers.judges
    wave = transcribed = np.zeros(0, np.float32)
    prompt = None
    if failure not in ("empty", "refused") and codes.shape[1]:
        wave = transcribed = voice.decode(item.prompt.codes, codes)
        prompt = (voice.decode(codes[:, :0], item.prompt.codes), rate)
        if item.prompt.continuation and not textless:
            transcribed = _decode_with_prompt(voice, item, codes)

    judge = None if textless else judges.transcribe
    text = "" if textless else item.text
    scored = score_tts(
        item.id, text, wave, rate, judge and (lambda _, rate: judge(transcribed, rate)),
        judges.embed, prompt, failure, scorers.language,
    )  # fmt: skip
    values = dict(scored.values)
    if scorers.similarity is not None and wave.size:
        values |= scorers.similarity.of(item, wave)
    if textless:
        return dataclasses.replace(scored, values=values), []
    transcript = scored.transcript if scored.words is not None else None
    # Maximum length reached: only the voice reports that.
    failed = ["cut"] * (failure == "cut") + failed_checks(
        voice, item, codes, wave, transcript, scorers.language
    )
    values["fault"] = float(bool(failed))
    if scored.words is not None:
        values["wrong"] = float(scored.words.wer > WRONG_WER)
    return dataclasses.replace(scored, values=values), failed


def failed_checks(
    voice: Voice, item: EvalItem, codes: Int[np.ndarray, "Q T"], wave: Float[np.ndarray, " S"],
    transcript: str | None, language: str = "en",
) -> list[str]:  # fmt: skip
    """Runs all checks of slm/generation/checks.py; returns the names of those that fail.

    Comparable between settings of sampling, which run different checks themselves.

    Args:
        transcript: the judge's, for the checks of words; None: without them.
    """
    rate, first, prompt = voice.codec.frame_rate, codes[0], item.prompt
    sample_rate = voice.codec.sample_rate
    prompt_wave = voice.decode(prompt.codes[:, :0], prompt.codes)
    if checks.is_empty(wave, sample_rate, checks.speech_level(prompt_wave, sample_rate)):
        return ["empty"]
    loop_length = max(8, round(STANDARD.loop_seconds * rate))
    found = {
        "loop": checks.has_loop(first, loop_length, CHECK_EVERY),
        "silence": checks.longest_silence(wave, sample_rate) > STANDARD.silence_seconds,
        "leak": checks.repeats_codes(first, prompt.codes[0], rate),
        "early": False,
        "mismatch": False,
    }
    try:
        bounds = voice.prepare(item.text, prompt).bounds
    except ValueError:  # The voice refuses the text; the codes are the codec's own.
        pass
    else:
        spelled = spell_out if voice.lm.tokenizer.text.normalize else str
        found["early"] = checks.is_early(
            codes.shape[1], bounds, spelled(item.text), prompt.codes.shape[1], spelled(prompt.text)
        )
    if transcript is not None:
        # Normalized, because Whisper writes numbers in digits.
        hypothesis, text, before = (
            whisper_normalize(one, language) for one in (transcript, item.text, prompt.text)
        )
        found["early"] |= checks.lacks_end(hypothesis, text)
        found["leak"] |= checks.begins_with_prompt(hypothesis, before, text)
        if not (found["early"] or found["leak"]):
            wrong = checks.share_of_wrong_letters(hypothesis, text)
            found["mismatch"] = wrong >= checks.MAX_MISMATCH
    return [name for name, failed in found.items() if failed]


def _decode_with_prompt(voice: Voice, item: EvalItem, codes: np.ndarray) -> np.ndarray:
    return voice.decode(codes[:, :0], np.concatenate([item.prompt.codes, codes], axis=1))


def codec_rows(
    voice: Voice, name: str, items: Sequence[EvalItem], scorers: Scorers, origin: Provenance
) -> list[Row]:
    """Returns the scores of the recordings' own codes after the same prompts: the upper limit of
    the lists `continuation` and `textless`."""
    textless = name == TEXTLESS
    if not (textless or scorers.judges.judge_name or scorers.judges.embed):
        return []
    scored = []
    for item in items:
        assert item.remainder is not None
        scored.append(score_codes(voice, item, item.remainder, scorers, textless=textless)[0])
    return rows_of(list_name(f"dev-{name}", items), scored, origin)


def write_results(
    path: Path, scored: Mapping[str, Sequence[ScoredList]], frame_rate: float
) -> None:
    """Writes results.jsonl: a line per setting, list and item, with transcript, wave and scores."""
    records = []
    for setting, lists in scored.items():
        for one in lists:
            for item, result in zip(one.items, one.results, strict=True):
                scores = result.scored
                record = {
                    "setting": setting,
                    "list": one.name,
                    "id": item.id,
                    "audio": result.audio,
                    "text": item.text,
                    "heard": scores.transcript,
                    "wer": None if scores.words is None else scores.words.wer,
                    "cer": None if scores.characters is None else scores.characters.rate,
                    "reported": result.failure,
                    "faults": result.failed_checks,
                    "tries": result.attempts,
                    "seed": result.seed,
                    "prompt_id": item.prompt_id,
                    "prompt_text": item.prompt.text,
                    "speaker": item.speaker,
                    **scores.values,
                    "prompt_seconds": item.prompt.codes.shape[1] / frame_rate,
                }
                records.append(record)
    write_json_lines(path, records)


def transcribe_items(
    voice: Voice, rows: Sequence[TokenRow], origin: Provenance, batch: int = 8
) -> list[Row]:
    """Returns the scores of the voice's own ASR; all words of a refused row are deletions."""
    origin = dataclasses.replace(origin, part="asr")
    if not origin.model and voice.folder is not None:
        origin = dataclasses.replace(origin, model=digest_of_voice(voice.folder))
    texts: list[str] = []
    for start in tqdm(range(0, len(rows), batch), "asr", unit="batch"):
        texts += _transcripts(voice, rows[start : start + batch])
    scored = [
        score_asr(row.id, row.text, text, origin.language)
        for row, text in zip(rows, texts, strict=True)
    ]
    return rows_of(list_name("dev-asr", rows), scored, origin, prefix=ASR_PREFIX)


def _transcripts(voice: Voice, rows: Sequence[TokenRow]) -> list[str]:
    """Transcripts as one batch, or one by one if a row does not fit into the model's context."""
    try:
        return voice.transcribe([codes_of(row)[0] for row in rows])
    except ValueError as error:
        if len(rows) == 1:
            logger.warning("%s was not transcribed: %s", rows[0].id, error)
            return [""]
    return [text for row in rows for text in _transcripts(voice, [row])]

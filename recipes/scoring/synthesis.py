"""Lets a voice speak and transcribe, and scores both. recipes/lib/voice_training.py does so after
training,
recipes/judge_voice.py on its own.

Lets a voice go on from recordings without a text, and scores what it adds.

The list is called `textless`: `continuation` is a text's, spoken from its beginning on. There are
no words to compare; what counts is whether the voice stays the prompt's.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codec import write_audio
from codec.io import atomic_file, sha256_of
from codec.tokens import TokenRow
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    Utterance,
    all_libraries,
    append_lines,
    machine,
    read_lines,
    rows_of,
    score_asr,
    score_tts,
)
from eval.text import normalize
from recipes.lib.run import git_revision
from recipes.scoring.eval_items import Line, codes_of, list_name
from recipes.scoring.judges import (
    Judges,
    digest_of_voice,
    safe_name,
    state_of_files,
)
from recipes.scoring.speaker_similarity import Likeness
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
"""In the order of a table's columns."""
WRONG_WER = 0.5
"""An utterance with a higher WER is wrong, whatever the voice itself found."""
MADE = "made.jsonl"
"""Beside the waves of a list: what was made, so that a later start goes on."""


STANDARD = SamplingConfig()
"""Whose limits `fault` takes, whatever a setting's own checks are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeakConfig:
    """What is spoken, and who judges it."""

    num_items: int = 8
    """Dev items, spread over the list; 0: none."""
    prompt_seconds: float = 3.0
    """Length of a prompt: the beginning that a continuation goes on from (of an item at most half),
    or another recording, which is cut if it is much longer."""
    batch: int = 8
    """Items generated together."""
    judge: str | None = None
    """Folder of the Whisper model that transcribes what was spoken; null: no WER."""
    speaker: str | None = None
    """Folder of the speaker encoder; null: no similarity."""
    aligner: str | None = None
    """Hub id or folder of a model (CTC or Whisper) that tells where a prompt's words end; null: a
    prompt is cut where it is the quietest, and the judge hears which words it holds."""
    sexes: str | None = None
    """A JSON file, speaker to sex: other speakers are then of the same sex; null: any others."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the codes are drawn."""

    def __post_init__(self) -> None:
        if self.num_items < 0 or self.batch < 1 or self.prompt_seconds <= 0:
            raise ValueError("speak: num_items >= 0, batch >= 1 and prompt_seconds > 0, please")


class Ears(NamedTuple):
    """Who judges what was said."""

    judges: Judges
    likeness: Likeness | None
    """None: no similarity but to the prompt, if that."""


class Made(NamedTuple):
    """A line as it was spoken and scored."""

    scored: Utterance
    faults: list[str]
    """What every check finds (`faults`)."""
    audio: str | None
    """Name of the file; None where nothing was spoken."""
    reported: str | None
    """What the voice itself reports, or `refused`."""
    tries: int
    seed: int | None


class Spoken(NamedTuple):
    """A list of lines as it was spoken and scored."""

    name: str
    lines: list[Line]
    made: list[Made]

    @property
    def scored(self) -> list[Utterance]:
        return [one.scored for one in self.made]


def say(voice: Voice, lines: Sequence[Line], seed: int) -> list[Speech | None]:
    """What was spoken as one batch; None where the text could not be."""
    speeches: list[Speech | None] = [None] * len(lines)
    ready = []
    for index, line in enumerate(lines):
        try:
            ready.append((index, voice.prepare(line.text, line.prompt, seed + index)))
        except ValueError as error:
            logger.warning("%s was not spoken: %s", line.id, error)
    if ready:
        spoken = voice.speak([utterance for _, utterance in ready])
        for (index, _), speech in zip(ready, spoken, strict=True):
            speeches[index] = speech
    return speeches


def speak_lines(
    voice: Voice, name: str, lines: Sequence[Line], speak: SpeakConfig, ears: Ears, folder: Path,
    origin: Provenance,
) -> Spoken:  # fmt: skip
    """Says the lines under `origin.seed`, `origin.seed` + 1, ..., writes FOLDER/NAME/ID.wav, and
    scores them.

    Every batch is kept in FOLDER/NAME/made.jsonl: a later call that would do the same goes on
    behind it.
    """
    folder = folder / name
    kept = folder / MADE
    key = _key_of(voice, lines, speak, ears, origin)
    made = _made(kept, key)
    for start in range(0, len(lines), speak.batch):
        part = lines[start : start + speak.batch]
        places = range(start, start + len(part))
        if made.keys() >= set(places):
            continue
        speeches = say(voice, part, origin.seed + start)
        for place, line, speech in zip(places, part, speeches, strict=True):
            made[place] = _score(voice, line, speech, ears, folder)
        append_lines(kept, [_kept(key, place, made[place]) for place in places])
    return Spoken(name, list(lines), [made[place] for place in range(len(lines))])


def _key_of(
    voice: Voice, lines: Sequence[Line], speak: SpeakConfig, ears: Ears, origin: Provenance
) -> str:
    """Changes with all that decides what the lines sound like and how they are scored."""
    files = ears.likeness.files if ears.likeness is not None else []
    said = [[line.id, line.text, line.prompt.text, line.prompt.codes.tolist()] for line in lines]
    whole = [
        said, dataclasses.asdict(voice.sampling), speak.batch, origin.seed, origin.git,
        origin.model, origin.judge, origin.speaker, all_libraries(), machine(),
        state_of_files(files),
    ]  # fmt: skip
    return sha256_of(json.dumps(whole), 16)


def _made(kept: Path, key: str) -> dict[int, Made]:
    """By place in the list, what an earlier call under the same key has made and is still there.

    What has another key is forgotten, because its waves are about to be replaced.
    """
    found, lines = {}, []
    for line in read_lines(kept):
        record = json.loads(line)
        audio = record["audio"]
        if record.pop("key") == key and (audio is None or (kept.parent / audio).is_file()):
            place, scored = record.pop("place"), Utterance.from_json(record.pop("scored"))
            found[place] = Made(scored=scored, **record)
            lines.append(line)
    with atomic_file(kept) as temporary:
        append_lines(temporary, lines)
    return found


def _kept(key: str, place: int, made: Made) -> str:
    record = {"key": key, "place": place, **made._asdict(), "scored": made.scored.to_json()}
    return json.dumps(record, ensure_ascii=False)


def write_prompts(voice: Voice, lines: Sequence[Line], folder: Path) -> None:
    """FOLDER/ID.wav: the prompt of each line, as the codec decodes it."""
    for line in lines:
        wave = voice.decode(line.prompt.codes[:, :0], line.prompt.codes)
        write_audio(folder / f"{safe_name(line.id)}.wav", wave, voice.codec.sample_rate)


def _score(voice: Voice, line: Line, speech: Speech | None, ears: Ears, folder: Path) -> Made:
    """Writes what was spoken, and scores it: a refused text loses all its words."""
    if speech is None:
        scored, found = judge_codes(voice, line, line.prompt.codes[:, :0], ears, "refused")
        return Made(scored, found, None, "refused", 0, None)
    wave = _whole(voice, line, speech.codes) if line.prompt.continuation else speech.wave
    name = f"{safe_name(line.id)}.wav"
    write_audio(folder / name, wave, voice.codec.sample_rate)
    scored, found = judge_codes(voice, line, speech.codes, ears, speech.failure)
    scored = dataclasses.replace(scored, seed=speech.seed)
    return Made(scored, found, name, speech.failure, speech.tries, speech.seed)


def judge_codes(
    voice: Voice, line: Line, codes: np.ndarray, ears: Ears, failure: str | None = None
) -> tuple[Utterance, list[str]]:
    """Scores the new part: its voice alone, but the words behind the beginning that it goes on.
    Also what is wrong with it, by name.

    Where nothing was added, the beginning's own words and voice earn nothing.
    """
    rate, judges = voice.codec.sample_rate, ears.judges
    if failure in ("empty", "refused") or not codes.shape[1]:
        wave = whole = np.zeros(0, np.float32)
        prompt = None
    else:
        wave = voice.decode(line.prompt.codes, codes)
        prompt = (voice.decode(codes[:, :0], line.prompt.codes), rate)
        whole = _whole(voice, line, codes) if line.prompt.continuation else wave

    def hear(_wave: np.ndarray, rate: int) -> str:
        return judges.transcribe(whole, rate)

    scored = score_tts(line.id, line.text, wave, rate, hear, judges.embed, prompt, failure)
    values = dict(scored.values)
    if ears.likeness is not None and wave.size:
        values |= ears.likeness.of(line, wave)
    heard = scored.transcript if judges.judge_name else None
    # Every setting reports what was cut; nothing but this can tell it afterwards.
    found = ["cut"] * (failure == "cut") + faults(voice, line, codes, wave, heard)
    values["fault"] = float(bool(found))
    if not judges.judge_name:
        return dataclasses.replace(scored, values=values, words=None, characters=None), found
    assert scored.words is not None
    values["wrong"] = float(scored.words.wer > WRONG_WER)
    return dataclasses.replace(scored, values=values), found


def faults(
    voice: Voice, line: Line, codes: np.ndarray, wave: np.ndarray, heard: str | None
) -> list[str]:
    """What is wrong with an utterance by every check, with the judge's ears for the words.

    So settings whose voice checks less, and reports fewer failures for it, can be compared.
    """
    if checks.is_empty(wave):
        return ["empty"]
    rate, first = voice.codec.frame_rate, codes[0]
    loop_length = max(8, round(STANDARD.loop_seconds * rate))
    found = {
        "loop": checks.has_loop(first, loop_length, CHECK_EVERY),
        "silence": checks.longest_silence(wave, voice.codec.sample_rate) > STANDARD.silence_seconds,
        "leak": checks.repeats_codes(first, line.prompt.codes[0], rate),
        "early": _is_early(voice, line, codes.shape[1]),
    }
    if heard is not None:
        # The judge writes numbers in figures, whatever the text does.
        said, text, before = (normalize(one) for one in (heard, line.text, line.prompt.text))
        found["early"] |= checks.lacks_end(said, text)
        found["leak"] |= checks.begins_with_prompt(said, before, text)
    return [name for name, is_so in found.items() if is_so]


def _is_early(voice: Voice, line: Line, num_frames: int) -> bool:
    """By the bounds and letters that the voice itself goes by."""
    try:
        bounds = voice.prepare(line.text, line.prompt).bounds
    except ValueError:  # The codec's own codes of a text that is refused.
        return False
    spelt = spell_out if voice.lm.tokenizer.text.normalize else str
    prompt = line.prompt
    return checks.is_early(
        num_frames, bounds, spelt(line.text), prompt.codes.shape[1], spelt(prompt.text)
    )


def _whole(voice: Voice, line: Line, codes: np.ndarray) -> np.ndarray:
    """The wave of a beginning and what goes on from it."""
    return voice.decode(codes[:, :0], np.concatenate([line.prompt.codes, codes], axis=1))


def score_codec(
    voice: Voice, items: Sequence[TokenRow], begun: Sequence[Line], ears: Ears, origin: Provenance
) -> list[Row]:
    """The ceiling: the items' own codes behind the very beginnings that the voice was given."""
    if not ears.judges.judge_name and ears.judges.embed is None:
        return []
    scored = [
        judge_codes(voice, line, codes_of(row)[:, line.prompt.codes.shape[1] :], ears)[0]
        for row, line in zip(items, begun, strict=True)
    ]
    return rows_of(list_name("dev-continuation", begun), scored, origin)


def write_results(path: Path, spoken: Mapping[str, Sequence[Spoken]], rate: float) -> None:
    """results.jsonl: what was said of every line in every setting, where it lies, its scores."""
    lines = []
    for setting, lists in spoken.items():
        for one in lists:
            for line, made in zip(one.lines, one.made, strict=True):
                lines.append({"setting": setting, "list": one.name, **_record(line, made)})
                lines[-1]["prompt_seconds"] = line.prompt.codes.shape[1] / rate
    with atomic_file(path) as temporary:
        temporary.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
            encoding="utf-8",
        )


def _record(line: Line, made: Made) -> dict[str, Any]:
    """Of one line in one setting."""
    scored = made.scored
    return {
        "id": line.id,
        "audio": made.audio,
        "text": line.text,
        "heard": scored.transcript,
        "wer": None if scored.words is None else scored.words.wer,
        "cer": None if scored.characters is None else scored.characters.rate,
        "reported": made.reported,
        "faults": made.faults,
        "tries": made.tries,
        "seed": made.seed,
        "prompt_id": line.prompt_id,
        "prompt_text": line.prompt.text,
        "speaker": line.speaker,
        **scored.values,
    }


def transcribe_items(
    voice: Voice, items: Sequence[TokenRow], origin: Provenance, batch: int = 8
) -> list[Row]:
    """WER of the model's own ASR on the items' codes; what it refuses loses all its words."""
    if not origin.model and voice.folder is not None:
        origin = dataclasses.replace(origin, model=digest_of_voice(voice.folder))
    texts: list[str] = []
    for start in range(0, len(items), batch):
        texts += _heard(voice, items[start : start + batch])
    scored = [score_asr(row.id, row.text, text) for row, text in zip(items, texts, strict=True)]
    return rows_of(list_name("dev-asr", items), scored, origin, prefix=ASR_PREFIX)


def _heard(voice: Voice, items: Sequence[TokenRow]) -> list[str]:
    """Transcripts as one batch, or one by one where an item does not fit into the model."""
    try:
        return voice.transcribe([codes_of(row)[0] for row in items])
    except ValueError as error:
        if len(items) == 1:
            logger.warning("%s was not transcribed: %s", items[0].id, error)
            return [""]
    return [text for row in items for text in _heard(voice, [row])]


def provenance(
    config: Any, system: str, judges: Judges | None = None, model: str = ""
) -> Provenance:
    """Where a run's rows come from; `model` is a digest of what is scored."""
    return Provenance(
        system=system,
        seed=config.seed,
        git=git_revision(),
        config=sha256_of(json.dumps(dataclasses.asdict(config), sort_keys=True), 16),
        model=model,
        judge=judges.judge_name if judges else "",
        speaker=judges.speaker_name if judges else "",
    )


TEXTLESS = "textless"


def go_on_lines(voice: Voice, lines: Sequence[Line], ears: Ears, folder: Path, seed: int) -> Spoken:
    """Goes on from each line's prompt, for at most as long as its recording does, under `seed`,
    `seed` + 1, ...; writes FOLDER/textless/ID.wav, prompts included."""
    made = []
    for number, line in enumerate(lines):
        assert line.rest is not None
        seconds = line.rest.shape[1] / voice.codec.frame_rate
        try:
            speech = voice.continue_speech(line.prompt, seconds, seed + number)
        except ValueError as error:
            logger.warning("%s was not gone on with: %s", line.id, error)
            scored = score(voice, line, line.rest[:, :0], ears, "refused")
            made.append(Made(scored, [], None, "refused", 0, None))
            continue
        name = f"{safe_name(line.id)}.wav"
        whole = np.concatenate([line.prompt.codes, speech.codes], axis=1)
        wave = voice.decode(whole[:, :0], whole)
        write_audio(folder / TEXTLESS / name, wave, voice.codec.sample_rate)
        scored = score(voice, line, speech.codes, ears, speech.failure)
        scored = dataclasses.replace(scored, seed=speech.seed)
        made.append(Made(scored, [], name, speech.failure, speech.tries, speech.seed))
    return Spoken(TEXTLESS, list(lines), made)


def rests(voice: Voice, lines: Sequence[Line], ears: Ears) -> Spoken:
    """The ceiling: what the recordings themselves go on with."""
    made = []
    for line in lines:
        assert line.rest is not None
        made.append(Made(score(voice, line, line.rest, ears), [], None, None, 0, None))
    return Spoken(TEXTLESS, list(lines), made)


def score(
    voice: Voice, line: Line, codes: np.ndarray, ears: Ears, failure: str | None = None
) -> Utterance:
    """Failure, seconds and, where there is a speaker encoder, similarities of the new part."""
    rate, judges = voice.codec.sample_rate, ears.judges
    wave = np.zeros(0, np.float32)
    if failure != "empty" and codes.shape[1]:
        wave = voice.decode(line.prompt.codes, codes)
    prompt = (voice.decode(codes[:, :0], line.prompt.codes), rate)
    scored = score_tts(line.id, "", wave, rate, _unheard, judges.embed, prompt, failure)
    values = dict(scored.values)
    if ears.likeness is not None and wave.size:
        values |= ears.likeness.of(line, wave)
    return dataclasses.replace(scored, values=values, words=None, characters=None)


def _unheard(_wave: np.ndarray, _rate: int) -> str:
    return ""

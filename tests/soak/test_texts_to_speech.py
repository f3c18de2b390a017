"""What models/small reports as good speech is speech of the text: 1,015 generations of words,
names, numbers, lists, questions, plain and hard sentences, judged by Whisper base.

    silent   the judge finds no word, or the level is 40 dB under the prompt's
    wrong    the judge's character error rate is 0.8 or more

Whisper does not know isolated words well: "three" becomes "I'm sorry". What seems silent or wrong
is therefore judged again behind its prompt, and is neither if there at least half of its letters
are right.

The table is out/soak/texts_to_speech.md; out/soak/texts_to_speech/ has a row of every generation.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchaudio.functional import edit_distance

from codec.io import atomic_file
from codec.transcripts import has_words
from slm.generation.checks import speech_level
from slm.tokenization.text_normalization import normalize
from slm.voice import Voice

ROOT = Path(__file__).resolve().parents[2]
JUDGE = ROOT / "models" / "whisper-base"
TEXTS = json.loads((ROOT / "tests" / "soak" / "texts_to_speak.json").read_text())
OUT = ROOT / "out" / "soak" / "texts_to_speech"
SILENT_DROP = 40.0
WRONG, FINE = 0.8, 0.2
"""Character error rates of the judge's transcript."""
RIGHT_BEHIND_PROMPT = 0.5
"""Maximum character error rate of the end of a transcript of prompt and speech."""
PAUSE_SECONDS = 0.3
"""Between prompt and speech."""
MAX_UNREPORTED = 0.0
"""Share of generations that are silent or wrong without a failure; not reached yet (LOG.md)."""

pytestmark = pytest.mark.skipif(
    not (JUDGE / "model.bin").is_file(), reason="needs models/whisper-base: make models"
)


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice.from_pretrained(ROOT / "models" / "small")


@pytest.fixture(scope="module")
def judge() -> Any:
    from eval.transcribe import Judge

    return Judge(JUDGE, num_threads=1)


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def readings(text: str) -> tuple[str, str]:
    """Letters spelled out and as written: the judge writes 6:15 as 615."""
    return letters(normalize(text)) if has_words(text) else "", letters(text)


def error_rate(text: str, transcript: str) -> float:
    """Character error rate."""
    pairs = zip(readings(text), readings(transcript), strict=True)
    return min(edit_distance(asked, found) / len(asked) for asked, found in pairs)


def error_rate_at_end(text: str, transcript: str) -> float:
    """Character error rate of the end of a transcript; of all ends the best one counts."""
    return min(
        edit_distance(asked, found[start:]) / len(asked)
        for asked, found in zip(readings(text), readings(transcript), strict=True)
        for start in range(max(0, len(found) - 2 * len(asked)), len(found) + 1)
    )


def judged(row: dict[str, Any], judge: Any, voice: Voice, wave: Any) -> dict[str, Any]:
    """The row with what the judge finds in the wave."""
    rate = voice.codec.sample_rate
    prompt = voice.prompts[row["prompt"]].codes
    prompt_wave = voice.decode(prompt[:, :0], prompt)
    drop = speech_level(prompt_wave, rate) - speech_level(wave, rate)
    transcript = judge.transcribe(wave, rate)
    alone = error_rate(row["text"], transcript)
    found = {"drop": drop, "transcript": transcript, "error_rate": alone, "behind_prompt": None}
    silent, wrong = not has_words(transcript), alone >= WRONG
    if silent or wrong:
        pause = np.zeros(round(PAUSE_SECONDS * rate), np.float32)
        both = judge.transcribe(np.concatenate([prompt_wave, pause, wave]), rate)
        if error_rate_at_end(row["text"], both) <= RIGHT_BEHIND_PROMPT:
            silent = wrong = False
        found["behind_prompt"] = both
    silent |= drop >= SILENT_DROP
    return row | found | {"silent": silent, "wrong": wrong and not silent}


@pytest.mark.parametrize("kind", TEXTS)
def test_speech_of_each_kind_of_text(kind: str, voice: Voice, judge: Any) -> None:
    rows = []
    names = list(voice.prompts)
    for number, text in enumerate(TEXTS[kind]):
        seeds = [100 * number + index for index in range(len(names))]
        made = voice.tts_batch([text] * len(names), names, seeds)
        for name, speech in zip(names, made, strict=True):
            row = {
                "kind": kind, "text": text, "prompt": name, "seed": speech.seed,
                "tries": speech.tries, "failure": speech.failure,
                "seconds": len(speech.wave) / speech.sample_rate,
            }  # fmt: skip
            rows.append(judged(row, judge, voice, speech.wave))
    OUT.mkdir(parents=True, exist_ok=True)
    with atomic_file(OUT / f"{kind}.json") as path:
        path.write_text(json.dumps(rows, indent=1))
    assert len(rows) == len(TEXTS[kind]) * len(names)


def test_table_of_failures() -> None:
    rows = [row for kind in TEXTS for row in json.loads((OUT / f"{kind}.json").read_text())]
    lines = [
        "| texts | generations | repeated | reported | of them fine | silent, not reported "
        "| wrong, not reported | mean error rate |",
        "|---" * 8 + "|",
    ]
    for kind in (*TEXTS, "all"):
        of_kind = [row for row in rows if kind in (row["kind"], "all")]
        reported = [row for row in of_kind if row["failure"] is not None]
        passed = [row for row in of_kind if row["failure"] is None]
        cells = (
            kind, len(of_kind), sum(row["tries"] > 1 for row in of_kind), len(reported),
            sum(row["error_rate"] <= FINE for row in reported),
            sum(row["silent"] for row in passed), sum(row["wrong"] for row in passed),
            f"{sum(row['error_rate'] for row in of_kind) / len(of_kind):.3f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    missed = [row for row in rows if row["failure"] is None and (row["silent"] or row["wrong"])]
    lines += [
        "", "Not reported:", *(
            f"- {row['text']!r}, {row['prompt']}, seed {row['seed']}, {row['seconds']:.2f} s: "
            f"{row['transcript']!r}, behind its prompt {row['behind_prompt']!r}"
            for row in missed
        ),
    ]  # fmt: skip
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    assert len(missed) <= MAX_UNREPORTED * len(rows)

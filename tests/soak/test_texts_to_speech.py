"""What models/small reports as good speech is speech of the text: 1,015 generations of words,
names, numbers, lists, questions, plain and hard sentences, judged by Whisper base.

    silent   the judge finds no word, or the level is 40 dB under the prompt's
    wrong    the judge's character error rate is 0.8 or more

The table is out/soak/texts_to_speech.md; out/soak/texts_to_speech/ has a row of every generation.
"""

import json
from pathlib import Path
from typing import Any

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
MAX_UNREPORTED = 0.0
"""Share of generations that are silent or wrong without a failure."""

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


def error_rate(text: str, transcript: str) -> float:
    """Character error rate, spelled out or as written: the judge writes 6:15 as 615."""

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text.lower()))

    def rate(asked: str, found: str) -> float:
        return edit_distance(asked, found) / len(asked)

    spelled = normalize(transcript) if has_words(transcript) else ""
    return min(
        rate(letters(normalize(text)), letters(spelled)), rate(letters(text), letters(transcript))
    )


@pytest.mark.parametrize("kind", TEXTS)
def test_speech_of_each_kind_of_text(kind: str, voice: Voice, judge: Any) -> None:
    rate = voice.codec.sample_rate
    levels = {
        name: speech_level(voice.decode(prompt.codes[:, :0], prompt.codes), rate)
        for name, prompt in voice.prompts.items()
    }
    rows = []
    for number, text in enumerate(TEXTS[kind]):
        seeds = [100 * number + index for index in range(len(levels))]
        for name, speech in zip(
            levels, voice.tts_batch([text] * len(levels), list(levels), seeds), strict=True
        ):
            transcript = judge.transcribe(speech.wave, rate)
            drop = levels[name] - speech_level(speech.wave, rate)
            rows.append(
                {
                    "kind": kind, "text": text, "prompt": name, "seed": speech.seed,
                    "tries": speech.tries, "failure": speech.failure,
                    "seconds": len(speech.wave) / rate, "drop": drop, "judge": transcript,
                    "error_rate": error_rate(text, transcript),
                    "silent": not has_words(transcript) or drop >= SILENT_DROP,
                }
            )  # fmt: skip
    OUT.mkdir(parents=True, exist_ok=True)
    with atomic_file(OUT / f"{kind}.json") as path:
        path.write_text(json.dumps(rows, indent=1))
    assert len(rows) == len(TEXTS[kind]) * len(voice.prompts)


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
            sum(row["silent"] for row in passed),
            sum(row["error_rate"] >= WRONG for row in passed if not row["silent"]),
            f"{sum(row['error_rate'] for row in of_kind) / len(of_kind):.3f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    missed = [
        row
        for row in rows
        if row["failure"] is None and (row["silent"] or row["error_rate"] >= WRONG)
    ]
    lines += [
        "", "Not reported:", *(
            f"- {row['text']!r}, {row['prompt']}, seed {row['seed']}, {row['seconds']:.2f} s: "
            f"{row['judge']!r}"
            for row in missed
        ),
    ]  # fmt: skip
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    assert len(missed) <= MAX_UNREPORTED * len(rows)

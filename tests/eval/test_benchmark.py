"""eval/benchmark.py."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    ScoredUtterance,
    rows_of,
    score_asr,
    score_reconstruction,
    score_tts,
    table,
)

RATE = 16000
ORIGIN = Provenance(system="s", seed=3, git="abc", model="m", judge="whisper int8", speaker="e")


def talk(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    harmonics = sum(np.sin(2 * np.pi * 130 * k * times) / k for k in range(1, 30))
    return (0.1 * syllables * (harmonics + generator.standard_normal(times.size))).astype("f4")


def transcribe(_wave: np.ndarray, _rate: int) -> str:
    return "hello word"


def embed(wave: np.ndarray, _rate: int) -> np.ndarray:
    return np.array([1.0, float(wave.size > RATE)])


def whole(rows: list[Row]) -> dict[str, Row]:
    return {row.metric: row for row in rows if row.utterance is None}


def test_list_rates_are_of_summed_counts_and_rows_carry_provenance() -> None:
    scored = [
        score_asr("a", "alpha", ""),
        score_asr("b", "bravo charlie delta", "bravo charlie delta"),
    ]
    rows = rows_of("dev", scored, ORIGIN)
    assert whole(rows)["wer"].value == pytest.approx(1 / 4)
    assert whole(rows)["wer"].n == 2
    per_utterance = {row.utterance: row for row in rows if row.metric == "wer" and row.utterance}
    assert (per_utterance["a"].value, per_utterance["a"].n) == (1.0, 1)
    assert (per_utterance["b"].value, per_utterance["b"].n) == (0.0, 3)
    row = whole(rows)["wer"]
    assert (row.seed, row.git, row.model) == (3, "abc", "m")
    assert row.library.startswith("jiwer 4")
    assert all(each in row.library for each in ("whisper-normalizer 0.", "faster-whisper 1."))
    assert row.library.endswith("whisper int8")
    assert row.machine


def test_perfect_reconstruction() -> None:
    wave = talk()
    one = score_reconstruction("u", "Hello world", wave, wave, RATE, transcribe, embed)
    assert one.values["stoi"] == pytest.approx(1.0)
    assert one.values["pesq"] == pytest.approx(4.64, abs=0.01)
    assert one.values["mel_distance"] == 0
    assert one.values["similarity"] == pytest.approx(1.0)
    assert one.words is not None
    assert one.words.wer == 0.5
    assert ScoredUtterance.from_record(json.loads(json.dumps(one.to_record()))) == one


def test_silent_reconstruction_is_a_failure_that_lowers_the_list_scores() -> None:
    def transcribe_sound(wave: np.ndarray, _: int) -> str:
        return "" if not wave.any() else "hello world"

    wave = talk()
    good = score_reconstruction("g", "hello world", wave, wave, RATE, transcribe_sound)
    bad = score_reconstruction(
        "b", "hello world", wave, np.zeros_like(wave), RATE, transcribe_sound
    )
    assert set(bad.missing) == {"stoi", "pesq", "mel_distance"}
    found = whole(rows_of("dev", [good, bad], ORIGIN))
    assert (found["failure"].value, found["failure"].n) == (0.5, 2)
    assert found["stoi"].n == 1
    assert found["wer"].value == 0.5
    assert "(n=1)" in table(found.values())


@pytest.mark.parametrize(
    ("output", "reason"),
    [(talk(1.0), "differ by"), (np.full(2 * RATE, np.nan, np.float32), "NaN")],
)
def test_broken_reconstruction_is_a_failure(output: np.ndarray, reason: str) -> None:
    one = score_reconstruction("u", "hello word", talk(), output, RATE, transcribe, embed)
    assert one.values == {"failure": 1.0}
    assert one.words is not None
    assert one.words.wer == 1.0
    assert set(one.missing) == {"stoi", "pesq", "mel_distance", "similarity"}
    assert all(reason in why for why in one.missing.values())


def test_silent_original_is_an_error() -> None:
    with pytest.raises(ValueError, match="original wave is silent"):
        score_reconstruction("u", "", np.zeros(RATE, np.float32), talk(1.0), RATE, transcribe)


def test_failed_synthesis_counts_as_deletions() -> None:
    empty = np.zeros(0, np.float32)
    one = score_tts("u", "hello world", empty, RATE, transcribe, embed, (talk(), RATE), "empty")
    assert one.words is not None
    assert (one.words.wer, one.values["failure"]) == (1.0, 1.0)
    assert "similarity" not in one.values
    assert one.missing["similarity"] == "the wave is silent"
    fine = score_tts("v", "hello word", talk(), RATE, transcribe, embed, (talk(), RATE))
    assert fine.values["similarity"] == pytest.approx(1.0)
    assert fine.values["failure"] == 0
    assert fine.values["seconds"] == pytest.approx(2.0)


def test_speech_with_nan_is_a_failure() -> None:
    wave = talk()
    wave[7] = np.nan
    one = score_tts("u", "hello word", wave, RATE, transcribe, embed, (talk(), RATE))
    assert one.values["failure"] == 1.0
    assert one.words is not None
    assert one.words.wer == 1.0


def test_own_asr_has_separate_columns() -> None:
    rows = rows_of("dev", [score_asr("a", "alpha", "alpha")], ORIGIN, prefix=ASR_PREFIX)
    assert {row.metric for row in rows} == {"asr_wer", "asr_wil", "asr_mer", "asr_cer"}
    assert all("whisper int8" not in row.library for row in rows)
    assert all(row.library.startswith("jiwer 4") for row in rows)


def test_column_of_two_judges_is_refused() -> None:
    scored = [score_asr("a", "alpha", "alpha")]
    first = rows_of("dev", scored, ORIGIN)
    assert table(first + rows_of("other", scored, ORIGIN)).count("\n") == 3
    second = rows_of("dev", scored, replace(ORIGIN, system="t", judge="another"))
    with pytest.raises(ValueError, match=r"wer was scored in 2 ways.*another.*whisper int8"):
        table(first + second)


def test_utterance_with_its_own_seed() -> None:
    scored = [replace(score_asr("a", "alpha", "alpha"), seed=7922)]
    seeds = {(row.utterance, row.seed) for row in rows_of("dev", scored, ORIGIN)}
    assert seeds == {("a", 7922), (None, 3)}


def test_empty_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no utterance"):
        rows_of("dev", [], ORIGIN)

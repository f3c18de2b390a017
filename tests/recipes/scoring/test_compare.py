"""recipes/scoring/compare.py and results.py."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from eval.benchmark import Row
from recipes.benchmark import main
from recipes.scoring.compare import compare_systems, comparison_table
from recipes.scoring.results import read_results
from recipes.scoring.rows import ORIGINAL, append_rows

JUDGE = "jiwer 4, whisper-x"


def rows_for(system: str, scores: Sequence[float], **given) -> list[Row]:
    """Rows of utterances u0, u1, ... with words 5, 6, ..., and of their list."""
    plain = {
        "part": "tts", "system": system, "list": "dev", "metric": "wer", "n": 1, "seed": 0,
        "git": "", "config": "", "model": system, "library": JUDGE, "machine": "",
    } | given  # fmt: skip
    words = [5 + place if plain["metric"] == "wer" else 1 for place in range(len(scores))]
    rows = [Row(**plain | {"utterance": f"u{place}", "value": score, "n": words[place]})
            for place, score in enumerate(scores)]  # fmt: skip
    value = float(np.average(scores, weights=words))
    return [*rows, Row(**plain | {"utterance": None, "value": value, "n": len(scores)})]


def out(folder: Path, *rows: list[Row]) -> Path:
    for own in rows:
        append_rows(folder / "rows.jsonl", own)
    return folder


def test_better_system_dominates_and_its_interval_excludes_zero(tmp_path: Path, capsys) -> None:
    random = np.random.default_rng(0)
    good = (random.integers(0, 3, 40) / 10).tolist()
    bad = [score + 0.3 for score in good]
    first = out(tmp_path / "a", rows_for("good", good), rows_for(ORIGINAL, [0.0] * 40))
    first = out(first, rows_for("good", [3 - x for x in good], metric="similarity", library="e"))
    second = out(tmp_path / "b", rows_for("bad", bad))
    second = out(second, rows_for("bad", [3 - x for x in bad], metric="similarity", library="e"))
    wer, similarity = compare_systems(read_results([first, second]))
    assert [*wer.systems] == ["good", "bad"]  # Not the originals.
    assert wer.comparisons == 2  # A pair, two measures.
    assert wer.alpha == pytest.approx(0.025)
    for one in (wer, similarity):  # One is better if lower, the other if higher.
        assert one.epsilons["good", "bad"] < 0.005
        assert one.epsilons["bad", "good"] > 0.9
    (difference,) = wer.differences
    words = np.arange(5, 45)
    assert difference.interval.value == pytest.approx(0.3)
    assert wer.systems["good"].value.value == pytest.approx(np.average(good, weights=words))
    assert wer.systems["good"].spread.mean == pytest.approx(np.mean(good))
    assert wer.systems["good"].spread.deviation == pytest.approx(np.std(good, ddof=1))
    # Paired: every resample has the same difference.
    assert difference.interval.low == pytest.approx(0.3)
    main(["compare", str(first), str(second)])
    printed = capsys.readouterr().out
    assert "### tts dev: WER (lower is better)" in printed
    assert "| good | " in printed
    assert "| - | 0.00\u2605 |" in printed
    assert "| bad - good | +0.300 | [0.300, 0.300] | yes |" in comparison_table(wer)


def test_rate_of_seeds_and_shared_utterances(tmp_path: Path) -> None:
    twice = [*rows_for("a", [0.2, 0.4, 0.0]), *rows_for("a", [0.6, 0.4, 0.0], seed=1)]
    folder = out(tmp_path / "o", twice, rows_for("b", [0.2, 0.4]))
    (found,) = compare_systems(read_results([folder]))
    assert found.num_utterances == 2
    # (0.2 + 0.6) * 5 + (0.4 + 0.4) * 6 errors of 22 words.
    assert found.systems["a"].value.value == pytest.approx(8.8 / 22)


def test_last_row_counts(tmp_path: Path) -> None:
    folder = out(tmp_path / "o", rows_for("a", [1.0, 1.0]), rows_for("b", [0.5, 0.5]))
    out(folder, rows_for("a", [0.2, 0.2], git="later"))
    (found,) = compare_systems(read_results([folder]))
    assert found.systems["a"].spread.mean == pytest.approx(0.2)


def test_other_judges_and_lists_are_user_errors(tmp_path: Path) -> None:
    first = out(tmp_path / "a", rows_for("a", [0.1, 0.2]))
    judged = out(tmp_path / "b", rows_for("b", [0.1, 0.2], library="whisper-y"))
    with pytest.raises(ValueError, match=r"wer of tts dev .* a by jiwer 4.*; b by whisper-y"):
        compare_systems(read_results([first, judged]))
    listed = out(tmp_path / "c", rows_for("c", [0.1, 0.2], list="other"))
    out(listed, rows_for("d", [0.1, 0.2], list="other"))
    with pytest.raises(ValueError, match=r"a \(tts dev\) shares no utterance .*/c"):
        compare_systems(read_results([first, listed]))
    both = [out(tmp_path / name, rows_for("a", [0.1, 0.2]), rows_for("b", [0.3, 0.4]))
            for name in "ef"]  # fmt: skip
    assert len(compare_systems(read_results(both))) == 1
    with pytest.raises(ValueError, match="with another system"):
        compare_systems(read_results([first]))
    with pytest.raises(ValueError, match=r"has no rows\.jsonl"):
        read_results([tmp_path])


def test_systems_of_one_name_keep_apart(tmp_path: Path) -> None:
    shared = rows_for(ORIGINAL, [0.0, 0.0], model="")
    first = out(tmp_path / "a", shared, rows_for("codec-8", [0.1, 0.2], model="1"))
    second = out(tmp_path / "b", shared, rows_for("codec-8", [0.3, 0.4], model="2"))
    results = read_results([first, second])
    assert results.folders[str(first)] == {ORIGINAL, "codec-8 (a)"}
    (found,) = compare_systems(results)
    assert [*found.systems] == ["codec-8 (a)", "codec-8 (b)"]
    # Other scores of one model, then another model on another list.
    for name, given in (("c", {"model": "1"}), ("d", {"model": "3", "list": "other"})):
        third = out(tmp_path / name, rows_for("codec-8", [0.5, 0.6], **given))
        assert read_results([first, third]).folders[str(third)] == {f"codec-8 ({name})"}


def test_alpha_is_divided_by_pairs_and_measures(tmp_path: Path) -> None:
    folder = out(tmp_path / "o", *(rows_for(name, [0.1, 0.2]) for name in "abc"))
    (found,) = compare_systems(read_results([folder]))
    assert found.comparisons == 3
    assert len(found.differences) == 3
    assert found.epsilons["a", "b"] >= 0.5  # Equal systems.

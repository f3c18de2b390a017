"""recipes/judge_voice.py: comparison of settings, with an untrained voice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import quiet, save_shard, save_voice

from codec import load_codec
from codec.io import FileLock
from eval.benchmark import ScoredUtterance
from eval.text import word_errors
from recipes.judge_voice import JudgeVoiceConfig, _cell, differences, main, repeated, settings
from recipes.lib.run import load_config
from recipes.scoring.eval_items import EvalItem
from recipes.scoring.rows import read_rows
from slm.data.prompts import Prompt

pytestmark = quiet()


def test_settings_change_what_their_names_say() -> None:
    config = load_config(
        JudgeVoiceConfig, ["compare=[controls,candidates]", "sampling.max_attempts=2"]
    )
    found = settings(config)
    given = config.sampling
    assert next(iter(found)) == "given"
    assert found["one-try"] == replace(given, max_attempts=1)
    assert found["no-window"] == replace(given, repetition_window=0)
    assert found["no-leak"].checks == ("loop", "silence", "early", "mismatch")
    assert found["no-controls"] == replace(given, checks=(), max_attempts=1, repetition_window=0)
    assert {name: found[name].num_candidates for name in found if name.startswith("cand")} == {
        "candidates-4": 4, "candidates-8": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match="no setting 'no-such'; there are controls"):
        JudgeVoiceConfig(compare=("no-such",))
    with pytest.raises(ValueError, match="at least 1"):
        JudgeVoiceConfig(seeds=0)
    with pytest.raises(ValueError, match="prompt_seconds > 0"):
        JudgeVoiceConfig(prompt_seconds=0.0)


def test_seeds_of_an_item_are_one_bootstrap_unit() -> None:
    def scored(heard: str, failure: float) -> ScoredUtterance:
        return ScoredUtterance(
            id="x", values={"failure": failure}, words=word_errors("a b c d", heard),
        )  # fmt: skip

    given = [scored("a b c d", 0.0), scored("a b", 1.0)] * 2
    other = [scored("a b c", 0.0), scored("a", 1.0)] * 2
    found = differences(given, other, seeds=2)
    # Either item is worse by a word in four under both seeds: nothing is uncertain.
    assert found["wer"] == pytest.approx((0.25, 0.25, 0.25))
    assert found["failure"] == (0.0, 0.0, 0.0)
    assert "similarity" not in found


def test_one_item_has_no_confidence_interval() -> None:
    one = ScoredUtterance(id="x", values={"failure": 0.0}, words=word_errors("a b", "a b"))
    worse = replace(one, words=word_errors("a b", "a"))
    found = differences([one, one], [worse, worse], seeds=2)
    assert found["wer"] == (0.5, None, None)
    assert _cell(found["wer"]) == "+0.500"
    found = differences([one, one], [worse, worse], seeds=1)
    assert _cell(found["wer"]) == "+0.500 [+0.500, +0.500]"


def test_repetitions_have_distinct_ids() -> None:
    item = EvalItem("a", "text", Prompt(codes=np.zeros((3, 4), np.int64), text="x"), source_id="a")
    found = repeated([item, item._replace(id="b", source_id="b")], 2)
    assert [one.id for one in found] == ["a", "b", "a.1", "b.1"]
    assert [one.source_id for one in found] == ["a", "b", "a", "b"]


def test_evaluation_in_two_settings_resumes(
    tmp_path: Path, tiny_codec_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    voice = save_voice(tmp_path, tiny_codec_folder)
    stamp = load_codec(tiny_codec_folder).stamp
    dev = save_shard(tmp_path / "dev.parquet", 4, stamp)
    out = tmp_path / "judged"
    given = [
        f"voice={voice}", f"tokens={dev}", f"out={out}", "num_items=2", "seeds=2",
        "prompt_seconds=0.4", "sampling.frames_per_token=[0.1,0.3]", "sampling.spare_seconds=0.2",
    ]  # fmt: skip
    main([*given, "compare=[no-controls]"])
    shown, messages = capsys.readouterr()
    assert shown.startswith((out / "table.md").read_text().strip())
    assert "Finished: scores" in messages
    assert "Differences from `given`" in shown
    rows = read_rows(out / "rows.jsonl")
    whole = {(row.system, row.list.partition("@")[0]): row.n for row in rows if not row.utterance}
    assert whole[("given", "cross")] == whole[("no-controls", "continuation")] == 4
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == 2 * 2 * 4
    for one in results:
        assert one["fault"] in (0.0, 1.0)
        if one["audio"] is not None:
            assert (out / "audio" / one["setting"] / one["list"] / one["audio"]).is_file()
    assert len(list((out / "audio" / "prompts" / "cross").glob("*.wav"))) == 4
    clips = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    assert [(clip["system"], clip["id"]) for clip in clips] == [
        (one["setting"], one["id"]) for one in results
    ]
    for clip in clips:
        assert (out / clip["reference_audio"]).is_file()
        assert clip["audio"] is None or (out / clip["audio"]).is_file()
        assert clip["list"] in {row.list for row in rows}
    records = [json.loads(line) for line in (out / "differences.jsonl").read_text().splitlines()]
    assert {record["setting"] for record in records} == {"no-controls"}
    assert {"value", "low", "high", "n", "seeds"} <= records[0].keys()
    assert all(records[0][key] for key in ("git", "config", "model", "library"))
    # An added setting synthesizes only its own items.
    waves = {path: path.stat().st_mtime_ns for path in (out / "audio").glob("[gn]*/*/*.wav")}
    main([*given, "compare=[no-controls,one-try]"])
    assert {path: path.stat().st_mtime_ns for path in waves} == waves
    again = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert again[: len(results)] == results
    assert len(again) == 3 * 2 * 4
    with FileLock(out), pytest.raises(ValueError, match="another process is running"):
        main(given)


def test_candidates_without_asr_are_refused_before_synthesis(
    tmp_path: Path, tiny_codec_folder: Path
) -> None:
    voice = save_voice(tmp_path, tiny_codec_folder)
    base = json.loads((voice / "ar" / "base.json").read_text())
    tasks = {**base.get("tasks", {}), "tts": 1.0, "asr": 0.0}
    (voice / "ar" / "base.json").write_text(json.dumps({**base, "tasks": tasks}))
    with pytest.raises(ValueError, match=r"without asr.*candidates-4"):
        main([f"voice={voice}", "compare=[candidates-4]", f"out={tmp_path / 'out'}"])

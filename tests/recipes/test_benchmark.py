"""recipes/benchmark.py."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CountingJudge
from tiny_lmspt import SPECTRAL, made

from codec import read_audio
from codec.json_lines import read_json_lines
from eval import metrics, speech
from eval.benchmark import BASIC_MEASURES, Row
from recipes import benchmark as program
from recipes.prepare_data import main as prepare
from recipes.scoring import scores
from recipes.scoring.lists import read_entries
from recipes.scoring.rows import read_rows

RATE = 16000


def whole(rows: list[Row]) -> dict[str, Row]:
    return {row.metric: row for row in rows if row.utterance is None}


def write_list(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_asr_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard = write_list(tmp_path / "heard.jsonl", [{"audio": "in/a.wav", "text": "hello word"}])
    texts = write_list(tmp_path / "texts.jsonl", [{"id": "a", "text": "Hello, world!"}])
    out = tmp_path / "out"
    program.main(
        ["asr", "--list", str(heard), "--references", str(texts), "--out", str(out), "--name", "m"]
    )
    assert whole(read_rows(out / "rows.jsonl"))["asr_wer"].value == 0.5
    assert "| m | heard | 1 | 0.500" in capsys.readouterr().out
    for arguments, message in (
        (["asr", "--list", str(heard)], "has no hypothesis"),
        (["asr", "--list", str(tmp_path / "none")], "no such list"),
    ):
        with pytest.raises(ValueError, match=message):
            program.main([*arguments, "--out", str(out)])
    write_list(texts, [{"id": "a", "text": "Hello, world!"}, {"id": "b", "text": "alpha bravo"}])
    program.main(
        ["asr", "--list", str(heard), "--references", str(texts), "--out", str(tmp_path / "all")]
    )
    row = whole(read_rows(tmp_path / "all" / "rows.jsonl"))["asr_wer"]
    assert (row.value, row.n) == (0.75, 2)  # What was not transcribed has lost its words.
    write_list(texts, [{"id": "b", "text": "x"}])
    with pytest.raises(ValueError, match="has no text for a"):
        program.main(["asr", "--list", str(heard), "--references", str(texts), "--out", str(out)])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "the list is empty"),
        ("{\n", "line 1: no JSON"),
        ('{"id": "a"}\n', "line 1: lacks text"),
        ('{"id": "a", "text": ""}\n{"id": "a", "text": ""}\n', "line 2: 'a' is there twice"),
    ],
)
def test_bad_lists(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "l.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_entries(tmp_path / "l.jsonl", ("id", "text"))


def prepare_cuts(folder: Path, write_wav, count: int = 3) -> Path:
    entries = []
    for index in range(count):
        write_wav(folder / f"{index}.wav", 1.5, seed=index)
        entries.append({"audio": f"{index}.wav", "text": "Hello world."})
    prepare(["list", str(write_list(folder / "l.jsonl", entries)), "--out", str(folder / "cuts")])
    return folder / "cuts" / "all.jsonl.gz"


def test_reconstruction_resumes(
    tmp_path: Path, judge: CountingJudge, tiny_codec_folder: Path, write_wav, capsys, monkeypatch
) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav)
    (tmp_path / "in" / "1.wav").write_bytes(b"")
    out = tmp_path / "out"
    command = ["reconstruction", "--codec", str(tiny_codec_folder), "--cuts", str(cuts)]
    command += ["--measures", *BASIC_MEASURES]
    command += ["--judge", "judge", "--out", str(out), "--codebooks", "2", "--name", "tiny"]
    stop = {"after": 1}
    real = speech.stoi

    def stoi(*arguments) -> float:
        stop["after"] -= 1
        if stop["after"] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setitem(metrics.PAIRED, "stoi", stoi)
    with pytest.raises(KeyboardInterrupt):
        program.main(command)
    assert not (out / "rows.jsonl").exists()
    assert judge.calls == 3  # two originals, one reconstruction
    stop["after"] = 9
    program.main(command)
    assert judge.calls == 4
    rows = read_rows(out / "rows.jsonl")
    coded = whole([row for row in rows if row.system == "tiny"])
    assert coded["bitrate"].value == pytest.approx(25 * 2 * 5)
    assert coded["wer"].n == coded["stoi"].n == 2
    assert len(coded["wer"].model) == 16
    assert {row.utterance for row in rows} == {None, "0", "2"}
    assert json.loads((out / "skipped-tiny.jsonl").read_text())["id"] == "1"
    assert sorted(one.name for one in (out / "waves" / "tiny").rglob("*.wav")) == ["0.wav", "2.wav"]
    capsys.readouterr()
    program.main(command)
    assert judge.calls == 4
    assert read_rows(out / "rows.jsonl") == rows
    assert "| tiny | all | 2 |" in capsys.readouterr().out
    for count in ("0", "4"):
        with pytest.raises(ValueError, match="--codebooks must be 1 to 3"):
            program.main([*command[:-4], "--codebooks", count])


def test_tts_program_counts_silence_as_failure(
    tmp_path: Path, judge: CountingJudge, write_wav, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    write_wav(tmp_path / "a.wav", 1.0)
    soundfile.write(tmp_path / "b.wav", np.zeros(RATE), RATE)
    entries = [
        {"id": "a", "text": "hello world", "audio": "a.wav", "prompt": "p", "failure": None},
        {"id": "b", "text": "hello world", "audio": "b.wav", "prompt": "p", "failure": None},
        {"id": "c", "text": "hello world", "audio": "c.wav", "prompt": "p", "failure": None},
        {"id": "d", "text": "hello world", "audio": None, "prompt": "p", "failure": "refused"},
    ]
    listed = write_list(tmp_path / "results.jsonl", entries)
    out = tmp_path / "out"
    program.main(
        [
            "tts",
            "--list",
            str(listed),
            "--judge",
            "judge",
            "--out",
            str(out),
            "--name",
            "v",
            "--measures",
        ]
    )
    found = whole(read_rows(out / "rows.jsonl"))
    assert (found["failure"].value, found["wer"].value, found["wer"].n) == (0.75, 0.75, 4)
    assert not (out / "skipped-v.jsonl").read_text()
    assert "| v | results | 4 |" in capsys.readouterr().out


def test_changed_inputs_are_scored_again(
    tmp_path: Path, judge: CountingJudge, write_wav, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wav(tmp_path / "a.wav", 1.0)
    entry = {"id": "a", "text": "hello world", "audio": "a.wav", "seed": 5}
    listed = write_list(tmp_path / "results.jsonl", [entry])
    command = [
        "tts",
        "--measures",
        "--list",
        str(listed),
        "--judge",
        "judge",
        "--out",
        str(tmp_path / "out"),
    ]

    def heard(*arguments: str) -> int:
        judge.calls = 0
        program.main([*command, *arguments])
        return judge.calls

    assert [heard(), heard()] == [1, 0]
    assert [heard("--model-digest", "m2"), heard("--model-digest", "m2")] == [1, 0]
    write_wav(tmp_path / "a.wav", 1.2)
    assert [heard(), heard()] == [1, 0]
    write_list(listed, [{**entry, "text": "hello you"}])
    assert [heard(), heard()] == [1, 0]
    monkeypatch.setattr(scores, "all_libraries", lambda: "jiwer 99")
    assert [heard(), heard()] == [1, 0]


def test_changed_recordings_are_scored_again(
    tmp_path: Path, judge: CountingJudge, tiny_codec_folder: Path, write_wav
) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav, count=1)
    command = ["reconstruction", "--codec", str(tiny_codec_folder), "--cuts", str(cuts)]
    command += ["--measures", "--judge", "judge", "--out", str(tmp_path / "out")]
    program.main(command)
    program.main(command)
    assert judge.calls == 2
    write_wav(tmp_path / "in" / "0.wav", 1.5, seed=9)
    program.main(command)
    assert judge.calls == 4


def test_rows_have_provenance(
    tmp_path: Path, judge: CountingJudge, tiny_codec_folder: Path, write_wav
) -> None:
    write_wav(tmp_path / "a.wav", 1.0)
    entry = {"id": "a", "text": "hello world", "audio": "a.wav", "seed": 5, "hypothesis": "hello"}
    listed = str(write_list(tmp_path / "results.jsonl", [entry]))
    (tmp_path / "voice").mkdir()
    shutil.copytree(tiny_codec_folder, tmp_path / "voice" / "codec")
    shared = ["--list", listed, "--voice", str(tmp_path / "voice"), "--out", str(tmp_path / "out")]
    program.main(["tts", *shared, "--judge", "judge", "--measures", "speaking_rate"])
    program.main(["asr", *shared])
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {"wer", "asr_wer"} <= {row.metric for row in rows}
    for row in rows:
        assert all((row.system, row.list, row.git, row.config, row.model, row.library)), row
        assert row.seed == (0 if row.metric.startswith("asr_") else 5)
    assert "judge@" in whole(rows)["wer"].library
    program.main(["asr", *shared, "--limit", "1"])
    assert len({row.config for row in read_rows(tmp_path / "out" / "rows.jsonl")}) == 3


def test_auxiliary_decoder_is_scored(tmp_path, judge, tiny_codec_folder, write_wav) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav, count=1)
    codec = made(SPECTRAL)
    codec.save_pretrained(tmp_path / "lmspt")
    command = [
        "reconstruction",
        "--measures",
        "--auxiliary",
        "--cuts",
        str(cuts),
        "--judge",
        "judge",
    ]
    program.main([*command, "--codec", str(tmp_path / "lmspt"), "--out", str(tmp_path)])
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric == "bitrate"]
    assert [(row.system, row.value) for row in rows] == [("lmspt-auxiliary", 100 * 6)]
    (file,) = (tmp_path / "waves" / "lmspt-auxiliary").rglob("0.wav")
    wave = read_audio(file, 16_000)
    original = torch.from_numpy(read_audio(tmp_path / "in" / "0.wav", 16_000))
    expected = codec.resynthesize(codec.encode(original[None, None]).codes)
    np.testing.assert_allclose(wave, expected[0, 0, : len(wave)].clip(-1, 1), atol=1e-4)
    command += ["--codec", str(tiny_codec_folder), "--out", str(tmp_path / "no")]
    for more, message in (([], "no auxiliary"), (["--codebooks", "1"], "leave --codebooks out")):
        with pytest.raises(ValueError, match=message):
            program.main([*command, *more])


def test_lists_with_the_same_ids_stay_apart(
    tmp_path: Path, judge: CountingJudge, tiny_codec_folder: Path, write_wav
) -> None:
    lists = []
    for index, name in enumerate("ab"):
        write_wav(tmp_path / name / "0.wav", 1.0 + index, seed=index)
        entry = {"audio": "0.wav", "text": "Hello world."}
        listed = write_list(tmp_path / name / "l.jsonl", [entry])
        prepare(["list", str(listed), "--out", str(tmp_path / name)])
        lists += ["--cuts", f"{name}={tmp_path / name / 'all.jsonl.gz'}"]
    command = ["reconstruction", "--codec", f"tiny={tiny_codec_folder}", "--codebooks", "1", "3"]
    command += ["--measures", "--judge", "judge"]
    program.main([*command, *lists, "--out", str(tmp_path / "both")])
    assert judge.calls == 2 * 3
    clips = [line.value for line in read_json_lines(tmp_path / "both" / "clips.jsonl")]
    audio = [tmp_path / "both" / clip["audio"] for clip in clips]
    assert len(set(audio)) == len(audio) == 6
    seconds = {clip["list"]: read_audio(file, RATE).size / RATE
               for clip, file in zip(clips, audio, strict=True)}  # fmt: skip
    assert seconds == pytest.approx({"a": 1.0, "b": 2.0}, abs=0.05)

    def constants(folder: str) -> dict[tuple[str, str, str], float]:
        rows = read_rows(tmp_path / folder / "rows.jsonl")
        kept = ("entropy_bitrate", "codebook_use", "codebook_perplexity")
        return {(r.system, r.list, r.metric): r.value for r in rows if r.metric in kept}

    program.main([*command, *lists[:2], "--out", str(tmp_path / "one")])
    alone = constants("one")
    assert alone
    (tmp_path / "both" / "rows.jsonl").unlink()
    program.main([*command, *lists, "--out", str(tmp_path / "both")])
    assert {key: value for key, value in constants("both").items() if key[1] == "a"} == alone

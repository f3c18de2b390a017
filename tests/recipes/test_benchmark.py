import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lmspt import SPECTRAL, made

from codec import read_audio
from eval import benchmark as scores
from eval.benchmark import (
    Provenance,
    Row,
    Utterance,
    append_rows,
    read_rows,
    rows_of,
    score_asr,
    score_reconstruction,
    score_tts,
    table,
)
from recipes import benchmark as program
from recipes.scoring import judges as scoring

RATE = 16000
ORIGIN = Provenance(system="s", seed=3, git="abc", model="m", judge="whisper int8", speaker="e")


def talk(seconds: float = 2.0, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    syllables = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    harmonics = sum(np.sin(2 * np.pi * 130 * k * times) / k for k in range(1, 30))
    return (0.1 * syllables * (harmonics + generator.standard_normal(times.size))).astype("f4")


def hear(_wave: np.ndarray, _rate: int) -> str:
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


def test_a_perfect_reconstruction() -> None:
    wave = talk()
    one = score_reconstruction("u", "Hello world", wave, wave, RATE, hear, embed)
    assert one.values["stoi"] == pytest.approx(1.0)
    assert one.values["pesq"] == pytest.approx(4.64, abs=0.01)
    assert one.values["mel_distance"] == 0
    assert one.values["similarity"] == pytest.approx(1.0)
    assert one.words is not None
    assert one.words.wer == 0.5
    assert Utterance.from_json(one.to_json()) == one


def test_a_silent_reconstruction_is_a_failure_and_never_flatters() -> None:
    def hear_nothing(wave: np.ndarray, _: int) -> str:
        return "" if not wave.any() else "hello world"

    wave = talk()
    good = score_reconstruction("g", "hello world", wave, wave, RATE, hear_nothing)
    bad = score_reconstruction("b", "hello world", wave, np.zeros_like(wave), RATE, hear_nothing)
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
def test_a_broken_reconstruction_is_a_failure(output: np.ndarray, reason: str) -> None:
    one = score_reconstruction("u", "hello word", talk(), output, RATE, hear, embed)
    assert one.values == {"failure": 1.0}
    assert one.words is not None
    assert one.words.wer == 1.0
    assert set(one.missing) == {"stoi", "pesq", "mel_distance", "similarity"}
    assert all(reason in why for why in one.missing.values())


def test_a_bad_original_is_an_error() -> None:
    with pytest.raises(ValueError, match="original wave is silent"):
        score_reconstruction("u", "", np.zeros(RATE, np.float32), talk(1.0), RATE, hear)


def test_speech_that_failed_counts_all_words_as_lost() -> None:
    empty = np.zeros(0, np.float32)
    one = score_tts("u", "hello world", empty, RATE, hear, embed, (talk(), RATE), "empty")
    assert one.words is not None
    assert (one.words.wer, one.values["failure"]) == (1.0, 1.0)
    assert "similarity" not in one.values
    assert one.missing["similarity"] == "nothing was spoken"
    fine = score_tts("v", "hello word", talk(), RATE, hear, embed, (talk(), RATE))
    assert fine.values["similarity"] == pytest.approx(1.0)
    assert fine.values["failure"] == 0
    assert fine.values["seconds"] == pytest.approx(2.0)


def test_speech_with_nan_is_a_failure() -> None:
    wave = talk()
    wave[7] = np.nan
    one = score_tts("u", "hello word", wave, RATE, hear, embed, (talk(), RATE))
    assert one.values["failure"] == 1.0
    assert one.words is not None
    assert one.words.wer == 1.0


def test_a_models_own_transcripts_have_columns_of_their_own() -> None:
    rows = rows_of("dev", [score_asr("a", "alpha", "alpha")], ORIGIN, prefix=scores.ASR_PREFIX)
    assert {row.metric for row in rows} == {"asr_wer", "asr_wil", "asr_mer", "asr_cer"}
    assert all("whisper int8" not in row.library for row in rows)
    assert all(row.library.startswith("jiwer 4") for row in rows)


def test_a_column_of_two_judges_is_refused() -> None:
    scored = [score_asr("a", "alpha", "alpha")]
    first = rows_of("dev", scored, ORIGIN)
    assert table(first + rows_of("other", scored, ORIGIN)).count("\n") == 3
    second = rows_of("dev", scored, replace(ORIGIN, system="t", judge="another"))
    with pytest.raises(ValueError, match=r"wer was scored in 2 ways.*another.*whisper int8"):
        table(first + second)


def test_an_utterance_may_have_a_seed_of_its_own() -> None:
    scored = [replace(score_asr("a", "alpha", "alpha"), seed=7922)]
    seeds = {(row.utterance, row.seed) for row in rows_of("dev", scored, ORIGIN)}
    assert seeds == {("a", 7922), (None, 3)}


def test_rows_survive_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    first = rows_of("dev", [score_asr("a", "x", "x")], ORIGIN)
    append_rows(path, first)
    with open(path, "a") as file:
        file.write('{"system": "half a li')
    assert read_rows(path) == first
    append_rows(path, first)
    assert read_rows(path) == first + first


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"system": "s"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1"):
        read_rows(tmp_path / "rows.jsonl")


def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no utterance"):
        rows_of("dev", [], ORIGIN)


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
        program.read_list(tmp_path / "l.jsonl", ("id", "text"))


class FakeJudge:
    """Counts what it hears."""

    heard = 0
    compute_type = "none"

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def transcribe(self, _wave: np.ndarray, _rate: int) -> str:
        FakeJudge.heard += 1
        return "hello world"


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "model.bin").touch()
    monkeypatch.setattr(scoring, "Judge", FakeJudge)
    FakeJudge.heard = 0
    return str(tmp_path / "judge")


def prepare_cuts(folder: Path, write_wav, count: int = 3) -> Path:
    from recipes.prepare_data import main

    entries = []
    for index in range(count):
        write_wav(folder / f"{index}.wav", 1.5, seed=index)
        entries.append({"audio": f"{index}.wav", "text": "Hello world."})
    main(["list", str(write_list(folder / "l.jsonl", entries)), "--out", str(folder / "cuts")])
    return folder / "cuts" / "all.jsonl.gz"


def test_reconstruction_program_goes_on_where_it_stopped(
    tmp_path: Path, judge: str, tiny_codec_folder: Path, write_wav, capsys, monkeypatch
) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav)
    (tmp_path / "in" / "1.wav").write_bytes(b"")
    out = tmp_path / "out"
    command = ["reconstruction", "--codec", str(tiny_codec_folder), "--cuts", str(cuts)]
    command += ["--judge", judge, "--out", str(out), "--codebooks", "2", "--name", "tiny"]
    stop = {"after": 1}
    real = scores.speech.stoi

    def stoi(*arguments) -> float:
        stop["after"] -= 1
        if stop["after"] < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(scores.speech, "stoi", stoi)
    with pytest.raises(KeyboardInterrupt):
        program.main(command)
    assert not (out / "rows.jsonl").exists()
    assert FakeJudge.heard == 3  # two originals, one reconstruction
    stop["after"] = 9
    program.main(command)
    assert FakeJudge.heard == 4
    rows = read_rows(out / "rows.jsonl")
    coded = whole([row for row in rows if row.system == "tiny"])
    assert coded["bitrate"].value == pytest.approx(25 * 2 * 5)
    assert coded["wer"].n == coded["stoi"].n == 2
    assert len(coded["wer"].model) == 16
    assert {row.utterance for row in rows} == {None, "0", "2"}
    assert json.loads((out / "skipped-tiny.jsonl").read_text())["id"] == "1"
    assert sorted(path.name for path in (out / "waves" / "tiny").iterdir()) == ["0.wav", "2.wav"]
    capsys.readouterr()
    program.main(command)
    assert FakeJudge.heard == 4
    assert read_rows(out / "rows.jsonl") == rows
    assert "| tiny | all | 2 |" in capsys.readouterr().out
    for count in ("0", "4"):
        with pytest.raises(ValueError, match="--codebooks must be 1 to 3"):
            program.main([*command[:-4], "--codebooks", count])


def test_tts_program_counts_silence_as_failure(
    tmp_path: Path, judge: str, write_wav, capsys: pytest.CaptureFixture[str]
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
    program.main(["tts", "--list", str(listed), "--judge", judge, "--out", str(out), "--name", "v"])
    found = whole(read_rows(out / "rows.jsonl"))
    assert (found["failure"].value, found["wer"].value, found["wer"].n) == (0.75, 0.75, 4)
    assert not (out / "skipped-v.jsonl").read_text()
    assert "| v | results | 4 |" in capsys.readouterr().out


def test_what_was_scored_is_scored_anew_when_anything_behind_it_changes(
    tmp_path: Path, judge: str, write_wav, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wav(tmp_path / "a.wav", 1.0)
    entry = {"id": "a", "text": "hello world", "audio": "a.wav", "seed": 5}
    listed = write_list(tmp_path / "results.jsonl", [entry])
    command = ["tts", "--list", str(listed), "--judge", judge, "--out", str(tmp_path / "out")]

    def heard(*arguments: str) -> int:
        FakeJudge.heard = 0
        program.main([*command, *arguments])
        return FakeJudge.heard

    assert [heard(), heard()] == [1, 0]
    assert [heard("--model-digest", "m2"), heard("--model-digest", "m2")] == [1, 0]
    write_wav(tmp_path / "a.wav", 1.2)
    assert [heard(), heard()] == [1, 0]
    write_list(listed, [{**entry, "text": "hello you"}])
    assert [heard(), heard()] == [1, 0]
    monkeypatch.setattr(scoring, "all_libraries", lambda: "jiwer 99")
    assert [heard(), heard()] == [1, 0]


def test_cuts_are_scored_anew_when_their_recordings_change(
    tmp_path: Path, judge: str, tiny_codec_folder: Path, write_wav
) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav, count=1)
    command = ["reconstruction", "--codec", str(tiny_codec_folder), "--cuts", str(cuts)]
    command += ["--judge", judge, "--out", str(tmp_path / "out")]
    program.main(command)
    program.main(command)
    assert FakeJudge.heard == 2
    write_wav(tmp_path / "in" / "0.wav", 1.5, seed=9)
    program.main(command)
    assert FakeJudge.heard == 4


def test_rows_of_the_programs_say_where_they_come_from(
    tmp_path: Path, judge: str, tiny_codec_folder: Path, write_wav
) -> None:
    write_wav(tmp_path / "a.wav", 1.0)
    entry = {"id": "a", "text": "hello world", "audio": "a.wav", "seed": 5, "hypothesis": "hello"}
    listed = str(write_list(tmp_path / "results.jsonl", [entry]))
    (tmp_path / "voice").mkdir()
    shutil.copytree(tiny_codec_folder, tmp_path / "voice" / "codec")
    shared = ["--list", listed, "--voice", str(tmp_path / "voice"), "--out", str(tmp_path / "out")]
    program.main(["tts", *shared, "--judge", judge])
    program.main(["asr", *shared])
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {"wer", "asr_wer"} <= {row.metric for row in rows}
    for row in rows:
        assert all((row.system, row.list, row.git, row.config, row.model, row.library)), row
        assert row.seed == (0 if row.metric.startswith("asr_") else 5)
    assert "judge@" in whole(rows)["wer"].library
    program.main(["asr", *shared, "--limit", "1"])
    assert len({row.config for row in read_rows(tmp_path / "out" / "rows.jsonl")}) == 3


def test_the_auxiliary_decoder_is_scored(tmp_path, judge, tiny_codec_folder, write_wav) -> None:
    cuts = prepare_cuts(tmp_path / "in", write_wav, count=1)
    codec = made(SPECTRAL)
    codec.save_pretrained(tmp_path / "lmspt")
    command = ["reconstruction", "--auxiliary", "--cuts", str(cuts), "--judge", judge]
    program.main([*command, "--codec", str(tmp_path / "lmspt"), "--out", str(tmp_path)])
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric == "bitrate"]
    assert [(row.system, row.value) for row in rows] == [("lmspt-auxiliary", 100 * 6)]
    wave = read_audio(tmp_path / "waves" / "lmspt-auxiliary" / "0.wav", 16_000)
    original = torch.from_numpy(read_audio(tmp_path / "in" / "0.wav", 16_000))
    expected = codec.resynthesize(codec.encode(original[None, None]).codes)
    np.testing.assert_allclose(wave, expected[0, 0, : len(wave)].clip(-1, 1), atol=1e-4)
    command += ["--codec", str(tiny_codec_folder), "--out", str(tmp_path / "no")]
    for more, told in (([], "no auxiliary"), (["--codebooks", "1"], "leave --codebooks out")):
        with pytest.raises(ValueError, match=told):
            program.main([*command, *more])

"""Lists of texts to speak: a bad line costs only itself, and a list goes on where it stopped."""

import json
import logging
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_slm import TEXT, copy_of, quiet, run_slm, save_voice, speak_briefly

from codec.audio import audio_tags
from codec.io import FileLock
from codec.program import CHECKS_FAILED
from slm.models.nar import NAR
from slm.voice import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


def status_of(out: Path) -> int:
    """The exit status that belongs to results.jsonl."""
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return CHECKS_FAILED if any(record["failure"] for record in records) else 0


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    speak_briefly(monkeypatch)


@pytest.mark.usefixtures("brief")
def test_a_list_costs_only_its_bad_lines(
    folder: Path,
    tmp_path: Path,
    write_wav: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_wav(tmp_path / "p.wav", 0.5)
    (tmp_path / "empty.wav").write_bytes(b"")
    lines = [
        {"id": "one", "text": TEXT, "prompt": "ann"},
        {"id": "two words", "text": "a cat", "prompt": "p.wav", "prompt_text": "red hen"},
        {"id": "script", "text": "\u043f\u0440\u0438", "prompt": "ann"},
        {"id": "gone", "text": TEXT, "prompt": "no.wav"},
        {"id": "empty", "text": TEXT, "prompt": "empty.wav"},
        {"id": "../out", "text": TEXT, "prompt": "ann"},
        {"id": "one", "text": TEXT, "prompt": "ann"},
        {"text": TEXT, "prompt": "ann"},
        {"id": "five", "text": TEXT, "prompt": "ann", "prompt_text": 5},
        {"id": "half", "text": "half \ud800 a sign", "prompt": "ann"},
        {"id": 5, "text": TEXT, "prompt": "ann"},
        {"id": "x" * 300, "text": TEXT, "prompt": "ann"},
        {"id": "zero\0byte", "text": TEXT, "prompt": "ann"},
        {"id": "ONE", "text": TEXT, "prompt": "ann"},
        {"id": "sub/", "text": TEXT, "prompt": "ann"},
        {"id": "away/a", "text": TEXT, "prompt": "ann"},
        {"id": "long", "text": TEXT, "prompt": "p" * 5000},
        {"id": "typo", "text": TEXT, "prompt": "p.wav", "prompt_txt": "red hen"},
        {"id": "s/u", "text": "a\u2028cat", "prompt": "ann", "seed": 5},
    ]
    listed = tmp_path / "list.jsonl"
    listed.write_text(
        "\ufeff" + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        + "not json\n", encoding="utf-8", errors="backslashreplace",
    )  # fmt: skip
    out = tmp_path / "out"
    for path in (out, tmp_path / "elsewhere"):
        path.mkdir()
    (out / "away").symlink_to(tmp_path / "elsewhere")
    with caplog.at_level(logging.INFO):
        assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
    for number in [*range(3, 19), 20]:
        assert f"skipped line {number}:" in caplog.text
    assert not any((tmp_path / "elsewhere").iterdir())
    assert "line 14: the id 'ONE' and 'one' are one file on some file systems" in caplog.text
    assert "line 18: prompt_txt: no such key; did you mean prompt_text?" in caplog.text
    assert "line 20: no JSON" in caplog.text
    assert f"{listed}, line 19: the key seed is not used" in caplog.text
    assert "skipped line 4: no.wav: no such recording, nor a prompt of this voice" in caplog.text
    assert "skipped line 8: id is missing" in caplog.text
    assert "skipped line 11: id must be a string, got 5" in caplog.text
    assert "20 lines: 17 skipped" in caplog.text
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    refused = [record for record in records if record["failure"] == "refused"]
    assert {record["id"] for record in refused} == {
        *("script", "gone", "empty", "half", "away/a", "long")
    }
    assert all(record["audio"] is None and record["reason"] for record in refused)
    records = [record for record in records if record["failure"] != "refused"]
    assert [record["id"] for record in records] == ["one", "two words", "s/u"]
    assert records[2]["text"] == "a\u2028cat"
    expected = {"id", "audio", "text", "prompt", "prompt_text", "failure", "tries", "seed", "score"}
    assert set(records[0]) == expected | {"request"}
    waves = sorted(path for path in out.rglob("*.wav") if path.is_file())
    assert [path.name for path in waves] == ["one.wav", "u.wav", "two words.wav"]
    assert all("synthetic speech by Parlance" in audio_tags(path)["comment"] for path in waves)
    seconds = sum(soundfile.info(path).duration for path in waves)
    assert f"{seconds:.1f} s of speech in " in caplog.text
    assert "times real time" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x"}, "text is missing"),
        (
            {"id": "x", "text": "\u043f", "prompt": "ann"},
            "of the script CYRILLIC",
        ),
        ({"id": "x", "text": "...", "prompt": "ann"}, "text '...' has no words"),
        ({"id": "x", "text": TEXT, "prompt": "no.wav"}, "no.wav: no such recording"),
        ({"id": "x", "text": TEXT, "prompt": "p.wav"}, "trained without asr; give prompt_text"),
        (
            {"id": "x", "text": TEXT, "prompt": "ann", "prompt_text": ".."},
            "prompt_text '..' has no words",
        ),
    ],
)
def test_a_list_without_a_usable_line_is_refused_before_the_voice_is_loaded(
    folder: Path, tmp_path: Path, line: dict[str, str], message: str,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, write_wav: Callable[..., Path],
) -> None:  # fmt: skip
    monkeypatch.setattr(Voice, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    write_wav(tmp_path / "p.wav", 0.5)
    other = copy_of(folder, tmp_path)
    base = json.loads((other / "ar" / "base.json").read_text())
    base["tasks"]["asr"] = 0.0
    (other / "ar" / "base.json").write_text(json.dumps(base))
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    listed.write_text(f"\n{json.dumps(line)}\nnot json\n")
    assert run_slm("tts", "--voice", other, "--list", listed, "--out", out) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {listed}: no line is usable; line 2: ")
    assert message in error
    assert not out.exists()


@pytest.mark.usefixtures("brief")
def test_lists_with_nothing_to_generate(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    arguments = ["--voice", folder, "--list", listed, "--out", out]
    (tmp_path / "empty.wav").write_bytes(b"")
    listed.write_text(json.dumps({"id": "x", "text": TEXT, "prompt": "empty.wav"}))
    with caplog.at_level(logging.INFO):
        assert run_slm("tts", *arguments) == 2
    assert "1 line: 1 skipped, 0 done before; nothing was generated" in caplog.text
    assert capsys.readouterr().err.strip().endswith("list.jsonl: no line is usable")
    listed.write_text(json.dumps({"id": "x", "text": TEXT, "prompt": "ann"}))
    assert run_slm("tts", *arguments) == status_of(out)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert run_slm("tts", *arguments) == status_of(out)
    assert "1 line: 0 skipped, 1 done before; nothing was generated" in caplog.text


@pytest.mark.usefixtures("brief")
def test_a_list_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    lines = [json.dumps({"id": str(i), "text": TEXT, "prompt": "ann"}) for i in range(3)]
    listed.write_text("\n".join(lines[:2]))
    assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
    before = (out / "0.wav").stat().st_mtime_ns
    (out / "1.wav").unlink()  # its result alone does not count
    with open(out / "results.jsonl", "a") as file:
        file.write('{"id": "torn')
    listed.write_text("\n".join(lines))
    assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
    assert (out / "0.wav").stat().st_mtime_ns == before
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["0", "1", "2"]


@pytest.mark.usefixtures("brief")
def test_an_interrupted_list_continues_with_the_same_command(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    lines = [json.dumps({"id": str(i), "text": TEXT, "prompt": "ann"}) for i in range(3)]
    listed.write_text("\n".join(lines))
    arguments = ["tts", "--voice", folder, "--list", listed, "--out", out, "--batch", "1"]
    original, calls = Voice.synthesize_batch, []

    def interrupted(voice: Voice, utterances: list) -> list:
        calls.append(len(utterances))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(voice, utterances)

    monkeypatch.setattr(Voice, "synthesize_batch", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert run_slm(*arguments) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command continues"
    assert [path.name for path in out.glob("*.wav")] == ["0.wav"]
    with caplog.at_level(logging.INFO):
        assert run_slm(*arguments) == status_of(out)
    assert "3 lines: 0 skipped, 1 done before" in caplog.text
    assert len(list(out.glob("*.wav"))) == 3


@pytest.mark.usefixtures("brief")
def test_a_line_that_is_refused_in_its_new_form_is_not_its_old_one(
    folder: Path, tmp_path: Path
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    for text, failure in (("a cat", None), ("\u043f", "refused"), ("\u043f", "refused")):
        lines = [
            {"id": "x", "text": text, "prompt": "ann"},
            {"id": "y", "text": "a", "prompt": "ann"},
        ]
        listed.write_text("\n".join(map(json.dumps, lines)))
        assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
        records = [json.loads(s) for s in (out / "results.jsonl").read_text().splitlines()]
        (record,) = [record for record in records if record["id"] == "x"]
        assert (record["failure"] == "refused") == (failure == "refused")
        assert record["text"] == text
        assert len(records) == 2


@pytest.mark.usefixtures("brief")
def test_a_line_that_changed_is_made_again(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy_of(folder, tmp_path)
    nar = NAR.from_pretrained(other / "nar")
    with torch.no_grad():
        nar.head.weight.add_(1.0)
    nar.save_pretrained(other / "nar")
    recording = write_wav(tmp_path / "p.wav", 0.5)
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    spoken: list[str] = []
    original = Voice.synthesize_batch

    def speak(voice: Voice, utterances: list) -> list:
        spoken.extend(one.text.original for one in utterances)
        return original(voice, utterances)

    monkeypatch.setattr(Voice, "synthesize_batch", speak)

    def made(*arguments: str, voice: Path = folder, **line: str) -> list[str]:
        spoken.clear()
        whole = {"id": "x", "text": "a cat", "prompt": "p.wav", "prompt_text": "red hen", **line}
        listed.write_text(json.dumps(whole))
        assert run_slm(
            "tts", "--voice", voice, "--list", listed, "--out", out, *arguments
        ) == status_of(out)
        assert len((out / "results.jsonl").read_text().splitlines()) == 1
        return list(spoken)

    assert made() == ["a cat"]
    assert made() == []
    assert made(text="a mat") == ["a mat"]
    assert made() == ["a cat"]
    assert made(prompt_text="the dog") == ["a cat"]
    assert made(prompt="ann") == ["a cat"]
    assert made("--seed", "1") == ["a cat"]
    assert made("--greedy") == ["a cat"]
    assert made("--greedy", voice=other) == ["a cat"]
    assert made("--greedy", voice=other) == []
    assert made("--greedy", "--top-k", "3", voice=other) == ["a cat"]
    write_wav(recording, 0.7)
    assert made("--greedy", voice=other) == ["a cat"]


def test_two_runs_in_one_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    listed.write_text(json.dumps({"id": "x", "text": TEXT, "prompt": "ann"}))
    with FileLock(out):
        assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == 2
    assert "another process is running in this folder" in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_results_that_say_too_little_are_made_again(folder: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    listed.write_text(json.dumps({"id": "x", "text": TEXT, "prompt": "ann"}))
    out.mkdir()
    (out / "results.jsonl").write_text('{"id": "x"}\n[]\n7\n{"audio": 3}\n')
    assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
    (line,) = (out / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["audio"] == "x.wav"


@pytest.mark.usefixtures("brief")
def test_a_line_separator_in_a_text_ends_no_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    line = {"id": "h", "text": "a\u2028cat", "prompt": "ann"}
    listed.write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    for num_done in (0, 1):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(
                out
            )
        assert f"1 line: 0 skipped, {num_done} done before" in caplog.text
    (record,) = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(record)["text"] == "a\u2028cat"


@pytest.mark.usefixtures("brief")
def test_a_file_that_cannot_be_written_costs_its_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    (out / "folder.wav").mkdir(parents=True)
    names = ("folder", "one", "one.wav/under", "two")
    lines = [{"id": name, "text": "a", "prompt": "ann"} for name in names]
    listed.write_text("\n".join(map(json.dumps, lines)))
    assert run_slm("tts", "--voice", folder, "--list", listed, "--out", out) == status_of(out)
    for number in (1, 3):
        assert f"skipped line {number}:" in caplog.text
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    audio = {record["id"]: record["audio"] for record in records}
    assert audio == {"folder": None, "one.wav/under": None, "one": "one.wav", "two": "two.wav"}


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_list_in_another_encoding_is_refused_at_the_start(
    folder: Path, tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture
) -> None:
    listed = tmp_path / "list.jsonl"
    line = {"id": "h", "text": "caf\u00e9", "prompt": "ann"}
    listed.write_bytes(json.dumps(line, ensure_ascii=False).encode(encoding))
    assert run_slm("tts", "--voice", folder, "--list", listed, "--out", tmp_path / "out") == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith(f"error: {listed}: is ")
    assert error.endswith("-t UTF-8 OLD > NEW")


@pytest.mark.usefixtures("brief")
def test_status_of_a_list_without_failures(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Voice.synthesize_batch

    def good(voice: Voice, utterances: list) -> list:
        return [replace(speech, failure=None) for speech in original(voice, utterances)]

    monkeypatch.setattr(Voice, "synthesize_batch", good)
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    lines = [json.dumps({"id": name, "text": TEXT, "prompt": "ann"}) for name in "xy"]
    listed.write_text("\n".join(lines))
    run = ["tts", "--voice", folder, "--list", listed, "--out", out]
    assert run_slm(*run) == status_of(out) == 0
    with (out / "results.jsonl").open("a") as file:
        file.write(json.dumps({"id": "of another list", "failure": "cut", "audio": "x.wav"}) + "\n")
    assert run_slm(*run) == 0
    listed.write_text("\n".join([*lines, "no JSON"]))
    assert run_slm(*run) == CHECKS_FAILED

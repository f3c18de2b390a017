"""The command slm: lists go on where they stopped, and what is wrong is one line and status 2."""

import io
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import voiced
from tiny_slm import TEXT, copy_of, quiet, save_voice

from slm.__main__ import main
from slm.config import SamplingConfig
from slm.lists import alone
from slm.nar import NAR
from slm.pipeline import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


def run(*arguments: str | Path) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models know no end: keep what they say short."""
    original = Voice.from_pretrained.__func__  # type: ignore[attr-defined]

    def load(cls, *args, **kwargs) -> Voice:
        voice = original(cls, *args, **kwargs)
        voice.sampling = replace(
            voice.sampling, frames_per_token=(0.2, 0.5), spare_seconds=0.0, tries=2
        )
        return voice

    monkeypatch.setattr(Voice, "from_pretrained", classmethod(load))


@pytest.mark.usefixtures("brief")
def test_command_tts(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    prompt = write_wav(tmp_path / "\u043f\u0440\u043e\u0431\u0430 1.wav", 1.0, 8000)
    out = tmp_path / "new folder" / "\u00e9.wav"
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", prompt]
    assert run("tts", *arguments, "--prompt-text", "red hen", "--seed", "3", "--out", out) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_text"] == "red hen"
    wave, rate = soundfile.read(out)
    assert rate == 16000
    assert len(wave) > 0
    assert run("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", "--out", out) == 0


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
    ]
    listed = tmp_path / "list.jsonl"
    listed.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n", encoding="utf-8")
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 0
    for number in range(3, 12):
        assert f"skipped line {number}:" in caplog.text
    assert "11 lines: 9 skipped" in caplog.text
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    refused = [record for record in records if record["failure"] == "refused"]
    assert {record["id"] for record in refused} == {"script", "gone", "empty", "half"}
    assert all(record["audio"] is None and record["reason"] for record in refused)
    records = [record for record in records if record["failure"] != "refused"]
    assert [record["id"] for record in records] == ["one", "two words"]
    expected = {"id", "audio", "text", "prompt", "prompt_text", "failure", "tries", "seed", "score"}
    assert set(records[0]) == expected | {"request"}
    assert sorted(path.name for path in out.glob("*.wav")) == ["one.wav", "two words.wav"]


@pytest.mark.usefixtures("brief")
def test_a_list_goes_on_where_it_stopped(folder: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    lines = [json.dumps({"id": str(i), "text": TEXT, "prompt": "ann"}) for i in range(3)]
    listed.write_text("\n".join(lines[:2]))
    assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 0
    before = (out / "0.wav").stat().st_mtime_ns
    (out / "1.wav").unlink()  # its result alone does not count
    with open(out / "results.jsonl", "a") as file:
        file.write('{"id": "torn')
    listed.write_text("\n".join(lines))
    assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 0
    assert (out / "0.wav").stat().st_mtime_ns == before
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["0", "1", "2"]


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
        assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 0
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
    original = Voice.speak

    def speak(voice: Voice, utterances: list) -> list:
        spoken.extend(one.text for one in utterances)
        return original(voice, utterances)

    monkeypatch.setattr(Voice, "speak", speak)

    def made(*arguments: str, voice: Path = folder, **line: str) -> list[str]:
        spoken.clear()
        whole = {"id": "x", "text": "a cat", "prompt": "p.wav", "prompt_text": "red hen", **line}
        listed.write_text(json.dumps(whole))
        assert run("tts", "--voice", voice, "--list", listed, "--out", out, *arguments) == 0
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
    with alone(out):
        assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 2
    assert "another process is writing here" in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_results_that_say_too_little_are_made_again(folder: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    listed.write_text(json.dumps({"id": "x", "text": TEXT, "prompt": "ann"}))
    out.mkdir()
    (out / "results.jsonl").write_text('{"id": "x"}\n[]\n7\n{"audio": 3}\n')
    assert run("tts", "--voice", folder, "--list", listed, "--out", out) == 0
    (line,) = (out / "results.jsonl").read_text().splitlines()
    assert json.loads(line)["audio"] == "x.wav"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "oo"], "oo: cannot be written"),
        (["--out", "oo.xyz"], "oo.xyz: cannot be written as XYZ"),
        (["--out", "o.wav", "--device", "gpu"], "device 'gpu'"),
        (["--out", "o.wav", "--device", "cuda:99"], "device 'cuda:99'"),
    ],
)
def test_outputs_and_devices_that_there_are_not(
    folder: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Voice, "speak", lambda *_: pytest.fail("nothing should be spoken"))
    assert run("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_command_tts_streams(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", "ann", "--chunk-seconds", "0.1"]
    assert run("tts", *arguments, "--stream", tmp_path / "new" / "o.wav") == 0
    wave, rate = soundfile.read(tmp_path / "new" / "o.wav")
    assert (rate, len(wave) % 640) == (16000, 0)
    capfdbinary.readouterr()
    assert run("tts", *arguments, "--stream", "-") == 0
    piped, _ = soundfile.read(io.BytesIO(capfdbinary.readouterr().out))
    assert np.array_equal(piped, wave)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stream", "o.mp3"], "only WAV is streamed"),
        (["--stream", "o.wav", "--chunk-seconds", "inf"], "positive and finite"),
        (["--stream", "o.wav", "--chunk-seconds", "nan"], "positive and finite"),
    ],
)
def test_streams_that_cannot_be(
    folder: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


def test_options_are_the_sampling_configurations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingConfig] = []

    def speak(voice: Voice, utterances: list) -> list:
        seen.append(voice.sampling)
        raise ValueError("enough")

    monkeypatch.setattr(Voice, "speak", speak)
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", "ann", "--out", tmp_path / "o.wav"]
    options = "--candidates 4 --temperature 0.7 --top-p 0.9 --top-k 5 --checks loop,leak --tries 2"
    assert run("tts", *arguments, *options.split(), "--nar-iterations", "3") == 2
    assert seen == [
        SamplingConfig(
            candidates=4, temperature=0.7, top_p=0.9, top_k=5, checks=("loop", "leak"), tries=2,
            nar_iterations=3,
        )
    ]  # fmt: skip
    assert run("tts", *arguments, "--checks", "none") == 2
    assert seen[1] == SamplingConfig(checks=())


def test_command_vc(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    source = write_wav(tmp_path / "a.wav", 0.8)
    arguments = ["--voice", folder, "--source", source, "--source-text", "red hen"]
    out = tmp_path / "o.wav"
    assert run("vc", *arguments, "--target", "ann", "--out", out) == 0
    assert len(soundfile.read(out)[0]) == 12800
    target = ["--target", write_wav(tmp_path / "b.wav", 0.5), "--target-text", "a cat"]
    assert run("vc", *arguments, *target, "--out", out) == 0
    assert run("vc", *arguments, "--target", "nobody", "--out", out) == 2
    assert "nor a prompt of this voice" in capsys.readouterr().err


def test_command_continue(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.wav"
    arguments = ["--voice", folder, "--prompt", "ann", "--seconds", "0.4", "--out", out]
    assert run("continue", *arguments) == 2
    assert "trained without continuation" in capsys.readouterr().err
    other = copy_of(folder, tmp_path)
    base = json.loads((other / "ar" / "base.json").read_text())
    base["tasks"]["continuation"] = 1.0
    (other / "ar" / "base.json").write_text(json.dumps(base))
    assert run("continue", "--voice", other, *arguments[2:], "--seconds", "inf") == 2
    assert run("continue", "--voice", other, *arguments[2:]) == 0
    assert 0 < len(soundfile.read(out)[0]) <= 6400


def test_command_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("export", "--voice", folder, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert run("export", "--voice", folder, folder) == 2
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_command_asr(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    good = write_wav(tmp_path / "a b.wav", 0.6, 44100)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert run("asr", "--voice", folder, good, tmp_path / "bad.wav") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["audio"] == str(good)
    assert run("asr", "--voice", folder, tmp_path / "bad.wav") == 2
    assert "bad.wav" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "hi"], "give --text and --prompt, or --list"),
        (["--text", "hi", "--list", "x"], "not both"),
        (["--list", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--text", "...", "--prompt", "ann"], "nothing to say"),
        (
            ["--text", "hi", "--prompt", "nobody"],
            "nobody: no such recording, nor a prompt of this voice",
        ),
        (
            ["--text", "hi", "--prompt", "ann", "--temperature", "nan"],
            "temperature must be positive",
        ),
        (["--text", "hi", "--prompt", "ann", "--stream", "-"], "either --out or --stream"),
        (["--text", "hi \udcff", "--prompt", "ann"], "text is no text"),
        (
            ["--text", "hi", "--prompt", "ann", "--prompt-text", "\udcff a"],
            "prompt_text is no text",
        ),
        (["--text", "hi", "--prompt", "ann", "--checks", "lop"], "no check 'lop'"),
        (["--text", "hi", "--prompt", "ann", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_what_people_get_wrong_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run("tts", "--voice", folder, *arguments, "--out", tmp_path / "o.wav") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "o.wav").exists()


@pytest.mark.parametrize("kind", ["silent", "nan", "truncated"])
def test_prompts_that_cannot_be_used(
    folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / f"{kind}.wav"
    wave = {"silent": np.zeros(16000), "nan": np.full(16000, np.nan), "truncated": voiced(1.0)}
    soundfile.write(path, wave[kind], 16000, subtype="FLOAT" if kind == "nan" else "PCM_16")
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:20])
    arguments = ["--text", TEXT, "--prompt", path, "--out", tmp_path / "o.wav"]
    assert run("tts", "--voice", folder, *arguments) == 2
    assert path.name in capsys.readouterr().err

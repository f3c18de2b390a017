"""The command slm: a user error is one line and status 2, before the models load where possible."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import voiced
from tiny_slm import TEXT, copy_of, quiet, run_slm, save_voice, speak_briefly

from codec.audio import audio_tags, write_audio
from codec.program import CHECKS_FAILED
from slm.config import SamplingConfig
from slm.generation.asr import Transcript
from slm.voice import Voice

pytestmark = quiet()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    speak_briefly(monkeypatch)


def check_tag(out: Path, folder: Path, seed: int) -> None:
    """A generated file says what it is."""
    tags, voice = audio_tags(out), Voice.from_pretrained(folder)
    assert tags["software"].startswith("Parlance")
    assert re.fullmatch(
        rf"synthetic speech by Parlance [\d.]+; voice {voice.digest}; seed {seed}", tags["comment"]
    )


@pytest.mark.usefixtures("brief")
def test_command_tts(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    prompt = write_wav(tmp_path / "\u043f\u0440\u043e\u0431\u0430 1.wav", 1.0, 8000)
    out = tmp_path / "new folder" / "\u00e9.wav"
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", prompt]
    assert (
        run_slm("tts", *arguments, "--prompt-text", "red hen", "--seed", "3", "--out", out)
        == CHECKS_FAILED
    )
    record = json.loads(capsys.readouterr().out)
    assert record["prompt_text"] == "red hen"
    assert record["failure"] == "cut"  # The tiny model generates no end.
    wave, rate = soundfile.read(out)
    assert rate == 16000
    assert len(wave) > 0
    check_tag(out, folder, record["seed"])
    assert (
        run_slm("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", "--out", out)
        == CHECKS_FAILED
    )


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
    monkeypatch.setattr(
        Voice, "synthesize_batch", lambda *_: pytest.fail("nothing should be spoken")
    )
    assert run_slm("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_command_tts_streams(
    folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", "ann", "--chunk-seconds", "0.1"]
    assert run_slm("tts", *arguments, "--stream", tmp_path / "new" / "o.wav") == CHECKS_FAILED
    wave, rate = soundfile.read(tmp_path / "new" / "o.wav")
    assert (rate, len(wave) % 640) == (16000, 0)
    check_tag(tmp_path / "new" / "o.wav", folder, 0)
    capfdbinary.readouterr()
    assert run_slm("tts", *arguments, "--stream", "-") == CHECKS_FAILED
    piped, _ = soundfile.read(io.BytesIO(capfdbinary.readouterr().out))
    assert np.array_equal(piped, wave)


@pytest.mark.usefixtures("brief")
def test_a_stream_that_fails_leaves_an_earlier_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.wav"
    out.write_bytes(b"an earlier one")
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", "ann", "--stream", out]
    original = Voice.stream_prepared

    def torn(voice: Voice, *given) -> Iterator[np.ndarray]:
        yield next(original(voice, *given))
        raise ValueError("the middle of it")

    monkeypatch.setattr(Voice, "stream_prepared", torn)
    assert run_slm("tts", *arguments) == 2
    assert out.read_bytes() == b"an earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["o.wav"]
    monkeypatch.setattr(Voice, "stream_prepared", original)
    assert run_slm("tts", *arguments) == CHECKS_FAILED
    assert soundfile.info(out).samplerate == 16000


@pytest.mark.usefixtures("brief")
def test_a_named_pipe_is_written_to_and_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.wav"
    os.mkfifo(out)
    with ThreadPoolExecutor() as pool:
        piped = pool.submit(out.read_bytes)
        assert (
            run_slm("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", "--stream", out)
            == CHECKS_FAILED
        )
        assert piped.result(timeout=30)[:4] == b"RIFF"
    assert out.is_fifo()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tts", "--temperature", "0", "--out", "o.wav"], "temperature must be positive"),
        (["tts", "--checks", "foo", "--out", "o.wav"], "no check 'foo'"),
        (["tts", "--out", "o.wav", "--lexicon", "none.tsv"], "none.tsv: no lexicon"),
        (["tts", "--out", "file/o.wav"], "file is no folder"),
        (["tts", "--stream", "file/deep/o.wav"], "file is no folder"),
        (["tts", "--stream", "folder.wav"], "is a folder; name a file"),
        (["tts", "--out", "shut/deep/o.wav"], "shut may not be written to"),
        (["list", "--out", "file"], "is a file; name a folder"),
        (["list", "--out", "shut"], "shut may not be written to"),
        (["continue", "--top-p", "2", "--out", "o.wav"], "top_p must be between 0 and 1"),
        (["continue", "--out", "shut/o.wav"], "shut may not be written to"),
        (["vc", "--out", "file/o.wav"], "file is no folder"),
        (["export", "file/o"], "file is no folder"),
        (["export", "full"], "contains other files than an export"),
    ],
)
def test_what_can_be_told_early_is_told_before_a_voice_is_loaded(
    tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Voice, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    for name in ("file", "folder.wav/x", "shut/x", "full/x"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    # The tests may run as root, to whom every folder is open.
    monkeypatch.setattr(os, "access", lambda path, _: Path(path).name != "shut")
    texts = {
        "tts": ["tts", "--text", TEXT, "--prompt", "ann"],
        "list": ["tts", "--list", "file"],
        "continue": ["continue", "--prompt", "ann", "--seconds", "1"],
        "vc": ["vc", "--source", "a.wav", "--target", "ann"],
        "export": ["export"],
    }
    command, *rest = arguments
    assert run_slm(*texts[command], "--voice", "v", *rest) == 2
    assert message in capsys.readouterr().err


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
    assert run_slm("tts", "--voice", folder, "--text", TEXT, "--prompt", "ann", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("o.*"))


def without(folder: Path, root: Path, part: str) -> Path:
    """A copy of the voice without a task, its nar/ or its prompts/."""
    other = copy_of(folder, root)
    if (other / part).is_dir():
        shutil.rmtree(other / part)
    else:
        record = json.loads((other / "ar" / "base.json").read_text())
        record["tasks"][part] = 0.0
        (other / "ar" / "base.json").write_text(json.dumps(record))
    return other


TTS = "tts --out o.wav"


@pytest.mark.parametrize(
    ("arguments", "lacks", "message"),
    [
        (f"{TTS} --text hi --prompt nobody", "", "nor a prompt of this voice (ann)"),
        (f"{TTS} --text hi --prompt nobody", "prompts", "nor a prompt of this voice"),
        (f"{TTS} --text hi --prompt nowhere.wav", "", "nowhere.wav: no such recording"),
        (f"{TTS} --text ... --prompt ann", "", "--text '...' has no words"),
        (f"{TTS} --text= --prompt ann", "", "--text '' has no words"),
        (f"{TTS} --text \u043f --prompt ann", "", "of the script CYRILLIC"),
        (f"{TTS} --text hi --prompt ann --prompt-text ..", "", "--prompt-text '..' has no words"),
        (f"{TTS} --text hi --prompt ann --prompt-text \u043f", "", "of the script CYRILLIC"),
        (f"{TTS} --text hi --prompt ann", "tts", "trained without tts"),
        (f"{TTS} --text hi --prompt ann", "nar", "has no TTS"),
        (f"{TTS} --text hi --prompt ann --candidates 2", "asr", "trained without asr"),
        (f"{TTS} --text hi --prompt a.wav", "asr", "give --prompt-text"),
        (f"{TTS} --text hi --prompt ann --seed 99999999999999999999", "", "--seed must be"),
        ("tts --text hi --prompt ann --stream o.wav --chunk-seconds 0", "", "--chunk-seconds"),
        ("tts --list list.jsonl --out out --candidates 2", "asr", "trained without asr"),
        ("tts --list list.jsonl --out out", "tts", "trained without tts"),
        ("asr a.wav", "asr", "trained without asr"),
        ("asr nowhere.wav", "", "nowhere.wav: no such recording"),
        ("asr nowhere.wav neither.wav", "", "nowhere.wav: no such recording"),
        ("asr a.wav --batch 0", "", "--batch must be at least 1"),
        ("vc --source a.wav --target ann --out o.wav", "nar", "no nar/"),
        ("vc --source nowhere.wav --target ann --out o.wav", "", "nowhere.wav: no such recording"),
        ("vc --source a.wav --target nobody --out o.wav", "", "nor a prompt of this voice (ann)"),
        ("vc --source a.wav --target ann --target-text . --out o.wav", "", "has no words"),
        ("continue --prompt ann --seconds 1 --out o.wav", "", "trained without continuation"),
        ("continue --prompt ann --seconds 0 --out o.wav", "", "--seconds must be positive"),
        ("continue --prompt ann --seconds nan --out o.wav", "", "--seconds must be positive"),
    ],
)
def test_requests_that_the_voice_cannot_fulfil_are_refused_before_it_is_loaded(
    folder: Path, tmp_path: Path, arguments: str, lacks: str, message: str,
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, write_wav: Callable[..., Path],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Voice, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    write_wav(tmp_path / "a.wav", 0.2)
    (tmp_path / "list.jsonl").write_text("{}")
    voice = without(folder, tmp_path, lacks) if lacks else folder
    command, *rest = arguments.split(" ")
    assert run_slm(command, "--voice", voice, *rest) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_options_are_the_sampling_configurations(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SamplingConfig] = []

    def speak(voice: Voice, utterances: list) -> list:
        seen.append(voice.sampling)
        raise ValueError("enough")

    monkeypatch.setattr(Voice, "synthesize_batch", speak)
    arguments = ["--voice", folder, "--text", TEXT, "--prompt", "ann", "--out", tmp_path / "o.wav"]
    options = "--candidates 4 --temperature 0.7 --top-p 0.9 --top-k 5 --checks loop,leak --tries 2"
    assert run_slm("tts", *arguments, *options.split()) == 2
    assert seen == [
        SamplingConfig(
            num_candidates=4, temperature=0.7, top_p=0.9, top_k=5, checks=("loop", "leak"),
            max_attempts=2,
        )
    ]  # fmt: skip
    assert run_slm("tts", *arguments, "--checks", "none") == 2
    assert seen[1] == SamplingConfig(checks=())


def test_what_is_not_given_stays_as_the_voice_has_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice, seen = Voice.from_pretrained(folder), []
    voice.sampling = SamplingConfig(greedy=True, top_k=7)
    monkeypatch.setattr(
        Voice, "from_pretrained", lambda *_, **options: seen.append(options) or voice
    )

    def go_on(*given) -> None:
        raise ValueError("enough")

    monkeypatch.setattr(Voice, "continue_speech", go_on)
    monkeypatch.setattr("slm.generation.conversion.check_continuation", lambda _: None)
    arguments = [
        "--voice",
        folder,
        "--prompt",
        "ann",
        "--seconds",
        "1",
        "--out",
        tmp_path / "o.wav",
    ]
    options = ["--temperature", "0.5", "--dtype", "bfloat16"]
    assert run_slm("continue", *arguments, *options) == 2
    assert voice.sampling == SamplingConfig(greedy=True, top_k=7, temperature=0.5)
    assert seen[0]["dtype"] == torch.bfloat16


@pytest.mark.usefixtures("brief")
def test_command_tts_with_halved_weights(folder: Path, tmp_path: Path) -> None:
    arguments = ["--text", TEXT, "--prompt", "ann", "--out", tmp_path / "o.wav"]
    assert run_slm("tts", "--voice", folder, *arguments, "--dtype", "bfloat16") == CHECKS_FAILED
    assert len(soundfile.read(tmp_path / "o.wav")[0]) > 0


def test_command_vc(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    source = write_wav(tmp_path / "a.wav", 0.8)
    arguments = ["--voice", folder, "--source", source, "--source-text", "red hen"]
    out = tmp_path / "o.wav"
    assert run_slm("vc", *arguments, "--target", "ann", "--out", out) == 0
    assert len(soundfile.read(out)[0]) == 12800
    check_tag(out, folder, 0)
    target = ["--target", write_wav(tmp_path / "b.wav", 0.5), "--target-text", "a cat"]
    assert run_slm("vc", *arguments, *target, "--out", out) == 0
    assert run_slm("vc", *arguments, "--target", "nobody", "--out", out) == 2
    assert "nor a prompt of this voice" in capsys.readouterr().err
    hiss = 0.1 * np.random.default_rng(0).standard_normal(32_000)
    write_audio(tmp_path / "hiss.wav", np.concatenate([0.1 * hiss, hiss]).astype("f4"), 16_000)
    arguments = ["--voice", folder, "--source", tmp_path / "hiss.wav", "--target", "ann"]
    assert run_slm("vc", *arguments, "--out", tmp_path / "h.wav") == 2
    assert "hiss.wav: no speech was found: 0.00 s of 4.0 s are voiced" in capsys.readouterr().err
    assert not (tmp_path / "h.wav").exists()


def test_command_continue(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.wav"
    arguments = ["--voice", folder, "--prompt", "ann", "--seconds", "0.4", "--out", out]
    assert run_slm("continue", *arguments) == 2
    assert "trained without continuation" in capsys.readouterr().err
    other = copy_of(folder, tmp_path)
    base = json.loads((other / "ar" / "base.json").read_text())
    base["tasks"]["continuation"] = 1.0
    (other / "ar" / "base.json").write_text(json.dumps(base))
    assert run_slm("continue", "--voice", other, *arguments[2:], "--seconds", "inf") == 2
    assert run_slm("continue", "--voice", other, *arguments[2:]) == 0
    assert 0 < len(soundfile.read(out)[0]) <= 6400


def test_command_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_slm("export", "--voice", folder, tmp_path / "out") == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert run_slm("export", "--voice", folder, folder) == 2
    assert "contains other files than an export" in capsys.readouterr().err


@pytest.mark.usefixtures("brief")
def test_command_asr(
    folder: Path, tmp_path: Path, write_wav: Callable[..., Path], capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    good = write_wav(tmp_path / "a b.wav", 0.6, 44100)
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    assert run_slm("asr", "--voice", folder, good, tmp_path / "bad.wav") == CHECKS_FAILED
    (line,) = capsys.readouterr().out.splitlines()
    record = json.loads(line)
    assert set(record) == {"audio", "text", "failure"}
    assert record["audio"] == str(good)
    reported = Transcript("so far", "cut")
    monkeypatch.setattr(Voice, "transcripts", lambda _, first: [reported for _ in first])
    assert run_slm("asr", "--voice", folder, good) == CHECKS_FAILED
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["failure"]) == ("so far", "cut")
    reported = Transcript("so far", None)
    assert run_slm("asr", "--voice", folder, good, good) == 0
    assert run_slm("asr", "--voice", folder, tmp_path / "bad.wav") == 2
    assert "bad.wav" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "hi"], "give --text and --prompt, or --list"),
        (["--text", "hi", "--list", "x"], "not both"),
        (["--list", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--text", "...", "--prompt", "ann"], "has no words"),
        (
            ["--text", "hi", "--prompt", "nobody"],
            "nobody: no such recording, nor a prompt of this voice",
        ),
        (
            ["--text", "hi", "--prompt", "ann", "--temperature", "nan"],
            "temperature must be positive",
        ),
        (["--text", "hi", "--prompt", "ann", "--stream", "-"], "either --out or --stream"),
        (
            ["--text", "hi \udcff", "--prompt", "ann"],
            "--text 'hi \\udcff' has \\udcff, half of",
        ),
        (
            ["--text", "hi", "--prompt", "ann", "--prompt-text", "\udcff a"],
            "--prompt-text '\\udcff a' has \\udcff, half of a surrogate",
        ),
        (["--text", "hi", "--prompt", "ann", "--checks", "lop"], "no check 'lop'"),
        (["--text", "hi", "--prompt", "ann", "--batch", "0"], "--batch must be at least 1"),
    ],
)
def test_what_people_get_wrong_is_one_line_and_status_2(
    folder: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert run_slm("tts", "--voice", folder, *arguments, "--out", tmp_path / "o.wav") == 2
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
    assert run_slm("tts", "--voice", folder, *arguments) == 2
    assert path.name in capsys.readouterr().err

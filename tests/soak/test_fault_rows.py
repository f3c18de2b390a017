"""Small inputs that once gave wrong results with status 0, one test a row, as a user meets them.

Commands use models/small and the prompt `kathleen`; rows about training use tiny models. The
recordings are made on the spot; PARLANCE_FAULTS names a folder with `audio/` and `texts.jsonl` to
use instead.
"""

import io
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, plain
from tiny_semantic import tiny_semantic
from tiny_slm import SMALL, STAMP, quiet, run_slm, save_base, voice_inputs

from codec import Codec, load_codec
from codec.audio import read_audio, recordings_in, write_audio
from recipes.prepare_data import main as prepare_data
from recipes.tts import main as train_tts
from slm.config import ARConfig, LoRAConfig
from slm.models.ar import SpeechLM
from slm.voice import Voice

VOICE = ROOT / "models" / "small"
BASE = ROOT / "models" / "smollm2-135m-instruct"
RATE = 16_000
PROMPT = "kathleen"
GIVEN = os.environ.get("PARLANCE_FAULTS")
pytestmark = [
    *quiet(),
    pytest.mark.skipif(not BASE.is_dir(), reason="the voice's text LLM is fetched by make models"),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice.from_pretrained(VOICE)


@pytest.fixture(autouse=True)
def commands_share_the_voice(voice: Voice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands load the voice once; what they set is undone."""
    loaded = Voice.from_pretrained

    def load(folder: object, *given: object, **named: object) -> Voice:
        return voice if Path(str(folder)) == VOICE else loaded(folder, *given, **named)

    monkeypatch.setattr(voice, "lexicon", {})
    monkeypatch.setattr(voice, "sampling", voice.sampling)
    monkeypatch.setattr(Voice, "from_pretrained", load)


@pytest.fixture(scope="module")
def speech(voice: Voice) -> np.ndarray:
    """The prompt's own recording, decoded: (S,)."""
    codes = torch.from_numpy(voice.prompts[PROMPT].codes.astype(np.int64))[None]
    wave = voice.codec.decode(codes)[0, 0].detach().numpy()
    return (0.23 * wave / np.abs(wave).max()).astype(np.float32)


def wav(wave: np.ndarray, kind: str = "WAV", **how: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format=kind, **how)
    return file.getvalue()


def container(wave: np.ndarray, path: Path, kind: str, encoder: str) -> None:
    """Writes an MP4 or WebM file."""
    av = pytest.importorskip("av")
    with av.open(path, "w", format=kind) as file:
        stream = file.add_stream(encoder, rate=48_000, layout="mono")
        samples = np.repeat((32767 * wave).astype(np.int16), 3)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 48_000
        resampler = av.AudioResampler(stream.codec_context.format, "mono", 48_000, 960)
        for part in [*resampler.resample(frame), None]:
            file.mux(stream.encode(part))


@pytest.fixture(scope="module")
def audio(speech: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of recordings."""
    if GIVEN:
        return Path(GIVEN) / "audio"
    folder = tmp_path_factory.mktemp("audio")
    whole, size = wav(speech), 2 * len(speech)
    at = whole.index(b"data") + 4
    open_end = b"\x24\xf0\xff\x7f"
    flac = bytearray(wav(speech, "FLAC"))
    flac[21] &= 0xF0  # The number of samples, then their MD5.
    flac[22:42] = bytes(20)
    w64 = bytearray(wav(speech, "W64"))
    data_at = w64.index(b"data") + 16
    w64[16:24], w64[data_at : data_at + 8] = b"\xff" * 8, b"\xff" * 7 + b"\x7f"
    click = np.zeros(2 * RATE, np.float32)
    click[RATE] = 1.0
    files = {
        "espeak_stdout.wav": whole[:4] + open_end + whole[8:at] + open_end + whole[at + 4 :],
        "zero_data.wav": whole[:at] + bytes(4) + whole[at + 4 :],
        "ffpipe.flac": bytes(flac),
        "ffpipe.w64": bytes(w64),
        "short001.wav": wav(speech[:160]),
        "dc.wav": wav(0.6 + speech),
        "impulse.wav": wav(click),
        "f32_int16scale.wav": wav(32767 * speech, subtype="FLOAT"),
        "stereo_inv.wav": wav(np.stack([speech, -speech], 1)),
        "mp3_joined.mp3": 2 * wav(speech, "MP3"),
    }
    assert len(whole) == at + 4 + size
    for name, content in files.items():
        (folder / name).write_bytes(content)
    container(speech, folder / "m4a.m4a", "mp4", "aac")
    container(speech, folder / "webm.webm", "webm", "libopus")
    shutil.copy(folder / "m4a.m4a", folder / "m4a_as_mp3.mp3")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> list[str]:
    return voice_inputs(tmp_path_factory.mktemp("inputs"), tiny_codec_folder)


def tts(*arguments: str | Path) -> int:
    """Status of `slm tts` with models/small."""
    return run_slm("tts", "--voice", VOICE, *arguments)


def one_line(capsys: pytest.CaptureFixture, *parts: str) -> None:
    """The error of a command is one line that has these parts."""
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    assert all(part in lines[0] for part in parts), error


def level(wave: np.ndarray) -> float:
    """Level of the loudest 0.1 s, in dB."""
    parts = np.array_split(np.square(wave.astype(np.float64)), max(1, len(wave) // 1600))
    return 10 * np.log10(max(part.mean() for part in parts) + 1e-12)


SHORT = ["Hello.", "Hi.", "Yes.", "No.", "Stop!", "Why?", "OK.", "One.", "Good morning.", "Go on.",
         "Thank you.", "Wait."]  # fmt: skip


def test_row_01_short_texts(voice: Voice, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompt = voice.prompts[PROMPT]
    loud = level(voice.codec.decode(torch.from_numpy(prompt.codes.astype(np.int64))[None])
                 [0, 0].detach().numpy())  # fmt: skip
    failures = 0
    for text in SHORT:
        made = voice.tts(text, PROMPT, seed=0)
        if made.failure is None:
            assert len(made.wave) > 0.15 * RATE, text
            assert level(made.wave) > loud - 30, text
            assert voice.asr([made.wave])[0], text
        failures += made.failure is not None
    assert failures < len(SHORT) / 2
    status = tts("--text", "Hello.", "--prompt", PROMPT, "--seed", "0", "--out", tmp_path / "a.wav")
    record = json.loads(capsys.readouterr().out)
    assert status == (3 if record["failure"] else 0)


@pytest.mark.parametrize("stage", ["ar", "nar", "semantic"])
def test_row_02_trainings_that_diverge(
    stage: str, inputs: list[str], tmp_path: Path, launch: Callable, request
) -> None:
    out = tmp_path / "run"
    if stage == "semantic":
        script, given = "train_semantic.py", request.getfixturevalue("semantic_settings")
        key, folder = "optim", out
        given = [*given, "optim.max_skipped_steps=1"]
    else:
        script, given = "tts.py", [*inputs, *SMALL]
        key, folder = {"ar": "optim", "nar": "nar_optim"}[stage], out / stage
    absurd = [f"{key}.lr=1e30", f"{key}.clip_norm=0", f"{key}.warmup_steps=1"]
    run = launch(None, ROOT / "recipes" / script, f"out={out}", *given, *absurd)
    assert run.returncode == 2, run.stderr[-2000:]
    assert "the training diverged before step" in run.stderr.splitlines()[-1]
    assert not list(out.rglob("README.md"))
    for path in out.rglob("*.safetensors"):
        from safetensors.torch import load_file

        assert all(torch.isfinite(each).all() for each in load_file(path).values()), path
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.fixture
def semantic_settings(tmp_path: Path, write_wav: Callable[..., Path]) -> list[str]:
    from lhotse import CutSet, Recording, SupervisionSegment

    cuts = []
    for seed, text in enumerate(["a red hen", "the cat sat", "a mat", "run far", "in the sun"]):
        cut = Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 1.2, seed=seed)).to_cut()
        cut.supervisions = [
            SupervisionSegment(id=cut.id, recording_id=cut.id, start=0, duration=1.2, text=text)
        ]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (tmp_path / "semantic").mkdir()
    _, whisper = tiny_semantic(tmp_path / "semantic")
    given = {
        "train": tmp_path / "cuts.jsonl.gz", "dev": tmp_path / "cuts.jsonl.gz",
        "whisper": whisper, "codec.lmspt.dimension": 8, "codec.spectral.num_mels": 20,
        "codec.spectral.encoder_width": 16, "codec.spectral.encoder_depths": "[1,1,1]",
        "codec.spectral.decoder_width": 16, "codec.spectral.decoder_depths": "[1,1,1]",
        "codec.quantizer.num_codebooks": 2, "codec.quantizer.codebook_size": 16,
        "codec.lmspt.auxiliary.kind": "none", "codec.lmspt.whisper.adapter_width": 8,
        "codec.lmspt.semantic_subtraction": "false", "batch.positions": 70,
        "optim.steps": 6, "optim.save_every": 3, "optim.eval_every": 6, "optim.log_every": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def test_row_03_segments_and_unknown_keys(
    speech: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from lhotse import CutSet

    write_audio(tmp_path / "a.wav", speech, RATE)
    line = {"audio": "a.wav", "text": "her beautiful", "offset": 0.5, "duration": 1.0}
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"

    def prepare(**more: str) -> None:
        listed.write_text(json.dumps(line | more) + "\n")
        prepare_data(["list", str(listed), "--out", str(out)])

    with pytest.raises(ValueError, match=r"speker.*speaker"):
        prepare(speker="anna")
    prepare(speaker="anna")
    (cut,) = CutSet.from_file(out / "all.jsonl.gz")
    assert (cut.start, cut.duration, cut.supervisions[0].speaker) == (0.5, 1.0, "anna")


def run_list(tmp_path: Path, lines: list[dict], encoding: str = "utf-8") -> tuple[int, list[dict]]:
    """Status of `slm tts --list`, and its results."""
    listed, out = tmp_path / "list.jsonl", tmp_path / "out"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    listed.write_text(text, encoding=encoding, newline="\n")
    status = tts("--list", listed, "--out", out)
    results = out / "results.jsonl"
    made = results.read_text(encoding="utf-8").split("\n") if results.exists() else []
    return status, [json.loads(line) for line in made if line]


def test_row_04_line_separators(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"id": "h", "text": "Good\u2028morning.", "prompt": PROMPT}]
    for num_done in (0, 1):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            _, results = run_list(tmp_path, lines)
        assert f"{num_done} done before" in caplog.text
    assert [one["text"] for one in results] == ["Good\u2028morning."]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_row_05_files_that_others_can_read(inputs: list[str], tmp_path: Path) -> None:
    train_tts([f"out={tmp_path / 'run'}", *inputs, *SMALL, "tts_eval.num_items=0"])
    tts("--text", "Good morning.", "--prompt", PROMPT, "--out", tmp_path / "a.wav")
    assert run_slm("export", "--voice", tmp_path / "run" / "voice", tmp_path / "lm") == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 3
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: "0o644" for path in files
    }


def test_row_06_links_in_sentences(voice: Voice) -> None:
    alone = voice.normalize("https://example.com").text
    assert alone == "h t t p s colon slash slash example dot com"
    made = voice.normalize("Visit https://example.com for details.").text
    assert made == f"Visit {alone} for details."


def test_row_07_numbers_and_signs(voice: Voice, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(GIVEN) / "texts.jsonl" if GIVEN else ROOT / "tests" / "golden" / "texts.jsonl"
    cases = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert len(cases) > 20
    for case in cases:
        with caplog.at_level(logging.WARNING):
            assert voice.normalize(case["text"]).text in case["spoken"]
    assert "not read" not in caplog.text
    voice.normalize("Acme\u2122 \U0001f600")
    assert "signs that are not read: \u2122 \U0001f600" in caplog.text


def test_row_08_invisible_characters_and_forms_of_letters(voice: Voice, tmp_path: Path) -> None:
    prompt = voice.prompts[PROMPT]
    plain_context = voice.prepare("the find is fine", prompt).context
    for text in ("the fi\u200bnd is\u00ad fi\ufeffne", "\uff54\uff48\uff45 \ufb01nd is \ufb01ne",
                 "\ufeff\U0001d42d\U0001d421\U0001d41e find is fine"):  # fmt: skip
        assert voice.prepare(text, prompt).context == plain_context
    line = {"id": "a", "text": "Good morning.", "prompt": PROMPT}
    _, results = run_list(tmp_path, [line], encoding="utf-8-sig")
    assert [one["text"] for one in results] == ["Good morning."]


def transcripts(capsys: pytest.CaptureFixture, *paths: Path) -> list[dict]:
    capsys.readouterr()
    run_slm("asr", "--voice", VOICE, *paths)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    "name", ["espeak_stdout.wav", "zero_data.wav", "ffpipe.w64", "ffpipe.flac"]
)
def test_row_09_sizes_that_a_pipe_leaves_open(
    name: str, audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check_read(audio / name, tmp_path, capsys)


def check_read(path: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    """A recording is read to its end and transcribed, and is the same from a pipe."""
    assert len(read_audio(path, RATE)) > 1.7 * RATE
    (record,) = transcripts(capsys, path)
    assert record["failure"] is None
    assert len(record["text"].split()) >= 3
    os.mkfifo(folder / "pipe")
    writer = threading.Thread(target=(folder / "pipe").write_bytes, args=(path.read_bytes(),))
    writer.start()
    wave = read_audio(folder / "pipe", RATE)
    writer.join()
    np.testing.assert_array_equal(wave, read_audio(path, RATE))


@pytest.mark.parametrize("name", ["m4a.m4a", "webm.webm", "m4a_as_mp3.mp3"])
def test_row_10_formats_of_phones_and_browsers(
    name: str,
    audio: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check_read(audio / name, tmp_path, capsys)
    assert audio / name in recordings_in(audio)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.xyz").touch()
    recordings_in(tmp_path / "folder")
    assert "skipped: .xyz" in caplog.text
    monkeypatch.setattr("codec.audio.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*ffmpeg -i"):
        read_audio(audio / name, RATE)


def test_row_11_tokenizers_larger_than_the_table(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", pad_rows=-3)
    lm = SpeechLM.create(ARConfig(base=str(base), lora=LoRAConfig(rank=2)), STAMP, seed=0)
    lm.save(tmp_path / "ar")
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(SpeechLM.load(tmp_path / "ar").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_row_12_a_run_folder_that_moves(inputs: list[str], tmp_path: Path) -> None:
    given = [*inputs, *SMALL, "tts_eval.num_items=0"]
    train_tts([f"out={tmp_path / 'here'}", *given])
    there = (tmp_path / "here").rename(tmp_path / "there")
    shutil.rmtree(there / "nar")
    train_tts([f"out={there}", *given])
    assert (there / "voice" / "nar").is_dir()
    assert not (tmp_path / "here").exists()


def test_row_13_ids_that_are_no_file_names(tmp_path: Path) -> None:
    ids = ["a", "x" * 300, "n\0l", "../up", "b"]
    lines = [{"id": one, "text": "Good morning.", "prompt": PROMPT} for one in ids]
    status, results = run_list(tmp_path, lines)
    assert status == 3
    assert sorted(one["id"] for one in results) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.rglob("*.wav")) == ["a.wav", "b.wav"]


@pytest.mark.parametrize("name", ["short001.wav", "dc.wav", "impulse.wav", "noise.wav"])
def test_row_14_recordings_without_speech(
    name: str, audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / name
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE)
    path.write_bytes(wav(noise) if name == "noise.wav" else (audio / name).read_bytes())
    if name == "dc.wav" and not GIVEN:
        path.write_bytes(wav(np.full(2 * RATE, 0.5)))
    found = transcripts(capsys, path)
    if name == "dc.wav" and GIVEN:  # It has speech, which a constant only displaces.
        assert all(one["failure"] or len(one["text"].split()) >= 3 for one in found)
        return
    assert all(one["failure"] for one in found)
    status = tts("--text", "Hello.", "--prompt", path, "--prompt-text", "so", "--out",
                 tmp_path / "o.wav")  # fmt: skip
    assert status == 2
    one_line(capsys, name)


def test_row_15_floats_of_another_scale(
    audio: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        wave = read_audio(audio / "f32_int16scale.wav", RATE)
    assert "scaled" in caplog.text
    assert 0.05 < np.abs(wave).max() <= 1.0
    (record,) = transcripts(capsys, audio / "f32_int16scale.wav")
    assert record["failure"] is None
    assert len(record["text"].split()) >= 3


def test_row_16_channels_that_cancel_and_joined_files(
    audio: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        wave = read_audio(audio / "stereo_inv.wav", RATE)
        joined = read_audio(audio / "mp3_joined.mp3", RATE)
    assert "cancel" in caplog.text
    assert "consists of 2 files" in caplog.text
    assert np.abs(wave).max() > 0.2
    assert level(joined[: len(joined) // 2]) - level(joined[len(joined) // 2 :]) < 1.0
    assert abs(len(joined) / len(wave) - 2) < 0.1


def test_row_17_loud_prompts(voice: Voice, speech: np.ndarray, tmp_path: Path) -> None:
    loud = np.clip(speech * 1.0 / np.abs(speech).max() * 3, -1, 1)
    write_audio(tmp_path / "loud.wav", loud, RATE)
    for seed in range(3):
        made = voice.tts("Good morning to you all.", tmp_path / "loud.wav", "her beautiful", seed)
        assert 0 < np.abs(made.wave).max() <= 1.0
        voice.save(made, tmp_path / "o.wav")
        written, _ = soundfile.read(tmp_path / "o.wav")
        np.testing.assert_allclose(written, made.wave, atol=2 / 32768)


def test_row_18_paragraphs_are_pauses(voice: Voice) -> None:
    text = voice.prepare_long("Chapter One\n\nIt was a cold day.", voice.prompts[PROMPT])
    assert [one.text.text for one in text.utterances] == ["Chapter One", "It was a cold day."]
    assert text.pauses == [0.8, 0.0]
    wave = voice.tts("Chapter One\n\nIt was a cold day.", PROMPT).wave
    parts = np.abs(wave[: len(wave) // 160 * 160]).reshape(-1, 160).max(1)
    quiet = "".join("01"[int(each)] for each in parts < 0.06 * parts.max())  # -24 dB, by 10 ms.
    assert max(map(len, re.findall("1+", quiet))) >= 70


def test_row_19_long_words(voice: Voice, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prompt = voice.prompts[PROMPT]
    text = ",".join(["red", "green", "blue"] * 100)
    assert len(voice.prepare_long(text, prompt).utterances) > 3
    link = "https://example.com/" + "ab1" * 113
    assert len(voice.prepare_long(f"Visit {link} now.", prompt).utterances) > 3
    word = "abc" * 400
    assert tts("--text", word, "--prompt", PROMPT, "--out", tmp_path / "a.wav") == 2
    one_line(capsys, word[:20])


def test_row_20_what_is_refused_at_the_start(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = {"id": "a", "text": "Good morning, Ren\u00e9.", "prompt": PROMPT}
    for encoding, name in (("utf-16", "UTF-16"), ("latin-1", "not UTF-8")):
        assert run_list(tmp_path, [line], encoding) == (2, [])
        one_line(capsys, "list.jsonl", name)
    out = ("--out", tmp_path / "a.wav")
    assert tts("--text", "half \udc80", "--prompt", PROMPT, *out) == 2
    one_line(capsys, "half of a surrogate pair", r"\udc80")
    assert tts("--text", "Hi.", "--prompt", PROMPT, *out, "--seed", str(10**23)) == 2
    one_line(capsys, "--seed")
    from transformers import AutoTokenizer

    base = shutil.copytree(inputs[0].removeprefix("ar.base="), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|text|>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ValueError, match=r"already has the token <\|text\|>"):
        train_tts([f"out={tmp_path / 'run'}", *inputs[1:], *SMALL, f"ar.base={base}"])
    assert not list((tmp_path / "run").rglob("step-*"))


def test_row_21_tensors_that_are_no_waves(tiny_codec_folder: Path) -> None:
    codec: Codec = load_codec(tiny_codec_folder)
    wave = torch.zeros(1, 1, RATE)
    wave[0, 0, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        plain(type(codec).encode)(codec, wave)
    with pytest.raises(ValueError, match="int64"):
        plain(type(codec).encode)(codec, torch.zeros(1, 1, RATE, dtype=torch.int64))


def test_row_22_misuse_in_python(voice: Voice, tiny_codec_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"the text must be a string, not .*tts_batch"):
        plain(Voice.tts)(voice, ["Good morning."], PROMPT)
    codec = load_codec(tiny_codec_folder)
    with pytest.raises(ValueError, match=r"torch\.from_numpy|Tensor"):
        plain(type(codec).encode)(codec, np.zeros((1, 1, RATE), np.float32))

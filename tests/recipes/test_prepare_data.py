import gzip
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from conftest import ROOT

from codec.tokens import TokenShard
from codec.training.data import load_cut, read_cuts
from recipes.offline.debian_prompts import PACKAGES, SOUNDS, TRANSCRIPTS
from recipes.prepare_data import main

Write = Callable[..., Path]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def skipped(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line["reason"] for line in map(json.loads, lines)}


def write_list(path: Path, entries: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def test_list_is_split_and_resolves_beside_itself(
    tmp_path: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "corpus" / "a b.wav", 0.5)
    write_wav(tmp_path / "corpus" / "\u8bed\u97f3.flac", 0.6, 24000)
    entries = [
        {"id": "x", "audio": "a b.wav", "text": " Hi. ", "speaker": "s1", "split": "train"},
        {"audio": "\u8bed\u97f3.flac", "text": "", "split": "dev", "language": "zh"},
    ]
    run("list", write_list(tmp_path / "corpus" / "l.jsonl", entries), "--out", tmp_path / "out")
    [train], [dev] = (list(read_cuts(tmp_path / "out" / f"{s}.jsonl.gz")) for s in ("train", "dev"))
    assert (train.id, train.supervisions[0].text, train.supervisions[0].speaker) == (
        "x",
        "Hi.",
        "s1",
    )
    assert (dev.id, dev.supervisions[0].language, dev.sampling_rate) == (
        "\u8bed\u97f3",
        "zh",
        24000,
    )
    assert load_cut(dev, 16000).shape == (9600,)
    printed = capsys.readouterr()
    assert "train.jsonl.gz: 1 cut, 0.00 h, 1 speaker\n" in printed.out
    assert "Finished: 2 lists of 2 recordings\n" in printed.err
    assert "Next: accelerate launch recipes/train_codec.py" in printed.err


def test_the_next_command_fits_the_lists(
    tmp_path: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "my recordings", tmp_path / "out"
    for number in range(12):
        write_wav(folder / f"{number}.wav", 0.5, seed=number)
    run("folder", folder, "--no-text", "--out", out)
    last = capsys.readouterr().err.splitlines()[-1]
    command = f"python recipes/prepare_data.py folder '{folder}' --no-text --out {out} --dev-cuts 1"
    assert last == f"Next: {command}   (training needs a dev list as well)"
    run(*shlex.split(command)[2:])
    assert "Next: accelerate launch recipes/train_codec.py" in capsys.readouterr().err
    entry = {"audio": str(folder / "1.wav"), "text": "", "split": "dev"}
    run("list", write_list(tmp_path / "l.jsonl", [entry]), "--out", tmp_path / "dev")
    printed = capsys.readouterr().err
    assert "Finished: 1 list of 1 recording\n" in printed
    assert (
        f"benchmark.py reconstruction --codec models/small/codec --cuts {tmp_path}/dev/dev"
        in (printed.splitlines()[-1])
    )


def spoil(folder: Path, write_wav: Write) -> None:
    """Writes an unusable recording of every kind."""
    write_wav(folder / "good.wav", 0.5)
    (folder / "empty.wav").touch()
    (folder / "unreadable.wav").write_bytes(b"no audio at all" * 100)
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16000)
    soundfile.write(folder / "nan.wav", np.full(8000, np.nan), 16000, "FLOAT")
    whole = write_wav(folder / "truncated.flac", 2.0).read_bytes()
    (folder / "truncated.flac").write_bytes(whole[: len(whole) // 2])
    write_wav(folder / "short.wav", 0.5)
    for path in [*folder.iterdir(), folder / "missing.wav"]:
        path.with_suffix(".txt").write_text("Words.", encoding="utf-8")


def test_unusable_recordings_are_skipped(tmp_path: Path, write_wav: Write) -> None:
    spoil(tmp_path / "in", write_wav)
    names = ["good.wav", "empty.wav", "unreadable.wav", "silent.wav", "nan.wav", "truncated.flac"]
    entries = [{"audio": name, "text": "Words."} for name in [*names, "missing.wav"]]
    entries.append({"audio": "short.wav", "text": "Words.", "duration": 0.9})
    run("list", write_list(tmp_path / "in" / "l.jsonl", entries), "--out", tmp_path / "out")
    assert [cut.id for cut in read_cuts(tmp_path / "out" / "all.jsonl.gz")] == ["good"]
    reasons = skipped(tmp_path / "out")
    assert set(reasons) == {
        *("empty", "unreadable", "silent", "nan", "truncated", "missing", "short")
    }
    assert "no such recording" in reasons["missing"]
    assert "silent" in reasons["silent"]
    assert "NaN" in reasons["nan"]
    assert "truncated: 0.50 of 0.90 s" in reasons["short"]
    assert all(f"{name}." in reason for name, reason in reasons.items())


def test_folder_with_texts_and_speakers(tmp_path: Path, write_wav: Write) -> None:
    write_wav(tmp_path / "in" / "Ann" / "one.wav", 0.5)
    (tmp_path / "in" / "Ann" / "one.txt").write_text("First.\n", encoding="utf-8")
    write_wav(tmp_path / "in" / "two.wav", 0.5)
    run("folder", tmp_path / "in", "--out", tmp_path / "out")
    [cut] = read_cuts(tmp_path / "out" / "all.jsonl.gz")
    assert (cut.id, cut.supervisions[0].speaker, cut.supervisions[0].text) == (
        *("Ann-one", "Ann", "First."),
    )
    assert "two.txt is missing" in skipped(tmp_path / "out")["two"]
    run("folder", tmp_path / "in", "--out", tmp_path / "out", "--no-text")
    assert len(read_cuts(tmp_path / "out" / "all.jsonl.gz")) == 2


def test_stereo_is_averaged(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    both = np.stack([np.full(8000, 0.5), np.full(8000, -0.25)], 1)
    soundfile.write(tmp_path / "in" / "stereo.wav", both, 16000)
    run("folder", tmp_path / "in", "--out", tmp_path / "out", "--no-text")
    [cut] = read_cuts(tmp_path / "out" / "all.jsonl.gz")
    assert load_cut(cut, 16000) == pytest.approx(np.full(8000, 0.125), abs=1e-3)


def test_duplicate_ids_are_refused(tmp_path: Path, write_wav: Write) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", 0.5)
    entries = [{"id": "same", "audio": f"{name}.wav", "text": ""} for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"id 'same': .*a\.wav and .*b\.wav"):
        run("list", write_list(tmp_path / "l.jsonl", entries), "--out", tmp_path / "out")


def test_segments_of_recordings(tmp_path: Path, write_wav: Write) -> None:
    write_wav(tmp_path / "a.wav", 3.0)
    wave, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    wave[2 * rate :] = 0.0
    soundfile.write(tmp_path / "a.wav", wave, rate)
    entries = [
        {"audio": "a.wav", "text": "one", "offset": 0.0, "duration": 1},
        {"audio": "a.wav", "text": "two", "offset": 1.25, "duration": 0.5},
        {"audio": "a.wav", "text": "three", "offset": 0.5},
        {"audio": "a.wav", "text": "four", "id": "first", "duration": 0.75},
        {"audio": "a.wav", "text": "five", "id": "all", "duration": 2.99},
        {"audio": "a.wav", "text": "six", "id": "quiet", "offset": 2.0, "duration": 1.0},
        {"audio": "a.wav", "text": "seven", "id": "behind", "offset": 3.5, "duration": 1.0},
        {"audio": "a.wav", "text": "eight", "id": "beyond", "offset": 2.0, "duration": 2.0},
        {"audio": "a.wav", "text": "nine", "id": None, "speaker": None, "offset": 0.25},
    ]
    run("list", write_list(tmp_path / "l.jsonl", entries), "--out", tmp_path / "out")
    cuts = {cut.id: cut for cut in read_cuts(tmp_path / "out" / "all.jsonl.gz")}
    found = {
        name: (cut.start, cut.duration, cut.supervisions[0].text) for name, cut in cuts.items()
    }
    assert found == {
        "a-0": (0.0, 1.0, "one"),
        "a-1250": (1.25, 0.5, "two"),
        "a-500": (0.5, 2.5, "three"),
        "first": (0.0, 0.75, "four"),
        "all": (0.0, 3.0, "five"),
        "a-250": (0.25, 2.75, "nine"),
    }
    assert cuts["a-1250"].supervisions[0].duration == 0.5
    assert cuts["a-250"].supervisions[0].speaker == "unknown"
    part = load_cut(cuts["a-1250"], rate)
    assert np.array_equal(part, wave[round(1.25 * rate) : round(1.75 * rate)])
    reasons = skipped(tmp_path / "out")
    assert "silent" in reasons["quiet"]
    assert "offset 3.5 s is behind its end, 3.00 s" in reasons["behind"]
    assert "truncated: 1.00 of 2.00 s are there" in reasons["beyond"]


def test_texts_in_another_encoding_are_named(tmp_path: Path, write_wav: Write) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / "in" / f"{name}.wav", 0.5)
    (tmp_path / "in" / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "in" / "b.txt").write_text("\ufeffWords\r\n and more.\r\n", encoding="utf-8")
    run("folder", tmp_path / "in", "--out", tmp_path / "out")
    [cut] = read_cuts(tmp_path / "out" / "all.jsonl.gz")
    assert cut.supervisions[0].text == "Words\n and more."
    assert "a.txt: is not UTF-8 (byte 0xe9 in line 1)" in skipped(tmp_path / "out")["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: no JSON"),
        ('{"text": "a"}', "line 1: needs an object with the key audio"),
        ('{"audio": "a.wav"}', "line 1: needs the key text"),
        ('{"audio": "a.wav", "text": ""}', "no usable recording.*no such recording"),
        ("", "the source is empty"),
        ('{"audio": "a.wav", "text": "", "duration": "3"}', "line 1: duration must be a number"),
        ('{"audio": "a.wav", "text": "", "duration": true}', "line 1: duration must be a number"),
        ('{"audio": "a.wav", "text": "", "duration": 0}', "duration must be positive, in seconds"),
        ('{"audio": "a.wav", "text": "", "offset": -1}', "offset must be at least 0, in seconds"),
        ('{"audio": "a.wav", "text": "", "offset": NaN}', "NaN is no number of JSON"),
        ('{"audio": "a.wav", "text": "", "speker": "anna"}', "'speker': no such.* mean speaker?"),
        ('{"audio_filepath": "a.wav", "text": ""}', "_filepath': no such.* mean audio?"),
        ('{"audio": "a.wav", "text": "", "start": 1}', "'start': no such.* mean offset?"),
        (
            '{"audio": "a.wav", "text": "", "x": 1}',
            "'x': no such key; the keys are audio, text",
        ),
        ('{"audio": "a\\n.wav"}', r"line 1: audio has a control character: 'a\\n.wav'"),
        ('{"audio": "a.wav", "text": "", "\\n": 1}', r"line 1: '\\n': no such key"),
        ('{"audio": "a.wav", "text": "a \\ud800"}', "line 1: has half of a surrogate pair"),
        ('{"audio": "a.wav", "text": "", "split": "../../evil"}', "line 1: split must be a plain"),
        ('{"audio": "a.wav", "text": "", "split": "a/b"}', "line 1: split must be a plain name"),
        ('{"audio": "a.wav", "text": "", "split": 3}', "line 1: split must be a plain name"),
    ],
)
def test_bad_lists(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "l.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        run("list", tmp_path / "l.jsonl", "--out", tmp_path / "out")


def test_a_segment_without_a_sample_is_left_out(tmp_path: Path, write_wav: Write) -> None:
    write_wav(tmp_path / "a.wav", 0.3)
    lines = [{"audio": "a.wav", "text": "x", "id": str(i), "duration": i} for i in (1e-9, 0.3)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run("list", tmp_path / "l.jsonl", "--out", tmp_path / "out", "--no-check")
    assert [cut.id for cut in read_cuts(tmp_path / "out" / "all.jsonl.gz")] == ["0.3"]
    assert "is shorter than a sample" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_missing_sources(tmp_path: Path) -> None:
    for kind in ("list", "folder", "librispeech", "vctk"):
        with pytest.raises(ValueError, match="no such"):
            run(kind, tmp_path / "nowhere", "--out", tmp_path / "out")


def test_held_out_speakers_are_not_in_train(tmp_path: Path, write_wav: Write) -> None:
    for index in range(8):
        write_wav(tmp_path / "in" / f"s{index % 4}" / f"{index}.wav", 0.3)
    run(
        *("folder", tmp_path / "in", "--out", tmp_path / "out", "--no-text"),
        *("--dev-speakers", 1, "--no-check"),
    )
    sides = [
        {cut.supervisions[0].speaker for cut in read_cuts(tmp_path / "out" / f"{split}.jsonl.gz")}
        for split in ("train", "dev")
    ]
    assert len(sides[1]) == 1
    assert len(sides[0] | sides[1]) == 4
    assert not sides[0] & sides[1]


@pytest.mark.filterwarnings("default")
def test_librispeech_skips_a_broken_file(tmp_path: Path, write_wav: Write) -> None:
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    for index in range(3):
        write_wav(chapter / f"84-121123-000{index}.flac", 0.5)
    (chapter / "84-121123-0001.flac").write_bytes(b"")
    lines = [f"84-121123-000{index} WORDS" for index in range(3)]
    (chapter / "84-121123.trans.txt").write_text("\n".join(lines))
    run("librispeech", tmp_path / "LibriSpeech", "--out", tmp_path / "out")
    cuts = list(read_cuts(tmp_path / "out" / "dev-clean.jsonl.gz"))
    assert [cut.id for cut in cuts] == ["84-121123-0000", "84-121123-0002"]
    supervision = cuts[0].supervisions[0]
    assert (supervision.speaker, supervision.language, supervision.text) == ("84", "en", "WORDS")
    assert list(skipped(tmp_path / "out")) == ["84-121123-0001"]


def libritts(folder: Path, write_wav: Write) -> Path:
    """A LibriTTS of three parts with one chapter of one or two speakers each."""
    speakers = {"train-clean-100": ("19", "26"), "train-other-500": ("31",), "dev-clean": ("84",)}
    for part, names in speakers.items():
        for seed, speaker in enumerate(names):
            chapter, stem = folder / part / speaker / "198", f"{speaker}_198_000007_000001"
            write_wav(chapter / f"{stem}.wav", 0.5, 24000, seed=seed)
            spoken = f"{stem}\tIt is 2.\tIt is two.\n"
            (chapter / f"{speaker}_198.trans.tsv").write_text(spoken)
            (chapter / f"{speaker}_198.book.tsv").write_text(f"{stem}\tx\t30.0\n")
    return folder


def speakers_of(path: Path) -> set[str]:
    return {cut.supervisions[0].speaker for cut in read_cuts(path)}


@pytest.mark.filterwarnings("default")
def test_libritts_parts_are_joined(
    tmp_path: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("libritts", libritts(tmp_path / "LibriTTS", write_wav), "--out", out)
    [cut] = read_cuts(out / "dev-clean.jsonl.gz")
    assert cut.supervisions[0].text == "It is two."
    assert {
        path.name.removesuffix(".jsonl.gz"): speakers_of(path) for path in out.glob("*.gz")
    } == {
        "train-clean-100": {"19", "26"},
        "train-other-500": {"31"},
        "dev-clean": {"84"},
        "train": {"19", "26", "31"},
        "dev": {"84"},
    }
    assert "0 of 4 skipped" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_speakers_are_held_out_of_the_training_parts(tmp_path: Path, write_wav: Write) -> None:
    out = tmp_path / "out"
    corpus = libritts(tmp_path / "LibriTTS", write_wav)
    run("libritts", corpus, "--out", out, "--dev-speakers", 1)
    train, dev = (speakers_of(out / f"{side}.jsonl.gz") for side in ("train", "dev"))
    assert train | dev == {"19", "26", "31", "84"}
    assert not train & dev
    assert (len(dev), "84" in dev) == (2, True)


@pytest.mark.filterwarnings("default")
def test_the_paper_settings_follow_on_libritts(
    tmp_path: Path, write_wav: Write, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guide's lines in their order, with a tiny codec in place of the trained one."""
    from recipes import export_tokens

    guide = (ROOT / "docs" / "train_your_own.md").read_text().replace("\\\n", "")
    lines = guide.partition("## 3. The big path")[2].partition("\n## ")[0].splitlines()
    prepare, *_ = (shlex.split(line) for line in lines if "prepare_data.py" in line)
    exports = [line.partition("export_tokens.py")[2] for line in lines if "export_tokens" in line]
    corpus = libritts(tmp_path / "LibriTTS", write_wav)
    monkeypatch.chdir(tmp_path)
    run(prepare[2], corpus, *prepare[4:])
    settings = {
        name.partition("/")[0]: yaml.safe_load((ROOT / f"recipes/configs/{name}.yaml").read_text())
        for name in ("codec/speechtokenizer", "tts/paper")
    }
    assert Path(settings["codec"]["train"]).is_file()
    assert Path(settings["codec"]["dev"]).is_file()
    for line in exports:
        arguments = [word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(line)]
        export_tokens.main([*arguments, f"codec={tiny_codec_folder}"])
    assert len(TokenShard.open(settings["tts"]["train"])) == 3
    assert TokenShard.open(settings["tts"]["dev"]).speakers == ["84"]


@pytest.mark.filterwarnings("default")
def test_ljspeech(tmp_path: Path, write_wav: Write) -> None:
    write_wav(tmp_path / "LJ" / "wavs" / "LJ001-0001.wav", 0.5, 22050)
    (tmp_path / "LJ" / "metadata.csv").write_text("LJ001-0001|In 1455,|In fourteen fifty-five,\n")
    run("ljspeech", tmp_path / "LJ", "--out", tmp_path / "out")
    [cut] = read_cuts(tmp_path / "out" / "all.jsonl.gz")
    assert (cut.id, cut.supervisions[0].speaker) == ("LJ001-0001", "ljspeech")
    assert cut.supervisions[0].text == "In fourteen fifty-five,"
    write_wav(tmp_path / "LJ" / "wavs" / "LJ001-0002.wav", 0.5, 22050)
    (tmp_path / "LJ" / "metadata.csv").write_text("LJ001-0001|One|One\nLJ001-0002|Two|Two\n")
    run("ljspeech", tmp_path / "LJ", "--out", tmp_path / "split", "--dev-cuts", 1)
    sides = [read_cuts(tmp_path / "split" / f"{side}.jsonl.gz") for side in ("train", "dev")]
    assert sorted(cut.id for side in sides for cut in side) == ["LJ001-0001", "LJ001-0002"]
    assert [len(side) for side in sides] == [1, 1]
    with pytest.raises(ValueError, match="one side would be empty"):
        run("ljspeech", tmp_path / "LJ", "--out", tmp_path / "none", "--dev-speakers", 1)


@pytest.mark.filterwarnings("default")
def test_vctk(tmp_path: Path, write_wav: Write) -> None:
    folder = tmp_path / "VCTK"
    write_wav(folder / "wav48_silence_trimmed" / "p225" / "p225_001_mic2.flac", 0.5, 48000)
    (folder / "txt" / "p225").mkdir(parents=True)
    (folder / "txt" / "p225" / "p225_001.txt").write_text("Please call Stella.\n")
    header = "ID AGE GENDER ACCENTS REGION COMMENTS\n"
    (folder / "speaker-info.txt").write_text(header + "p225 23 F English Southern England\n")
    run("vctk", folder, "--out", tmp_path / "out")
    [cut] = read_cuts(tmp_path / "out" / "all.jsonl.gz")
    assert (cut.supervisions[0].speaker, cut.sampling_rate) == ("p225", 48000)


def encode_g722(path: Path, wave: np.ndarray) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16000, layout="mono")
        samples = (wave * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="no Debian tools")
def test_prompts_from_debian_packages(tmp_path: Path) -> None:
    times = np.arange(16000) / 16000
    tone = 0.3 * np.sin(2 * np.pi * 300 * times)
    trees = {package: tmp_path / package for package in PACKAGES}
    sounds, words = trees[PACKAGES[0]] / SOUNDS, trees[PACKAGES[1]] / TRANSCRIPTS
    encode_g722(sounds / "digits" / "1.g722", tone)
    encode_g722(sounds / "beep.g722", tone)
    words.parent.mkdir(parents=True)
    text = "; Comment\n\nbeep: [a beep tone]\ndigits/1: one\nabsent: Not here.\n"
    words.write_bytes(gzip.compress(text.encode()))
    for package, tree in trees.items():
        (tree / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: n\nDescription: d\n"
        )
        (tree / "DEBIAN" / "control").write_text(control)
        deb = tmp_path / "debs" / f"{package}_1_all.deb"
        deb.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-b", tree, deb], check=True, capture_output=True)
    out = tmp_path / "o u t"
    run("prompts", "--packages", tmp_path / "debs", "--out", out)
    [cut] = read_cuts(out / "all.jsonl.gz")
    assert (cut.id, cut.supervisions[0].text) == ("digits-1", "one")
    wave = load_cut(cut, 16000)
    # G.722's two filter banks delay by 22 samples.
    assert np.corrcoef(wave[22:], tone[: wave.size - 22])[0, 1] > 0.99
    assert "cc-by-sa-3.0" in (out / "prompts" / "README.md").read_text()


def test_missing_packages_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"holds no {PACKAGES[0]}"):
        run("prompts", "--packages", tmp_path, "--out", tmp_path / "out")

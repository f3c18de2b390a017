import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from safetensors.torch import save_file

from codec import Codec, load_codec, read_audio, tokenize
from codec.__main__ import main
from codec.tokens import TokenRow, TokenShard, write_shard

Write = Callable[..., Path]
GOLDEN = ROOT / "tests" / "golden" / "speechtokenizer_tiny.pt"


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command line that must end with status 2 and one line; returns the line."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def test_encode_and_decode_keep_names_and_lengths(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "in" / "two words.wav", 1.03)
    write_wav(tmp_path / "in" / "\u8bed\u97f3.flac", 0.71, 24_000)
    tokens = tmp_path / "t.parquet"
    run("encode", "--codec", tiny_codec_folder, tmp_path / "in", "--out", tokens)
    assert json.loads(capsys.readouterr().out)["recordings"] == 2
    run("decode", "--codec", tiny_codec_folder, tokens, "--out", tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["two words.wav", "\u8bed\u97f3.wav"]
    assert len(read_audio(tmp_path / "out" / "two words.wav", 16_000)) == round(1.03 * 16_000)
    assert len(read_audio(tmp_path / "out" / "\u8bed\u97f3.wav", 16_000)) == round(0.71 * 16_000)


def test_same_names_in_different_folders_overwrite_nothing(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write
) -> None:
    first = write_wav(tmp_path / "a" / "x.wav", 0.5)
    second = write_wav(tmp_path / "b" / "x.wav", 0.8)
    write_wav(tmp_path / "tree" / "sub" / "x.wav", 0.3)
    out = tmp_path / "out"
    run(
        *("reconstruct", "--codec", tiny_codec_folder),
        *(first, second, tmp_path / "tree", "--out", out),
    )
    made = {str(path.relative_to(out)): path for path in out.rglob("*.wav")}
    lengths = {name: len(read_audio(path, 16_000)) for name, path in made.items()}
    assert lengths == {"x.wav": 8_000, "x-2.wav": 12_800, "sub/x.wav": 4_800}


def test_reconstruct_takes_any_number_of_codebooks(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = write_wav(tmp_path / "x.wav", 0.5)
    command = ["reconstruct", "--codec", tiny_codec_folder, wave]
    run(*command, "--out", tmp_path / "all")
    run(*command, "--out", tmp_path / "one", "--codebooks", 1)
    whole, coarse = (read_audio(tmp_path / name / "x.wav", 16_000) for name in ("all", "one"))
    assert len(whole) == len(coarse)
    assert np.abs(whole - coarse).max() > 0
    codec = load_codec(tiny_codec_folder)
    codes = codec.encode_stream([read_audio(wave, 16_000)])
    expected = np.concatenate(list(codec.decode_stream(codes[:1])))[: len(coarse)]
    np.testing.assert_allclose(coarse, np.clip(expected, -1, 1), atol=1e-4)
    assert "between 1 and 3" in failure(
        capsys, *command, "--out", tmp_path / "no", "--codebooks", 4
    )


def test_reconstruct_never_writes_over_its_input(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = write_wav(tmp_path / "x.wav", 0.5)
    before = wave.read_bytes()
    message = failure(capsys, "reconstruct", "--codec", tiny_codec_folder, wave, "--out", tmp_path)
    assert "x.wav: is one of the input recordings" in message
    assert wave.read_bytes() == before


@pytest.mark.parametrize("command", ["decode", "reconstruct"])
def test_existing_recordings_are_kept_without_overwrite(
    tmp_path: Path,
    tiny_codec_folder: Path,
    write_wav: Write,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = [write_wav(tmp_path / "in" / f"{name}.wav", 0.5) for name in "abc"]
    source = [tmp_path / "in"]
    if command == "decode":
        source = [tmp_path / "t.parquet"]
        run("encode", "--codec", tiny_codec_folder, *new, "--out", *source)
    out = tmp_path / "speech"
    originals = {
        path: path.read_bytes()
        for path in (out / "b.wav", out / "c.wav")
        if write_wav(path, 0.8, seed=1)
    }
    decode = [command, "--codec", tiny_codec_folder, *source, "--out", out]
    message = failure(capsys, *decode)
    assert f"{out / 'b.wav'}: exists already (and 1 more)" in message
    assert {path: path.read_bytes() for path in sorted(out.iterdir())} == originals
    run(*decode, "--overwrite")
    assert [len(read_audio(out / f"{name}.wav", 16_000)) for name in "abc"] == [8_000] * 3


def test_an_existing_shard_is_kept_without_overwrite(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wave, tokens = write_wav(tmp_path / "x.wav", 0.5), tmp_path / "t.parquet"
    tokens.write_bytes(b"earlier")
    encode = ["encode", "--codec", tiny_codec_folder, wave, "--out", tokens]
    message = failure(capsys, *encode)
    assert f"{tokens}: exists already; choose another file or use --overwrite" in message
    assert tokens.read_bytes() == b"earlier"
    run(*encode, "--overwrite")
    assert TokenShard.open(tokens).ids == ["x"]


def test_a_bad_recording_in_a_folder_is_skipped(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "in" / "good.wav", 0.5)
    (tmp_path / "in" / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "in" / "silent.wav", np.zeros(8_000), 16_000)
    tokens = tmp_path / "t.parquet"
    run("encode", "--codec", tiny_codec_folder, tmp_path / "in", "--out", tokens)
    assert json.loads(capsys.readouterr().out)["skipped"] == 2
    assert TokenShard.open(tokens).ids == ["good"]


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "silent", "nan", "no audio"])
def test_a_single_bad_recording_is_named(
    tmp_path: Path,
    tiny_codec_folder: Path,
    write_wav: Write,
    kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wave = tmp_path / "bad one.wav"
    if kind == "empty":
        wave.touch()
    elif kind == "truncated":
        write_wav(wave, 0.5)
        wave.write_bytes(wave.read_bytes()[:30])
    elif kind == "silent":
        soundfile.write(wave, np.zeros(8_000), 16_000)
    elif kind == "nan":
        soundfile.write(wave, np.full(8_000, np.nan), 16_000, subtype="FLOAT")
    elif kind == "no audio":
        wave.write_text("hello")
    tokens = tmp_path / "t.parquet"
    tokens.write_bytes(b"earlier")
    encode = ["encode", "--codec", tiny_codec_folder, wave, "--out", tokens, "--overwrite"]
    assert "bad one.wav" in failure(capsys, *encode)
    assert tokens.read_bytes() == b"earlier"
    made = {path.name for path in tmp_path.iterdir()} - {"bad one.wav"}
    assert made == {"t.parquet"}


def test_encode_keeps_a_shard_of_another_process(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tokens, plain = tmp_path / "t.parquet", tokenize.encode_recording

    def late(*given: Any) -> Any:
        tokens.write_bytes(b"of another process")
        return plain(*given)

    monkeypatch.setattr(tokenize, "encode_recording", late)
    wave = write_wav(tmp_path / "x.wav", 0.5)
    encode = ["encode", "--codec", tiny_codec_folder, wave, "--out", tokens]
    assert "t.parquet: exists already; choose another file" in failure(capsys, *encode)
    assert tokens.read_bytes() == b"of another process"
    run(*encode, "--overwrite")
    assert len(TokenShard.open(tokens)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "x.wav"}


def test_info_distinguishes_codecs_and_shards(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run("info", tiny_codec_folder)
    codec = json.loads(capsys.readouterr().out)
    assert codec["kind"] == "codec"
    assert codec["codebook_sizes"] == [32, 32, 32]
    assert codec["bits_per_second"] == 25 * 3 * 5
    tokens = tmp_path / "t.parquet"
    wave = write_wav(tmp_path / "x.wav", 0.5)
    run("encode", "--codec", tiny_codec_folder, wave, "--out", tokens)
    capsys.readouterr()
    run("info", tokens)
    shard = json.loads(capsys.readouterr().out)
    assert (shard["kind"], shard["utterances"], shard["frames"]) == ("token shard", 1, 13)
    assert shard["codec"]["digest"] == codec["digest"]
    assert "use" not in shard
    run("info", "--use", tokens)
    use = json.loads(capsys.readouterr().out)["use"]
    codes = TokenShard.open(tokens)[0].codes
    assert use["share"] == [round(len(np.unique(row)) / 32, 4) for row in codes]
    assert all(1 <= each <= 13 for each in use["perplexity"])
    even = TokenRow("x", "", "", "", 0.16, np.array([[3, 3, 7, 7]] * 3))
    write_shard(tmp_path / "even.parquet", [even], load_codec(tiny_codec_folder).stamp)
    run("info", "--use", tmp_path / "even.parquet")
    assert json.loads(capsys.readouterr().out)["use"] == {
        "share": [0.0625] * 3,
        "perplexity": [2.0] * 3,
    }
    run("info", wave)
    facts = {"sample_rate": 16_000, "num_channels": 1, "num_samples": 8_000, "seconds": 0.5}
    assert json.loads(capsys.readouterr().out) == {"kind": "recording", **facts, "tags": {}}
    assert "--use is for token shards" in failure(capsys, "info", "--use", tiny_codec_folder)
    nothing = tmp_path / "nothing"
    assert f"{nothing}: no such file or folder" in failure(capsys, "info", "--use", nothing)


def test_decode_refuses_what_it_cannot_decode(
    tmp_path: Path, tiny_codec_folder: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "t.parquet"
    wave = write_wav(tmp_path / "x.wav", 0.5)
    run("encode", "--codec", tiny_codec_folder, wave, "--out", tokens)
    row = TokenShard.open(tokens)[0]
    codec = load_codec(tiny_codec_folder)
    write_shard(tokens, [row._replace(id="../x")], codec.stamp)
    decode = ["decode", "--codec", tiny_codec_folder, tokens, "--out", tmp_path / "out"]
    assert "leads out of the folder" in failure(capsys, *decode)
    next(codec.parameters()).data.add_(1)
    write_shard(tokens, [row], codec.stamp)
    assert "made by codec" in failure(capsys, *decode)
    tokens.write_bytes(tokens.read_bytes()[:50])
    assert "corrupted token shard (truncated, or not Parquet)" in failure(capsys, *decode)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["speechtokenizer", "dmcodec"])
def test_import_and_export(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    config, checkpoint = tmp_path / "config.json", tmp_path / "ModelTrainer_00001000"
    config.write_text(json.dumps(golden["config"] | {"project_name": "mine"}))
    torch.save({"generator": golden["state_dict"], "discriminators": {}}, checkpoint)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    run("import", kind, config, checkpoint, ours)
    made = json.loads(capsys.readouterr().out)
    assert (made["id"], made["num_codebooks"], made["frame_rate"]) == (str(ours), 8, 50)
    assert made["digest"] == load_codec(ours).stamp.digest

    before = (ours / "model.safetensors").read_bytes()
    message = failure(capsys, "import", kind, config, checkpoint, ours)
    assert "config.json: exists already (and 1 more)" in message
    assert "is an input file" in failure(
        capsys, "import", kind, config, checkpoint, tmp_path, "--overwrite"
    )
    assert (ours / "model.safetensors").read_bytes() == before
    (ours / "README.md").write_text("mine")
    run("import", kind, config, checkpoint, ours, "--overwrite")
    made_files = sorted(path.name for path in ours.iterdir())
    assert made_files == ["README.md", "config.json", "model.safetensors"]
    assert (ours / "README.md").read_text() == "mine"

    capsys.readouterr()
    run("export", "speechtokenizer", ours, theirs)
    assert json.loads(capsys.readouterr().out)["codec"]["digest"] == made["digest"]
    assert sorted(path.name for path in theirs.iterdir()) == ["SpeechTokenizer.pt", "config.json"]
    state = torch.load(theirs / "SpeechTokenizer.pt", weights_only=True)
    assert state.keys() == golden["state_dict"].keys()
    assert all(torch.equal(state[name], golden["state_dict"][name]) for name in state)
    message = failure(capsys, "export", "speechtokenizer", ours, theirs)
    assert "exists already (and 1 more); choose another folder or use --overwrite" in message
    run("export", "speechtokenizer", ours, theirs, "--overwrite")


def test_import_and_export_keep_their_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(golden["config"]))
    out.mkdir()
    save_file(golden["state_dict"], out / "model.safetensors")
    command = ["import", "speechtokenizer", config, out / "model.safetensors"]
    before = (out / "model.safetensors").read_bytes()
    assert "model.safetensors: is an input file" in failure(capsys, *command, out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before
    run(*command, tmp_path / "ours")

    ours = {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()}
    for options in ([], ["--overwrite"]):
        export = ["export", "speechtokenizer", tmp_path / "ours", tmp_path / "ours", *options]
        assert "ours: has model.safetensors" in failure(capsys, *export)

    def full(_codec: Codec, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(Codec, "save_pretrained", full)
    for folder in ("ours", "new"):
        assert "No space left" in failure(capsys, *command, tmp_path / folder, "--overwrite")
    assert {file.name: file.read_bytes() for file in (tmp_path / "ours").iterdir()} == ours
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_an_output_folder_that_is_a_file_is_refused(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()
    for command in ("import speechtokenizer c.json c.pt", "export speechtokenizer DIR"):
        message = failure(capsys, *command.split(), tmp_path / "out", *options)
        assert message == f"error: {tmp_path / 'out'}: is a file; name a folder to write"


def test_bad_checkpoints_end_in_one_line(
    tmp_path: Path, tiny_codec_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    config, checkpoint = tmp_path / "config.json", tmp_path / "cut.pt"
    config.write_text(json.dumps(golden["config"]))
    torch.save(golden["state_dict"], checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    command = ["import", "speechtokenizer", config, checkpoint, tmp_path / "ours"]
    assert "cut.pt: not a complete checkpoint" in failure(capsys, *command)
    torch.save({}, checkpoint)
    assert "cut.pt: neither a state_dict" in failure(capsys, *command)
    config.write_text("{}")
    assert "config.json: the configuration lacks n_filters" in failure(capsys, *command)
    assert not (tmp_path / "ours").exists()
    command = ["export", "speechtokenizer", tiny_codec_folder, tmp_path / "theirs"]
    assert "only codecs of the family seanet" in failure(capsys, *command)
    assert not (tmp_path / "theirs").exists()


def test_bad_values_are_refused_before_a_codec_is_loaded(
    tmp_path: Path,
    write_wav: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("codec.models.codec.load_codec", None)  # Calling it fails.
    wave, file = write_wav(tmp_path / "x.wav", 0.5), tmp_path / "file"
    file.touch()
    (shard := tmp_path / "x.parquet").touch()
    encode, decode, reconstruct = (
        [name, "--codec", "c"] for name in ("encode", "decode", "reconstruct")
    )
    assert "--out must be a .parquet" in failure(capsys, *encode, wave, "--out", file)
    assert "x.parquet: exists already" in failure(capsys, *encode, wave, "--out", shard)
    assert "no such recording" in failure(capsys, *encode, tmp_path / "none", "--out", "t.parquet")
    assert "no such token shard" in failure(capsys, *decode, tmp_path / "none", "--out", "out")
    assert "is a file" in failure(capsys, *decode, wave, "--out", file)
    assert "is a file" in failure(capsys, *reconstruct, wave, "--out", file)
    message = failure(capsys, *reconstruct, wave, "--out", tmp_path / "out", "--codebooks", 0)
    assert "--codebooks must be at least 1, got 0" in message
    assert "is one of the input" in failure(capsys, *reconstruct, wave, "--out", tmp_path)


def test_what_is_no_codec_is_named(
    tmp_path: Path, write_wav: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    wave = write_wav(tmp_path / "x.wav", 0.5)
    message = failure(capsys, "encode", "--codec", tmp_path, wave, "--out", tmp_path / "t.parquet")
    assert str(tmp_path) in message
    (tmp_path / "none").mkdir()
    encode = ["encode", "--codec", tmp_path, tmp_path / "none", "--out", "t.parquet"]
    assert "no recording in this folder" in failure(capsys, *encode)


def test_the_installed_command_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "codec", "info", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1

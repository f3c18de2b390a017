"""recipes/scoring/vc.py: swapped codebooks, words and speakers of conversions."""

from pathlib import Path

import numpy as np
import pytest

from codec import load_codec, read_audio
from codec.json_lines import read_json_lines, write_json_lines
from recipes import benchmark as program
from recipes.scoring import judges as scoring
from recipes.scoring.reconstruction import encode_wave
from recipes.scoring.rows import read_rows


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the waves that the judge has read."""
    sizes: list[int] = []

    def transcribe(wave: np.ndarray, _rate: int) -> str:
        sizes.append(wave.size)
        return "hello world"

    def embed(wave: np.ndarray, _rate: int) -> np.ndarray:
        return np.array([1.0, 10 * float(np.abs(wave).mean())])

    def load(_judge: str, _speaker: str, **_: object) -> scoring.Judges:
        return scoring.Judges(transcribe, embed, "judge", "encoder")

    monkeypatch.setattr("recipes.scoring.options.load_judges", load)
    return sizes


def test_codebooks_are_swapped_and_scored(
    tmp_path: Path, tiny_codec_folder: Path, write_wav, calls: list[int]
) -> None:
    write_wav(tmp_path / "s.wav", 1.0, seed=1)
    write_wav(tmp_path / "t.wav", 0.4, seed=2)
    pairs = [
        {"id": "a", "source": "s.wav", "target": "t.wav", "text": "hello there"},
        {"id": "b", "source": "t.wav", "target": "s.wav"},
    ]
    write_json_lines(tmp_path / "pairs.jsonl", pairs)
    out = tmp_path / "out"
    command = ["vc", "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(out)]
    command += ["--judge", "x", "--speaker", "y", "--measures"]
    program.main([*command, "--codec", f"tiny={tiny_codec_folder}"])
    found = {(r.system, r.utterance, r.metric): r.value for r in read_rows(out / "rows.jsonl")}
    rows = {key[1:]: value for key, value in found.items() if key[0] == "tiny"}
    assert found["original", None, "wer"] == 0.5  # Of the source with a text.
    assert found["original", "a", "similarity_source"] == pytest.approx(1)
    assert (rows["a", "wer"], rows["b", "wer"], rows[None, "wer"]) == (0.5, 0, 0.25)
    for name in ("a", "b"):
        gain = rows[name, "similarity"] - rows[name, "similarity_source"]
        assert rows[name, "similarity_gain"] == pytest.approx(gain)
    wave = out / "runs" / "tiny" / "pairs" / "a.wav"
    before = wave.stat().st_mtime_ns
    calls.clear()
    program.main([*command, "--codec", f"tiny={tiny_codec_folder}"])
    assert wave.stat().st_mtime_ns == before  # Nothing is made or scored twice.
    assert not calls
    codec = load_codec(tiny_codec_folder)
    rate = codec.sample_rate
    source, target = (read_audio(tmp_path / f"{n}.wav", rate) for n in ("s", "t"))
    made = read_audio(out / "runs" / "tiny" / "pairs" / "a.wav", rate)
    assert made.size == source.size
    first, others = encode_wave(codec, source, 1), encode_wave(codec, target, 3)[1:]
    codes = np.concatenate([first, np.tile(others, 3)[:, : first.shape[1]]])
    import torch

    expected = codec.decode(torch.from_numpy(codes)[None])[0, 0, : made.size].numpy()
    np.testing.assert_allclose(made, expected.clip(-1, 1), atol=1e-4)
    clips = [line.value for line in read_json_lines(out / "clips.jsonl")]
    clip = next(one for one in clips if one["system"] == "tiny")
    assert clip["reference_audio"] == str(tmp_path / "t.wav")
    assert clip["audio"] == "runs/tiny/pairs/a.wav"


def test_conversions_that_are_missing_lose_all_words(tmp_path: Path, write_wav) -> None:
    write_wav(tmp_path / "s.wav", 1.0)
    entry = {"source": "s.wav", "target": "s.wav", "text": "hello world"}
    made = [{"id": "a", "audio": "s.wav", **entry}, {"id": "b", "audio": None, **entry}]
    write_json_lines(tmp_path / "made.jsonl", made)
    command = ["vc", "--list", str(tmp_path / "made.jsonl"), "--judge", "x", "--name", "n"]
    command += ["--measures"]
    program.main([*command, "--out", str(tmp_path)])
    scored = [row for row in read_rows(tmp_path / "rows.jsonl") if row.system == "n"]
    rows = {(row.utterance, row.metric): row for row in scored}
    assert rows[None, "wer"].value == 0.5
    assert rows[None, "failure"].value == 0.5
    assert rows[None, "similarity_gain"].value == pytest.approx(0, abs=1e-6)
    assert rows[None, "wer"].part == "vc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give --list, or --pairs and a system \(--codec, --voice, --run\)"),
        (["--pairs", "p.jsonl"], "--pairs needs a system"),
        (["--list", "p.jsonl", "--codec", "v"], "--codec is a system for --pairs, not for --list"),
        (["--pairs", "p.jsonl", "--run", "x {source} {out}"], r"the command has no \{target\}"),
    ],
)
def test_bad_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "p.jsonl", [{"id": "a", "source": "s.wav", "target": "t.wav"}])
    with pytest.raises(ValueError, match=message):
        program.main(["vc", *arguments, "--out", str(tmp_path)])

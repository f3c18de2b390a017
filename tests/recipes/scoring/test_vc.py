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
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(wave: np.ndarray, _rate: int) -> np.ndarray:
        return np.array([1.0, 10 * float(np.abs(wave).mean())])

    def load(_judge: str, _speaker: str, **_: object) -> scoring.Judges:
        return scoring.Judges(lambda _wave, _rate: "hello world", embed, "judge", "encoder")

    monkeypatch.setattr("recipes.scoring.options.load_judges", load)


def test_codebooks_are_swapped_and_scored(
    tmp_path: Path, tiny_codec_folder: Path, write_wav
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
    rows = {(r.utterance, r.metric): r.value for r in read_rows(out / "rows.jsonl")}
    assert (rows["a", "wer"], rows["b", "wer"], rows[None, "wer"]) == (0.5, 0, 0.25)
    for name in ("a", "b"):
        gain = rows[name, "similarity"] - rows[name, "similarity_source"]
        assert rows[name, "similarity_gain"] == pytest.approx(gain)
    codec = load_codec(tiny_codec_folder)
    rate = codec.sample_rate
    source, target = (read_audio(tmp_path / f"{n}.wav", rate) for n in ("s", "t"))
    made = read_audio(out / "runs" / "tiny" / "a.wav", rate)
    assert made.size == source.size
    first, others = encode_wave(codec, source, 1), encode_wave(codec, target, 3)[1:]
    codes = np.concatenate([first, np.tile(others, 3)[:, : first.shape[1]]])
    import torch

    expected = codec.decode(torch.from_numpy(codes)[None])[0, 0, : made.size].numpy()
    np.testing.assert_allclose(made, expected.clip(-1, 1), atol=1e-4)
    (clip, _) = [line.value for line in read_json_lines(out / "clips.jsonl")]
    assert clip["reference_audio"] == str(tmp_path / "t.wav")
    assert clip["audio"] == "runs/tiny/a.wav"


def test_conversions_that_are_missing_lose_all_words(tmp_path: Path, write_wav) -> None:
    write_wav(tmp_path / "s.wav", 1.0)
    entry = {"source": "s.wav", "target": "s.wav", "text": "hello world"}
    made = [{"id": "a", "audio": "s.wav", **entry}, {"id": "b", "audio": None, **entry}]
    write_json_lines(tmp_path / "made.jsonl", made)
    command = ["vc", "--list", str(tmp_path / "made.jsonl"), "--judge", "x", "--name", "n"]
    command += ["--measures"]
    program.main([*command, "--out", str(tmp_path)])
    rows = {(r.utterance, r.metric): r for r in read_rows(tmp_path / "rows.jsonl")}
    assert rows[None, "wer"].value == 0.5
    assert rows[None, "failure"].value == 0.5
    assert rows[None, "similarity_gain"].value == pytest.approx(0, abs=1e-6)
    assert rows[None, "wer"].part == "vc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --list with conversions, or --pairs and a system"),
        (["--pairs", "p.jsonl"], "--pairs needs a system"),
        (["--list", "p.jsonl", "--voice", "v"], "convert --pairs, not --list"),
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

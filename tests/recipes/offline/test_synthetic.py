"""recipes/offline/synthetic.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codec.audio import audio_tags
from codec.training.data import read_cuts
from eval.transcribe import Judge
from recipes.offline import synthetic
from recipes.offline.kokoro import Kokoro
from recipes.offline.synthetic import SyntheticConfig, make_speech, synthetic_config, work
from recipes.prepare_data import main
from slm.tokenization import text_normalization as spelling

TEXTS = [
    "The dog ran far away. The hen sat in the sun!", "Too short.",
    "It has 4 numbers in it, and is left out.", "A red hen sat on the mat",
    "Nobody will ever understand this one here.",
]  # fmt: skip
KEPT = ["The dog ran far away.", "The hen sat in the sun!", "A red hen sat on the mat."]


class Fake(Kokoro):
    """Stands in for Kokoro; the judge transcribes the last text."""

    def __init__(self, folder: Path) -> None:
        self.styles = {name: np.zeros((4, 256), np.float32) for name in ("af_a", "bm_b", "ef_c")}

    def synthesize(self, phonemes: str, style: np.ndarray, speed: float) -> np.ndarray:
        synthesized.append(phonemes)
        return 0.1 * np.sin(np.arange(24_000)).astype(np.float32)


synthesized: list[str] = []


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SyntheticConfig:
    synthesized.clear()
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "model.bin").touch()
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    monkeypatch.setattr(synthetic, "Kokoro", Fake)
    monkeypatch.setattr(spelling, "phonemes", lambda text, tied: text)
    monkeypatch.setattr(
        Judge, "transcribe", lambda *_: "mumble" if "Nobody" in synthesized[-1] else synthesized[-1]
    )

    def run_all(config: SyntheticConfig) -> None:
        for rank in range(config.processes):
            work(config, rank)

    monkeypatch.setattr(synthetic, "_run_all", run_all)
    return SyntheticConfig(
        out=tmp_path / "out", hours=12 / 3600, voices=3, texts=tmp_path / "texts.txt",
        judge=tmp_path / "judge",
    )  # fmt: skip


def rows(config: SyntheticConfig) -> list[dict]:
    lines = (config.out / "synthetic.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_speech_with_a_low_wer_is_kept(config: SyntheticConfig) -> None:
    make_speech(config)
    made = rows(config)
    assert len(made) == 12
    assert {row["text"] for row in made} == set(KEPT)
    assert {row["speaker"] for row in made} == {"kokoro-af_a", "kokoro-bm_b", "kokoro-drawn-0000"}
    for row in made:
        voice = row["speaker"].removeprefix("kokoro-")
        found = audio_tags(config.out / row["audio"])["comment"]
        assert found == f"synthetic speech by Kokoro-82M; voice {voice}; seed 0"
    rejected = [
        json.loads(line)
        for file in config.out.glob("rejected-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert {row["text"] for row in rejected} == {TEXTS[-1]}
    assert not {row["id"] for row in rejected} & {row["id"] for row in made}
    assert "texts.txt" in (config.out / "audio" / "README.md").read_text()


def test_resumed_synthesis_equals_an_uninterrupted_one(
    config: SyntheticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_speech(config)
    other = replace(config, out=tmp_path / "other")

    def stop(*_: object) -> np.ndarray:
        synthesized.append(str(_[1]))
        if len(synthesized) == stopped:
            raise KeyboardInterrupt
        return 0.1 * np.sin(np.arange(24_000)).astype(np.float32)

    synthesized.clear()
    stopped = 5
    monkeypatch.setattr(Fake, "synthesize", stop)
    with pytest.raises(KeyboardInterrupt):
        make_speech(other)
    before = len(synthesized)
    # An incomplete line and a missing recording are made again.
    with open(tmp_path / "other" / "made-0.jsonl", "a") as file:
        file.write('{"id": "syn-0')
    stopped = -1
    make_speech(other)
    assert rows(other) == rows(config)
    assert before == 5
    count = len(synthesized)
    make_speech(other)  # It is done.
    assert len(synthesized) == count
    with pytest.raises(ValueError, match="started with other settings"):
        make_speech(replace(other, seed=1))


def test_excluded_texts_are_not_synthesized(
    config: SyntheticConfig, tmp_path: Path, write_wav
) -> None:
    write_wav(tmp_path / "a.wav", 1.0)
    record = {"audio": "a.wav", "text": "THE DOG RAN FAR AWAY"}
    (tmp_path / "l.jsonl").write_text(json.dumps(record))
    main(["list", str(tmp_path / "l.jsonl"), "--out", str(tmp_path / "dev")])
    make_speech(replace(config, without=tmp_path / "dev" / "all.jsonl.gz"))
    assert {row["text"] for row in rows(config)} == set(KEPT[1:])


def test_recipe_writes_lists_of_cuts(
    config: SyntheticConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "whisper-base").mkdir(parents=True)
    (tmp_path / "models" / "whisper-base" / "model.bin").touch()
    main([
        "synthetic", "--out", "out", "--hours", "0.003", "--voices", "3", "--texts", "texts.txt",
        "--dev-speakers", "1", "--processes", "1",
    ])  # fmt: skip
    train, dev = (list(read_cuts(tmp_path / "out" / f"{one}.jsonl.gz")) for one in ("train", "dev"))
    assert len(train) + len(dev) == 11
    speakers = [{cut.supervisions[0].speaker for cut in cuts} for cuts in (train, dev)]
    assert not speakers[0] & speakers[1]


def test_user_errors(config: SyntheticConfig, tmp_path: Path, monkeypatch) -> None:
    for wrong in ({"hours": 0.0}, {"voices": 0}, {"processes": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            replace(config, **wrong)
    with pytest.raises(ValueError, match="makes the judge"):
        replace(config, judge=tmp_path / "none")
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "Kokoro", Kokoro)
        with pytest.raises(ValueError, match="no valid Kokoro"):
            make_speech(replace(config, kokoro=tmp_path / "none"))
    (tmp_path / "texts.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="no text of 4 to 25 words"):
        make_speech(config)


def test_settings_round_trip_as_json(config: SyntheticConfig) -> None:
    from dataclasses import asdict

    assert synthetic_config(json.loads(json.dumps(asdict(config), default=str))) == config


def test_seeds_beyond_those_of_numpy_are_refused(tmp_path: Path) -> None:
    for seed in (-1, 2**32, 10**23):
        with pytest.raises(ValueError, match=f"--seed={seed}: expected a whole number from 0 to"):
            main(["synthetic", "--out", str(tmp_path / "out"), "--seed", str(seed)])
    assert not (tmp_path / "out").exists()

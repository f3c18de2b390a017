"""recipes/scoring/synthesis.py with a voice and an encoder that are made up, so that scores are
foreseen."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from codec.tokens import TokenRow
from eval.benchmark import Provenance, rows_of
from recipes.scoring.eval_items import Line, continuations
from recipes.scoring.judges import Judges
from recipes.scoring.synthesis import Ears, go_on_lines, rests
from slm.data.sequences import Prompt
from slm.voice import Speech

HOP = 640


class FakeVoice:
    """Codes are amplitudes. It goes on with 9s as long as it may, but refuses what begins with 8,
    and says nothing after a 7."""

    def __init__(self) -> None:
        self.codec = SimpleNamespace(sample_rate=16000, frame_rate=25.0)

    def continue_speech(self, prompt: Prompt, seconds: float, seed: int) -> Speech:
        begun = prompt.codes[0, 0]
        if begun == 8:
            raise ValueError("the prompt is too long for the model")
        codes = np.full((3, 0 if begun == 7 else round(25 * seconds)), 9)
        return Speech(
            wave=self.decode(prompt.codes, codes), codes=codes, text="", prompt_text="",
            failure="empty" if begun == 7 else None, tries=1, seed=seed, sample_rate=16000,
        )  # fmt: skip

    def decode(self, _prompt: np.ndarray, new: np.ndarray) -> np.ndarray:
        return np.repeat(new[0] / 10, HOP).astype(np.float32)


def embed(wave: np.ndarray, _rate: int) -> np.ndarray:
    angle = np.pi * float(wave.mean())
    return np.array([np.cos(angle), np.sin(angle)])


def lines() -> list[Line]:
    """Prompts of 10 frames of amplitude 0.3, 0.7 and 0.8; then 20 of 0.5."""
    rows = [
        TokenRow(name, "a text", "s", "en", 1.2, np.repeat([[first] * 10 + [5] * 20], 3, axis=0))
        for name, first in (("a", 3), ("silent", 7), ("refused", 8))
    ]
    return continuations(rows, 0.4, 25.0)


def test_what_is_added_is_compared_with_the_prompt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ears = Ears(Judges(lambda *_: "", embed, "", "encoder"), None)
    spoken = go_on_lines(FakeVoice(), lines(), ears, tmp_path, seed=4)
    found = {one.scored.id: one for one in spoken.made}
    good = found["a"].scored
    # As long as the recording itself goes on.
    assert (good.values["failure"], good.values["seconds"], good.seed) == (0.0, 0.8, 4)
    assert good.values["similarity"] == pytest.approx(np.cos(np.pi * 0.6), abs=1e-5)
    assert good.words is good.characters is None
    assert soundfile.info(tmp_path / "textless" / "a.wav").duration == pytest.approx(1.2)
    for name in ("silent", "refused"):
        assert found[name].scored.values == {"failure": 1.0, "seconds": 0.0}
    assert found["refused"].audio is None
    assert found["refused"].reported == "refused"
    assert "refused was not gone on with: the prompt is too long" in caplog.text
    rows = rows_of("textless", spoken.scored, Provenance(system="slm", speaker="encoder"))
    whole = {row.metric: (row.n, row.value) for row in rows if row.utterance is None}
    assert whole["failure"] == (3, pytest.approx(2 / 3))
    assert whole["similarity"][0] == 1


def test_the_recordings_own_rest_is_the_ceiling() -> None:
    ears = Ears(Judges(lambda *_: "", embed, "", "encoder"), None)
    own = rests(FakeVoice(), lines()[:1], ears).scored[0]
    assert own.values["similarity"] == pytest.approx(np.cos(np.pi * 0.2), abs=1e-5)
    assert (own.values["failure"], own.values["seconds"]) == (0.0, 0.8)
    silent = rests(FakeVoice(), lines()[:1], Ears(Judges(lambda *_: "", None, "", ""), None))
    assert silent.scored[0].values.keys() == {"failure", "seconds"}

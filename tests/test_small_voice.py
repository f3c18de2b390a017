"""models/small: whole, small enough, and its parts fit each other."""

import json
import re
from pathlib import Path

import pytest
import torch

from codec import load_codec
from codec.halving import is_half
from slm.nar import NAR
from slm.prompts import load_prompts
from slm.shipping import load_sampling
from slm.vocab import Vocabulary

FOLDER = Path(__file__).parents[1] / "models" / "small"
MEGABYTE = 1_000_000
MOST_PARAMETERS = 20_000_000


def test_it_is_small_enough_and_names_no_place() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 45 * MEGABYTE
    assert sum(sizes) <= 90 * MEGABYTE
    for file in files:
        if file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r'"/|(^|\s)/(home|root|tmp)/', text), file
    base = json.loads((FOLDER / "ar" / "base.json").read_text())
    assert base["relative"] == "../../smollm2-135m-instruct"


@pytest.mark.parametrize("part", ["", "codec"])
def test_a_card_says_what_it_is_made_of(part: str) -> None:
    card = (FOLDER / part / "README.md").read_text(encoding="utf-8")
    for heading in ("Scores", "Data", "Training", "Limits"):
        assert f"\n## {heading}\n" in card
    assert "license: apache-2.0" in card


def test_codec_nar_and_prompts_fit_each_other() -> None:
    codec = load_codec(FOLDER / "codec")
    assert is_half(codec)
    nar = NAR.load(FOLDER / "nar")
    for model in (codec, nar):
        assert sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS
    stamp = codec.stamp
    assert Vocabulary.load(FOLDER / "ar").codec.digest == stamp.digest
    assert nar.config.codebook_sizes == stamp.codebook_sizes
    bits = sum(torch.tensor(stamp.codebook_sizes).log2().tolist())
    assert bits * stamp.frame_rate <= 2000
    sampling = load_sampling(FOLDER)
    assert sampling is not None
    assert sampling.tries > 1
    prompts = load_prompts(FOLDER / "prompts")
    assert len(prompts) >= 2
    for prompt in prompts.values():
        prompt.check(stamp.codebook_sizes)
        assert prompt.text
        assert re.search(r"CC0|CC BY|public domain", prompt.credit or "")
    one = prompts["kathleen"]
    (made,) = nar.decode([""], [one.codes[:, :20]], [one.codes[0, 20:40]])
    assert made.shape == (8, 20)
    # Its own speaker's codes come back oftener than by chance (1 in 1,024).
    assert (made[1] == one.codes[1, 20:40]).mean() > 0.02

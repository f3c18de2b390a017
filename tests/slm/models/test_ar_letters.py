"""slm/models/ar.py: embedding rows initialised from letters."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, save_base

from slm.config import ARConfig, LoRAConfig, SpeechFormConfig, TextConfig
from slm.models.ar import Letters, SpeechLM
from slm.tokenization.acoustic_bpe import AcousticBPE

NUM_CODES = STAMP.codebook_sizes[0]


def shares() -> np.ndarray:
    """Code 1 is a, code 2 b and a little of a, code 3 the end of a word, the others nothing."""
    found = np.zeros((NUM_CODES, 3), dtype=np.float32)
    found[1], found[2], found[3] = (0, 1, 0), (0, 0.25, 0.75), (0.5, 0, 0)
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_as_their_letters(tmp_path: Path, tied: bool) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    Letters("ab", shares()).save(tmp_path / "letters.json")
    text = TextConfig(tts_form="characters", asr_form="characters")
    config = ARConfig(base=str(base), lora=None, text=text, init_scale=0.0)
    plain = SpeechLM.create(config, STAMP, seed=0)
    spelt = SpeechLM.create(
        ARConfig(base=str(base), lora=None, text=text, init_scale=0.0,
                 letter_init=str(tmp_path / "letters.json")), STAMP, seed=0,
    )  # fmt: skip
    first = spelt.vocabulary.first_speech
    ids = dict(zip(" ab", (row[0] for row in spelt.tokenizer.character_ids(" ab")), strict=True))
    for table in ("get_input_embeddings", "get_output_embeddings"):
        before = getattr(plain.lm, table)().weight
        after = getattr(spelt.lm, table)().weight
        mean = before[: spelt.vocabulary.num_text].mean(0)
        a, b, space = (before[ids[one]] for one in "ab ")
        expected = before.clone()
        expected[first + 1] = before[first + 1] + a - mean
        expected[first + 2] = before[first + 2] + 0.25 * (a - mean) + 0.75 * (b - mean)
        expected[first + 3] = before[first + 3] + 0.5 * (space - mean)
        torch.testing.assert_close(after, expected)
        assert torch.equal(after[:first], before[:first])


def test_a_merge_has_the_mean_of_its_codes(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base"))
    Letters("ab", shares()).save(tmp_path / "letters.json")
    units = AcousticBPE.train([np.tile([1, 3], 50)], STAMP, size=1)
    units.save(tmp_path / "units.model")
    heard = SpeechFormConfig(asr_form="bpe", bpe_model=str(tmp_path / "units.model"))
    config = ARConfig(base=base, lora=None, speech=heard, init_scale=0.0)
    plain = SpeechLM.create(config, STAMP, seed=0)
    spelt = SpeechLM.create(
        replace(config, letter_init=str(tmp_path / "letters.json")), STAMP, seed=0
    )
    before, after = (lm.lm.get_input_embeddings().weight for lm in (plain, spelt))
    a, space = (before[ids[0]] for ids in spelt.tokenizer.character_ids("a "))
    mean = before[: spelt.vocabulary.num_text].mean(0)
    merge = spelt.vocabulary.first_speech + NUM_CODES
    assert units.decode([NUM_CODES]).tolist() == [1, 3]
    said = (a - mean + 0.5 * (space - mean)) / 2
    torch.testing.assert_close(after[merge], before[merge] + said)


def test_adapters_keep_the_initialised_rows(tmp_path: Path) -> None:
    base = str(save_base(tmp_path / "base"))
    Letters("ab", shares()).save(tmp_path / "letters.json")
    letters = str(tmp_path / "letters.json")
    whole = SpeechLM.create(ARConfig(base=base, lora=None, letter_init=letters), STAMP, seed=0)
    adapted = SpeechLM.create(
        ARConfig(base=base, lora=LoRAConfig(rank=2), letter_init=letters), STAMP, seed=0
    )
    adapted.save(tmp_path / "ar")
    again = SpeechLM.load(tmp_path / "ar", base, torch.float32)
    rows = [each.lm.get_input_embeddings().weight for each in (whole, again)]
    torch.testing.assert_close(rows[0], rows[1])


def test_letters_of_another_codebook_are_refused(tmp_path: Path) -> None:
    Letters("ab", shares()[1:]).save(tmp_path / "letters.json")
    config = ARConfig(
        base=str(save_base(tmp_path / "base")), letter_init=str(tmp_path / "letters.json")
    )
    with pytest.raises(ValueError, match=f"of {NUM_CODES - 1} codes, but codebook 1 has"):
        SpeechLM.create(config, STAMP, seed=0)


def test_letters_are_saved_and_loaded(tmp_path: Path) -> None:
    Letters("ab", shares()).save(tmp_path / "letters.json")
    again = Letters.load(tmp_path / "letters.json")
    assert again.letters == "ab"
    np.testing.assert_allclose(again.shares, shares(), atol=1e-4)


@pytest.mark.parametrize(
    "content",
    [
        None, "{", "[]", json.dumps({"letters": "ab", "shares": [[0, 1]]}),
        json.dumps({"letters": "a", "shares": [[0, 2]]}),
        json.dumps({"letters": "a", "shares": [[0, float("nan")]]}),
        json.dumps({"letters": "a", "shares": [0]}),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "letters.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"letters\.json: no letters of codes"):
        Letters.load(path)

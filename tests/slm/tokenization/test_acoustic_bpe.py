"""acoustic_bpe.py: acoustic BPE gives every sequence of codes back, in fewer pieces."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import STAMP

from codec.tokens import CodecStamp
from slm.tokenization import acoustic_bpe as units_module
from slm.tokenization.acoustic_bpe import AcousticBPE, without_runs

SIZE = STAMP.codebook_sizes[0]


def sequences(count: int = 40, most: int = SIZE - 4, seed: int = 0) -> list[np.ndarray]:
    """Runs of codes of which the last four of the codebook never occur."""
    random = np.random.default_rng(seed)
    return [
        np.repeat(random.integers(0, most, 20), random.integers(1, 5, 20)) for _ in range(count)
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "without runs"])
def units(request: pytest.FixtureRequest) -> AcousticBPE:
    return AcousticBPE.train(iter(sequences()), STAMP, size=30, remove_runs=request.param)


def test_every_sequence_comes_back(units: AcousticBPE) -> None:
    random = np.random.default_rng(1)
    some = [random.integers(0, SIZE, random.integers(0, 60)) for _ in range(50)]
    special = [np.arange(SIZE), np.full(3000, 7), np.array([SIZE - 1]), np.zeros(0, np.int64)]
    for codes in [*some, *special, *sequences(20, SIZE, seed=2)]:
        expected = without_runs(codes) if units.remove_runs else codes
        pieces = units.encode(codes)
        assert units.decode(pieces).tolist() == expected.tolist()
        assert units.lengths[pieces].sum() == len(expected)


def test_pieces_are_codes_first_and_merges_after(units: AcousticBPE) -> None:
    assert units.num_merges == 30
    assert [units.decode([piece]).tolist() for piece in range(SIZE)] == [[c] for c in range(SIZE)]
    merges = range(SIZE, SIZE + 30)
    assert all(len(units.decode([piece])) == units.lengths[piece] > 1 for piece in merges)
    assert len({tuple(units.decode([piece])) for piece in merges}) == 30
    for outside in (-1, SIZE + 30):
        with pytest.raises(ValueError, match=f"no piece {outside} among"):
            units.decode([outside])


def test_sequences_become_shorter(units: AcousticBPE) -> None:
    unseen = sequences(seed=3)
    assert sum(len(units.encode(codes)) for codes in unseen) < 0.6 * sum(map(len, unseen))


def test_runs_are_kept_or_removed() -> None:
    assert without_runs(np.array([0, 0, 3, 3, 3, 0])).tolist() == [0, 3, 0]
    assert without_runs(np.array([1, 1, 0])).tolist() == [1, 0]
    assert without_runs(np.zeros(0, np.int64)).size == 0


def test_long_sequences_are_encoded_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    units = AcousticBPE.train(sequences(), STAMP, size=30)
    codes = np.concatenate(sequences())
    monkeypatch.setattr(units_module, "ENCODING_CODES", 7)
    assert units.decode(units.encode(codes)).tolist() == codes.tolist()


def test_long_utterances_are_trained_on_in_stretches() -> None:
    """What crosses a cut is no pair; what is within is found as in short utterances."""
    units = AcousticBPE.train([np.tile([1, 2, 3], 1000)], STAMP, size=2)
    assert units.num_merges == 2
    assert len(units.encode(np.tile([1, 2, 3], 10))) == 10


def test_fewer_merges_than_asked_for_where_there_are_no_more() -> None:
    assert AcousticBPE.train([np.array([5])], STAMP, size=10).num_merges == 0
    assert AcousticBPE.train([np.array([5, 6])], STAMP, size=0).num_merges == 0


def test_large_codebooks() -> None:
    """Their codes fill two of Unicode's planes."""
    codes = np.array([0, 0xFFFD, 0xFFFE, 0xFFFF, 0xFFFF, 0])
    text = units_module._text(codes)
    assert units_module._codes(text).tolist() == codes.tolist()
    # The last two characters of each plane are none of Unicode's.
    assert [ord(each) for each in text[1:3]] == [0xFFFFD, 0x100000]
    stamp = dataclasses.replace(STAMP, codebook_sizes=(65_536, 16, 16))
    units = AcousticBPE.train([np.tile([0xFFFF, 0xFFFE, 0], 20)], stamp, size=2)
    assert len(units.encode(np.tile([0xFFFF, 0xFFFE, 0], 5))) == 5
    assert units.decode(units.encode(codes)).tolist() == codes.tolist()
    stamp = dataclasses.replace(STAMP, codebook_sizes=(65_537, 16, 16))
    with pytest.raises(ValueError, match="65537 entries, 65536 at most"):
        AcousticBPE.train([codes], stamp, size=1)


@pytest.mark.parametrize("code", [-1, SIZE])
def test_codes_outside_the_codebook_are_named(units: AcousticBPE, code: int) -> None:
    with pytest.raises(ValueError, match=f"code {code} is outside codebook 1"):
        units.encode(np.array([0, code]))
    with pytest.raises(ValueError, match=f"code {code} is outside codebook 1"):
        AcousticBPE.train([np.array([0, code])], STAMP, size=1)


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="no codes"):
        AcousticBPE.train([np.zeros(0, np.int64)], STAMP, size=1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        AcousticBPE.train(sequences(), STAMP, size=-1)


def test_save_and_load(units: AcousticBPE, tmp_path: Path) -> None:
    units.save(tmp_path / "a" / "units.model")
    loaded = AcousticBPE.load(tmp_path / "a" / "units.model")
    assert (loaded.digest, loaded.trained) == (units.digest, units.trained)
    codes = np.concatenate(sequences(seed=4))
    assert loaded.encode(codes).tolist() == units.encode(codes).tolist()


def test_the_digest_tells_units_apart() -> None:
    made = [
        AcousticBPE.train(sequences(), STAMP, size=30),
        AcousticBPE.train(sequences(), STAMP, size=29),
        AcousticBPE.train(sequences(), STAMP, size=30, remove_runs=True),
        AcousticBPE.train(sequences(), dataclasses.replace(STAMP, digest="f" * 16), size=30),
    ]
    assert len({units.digest for units in made}) == 4
    assert {len(units.digest) for units in made} == {16}
    assert AcousticBPE.train(sequences(), STAMP, size=30).digest == made[0].digest


def test_units_of_another_codec_are_refused(units: AcousticBPE) -> None:
    units.check_codec(STAMP)
    with pytest.raises(ValueError, match=r"my\.model: trained .* of tiny \(f{16}\)"):
        units.check_codec(dataclasses.replace(STAMP, digest="f" * 16), "my.model")


def test_damaged_files_are_named(units: AcousticBPE, tmp_path: Path) -> None:
    path = tmp_path / "units.model"
    with pytest.raises(ValueError, match="no such acoustic BPE model"):
        AcousticBPE.load(path)
    units.save(path)
    whole = json.loads(path.read_text())
    larger: CodecStamp = dataclasses.replace(STAMP, codebook_sizes=(SIZE + 1, 16, 16))
    broken = [
        {},
        {**whole, "format": 99},
        {**whole, "sentencepiece": whole["sentencepiece"][:40]},
        {**whole, "codec": dataclasses.asdict(larger)},
        {**whole, "codec": {**whole["codec"], "codebook_sizes": []}},
    ]
    for record in broken:
        path.write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r"units\.model: not an acoustic BPE model"):
            AcousticBPE.load(path)

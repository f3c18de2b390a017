"""Clips of a few words, word boundaries, and the letter probabilities of codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_semantic import one_hot_recognizer

import recipes.make_clips as recipe
from codec.distillation.ctc_reader import CodeRecognizer, RecognizerNetwork
from codec.tokens import CodecStamp, TokenRow, TokenShard, write_shard
from recipes.make_clips import cut, main
from slm.data.interleaving import read_word_boundaries
from slm.models.ar import Letters

STAMP = CodecStamp(
    id="c", digest="0" * 16, sample_rate=16_000, frame_rate=25.0, num_codebooks=2,
    codebook_sizes=(5, 7),
)  # fmt: skip
TEXTS = ["Ab ca, bac.", "CAB A", "b2 a", "- ab"]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Utterances whose codes are their letters, four frames each; the third has a digit, the
    fourth what is no word."""
    rows = []
    for number, text in enumerate(TEXTS):
        labels = ["_ abc".index(one) for one in text.lower() if one in " abc"]
        if text[0] == "-":
            labels = labels[1:]
        first = np.repeat(labels, 4).astype(np.uint16)
        first[np.arange(len(first)) % 4 > 0] = 0
        both = np.stack([first, np.arange(len(first)) % 7]).astype(np.uint16)
        rows.append(TokenRow(f"u{number}", text, "s", "en", both.shape[1] / 25, both))
    write_shard(tmp_path / "tokens.parquet", rows, STAMP)
    CodeRecognizer(RecognizerNetwork(4, 8, "abc"), torch.randn(5, 4)).save(tmp_path / "reader")
    log_probs = one_hot_recognizer("abc").log_probs
    monkeypatch.setattr(CodeRecognizer, "log_probs", lambda _, codes: log_probs(codes))
    return [f"tokens={tmp_path / 'tokens.parquet'}", f"reader={tmp_path / 'reader'}",
            f"out={tmp_path / 'out'}"]  # fmt: skip


def test_clips_cover_an_utterance_word_by_word(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    main([*settings, "max_words=2"])
    results = json.loads(capsys.readouterr().out.splitlines()[0])
    assert results["unspelled"] == 1
    shard, whole = TokenShard.open(results["clips"]), TokenShard.open(tmp_path / "tokens.parquet")
    assert len(shard) == results["number"]
    assert shard.stamp == whole.stamp
    for number, text in enumerate(["Ab ca, bac.", "cab a"]):
        mine = [i for i, name in enumerate(shard.ids) if name.startswith(f"u{number}#")]
        assert " ".join(shard.texts[i] for i in mine) == text
        joined = np.concatenate([shard[i].codes for i in mine], axis=1)
        np.testing.assert_array_equal(joined, whole[number].codes)
        assert all(len(shard.texts[i].split()) <= 2 for i in mine)
    assert np.isclose(shard.durations, shard.num_frames / 25).all()
    assert all(any(map(str.isalpha, text)) for text in shard.texts)
    both = TokenShard.open([tmp_path / "tokens.parquet", results["clips"]])
    assert len(both) == len(whole) + len(shard)
    edges = read_word_boundaries([tmp_path / "out" / "edges.jsonl.gz"])
    for index, name in enumerate([*whole.ids, *shard.ids]):
        row = [*whole, *shard][index]
        if name != "u2":  # It has a digit.
            assert len(edges[name]) == len(row.text.split()) + 1
            assert (edges[name][0], edges[name][-1]) == (0, row.num_frames)
    assert "u2" not in edges
    letters = Letters.load(results["letters"])
    assert letters.letters == "abc"
    assert letters.shares.argmax(1)[1:].tolist() == [0, 1, 2, 3]


def test_the_seed_decides_where_clips_are_cut() -> None:
    edges = list(range(0, 300, 3))
    drawn = [list(cut(edges, 8, np.random.default_rng(seed))) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    sizes = [clip.last - clip.first for clip in drawn[0]]
    assert set(sizes) <= set(range(1, 9))
    assert sum(sizes) == 99


def test_long_silences_are_dropped(settings: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(recipe, "MAX_WORD", 0.1)
    with pytest.raises(ValueError, match="no clips: the transcripts of 1 utterances"):
        main(settings)


def test_a_recognizer_of_other_codes_is_refused(settings: list[str], monkeypatch) -> None:
    monkeypatch.setattr(CodeRecognizer, "transcribe", lambda *_: "zzzz")
    with pytest.raises(ValueError, match="does not recognize the codes of"):
        main(settings)


def test_a_recognizer_of_another_codebook_is_refused(settings: list[str], tmp_path: Path) -> None:
    CodeRecognizer(RecognizerNetwork(4, 8, "abc"), torch.randn(6, 4)).save(tmp_path / "reader")
    with pytest.raises(ValueError, match=r"a codebook of 6 entries, but that of .* has 5"):
        main(settings)


@pytest.mark.parametrize("given", ["max_words=0", "seed=-1"])
def test_invalid_settings_are_refused(settings: list[str], given: str) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        main([*settings, given])

"""The CTC probe of codes: its labels, training and scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from eval.text_probe import (
    LABELS,
    Probe,
    ProbeConfig,
    ProbeCorpus,
    ProbeNetwork,
    _schedule,
    decode_labels,
    label_text,
    labels_of_text,
    min_ctc_frames,
    summed_ctc_loss,
    train_probe,
)

SIZE = 40
TINY = ProbeConfig(
    hidden=24,
    num_layers=1,
    embedding=16,
    dropout=0.0,
    epochs=25,
    learning_rate=2e-2,
    batch_frames=400,
)
ALPHABET = "abcd"


def corpus(num: int, seed: int, readable: bool = True) -> ProbeCorpus:
    """Texts of four letters, each two or three frames of one of its own codes."""
    generator = np.random.default_rng(seed)
    codes, texts = [], []
    for _ in range(num):
        letters = generator.integers(0, len(ALPHABET), generator.integers(3, 9))
        runs = []
        for letter in letters:
            run = [4 + 3 * letter + generator.integers(0, 3)] * generator.integers(2, 4)
            runs += [*run, generator.integers(0, 4)]  # A pause of one frame.
        spoken = np.array(runs if readable else generator.integers(0, SIZE, len(runs)))
        codes.append(spoken.astype(np.uint16))
        texts.append("".join(ALPHABET[letter] for letter in letters))
    return ProbeCorpus(codes, texts)


def test_informative_codes_have_a_low_error_rate_and_random_ones_do_not() -> None:
    dev = corpus(12, seed=2)
    probe = train_probe(
        corpus(80, seed=1), codebook_sizes=[SIZE], frame_rate=50, config=TINY, dev=dev
    )
    result = probe.score(dev)
    assert result.cer < 0.02
    assert result.loss < 0.1
    assert result.n == 12
    assert result.texts == probe.transcribe(dev.codes)
    assert probe.num_trained == 80
    assert len(probe.history) == TINY.epochs
    assert probe.history[-1].dev_cer == result.cer
    assert probe.history[-1].train_loss < probe.history[0].train_loss / 10
    noise = corpus(12, seed=2, readable=False)
    random = train_probe(
        corpus(80, seed=1, readable=False), codebook_sizes=[SIZE], frame_rate=50, config=TINY
    ).score(noise)
    assert random.cer > 0.4
    assert random.loss > 10 * result.loss


def short(**changes: object) -> ProbeConfig:
    return ProbeConfig(hidden=8, embedding=8, epochs=2, batch_frames=200, **changes)


def test_the_seed_decides_and_leaves_other_generators_alone() -> None:
    train, dev = corpus(10, seed=1), corpus(4, seed=2)

    def losses(seed: int) -> list[float]:
        config = short(seed=seed, dropout=0.3)
        probe = train_probe(train, codebook_sizes=[SIZE], frame_rate=50, config=config)
        return [*(epoch.train_loss for epoch in probe.history), probe.score(dev).loss]

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = losses(0)
    assert torch.equal(torch.rand(1), expected)
    assert losses(0) == first
    assert losses(1) != first


def test_scoring_dev_between_epochs_changes_nothing() -> None:
    train = corpus(10, seed=1)
    probes = [
        train_probe(train, codebook_sizes=[SIZE], frame_rate=50, config=short(dropout=0.5), dev=dev)
        for dev in (None, corpus(4, seed=2))
    ]
    alone, scored = (probe.network.state_dict() for probe in probes)
    for name, weight in alone.items():
        assert torch.equal(weight, scored[name]), name
    assert [epoch.dev_cer is None for probe in probes for epoch in probe.history] == [
        *(True, True),
        *(False, False),
    ]


def test_the_learning_rate_is_piecewise_linear() -> None:
    shares = [_schedule(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 10)
    assert shares[4] == pytest.approx(5 / 10)
    assert max(shares) == shares[9] == 1
    assert shares[54] == pytest.approx(46 / 91)
    assert shares[99] == pytest.approx(1 / 91)
    assert [_schedule(step, 2) for step in range(2)] == [1, 0.5]


def test_the_loss_is_in_nats_per_character() -> None:
    """With a uniform distribution over labels in every frame."""
    network = ProbeNetwork([SIZE], short())
    nn.init.zeros_(network.output.weight)
    nn.init.zeros_(network.output.bias)
    frames = [np.array([5, 6]), np.array([7, 8])]
    result = Probe(network, [SIZE], repeats=1).score(ProbeCorpus(frames, ["ab", "c"]))
    # "ab" has one path of two frames, "c" three: cc, c and a blank, a blank and c.
    frame = math.log(1 + len(LABELS))
    assert result.loss == pytest.approx((2 * frame + 2 * frame - math.log(3)) / 3, rel=1e-5)
    # A text that cannot be aligned counts in neither sum.
    unscored = Probe(network, [SIZE], repeats=1).score(ProbeCorpus(frames, ["ab", "abcdefgh"]))
    assert unscored.loss == pytest.approx(frame, rel=1e-5)


def test_a_padded_batch_equals_single_items() -> None:
    torch.manual_seed(0)
    network = ProbeNetwork([SIZE, 7], short()).eval()
    lengths = [5, 9, 1]
    codes = torch.zeros(3, 2, 9, dtype=torch.long)
    singles = []
    for row, length in enumerate(lengths):
        codes[row, 0, :length] = torch.randint(0, SIZE, (length,))
        codes[row, 1, :length] = torch.randint(0, 7, (length,))
        alone = codes[row : row + 1, :, :length]
        singles.append(network(alone, torch.tensor([length]))[0])
    batch = network(codes, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(batch[row, :length], singles[row])
    # The backward direction sees what follows.
    later = codes.clone()
    later[1, 0, 8] = (later[1, 0, 8] + 1) % SIZE
    assert not torch.equal(network(later, torch.tensor(lengths))[1, 0], batch[1, 0])


def test_texts_that_cannot_be_aligned_are_left_out_and_counted() -> None:
    train = corpus(6, seed=1)
    frames = [np.array([5, 6, 7])] * 3
    added = ProbeCorpus([*train.codes, *frames], [*train.texts, "abcd", "aab", "4 a"])
    config = short(min_frame_rate=50.0)
    probe = train_probe(added, codebook_sizes=[SIZE], frame_rate=50, config=config)
    counts = (probe.num_trained, probe.num_too_short, probe.num_unspelled)
    assert counts == (6, 2, 1)
    result = probe.score(ProbeCorpus([*frames, np.zeros(0, np.int64)], ["abc", "abcd", "4 a", "a"]))
    assert (result.n, result.num_unscored) == (4, 3)
    assert result.texts[3] == ""
    assert math.isnan(probe.score(ProbeCorpus(frames[:1], ["abcd"])).loss)


def test_slow_frames_are_repeated() -> None:
    train = corpus(6, seed=1)
    added = ProbeCorpus([*train.codes, np.array([5, 6, 7])], [*train.texts, "abcd"])
    probe = train_probe(added, codebook_sizes=[SIZE], frame_rate=20, config=short())
    assert (probe.repeats, probe.num_trained, probe.num_too_short) == (3, 7, 0)


def test_all_codebooks_are_used_and_given_tables_are_frozen() -> None:
    """The letters are in codebook 2; codebook 1 is noise."""
    train = corpus(40, seed=1)
    noise = np.random.default_rng(0)
    both = [np.stack([noise.integers(0, 9, one.size), one]) for one in train.codes]
    tables = [torch.randn(size, 8, generator=torch.Generator().manual_seed(1)) for size in (9, 40)]
    probe = train_probe(
        ProbeCorpus(both, train.texts),
        codebook_sizes=[9, SIZE],
        frame_rate=50.0,
        config=replace(TINY, batch_frames=100),
        tables=tables,
        progress=False,
    )
    assert probe.score(ProbeCorpus(both, train.texts)).cer < 0.25
    assert torch.equal(probe.network.embedding.weight, torch.cat(tables))


def test_invalid_input_is_refused() -> None:
    train = corpus(4, seed=1)
    with pytest.raises(ValueError, match="4 utterances of codes, 3 texts"):
        train_probe(ProbeCorpus(train.codes, train.texts[:3]), codebook_sizes=[SIZE], frame_rate=50)
    with pytest.raises(ValueError, match="the corpus is empty"):
        train_probe(ProbeCorpus([], []), codebook_sizes=[SIZE], frame_rate=50)
    with pytest.raises(ValueError, match="outside the codebooks"):
        train_probe(train, codebook_sizes=[4], frame_rate=50)
    with pytest.raises(ValueError, match="there are 2 codebooks"):
        train_probe(train, codebook_sizes=[SIZE, SIZE], frame_rate=50)
    with pytest.raises(ValueError, match="frame_rate must be positive"):
        train_probe(train, codebook_sizes=[SIZE], frame_rate=0)
    with pytest.raises(ValueError, match="one \\(K, D\\)"):
        train_probe(train, codebook_sizes=[SIZE], frame_rate=50, tables=[torch.zeros(3, 2)])
    short_one = ProbeCorpus([np.zeros(1, int)], ["ab"])
    hint = "none of 1 utterances .* 1 fewer frames .*; raise min_frame_rate .*--setting paper"
    with pytest.raises(ValueError, match=hint):
        train_probe(short_one, codebook_sizes=[SIZE], frame_rate=50)
    # Without the hint about frames, for digits.
    with pytest.raises(ValueError, match=r"1 have no labels .*, 0 fewer frames than characters$"):
        train_probe(ProbeCorpus(train.codes[:1], ["7"]), codebook_sizes=[SIZE], frame_rate=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeConfig(**change)


def test_texts_are_normalized_to_labels() -> None:
    assert label_text("DON'T stop, Zo\u00eb -- now!") == "don't stop zoe now"
    assert label_text("it\N{RIGHT SINGLE QUOTATION MARK}s") == "it's"
    assert label_text("Les \u00c9l\u00e8ves na\u00effs") == "les eleves naifs"
    assert label_text("room 12") is None
    assert label_text("...") is None
    assert set(label_text("".join(map(chr, range(32, 48)))) or "") <= set(LABELS)


def test_labels_and_texts_are_inverse() -> None:
    labels = labels_of_text("It's a see-saw")
    assert labels is not None
    assert min(labels) > 0
    apart = [label for one in labels for label in (one, one, 0)]
    assert decode_labels(apart) == "it's a see saw"
    assert decode_labels([0, 0]) == ""
    assert labels_of_text("7") is None


def test_double_letters_need_a_frame_between() -> None:
    assert min_ctc_frames(labels_of_text("aab") or []) == 4
    assert min_ctc_frames(labels_of_text("aba") or []) == 3
    uniform = torch.zeros(1, 4, 1 + len(LABELS)).log_softmax(2)
    # One path of four frames: a, blank, a, b.
    loss = float(summed_ctc_loss(uniform, [[3, 3, 4]], [4]))
    assert loss == pytest.approx(4 * math.log(1 + len(LABELS)))
    assert float(summed_ctc_loss(uniform, [[3, 3, 4]], [3])) == math.inf


def test_likelihoods_are_those_of_single_ctc_losses() -> None:
    """Row j has text j given the codes of others; texts that do not fit them have -inf."""
    torch.manual_seed(0)
    probe = Probe(ProbeNetwork([SIZE], short()), [SIZE], repeats=2)
    data = ProbeCorpus(
        [np.arange(5), np.arange(1, 9), np.array([3, 4]), np.arange(3), np.arange(1)],
        ["abc", "aab a bad cad", "ab", "7", "abc"],
    )
    found = probe.likelihoods(data)
    assert found.indices == [0, 1, 2]
    assert found.num_characters.tolist() == [3, 13, 2]
    labels = [labels_of_text(data.texts[index]) or [] for index in found.indices]
    for text in range(3):
        own = -probe.score(ProbeCorpus([data.codes[text]], [data.texts[text]])).loss
        assert found.matching[text] == pytest.approx(own * len(labels[text]), rel=1e-5)
        crossed = []
        for codes in (one for one in range(3) if one != text):
            if min_ctc_frames(labels[text]) > 2 * data.codes[codes].size:
                crossed.append(-math.inf)
            else:
                pair = ProbeCorpus([data.codes[codes]], [data.texts[text]])
                crossed.append(-probe.score(pair).loss * len(labels[text]))
        assert sorted(found.others[text]) == pytest.approx(sorted(crossed), rel=1e-5)
    assert np.isneginf(found.others[1]).all()
    sampled = probe.likelihoods(data, num_others=1, seed=3)
    assert sampled.others.shape == (3, 1)
    assert all(one in row for one, row in zip(sampled.others[:, 0], found.others, strict=True))
    assert np.array_equal(probe.likelihoods(data, num_others=1, seed=3).others, sampled.others)
    with pytest.raises(ValueError, match="1 of 2 utterances can be aligned; need 2"):
        probe.likelihoods(ProbeCorpus(data.codes[2:4], data.texts[2:4]))
    with pytest.raises(ValueError, match="num_others must be at least 1, got 0"):
        probe.likelihoods(data, num_others=0)

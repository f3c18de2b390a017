"""Bounds and SNMI on joint distributions whose mutual information is known."""

import math

import numpy as np
import pytest

from eval.mutual_information import (
    estimate_of,
    information_bounds,
    sequence_information,
)
from eval.text_probe import ProbeConfig, ProbeCorpus, train_probe

NUM_LETTERS = 4
LENGTH = 3


def channel_information(error: float) -> float:
    """Information in nats of LENGTH uniform letters, each replaced by another with a probability
    of `error`."""
    letter = math.log(NUM_LETTERS) - error * math.log(NUM_LETTERS - 1)
    letter += sum(p * math.log(p) for p in (error, 1 - error) if p)
    return LENGTH * letter


def through_channel(num: int, error: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters (num, LENGTH) that were sent, and those that were received."""
    generator = np.random.default_rng(seed)
    sent = generator.integers(0, NUM_LETTERS, (num, LENGTH))
    wrong = (sent + generator.integers(1, NUM_LETTERS, sent.shape)) % NUM_LETTERS
    return sent, np.where(generator.random(sent.shape) < error, wrong, sent)


@pytest.mark.parametrize("error", [0.05, 0.2, 0.4, 0.6])
def test_the_true_distribution_gives_bounds_from_both_sides(error: float) -> None:
    sent, received = through_channel(500, error, seed=1)
    equal = (sent[:, None] == received[None]).sum(2)  # Row: text; column: codes.
    table = equal * math.log(1 - error) + (LENGTH - equal) * math.log(error / (NUM_LETTERS - 1))
    others = table[~np.eye(500, dtype=bool)].reshape(500, 499)
    bounds = information_bounds(np.diag(table), others)
    truth = channel_information(error)
    lower, upper = estimate_of(bounds.info_nce), estimate_of(bounds.vclub)
    assert lower.value <= truth + 2 * lower.error
    assert lower.value >= 0.8 * truth - 3 * lower.error
    assert upper.value >= truth - 2 * upper.error
    assert bounds.info_nce.max() <= bounds.limit == math.log(500)
    # The paper's double sum, in which i = j counts too.
    assert upper.value == pytest.approx(np.diag(table).mean() - table.mean())


def test_a_trained_probe_stays_below_the_information_and_rises_with_it() -> None:
    """Each letter is the code of one frame, and a frame of silence follows."""
    found = []
    errors = (0.5, 0.2, 0.0)
    for error in errors:
        corpora = []
        for seed, num in ((1, 300), (2, 150)):
            sent, received = through_channel(num, error, seed)
            codes = [np.stack([1 + row, 0 * row], 1).reshape(-1) for row in received]
            corpora.append(
                ProbeCorpus(codes, ["".join("abcd"[one] for one in row) for row in sent])
            )
        train, dev = corpora
        config = ProbeConfig(
            hidden=16, num_layers=1, embedding=8, dropout=0.0, epochs=6, learning_rate=3e-2,
            batch_frames=150,
        )  # fmt: skip
        probe = train_probe(
            train, codebook_sizes=[1 + NUM_LETTERS], frame_rate=50, config=config, progress=False
        )
        likelihoods = probe.likelihoods(dev, progress=False)
        bounds = information_bounds(likelihoods.matching, likelihoods.others)
        found.append(estimate_of(bounds.info_nce))
    truths = [channel_information(error) for error in errors]
    for estimate, truth in zip(found, truths, strict=True):
        assert estimate.value <= truth + 2 * estimate.error
    assert found[-1].value > 0.9 * truths[-1]
    rising = [estimate.value for estimate in found]
    assert rising == sorted(rising)
    assert rising[0] > 0


def test_impossible_texts_are_left_out_of_vclub_and_kept_in_info_nce() -> None:
    bounds = information_bounds(
        np.array([-1.0, -2.0]), np.array([[-np.inf, -3.0], [-np.inf, -np.inf]])
    )
    assert bounds.vclub[0] == pytest.approx(-1 + 1 / 2 + 3 / 2)
    assert np.isnan(bounds.vclub[1])
    assert bounds.info_nce[1] == pytest.approx(math.log(3))
    assert estimate_of(np.array([1.0, np.nan, 3.0])) == (2, 1)
    for matching, others, message in (
        ([-1.0], [[-1.0]], "need two utterances"),
        ([-1.0, -np.inf], [[-1.0], [-1.0]], "NaN or infinite"),
        ([-1.0, -1.0], [[-1.0], [np.nan]], "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            information_bounds(np.array(matching), np.array(others))
    with pytest.raises(ValueError, match="1 terms; a standard error needs 2"):
        estimate_of(np.array([1.0, np.nan]))


def recordings(noise: float, seed: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """Eight sentences, each read 12 times at different rates; a share of the codes is random."""
    generator = np.random.default_rng(seed)
    sentences = generator.integers(0, 50, (8, 12))
    codes, names = [], []
    for number in range(96):
        line = np.repeat(sentences[number % 8], generator.integers(1, 4, 12))
        changed = generator.random(line.size) < noise
        codes.append(np.where(changed, generator.integers(0, 50, line.size), line)[None])
        names.append(f"sentence {number % 8}")
    return codes, names


def test_snmi_falls_with_noise_from_its_ceiling_to_chance() -> None:
    results = [sequence_information(*recordings(noise)) for noise in (0.0, 0.2, 1.0)]
    clear, noisy, random = results
    assert clear.snmi == pytest.approx(clear.ceiling)  # Durations alone differ.
    assert clear.ceiling > 0.7
    assert clear.snmi > noisy.snmi + 0.1
    assert noisy.snmi > random.snmi + 0.1
    assert abs(random.snmi - random.chance) < 0.05
    assert 0 < random.chance < 0.4
    assert clear.chance < 0.4  # Its sentences are permuted, whatever the codes are.
    assert (clear.n, clear.num_sentences) == (96, 8)
    assert 0 < clear.error < 0.05
    assert sequence_information(*recordings(0.2)) == noisy


def test_snmi_of_all_codebooks_and_of_repeated_sentences_only() -> None:
    codes, names = recordings(0.0)
    noise, _ = recordings(1.0, seed=1)
    both = [np.concatenate([one, other[:, : one.shape[1]].repeat(3, 1)[:, : one.shape[1]]])
            for one, other in zip(codes, noise, strict=True)]  # fmt: skip
    alone = sequence_information(codes, names)
    assert sequence_information(both, names).snmi < alone.snmi
    more = sequence_information([*codes, codes[0]], [*names, "another"])
    assert more == alone
    with pytest.raises(ValueError, match="1 sentences occur at least twice"):
        sequence_information(codes[:9], names[:9])
    with pytest.raises(ValueError, match="96 sequences of codes, 9 sentences"):
        sequence_information(codes, names[:9])
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        sequence_information([codes[0], codes[0][:, :0], *codes[1:]], [names[0], *names])


def test_constant_codes_have_no_information() -> None:
    _, names = recordings(0.0)
    result = sequence_information([np.zeros(5, np.int64)] * len(names), names)
    assert (result.snmi, result.chance, result.ceiling) == (0, 0, 0)

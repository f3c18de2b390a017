"""codec/training/losses.py: what an ear understands, close to pystoi, with a gradient."""

import numpy as np
import pytest
import torch
from conftest import voiced

from codec import read_audio
from codec.training.losses import stoi_loss
from eval.speech import stoi

RATE = 16_000


@pytest.fixture
def speech(write_wav, tmp_path) -> torch.Tensor:
    """Two items of 3 s whose loudness moves as that of syllables does."""
    moves = 0.5 + 0.5 * torch.sin(2 * torch.pi * 4 * torch.arange(3 * RATE) / RATE)
    waves = [
        torch.from_numpy(read_audio(write_wav(tmp_path / f"{seed}.wav", 3.0, seed=seed), RATE))
        for seed in (0, 1)
    ]
    hiss = 0.3 * torch.randn(2, 3 * RATE, generator=torch.Generator().manual_seed(0))
    return ((torch.stack(waves) + hiss) * moves)[:, None]


def noisy(wave: torch.Tensor, strength: float) -> torch.Tensor:
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(1))
    return wave + strength * noise


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5])
def test_it_is_what_pystoi_finds(speech: torch.Tensor, strength: float) -> None:
    heard = noisy(speech, strength)
    pairs = zip(speech[:, 0].numpy(), heard[:, 0].numpy(), strict=True)
    expected = np.mean([stoi(real, fake, RATE) for real, fake in pairs])
    assert float(1 - stoi_loss(heard, speech, RATE)) == pytest.approx(expected, abs=0.03)


def test_loudness_does_not_count(speech: torch.Tensor) -> None:
    heard = noisy(speech, 0.5)
    assert stoi_loss(0.1 * heard, speech, RATE) == pytest.approx(
        float(stoi_loss(heard, speech, RATE)), abs=1e-3
    )


def test_silence_beside_speech_does_not_count(speech: torch.Tensor) -> None:
    heard = noisy(speech, 0.5)
    longer = torch.nn.functional.pad(speech, (0, 3 * RATE))
    hissing = torch.nn.functional.pad(heard, (0, 3 * RATE))
    hissing[..., 3 * RATE :] = 1e-5
    found, before = stoi_loss(hissing, longer, RATE), stoi_loss(heard, speech, RATE)
    assert float(found) == pytest.approx(float(before), abs=0.03)


def test_its_gradient_leads_to_what_is_better_understood(speech: torch.Tensor) -> None:
    fake = noisy(speech, 0.5).requires_grad_()
    losses = []
    for _ in range(5):
        loss = stoi_loss(fake, speech, RATE)
        (gradient,) = torch.autograd.grad(loss, fake)
        fake = (fake - 0.5 * gradient / gradient.norm() * fake.norm() / 10).detach()
        fake.requires_grad_()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_an_item_without_speech_does_not_count(speech: torch.Tensor) -> None:
    silent = torch.cat([speech[:1], torch.zeros_like(speech[:1])])
    said = torch.cat([noisy(speech, 0.5)[:1], torch.zeros_like(speech[:1])])
    alone = stoi_loss(said[:1], silent[:1], RATE)
    assert stoi_loss(said, silent, RATE).item() == pytest.approx(alone.item(), abs=1e-6)
    assert stoi_loss(said[1:], silent[1:], RATE).item() == 0.0


@pytest.mark.parametrize("samples", [0.0, 1.0])
def test_silence_and_short_items_are_finite(samples: float) -> None:
    for size in (RATE, RATE // 4):
        fake = torch.zeros(1, 1, size, requires_grad=True)
        loss = stoi_loss(fake, samples * torch.ones(1, 1, size), RATE)
        loss.backward()
        assert fake.grad is not None
        assert bool(fake.grad.isfinite().all())
        assert 0 <= loss.item() <= 1.001


@pytest.mark.parametrize(
    ("rate", "noise", "expected"),
    [(16_000, 1.0, 0.351596), (16_000, 0.4, 0.129348), (8010, 1.0, 0.383343)],
)
def test_its_value_is_pinned(rate: int, noise: float, expected: float) -> None:
    """Trained models depend on it. At 8010 Hz a frame has an odd number of samples."""
    moves = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * np.arange(3 * rate) / rate)
    waves = [
        (voiced(3.0, rate, seed) + 0.3 * np.random.default_rng(seed).standard_normal(3 * rate))
        * moves
        for seed in (0, 1)
    ]
    real = torch.from_numpy(np.stack(waves).astype(np.float32))[:, None]
    hiss = 0.5 * np.random.default_rng(2).standard_normal(real.shape)
    fake = real + torch.from_numpy(hiss.astype(np.float32))
    real[:, :, :rate] *= 1e-3  # Segments that do not count.
    mixed = (1 - noise) * real + noise * fake
    assert stoi_loss(mixed, real, rate).item() == pytest.approx(expected, abs=2e-5)

"""Losses: known values, known minima, gradients where they belong."""

import pytest
import torch
from conftest import ROOT

from codec.audio import magnitude_spectrogram
from codec.modules.discriminators import DiscriminatorOutput
from codec.training.config import LossConfig, LossWeights, MelScaleConfig
from codec.training.losses import (
    adversarial_loss,
    discriminator_loss,
    feature_loss,
    log_mel,
    magnitude_loss,
    mel_loss,
    mel_magnitudes,
    wave_loss,
)
from recipes.lib.codec_training import TrainCodecConfig
from recipes.lib.run import load_config

SCALES = LossConfig().mel_scales


@pytest.fixture
def waves() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, fake = 0.1 * torch.randn(2, 2, 1, 8000, generator=generator)
    return real, fake


def test_equal_waves_cost_nothing(waves) -> None:
    real, _ = waves
    assert wave_loss(real, real) == 0
    assert mel_loss(real, real, SCALES, sample_rate=16_000, l2_weight=1.0) == 0
    assert magnitude_loss(real, real, (512, 128)) == 0


def test_log_mel_rises_by_the_log_of_the_gain(waves) -> None:
    real, _ = waves
    scale = MelScaleConfig(window=1024, hop=240, num_mels=80)
    louder = log_mel(2 * real, scale, 16_000) - log_mel(real, scale, 16_000)
    torch.testing.assert_close(louder, torch.full_like(louder, 0.6931), atol=1e-2, rtol=0)
    # ceil((8000 - 1024 + 784) / 240) frames: the released code's reflect padding.
    assert log_mel(real, scale, 16_000).shape == (2, 80, 33)


def test_mel_filters_are_kept_apart_by_resolution(waves) -> None:
    """The released code's cache ignores n_fft: a naive fix would reuse the wrong filters."""
    real, fake = waves
    scales = [MelScaleConfig(window=w, hop=w // 4, num_mels=20) for w in (512, 1024)]
    first = mel_loss(fake, real, scales[:1], sample_rate=16_000)
    mel_loss(fake, real, scales[1:], sample_rate=16_000)
    assert mel_loss(fake, real, scales[:1], sample_rate=16_000) == first


def test_weights_of_scales_and_of_the_norm_count(waves) -> None:
    real, fake = waves
    one = [MelScaleConfig(window=512, hop=128, num_mels=20, weight=1.0)]
    three = [MelScaleConfig(window=512, hop=128, num_mels=20, weight=3.0)]
    plain = mel_loss(fake, real, one, sample_rate=16_000)
    torch.testing.assert_close(mel_loss(fake, real, three, sample_rate=16_000), 3 * plain)
    a, b = (log_mel(wave, one[0], 16_000) for wave in (fake, real))
    both = mel_loss(fake, real, one, sample_rate=16_000, l2_weight=2.0)
    norms = [(a - b)[item].square().mean().sqrt() for item in range(2)]
    torch.testing.assert_close(both, plain + 2 * torch.stack(norms).mean())


def test_equation_5_of_dm_codec(waves) -> None:
    """The norms of paper_losses.yaml, as means over N bins: |d|_1 / N + |d|_2 / sqrt(N)."""
    file = ROOT / "recipes" / "configs" / "codec" / "paper_losses.yaml"
    losses = load_config(TrainCodecConfig, ["--config", str(file)]).losses
    assert [scale.window for scale in losses.mel_scales] == [2**i for i in range(11, 4, -1)]
    assert all(scale.hop * 4 == scale.window for scale in losses.mel_scales)
    assert {scale.num_mels for scale in losses.mel_scales} == {64}
    assert losses.mel_l2_weight == 1
    real, fake = waves[0][:1], waves[1][:1]
    expected = 0.0
    for scale in losses.mel_scales:
        d = log_mel(fake, scale, 16_000) - log_mel(real, scale, 16_000)
        norms = torch.linalg.norm(d.flatten(), 1), torch.linalg.norm(d.flatten(), 2)
        expected += scale.weight * float(norms[0] / d.numel() + norms[1] / d.numel() ** 0.5)
    found = mel_loss(fake, real, losses.mel_scales, sample_rate=16_000, l2_weight=1.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def golden() -> dict:
    """Numbers of LM-SPT's released code."""
    return torch.load(ROOT / "tests" / "golden" / "lmspt_discriminator_loss.pt", weights_only=True)


@pytest.fixture(scope="module")
def preset() -> LossConfig:
    file = ROOT / "recipes" / "configs" / "codec" / "lmspt_losses.yaml"
    return load_config(TrainCodecConfig, ["--config", str(file)]).losses


def test_released_mel_loss_of_lm_spt(golden: dict, preset: LossConfig) -> None:
    options = {
        "sample_rate": golden["sample_rate"], "l2_weight": preset.mel_l2_weight,
        "linear_weight": preset.mel_linear_weight, "form": preset.mel_form,
    }  # fmt: skip
    waves = golden["fake"], golden["real"]
    each = [float(mel_loss(*waves, [scale], **options)) for scale in preset.mel_scales]
    assert each == pytest.approx(golden["mel_loss_per_scale"], rel=1e-4)
    total = float(mel_loss(*waves, preset.mel_scales, **options))
    assert total == pytest.approx(golden["mel_loss_total"], rel=1e-4)


def test_released_mels_of_lm_spt(golden: dict, preset: LossConfig) -> None:
    mels = [
        mel_magnitudes(golden["real"], scale, golden["sample_rate"], "lmspt")
        for scale in preset.mel_scales
    ]
    batch, _, *shape = golden["mel_256_40_real_shape"]
    assert list(mels[0].shape) == [batch, *shape]
    first = golden["mel_1024_160_real_first"]
    torch.testing.assert_close(mels[2][0, :, :3], first, atol=1e-5, rtol=1e-4)


def test_terms_of_the_mel_loss_add_up(waves) -> None:
    real, fake = waves
    one = [MelScaleConfig(window=512, hop=128, num_mels=20)]
    for form in ("speechtokenizer", "lmspt"):
        plain, linear, all_three = (
            mel_loss(fake, real, one, sample_rate=16_000, form=form, l2_weight=squared,
                     linear_weight=weight)
            for squared, weight in ((0.0, 0.0), (0.0, 2.0), (3.0, 2.0))
        )  # fmt: skip
        a, b = (mel_magnitudes(wave, one[0], 16_000, form) for wave in (fake, real))
        torch.testing.assert_close(linear - plain, 2 * (a - b).abs().mean())
        logs = [
            each.clamp(min=1e-5).log() * (1.0 if form == "speechtokenizer" else 0.8685889638)
            for each in (a, b)
        ]
        torch.testing.assert_close(plain, (logs[0] - logs[1]).abs().mean())
        norms = (logs[0] - logs[1]).square().mean((1, 2)).sqrt()
        torch.testing.assert_close(all_three - linear, 3 * norms.mean())


def test_silence_has_a_finite_gradient_in_either_form(waves) -> None:
    real, _ = waves
    for form in ("speechtokenizer", "lmspt"):
        for target in (real, torch.zeros_like(real)):
            silent = torch.zeros_like(real, requires_grad=True)
            mel_loss(
                silent, target, SCALES,
                sample_rate=16_000, l2_weight=1.0, linear_weight=1.0, form=form,
            ).backward()  # fmt: skip
            assert bool(silent.grad.isfinite().all())


def test_a_negative_weight_of_the_mels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"losses\.mel_linear_weight must be at least 0"):
        LossConfig(mel_linear_weight=-1.0)


def test_the_preset_weighs_as_released(preset: LossConfig) -> None:
    """15 mel, 1 adversarial, 2 features; commitment 0.25 and codebook 1 of sums over 8 codebooks,
    whose means we weigh."""
    weights = preset.weights
    assert (weights.wave, weights.mel, weights.magnitude) == (0, 15, 0)
    assert (weights.commitment, weights.codebook) == (8 * 0.25, 8 * 1)
    assert (weights.adversarial, 2 * weights.feature) == (1, 2)


def verdicts(score: float) -> list[DiscriminatorOutput]:
    return [
        DiscriminatorOutput(torch.full((2, 1, 5), score), [torch.full((2, 3), score)])
        for _ in range(2)
    ]


@pytest.mark.parametrize(
    ("form", "real", "fake", "expected", "generator"),
    [
        ("least_squares", 1.0, 0.0, 0.0, 2.0),
        ("least_squares", 0.5, 0.5, 1.0, 0.5),
        ("hinge", 1.0, -1.0, 0.0, 2.0),
        ("hinge", 0.0, 0.0, 2.0, 1.0),
        ("hinge", 0.0, 3.0, 5.0, 0.0),
    ],
)
def test_adversarial_values(form, real, fake, expected, generator) -> None:
    assert discriminator_loss(verdicts(real), verdicts(fake), form) == expected
    assert adversarial_loss(verdicts(fake), form) == generator


def test_feature_loss_forms() -> None:
    # Two sub-discriminators, one layer each, |2 - 5| = 3: released 2 * (3 + 3), papers 3 / 2.
    assert feature_loss(verdicts(2.0), verdicts(5.0), normalize=False) == 12
    assert feature_loss(verdicts(2.0), verdicts(5.0), normalize=True) == 1.5


@pytest.mark.parametrize(("normalize", "expected"), [(False, 2 * (3 + 3)), (True, 3 / 2)])
def test_feature_loss_without_scores_leaves_the_last_layer_out(normalize, expected) -> None:
    def heard(feature: float, score: float) -> list[DiscriminatorOutput]:
        maps = [torch.full((2, 3), feature), torch.full((2, 1), score)]
        return [DiscriminatorOutput(maps[-1], maps) for _ in range(2)]

    real, fake = heard(2.0, 1.0), heard(5.0, 9.0)
    assert feature_loss(real, fake, normalize=normalize, logits=False) == expected
    assert feature_loss(real, fake, normalize=normalize) > expected


def test_feature_loss_trains_the_fake_side_only() -> None:
    real, fake = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    score = torch.zeros(1)
    feature_loss(
        [DiscriminatorOutput(score, [real])], [DiscriminatorOutput(score, [fake])], normalize=False
    ).backward()
    assert real.grad is None
    assert fake.grad.abs().sum() > 0


def test_a_codec_without_reconstruction_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="wave, mel and magnitude"):
        LossWeights(mel=0.0, magnitude=0.0)


def test_spectral_convergence_in_numbers() -> None:
    """Half the amplitude misses half of each norm, at every window; silence is bounded."""
    wave = 0.1 * torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    assert magnitude_loss(0.5 * wave, wave, (512, 128)).item() == pytest.approx(1.0, abs=1e-3)
    quiet = torch.cat([wave[:1], torch.zeros_like(wave[:1])])
    a, b = (
        magnitude_spectrogram(each[:, 0], window=512, hop=128).norm(dim=(1, 2))
        for each in (wave - quiet, quiet)
    )
    expected = (a[1] / b[1].clamp(min=1e-2)).item() / 2
    assert magnitude_loss(wave, quiet, (512,)).item() == pytest.approx(expected, rel=1e-4)


def test_features_are_divided_by_their_magnitude() -> None:
    real = [DiscriminatorOutput(torch.zeros(1), [torch.tensor([[-4.0, 4.0]]), torch.zeros(1, 2)])]
    fake = [DiscriminatorOutput(torch.zeros(1), [torch.tensor([[-4.0, 6.0]]), torch.zeros(1, 2)])]
    assert feature_loss(real, fake, normalize=True) == (1 / 4 + 0) / 2
    fake[0].features[1] += 1e-7
    assert feature_loss(real, fake, normalize=True).item() == pytest.approx((1 / 4 + 0.1) / 2)

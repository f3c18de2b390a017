"""Discriminators: shapes, sizes of the published ones, and that they can tell."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from codec.modules.discriminators import (
    BandDiscriminator,
    DiscriminatorOutput,
    Discriminators,
    PeriodDiscriminator,
    STFTDiscriminator,
)
from codec.training.config import DiscriminatorConfig
from codec.training.losses import adversarial_loss, discriminator_loss, feature_loss
from recipes.lib.codec_training import TrainCodecConfig
from recipes.lib.run import load_config

TINY = DiscriminatorConfig(
    periods=(2, 3), num_scales=2, stft_windows=(128,), stft_filters=4, band_windows=(128,),
    width_divisor=32,
)  # fmt: skip
BANDS = replace(TINY, periods=(), num_scales=0, stft_windows=())


def test_published_sizes() -> None:
    """HiFi-GAN's period discriminator has 8.22 M parameters (counted in its released code)."""
    count = sum(each.numel() for each in PeriodDiscriminator(2).parameters())
    assert count == 8_221_154
    features = STFTDiscriminator(1024, 32)(torch.randn(1, 1, 16_000)).features
    assert [each.shape[1] for each in features] == [32, 32, 32, 32, 32, 1]
    # Strides of 2 along frequency only: 513, 513, 257, 129, 65 bins.
    assert [each.shape[3] for each in features] == [513, 257, 129, 65, 65, 65]


def test_every_sub_discriminator_keeps_items_apart() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators(TINY).eval()
    wave = torch.randn(2, 1, 4001)
    both = discriminators(wave)
    assert len(both) == 6
    for alone, together in zip(discriminators(wave[1:]), both, strict=True):
        torch.testing.assert_close(alone.logits[0], together.logits[1], atol=1e-5, rtol=1e-4)
        assert len(together.features) >= 6


def test_they_learn_to_tell_noise_from_a_tone() -> None:
    torch.manual_seed(0)
    discriminators = Discriminators(TINY)
    optimizer = torch.optim.Adam(discriminators.parameters(), 3e-3)
    tone = 0.3 * torch.sin(torch.arange(2000) * 0.1).expand(2, 1, -1)
    for _ in range(20):
        noise = 0.3 * torch.randn(2, 1, 2000)
        loss = sum(
            (1 - real.logits).square().mean() + fake.logits.square().mean()
            for real, fake in zip(discriminators(tone), discriminators(noise), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.6 * 6


@pytest.mark.parametrize(("samples", "rows"), [(998, 333), (999, 334), (1000, 334)])
def test_extra_period_for_complete_rows(samples: int, rows: int) -> None:
    """As Descript's code does; 999 samples are 333 rows of 3 without."""
    torch.manual_seed(0)
    wave = torch.randn(1, 1, samples)
    for extra, expected in ((True, rows), (False, -(-samples // 3))):
        discriminator, seen = PeriodDiscriminator(3, 32, extra=extra), []
        discriminator.convs[0].register_forward_pre_hook(lambda _, x, seen=seen: seen.append(*x))
        discriminator(wave)
        assert seen[0].shape == (1, 1, expected, 3)
        filled = seen[0].flatten()
        assert torch.equal(filled[samples:], wave.flatten().flip(0)[1:][: len(filled) - samples])


def test_none_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="discriminators: there are none"):
        Discriminators(DiscriminatorConfig(periods=(), num_scales=0, stft_windows=()))


@pytest.mark.parametrize("window", [128, 512, 1024, 2048])
def test_bands_hold_each_bin_once(window: int) -> None:
    bands = BandDiscriminator(window, 64).bands
    covered = [index for low, high in bands for index in range(low, high)]
    assert covered == list(range(window // 2 + 1))
    assert all(low < high for low, high in bands)


@pytest.mark.parametrize(("kind", "window"), [(BandDiscriminator, 128), (STFTDiscriminator, 8)])
def test_gradients_in_bfloat16_on_a_cpu_are_those_of_float32(kind, window: int) -> None:
    """At the shortest windows that there are."""
    torch.manual_seed(0)
    discriminator, wave = kind(window, 16), torch.randn(2, 1, 2000)
    gradients = {}
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = (1 - discriminator(wave).logits).square().mean()
        # Freed memory that a kernel takes and leaves unwritten shows.
        rubbish = [torch.full((size,), 1e30) for size in (144, 576, 4096, 65536) for _ in range(50)]
        rubbish.clear()
        gradients[half] = torch.autograd.grad(loss, list(discriminator.parameters()))
    largest = max(float(each.abs().max()) for each in gradients[False])
    for exact, rounded in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05 * largest)


@pytest.mark.parametrize(
    ("name", "least", "value"),
    [
        ("band_windows", 128, (512, 127)),
        ("stft_windows", 8, (512, 7)),
        ("periods", 1, (2, 0)),
        ("num_scales", 0, -1),
        ("stft_filters", 1, 0),
        ("width_divisor", 1, 0),
    ],
)
def test_what_no_discriminator_can_be_made_of_is_refused(name: str, least: int, value) -> None:
    with pytest.raises(ValueError, match=rf"discriminators\.{name} must be at least {least}, got"):
        DiscriminatorConfig(**{name: value})
    fitting = replace(TINY, **{name: (least,) if isinstance(value, tuple) else least})
    for each in Discriminators(fitting)(torch.randn(1, 1, 1000)):
        assert bool(each.logits.isfinite().all())


@pytest.mark.parametrize(("samples", "frames"), [(640, 40), (641, 41), (655, 41), (656, 41)])
def test_bands_cover_every_sample_of_any_length(samples: int, frames: int) -> None:
    torch.manual_seed(0)
    discriminator = BandDiscriminator(64, 16)
    wave = torch.randn(2, 1, samples, requires_grad=True)
    verdict = discriminator(wave)
    assert len(verdict.features) == 26
    assert {each.shape[2] for each in verdict.features} == {frames}
    verdict.logits.square().sum().backward()
    assert bool((wave.grad != 0).all())
    assert all(bool(each.grad.any()) for each in discriminator.parameters())


def test_normalized_input_hides_gain_and_offset() -> None:
    torch.manual_seed(0)
    wave = 0.1 * torch.randn(2, 1, 2001)
    moved = torch.tensor([0.5, 3.0]).view(2, 1, 1) * wave + 0.2
    for normalize, close in ((True, True), (False, False)):
        discriminators = Discriminators(replace(TINY, normalize_input=normalize)).eval()
        for a, b in zip(discriminators(wave), discriminators(moved), strict=True):
            assert torch.allclose(a.features[0], b.features[0], atol=1e-4) is close
    seen = []
    discriminators = Discriminators(replace(BANDS, normalize_input=True))
    discriminators.others[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    silent = torch.zeros(1, 1, 2001, requires_grad=True)
    discriminators(torch.cat([wave, silent]))[0].logits.sum().backward()
    torch.testing.assert_close(seen[0].abs().amax(-1).squeeze(), torch.tensor([0.8, 0.8, 0.0]))
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(3, 1), atol=1e-6, rtol=0)
    assert bool(silent.grad.isfinite().all())


def test_spectra_stay_exact_under_autocast(monkeypatch) -> None:
    torch.manual_seed(0)
    discriminators, dtypes = Discriminators(BANDS), []
    transform = torch.stft

    def listen(wave, *arguments, **named):
        dtypes.append(wave.dtype)
        return transform(wave, *arguments, **named)

    monkeypatch.setattr(torch, "stft", listen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verdicts = discriminators(torch.randn(1, 1, 2001).bfloat16())
    assert dtypes == [torch.float32]
    assert all(each.logits.dtype == torch.float32 for each in verdicts)
    assert verdicts[0].features[0].dtype == torch.bfloat16


@pytest.fixture(scope="module")
def golden() -> dict:
    """Numbers of LM-SPT's released code, its discriminators filled by `fill_rule`."""
    return torch.load(ROOT / "tests" / "golden" / "lmspt_discriminator_loss.pt", weights_only=True)


@pytest.fixture(scope="module")
def released(
    golden: dict,
) -> tuple[Discriminators, list[DiscriminatorOutput], list[DiscriminatorOutput]]:
    """The released discriminators as lmspt_losses.yaml has them, of the real and the fake wave."""
    preset = ROOT / "recipes" / "configs" / "codec" / "lmspt_losses.yaml"
    config = load_config(TrainCodecConfig, ["--config", str(preset)])
    discriminators = Discriminators(config.discriminators)
    with torch.no_grad():
        fill(discriminators)
        return discriminators, discriminators(golden["real"]), discriminators(golden["fake"])


def original_name(ours: str) -> str:
    """What the original calls a parameter."""
    ours = ours.replace("others", "discriminators").replace("conv_out", "conv_post")
    ours = ours.replace("parametrizations.weight.original0", "weight_g")
    ours = ours.replace("parametrizations.weight.original1", "weight_v")
    return re.sub(r"(convs(\.\d+)+)", r"\1.0", ours)


def fill(discriminators: Discriminators) -> None:
    """`fill_rule` of the golden file."""
    named = {original_name(name): each for name, each in discriminators.named_parameters()}
    for number, (name, parameter) in enumerate(sorted(named.items())):
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        value = torch.sin(0.37 * index + 0.11 * number**2 + 0.5)
        if name.endswith("weight_v"):
            value += 0.5 * torch.sin(1.7 * index + number)
        elif name.endswith("weight_g"):
            value = 1.5 + 0.3 * value
        else:
            value *= 0.05
        parameter.copy_(value.view_as(parameter))


def test_released_parameters(golden: dict, released) -> None:
    discriminators, _, _ = released
    names = sorted(original_name(name) for name, _ in discriminators.named_parameters())
    assert names == golden["param_names_sorted"]
    counts = [sum(part.numel() for part in each.parameters()) for each in discriminators.others]
    assert counts == golden["n_params_each"]
    assert sum(counts) == golden["n_params_total"] == 46_698_544


def test_released_maps(golden: dict, released) -> None:
    _, real, fake = released
    shapes = [[list(each.shape) for each in verdict.features] for verdict in real]
    assert shapes == golden["fmap_shapes_real"]
    for verdict, means in zip(real, golden["fmap_mean_abs_real"], strict=True):
        found = [float(each.abs().mean()) for each in verdict.features]
        assert found == pytest.approx(means, rel=1e-4)
    for verdicts, name in ((real, "logit_mean_real"), (fake, "logit_mean_fake")):
        found = [float(each.logits.mean()) for each in verdicts]
        assert found == pytest.approx(golden[name], rel=1e-4)


def test_released_losses(golden: dict, released) -> None:
    _, real, fake = released
    found = float(discriminator_loss(real, fake, "least_squares"))
    assert found == pytest.approx(golden["disc_loss"], rel=1e-4)
    found = float(adversarial_loss(fake, "least_squares"))
    assert found == pytest.approx(golden["adv_g_loss"], rel=1e-4)
    # The original weighs features 2; that factor is ours.
    found = float(feature_loss(real, fake, normalize=False, logits=False))
    assert found == pytest.approx(2 * golden["feat_loss"], rel=1e-4)
    each = [
        float(feature_loss([a], [b], normalize=False, logits=False))
        for a, b in zip(real, fake, strict=True)
    ]
    assert each == pytest.approx([2 * loss for loss in golden["feat_l1_per_disc"]], rel=1e-4)

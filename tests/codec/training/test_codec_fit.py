"""Training of LM-SPT as released: ranks, low precision, weight decay, crops that are too short."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from conftest import voiced

from codec import Codec, CodecConfig
from codec.config import AuxiliaryConfig, ConvConfig, LMSPTConfig, QuantizerConfig
from codec.distillation.objectives import Student
from codec.modules.discriminators import Discriminators
from codec.training.codec_fit import check_training_setup, prepare_trainer, set_learning_rates
from codec.training.codec_step import TrainingModels, generator_step
from codec.training.config import (
    CodecOptimConfig,
    CropConfig,
    DiscriminatorConfig,
    LossConfig,
    LossWeights,
    MelScaleConfig,
)
from codec.training.optim import adamw, is_codec_matrix

TINY = CodecConfig(
    family="lmspt",
    lmspt=LMSPTConfig(
        encoder="conv",
        decoder="conv",
        dimension=8,
        conv=ConvConfig(width=2, strides=(4, 5, 8), decoder_width=16, dilations=(1,)),
        auxiliary=AuxiliaryConfig(kind="conv", width=16, strides=(8, 5, 4), dilations=(1,)),
    ),
    quantizer=QuantizerConfig(
        num_codebooks=3, codebook_sizes=(16, 8, 8), codebook_dimension=3, normalize=True,
        learning="gradient", decay=0.8, kmeans_iterations=2,
    ),
)  # fmt: skip
QUANTIZERS = {
    "factorised": TINY.quantizer,
    "factorised-ema": replace(TINY.quantizer, learning="ema", normalize=False),
    "ema": replace(TINY.quantizer, codebook_dimension=0, learning="ema", normalize=False),
}
LOSSES = LossConfig(
    weights=LossWeights(codebook=1.0),
    mel_scales=(MelScaleConfig(window=512, hop=128, num_mels=40),),
    magnitude_windows=(512,),
)


def waves(count: int) -> torch.Tensor:
    made = [torch.from_numpy(voiced(0.5, seed=seed)) for seed in range(count)]
    return torch.stack(made).unsqueeze(1)


def _train_on_rank(quantizer: str, out: str) -> None:
    """Four steps, on each rank of a launch or on one process; writes the state after each."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    torch.manual_seed(1)
    codec = Codec(replace(TINY, quantizer=QUANTIZERS[quantizer])).train()
    for name, parameter in codec.named_parameters():
        # They make latents of random weights nearly equal: rounding would choose their entries.
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    codec.auxiliary.requires_grad_(False)
    model = codec
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(codec, broadcast_buffers=False)
    optimizer, states = torch.optim.SGD(codec.parameters(), 1e-2), []
    for batch in waves(16).chunk(4):
        mine = batch.chunk(world)[rank]
        generator_step(model(mine), mine, None, LOSSES, 16_000).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({name: each.clone() for name, each in codec.state_dict().items()})
    torch.save(states, f"{out}.{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("quantizer", ["factorised", "factorised-ema"])
def test_two_ranks_train_lm_spt_as_one_process_on_the_joined_batch(
    quantizer: str, tmp_path: Path, launch: Callable[..., CompletedProcess[str]]
) -> None:
    """First centroids, use, sums and revival are the joined batch's."""
    done = launch("ddp", __file__, quantizer, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    _train_on_rank(quantizer, str(tmp_path / "one"))
    first, second, joined = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("two.0.pt", "two.1.pt", "one.0.pt")
    )
    for step, state in enumerate(joined):
        for name, expected in state.items():
            found = first[step][name]
            assert torch.equal(found, second[step][name]), (step, name)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    entries = "quantizer.semantic.codebooks.0.codebook.entries"
    assert not torch.equal(joined[0][entries], joined[-1][entries])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_under_autocast_the_quantiser_stays_exact_and_everything_learns(quantizer: str) -> None:
    torch.manual_seed(0)
    codec = Codec(replace(TINY, quantizer=QUANTIZERS[quantizer])).train()
    wave = waves(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latent = codec.encoder(wave)
        out = codec(wave)
        spoken = codec.auxiliary(out.quantized.part("first"))
        total = generator_step(out, wave, None, LOSSES, 16_000).total + spoken.square().mean()
    assert latent.dtype == torch.bfloat16
    assert all(
        each.dtype == torch.float32 for each in (out.quantized.latent, *out.quantized.entries)
    )
    assert out.quantized.commitment.dtype == torch.float32
    total.backward()
    for name, each in codec.named_parameters():
        assert each.grad is not None, name
        assert bool(each.grad.isfinite().all()), name
        assert bool(each.grad.any()), name


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_trained_codec_comes_back_from_its_folder(quantizer: str, tmp_path) -> None:
    """And trains on as if it had stayed: sums and use of the entries travel along."""
    torch.manual_seed(0)
    codec, wave = Codec(replace(TINY, quantizer=QUANTIZERS[quantizer])).train(), waves(2)
    initial = {name: each.clone() for name, each in codec.state_dict().items()}
    codec(wave)
    codec.eval().save_pretrained(tmp_path / "codec")
    again = Codec.from_pretrained(str(tmp_path / "codec"))
    assert again.config == codec.config
    assert again.stamp.digest == codec.stamp.digest
    assert torch.equal(again.encode(wave).codes, codec.encode(wave).codes)
    for each in (codec, again):
        each.train()(wave + 0.01)
    found = again.state_dict()
    for name, expected in codec.state_dict().items():
        assert torch.equal(found[name], expected), name
    entries = [name for name in found if name.endswith(".entries")]
    assert len(entries) == 3
    assert not any(torch.equal(found[name], initial[name]) for name in entries)


def test_each_optimiser_has_a_learning_rate_of_its_own() -> None:
    discriminators = Discriminators(
        DiscriminatorConfig(periods=(2,), num_scales=0, stft_windows=(), width_divisor=64)
    )
    accelerator = SimpleNamespace(prepare=lambda *given: given, device=torch.device("cpu"))
    optim = CodecOptimConfig(
        lr=1e-3, discriminator_lr=3e-4, warmup_steps=2, steps=10, final_lr_share=0.1
    )
    student = Student(Codec(TINY))
    trainer = prepare_trainer(TrainingModels(student, discriminators), accelerator, LOSSES, optim)
    optimizers = trainer.optimizers
    assert trainer.models.student is student
    for optimizer, model in zip(optimizers, (student, discriminators), strict=True):
        held = {id(each) for group in optimizer.param_groups for each in group["params"]}
        assert held == {id(each) for each in model.parameters() if each.requires_grad}
    for step, share in ((None, 1.0), (0, 0.5), (2, 1.0), (10, 0.1)):
        if step is not None:
            set_learning_rates(trainer, step)
        found = [group["lr"] for each in optimizers for group in each.param_groups]
        expected = [share * peak for peak in (1e-3, 1e-3, 3e-4, 3e-4)]
        assert found == pytest.approx(expected), step


def test_weight_decay_is_of_matrices_alone() -> None:
    codec = Codec(TINY)
    groups = adamw(codec, CodecOptimConfig(weight_decay=0.1), decays=is_codec_matrix).param_groups
    assert all(group["fused"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = ({id(each) for each in group["params"]} for group in groups)
    kinds = {True: set(), False: set()}
    for name, each in codec.named_parameters():
        assert (id(each) in decayed) != (id(each) in others)
        kinds[id(each) in decayed].add(name.rpartition(".")[2])
    assert kinds == {True: {"original1"}, False: {"original0", "bias", "alpha", "entries"}}


@pytest.mark.parametrize(
    ("kind", "fits", "least", "too_few", "longer"),
    [("band", 2048, 1280, 1025, 4096), ("stft", 1024, 1024, 1023, 2048)],
)
def test_crops_too_short_for_a_window_are_refused(
    kind: str, fits: int, least: int, too_few: int, longer: int
) -> None:
    """Of the multi-band ones, which reflect what is missing, and of those that do not."""
    none = DiscriminatorConfig(periods=(), num_scales=0, stft_windows=(), width_divisor=64)
    of = {
        window: Discriminators(replace(none, stft_filters=2, **{f"{kind}_windows": (window, 128)}))
        for window in (fits, longer)
    }
    models = TrainingModels(Student(Codec(TINY)), of[fits])
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    short = CropConfig(seconds=0.1)
    check_training_setup(models, short, LOSSES, accelerator)
    assert of[fits].others[0].min_samples == least
    of[fits](torch.randn(1, 1, least))
    of[fits](torch.randn(1, 1, least + 1))
    with pytest.raises(RuntimeError):
        of[fits](torch.randn(1, 1, too_few))
    models.discriminators = of[longer]
    reported = rf"data\.seconds 0\.1 is too short for a window of discriminators\.{kind}_windows"
    with pytest.raises(ValueError, match=reported):
        check_training_setup(models, short, LOSSES, accelerator)


def test_deepspeed_is_refused() -> None:
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    models = TrainingModels(Student(Codec(TINY)), None)
    with pytest.raises(ValueError, match="do not train under DeepSpeed; launch with"):
        check_training_setup(models, CropConfig(), LOSSES, accelerator)


if __name__ == "__main__":
    _train_on_rank(*sys.argv[1:])

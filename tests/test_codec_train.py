"""Training of LM-SPT as released: ranks, low precision, weight decay, crops that are too short."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import free_port, voiced

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig
from codec.discriminators import Discriminators
from codec.distill import Student
from codec.lmspt_config import AuxiliaryConfig, ConvConfig, LMSPTConfig
from codec.train import Models, _adamw, _check, generator_step
from codec.train_config import (
    CropConfig,
    DiscriminatorConfig,
    LossConfig,
    LossWeights,
    MelScaleConfig,
    OptimConfig,
)

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
LOSSES = LossConfig(
    weights=LossWeights(codebook=1.0),
    mel_scales=(MelScaleConfig(window=512, hop=128, num_mels=40),),
    magnitude_windows=(512,),
)


def waves(count: int) -> torch.Tensor:
    made = [torch.from_numpy(voiced(0.5, seed=seed)) for seed in range(count)]
    return torch.stack(made).unsqueeze(1)


def _train_on_rank(rank: int, world: int, port: int, out: str) -> None:
    """Four steps; writes the state after each."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    torch.manual_seed(0)
    codec = Codec(TINY).train()
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


def test_two_ranks_train_lm_spt_as_one_process_on_the_joined_batch(tmp_path) -> None:
    """Entries learn by gradient: their first centroids, use and revival are the joined batch's."""
    torch.multiprocessing.spawn(
        _train_on_rank, (2, free_port(), str(tmp_path / "two")), nprocs=2, join=True
    )
    _train_on_rank(0, 1, 0, str(tmp_path / "one"))
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


@pytest.mark.parametrize("quantizer", ["factorised", "ema"])
def test_under_autocast_the_quantiser_stays_exact_and_everything_learns(quantizer: str) -> None:
    torch.manual_seed(0)
    config = TINY
    if quantizer == "ema":
        plain = replace(TINY.quantizer, codebook_dimension=0, learning="ema", normalize=False)
        config = replace(TINY, quantizer=plain)
    codec, wave = Codec(config).train(), waves(2)
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


def test_weight_decay_is_of_matrices_alone() -> None:
    codec = Codec(TINY)
    groups = _adamw(codec, 1e-3, OptimConfig(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    decayed, others = ({id(each) for each in group["params"]} for group in groups)
    kinds = {True: set(), False: set()}
    for name, each in codec.named_parameters():
        assert (id(each) in decayed) != (id(each) in others)
        kinds[id(each) in decayed].add(name.rpartition(".")[2])
    assert kinds == {True: {"original1"}, False: {"original0", "bias", "alpha", "entries"}}


def test_crops_too_short_for_a_band_window_are_refused() -> None:
    bands = DiscriminatorConfig(periods=(), num_scales=0, stft_windows=(), band_windows=(2048, 128))
    discriminators = Discriminators(replace(bands, width_divisor=64))
    models = Models(Student(Codec(TINY)), discriminators)
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="NO"))
    # 1280 samples fill a window by reflection.
    _check(models, CropConfig(seconds=0.1), LOSSES, accelerator)
    discriminators(torch.randn(1, 1, 1280))
    discriminators(torch.randn(1, 1, 1281))
    models.discriminators = Discriminators(replace(bands, band_windows=(4096,), width_divisor=64))
    with pytest.raises(ValueError, match=r"data\.seconds 0\.1 .* discriminators\.band_windows"):
        _check(models, CropConfig(seconds=0.1), LOSSES, accelerator)

"""Codec training: steps, ranks, and runs that are killed and started again."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import ROOT
from forking import ForkedRun
from lhotse import CutSet, Recording
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_teachers import save_speech_teacher

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig, SpectralConfig
from codec.distillation.objectives import Student, Target
from codec.modules.discriminators import Discriminators
from codec.modules.quantize import Codebook, Statistics, update_codebooks
from codec.training.codec_fit import prepare_trainer, save_codec
from codec.training.codec_step import (
    TeacherTargets,
    TrainingModels,
    discriminator_step,
    generator_step,
    train_step,
)
from codec.training.config import (
    CodecOptimConfig,
    DiscriminatorConfig,
    DistillConfig,
    LossConfig,
    LossWeights,
    MelScaleConfig,
    SpeechTeacherConfig,
)
from codec.training.data import Crops
from codec.training.run import make_accelerator
from codec.training.schedule import learning_rate

TINY = CodecConfig(
    spectral=SpectralConfig(
        num_mels=20, encoder_width=16, encoder_depths=(1, 1, 1), dimension=8,
        decoder_width=16, decoder_depths=(1, 1, 1),
    ),
    quantizer=QuantizerConfig(num_codebooks=2, codebook_size=16, decay=0.8),
)  # fmt: skip
SCALES = (MelScaleConfig(window=512, hop=128, num_mels=40),)
DISCRIMINATORS = DiscriminatorConfig(
    periods=(2,), num_scales=1, stft_windows=(128,), stft_filters=4, band_windows=(128,),
    width_divisor=64,
)  # fmt: skip


@pytest.fixture
def wave(write_wav, tmp_path) -> torch.Tensor:
    import soundfile

    waves = [
        soundfile.read(write_wav(tmp_path / f"{seed}.wav", 1.0, seed=seed), dtype="float32")[0]
        for seed in range(4)
    ]
    return torch.stack([torch.from_numpy(each) for each in waves]).unsqueeze(1)


def test_only_weighted_losses_are_computed_and_weights_multiply(wave) -> None:
    torch.manual_seed(0)
    out = Codec(TINY).train()(wave)
    config = LossConfig(
        weights=LossWeights(mel=2.0, magnitude=0.0, wave=3.0, commitment=0.0), mel_scales=SCALES
    )
    losses = generator_step(out, wave, None, config, 16_000)
    assert set(losses.parts) == {"mel", "wave"}
    expected = 2 * losses.parts["mel"] + 3 * losses.parts["wave"]
    torch.testing.assert_close(losses.total, expected)


def test_the_codebook_loss_moves_entries_and_nothing_else(wave) -> None:
    torch.manual_seed(0)
    codec = Codec(replace(TINY, quantizer=replace(TINY.quantizer, learning="gradient"))).train()
    config = LossConfig(weights=LossWeights(codebook=2.0), mel_scales=SCALES)
    generator_step(codec(wave), wave, None, config, 16_000).parts["codebook"].backward()
    moved = {name for name, each in codec.named_parameters() if each.grad is not None}
    assert moved == {"quantizer.codebooks.0.entries", "quantizer.codebooks.1.entries"}


def test_each_step_trains_its_own_side(wave) -> None:
    torch.manual_seed(0)
    codec, discriminators = Codec(TINY).train(), Discriminators(DISCRIMINATORS)
    config = LossConfig(weights=LossWeights(adversarial=1.0, feature=1.0), mel_scales=SCALES)
    out = codec(wave)
    discriminator_step(out, wave, discriminators, config).total.backward()
    assert all(each.grad is None for each in codec.parameters())
    assert all(each.grad is not None for each in discriminators.parameters())
    discriminators.zero_grad()
    discriminators.requires_grad_(False)
    losses = generator_step(out, wave, discriminators, config, 16_000)
    losses.total.backward()
    assert {"adversarial", "feature"} < set(losses.parts)
    assert all(each.grad is None for each in discriminators.parameters())
    assert all(each.grad is not None for each in codec.parameters())


def test_the_teachers_are_heard_by_the_generator() -> None:
    """The lesson is weighed into the total, and its gradient reaches encoder and projection."""
    torch.manual_seed(0)
    config = DistillConfig(speech=SpeechTeacherConfig(model="somebody", weight=0.5))
    student = Student(Codec(TINY), config, {"speech": 4}).train()
    wave = torch.randn(2, 1, 8000)
    target = Target(torch.randn(2, 50, 4), torch.ones(2, 50, dtype=torch.bool))
    losses = LossConfig(mel_scales=SCALES, weights=LossWeights(distill=7.0))
    out = student(wave)
    frames = out.projections["speech"].shape[1]
    target = Target(target.values[:, :frames], target.mask[:, :frames])
    lesson = TeacherTargets({"speech": target}, config)
    untaught = generator_step(out, wave, None, losses, 16_000)
    taught = generator_step(out, wave, None, losses, 16_000, lesson)
    assert taught.parts["distill"] == 0.5 * taught.parts["distill_speech"]
    torch.testing.assert_close(taught.total, untaught.total + 7.0 * taught.parts["distill"])
    wanted = [*student.heads.parameters(), *student.codec.encoder.parameters()]
    taught.parts["distill"].backward()
    assert all(each.grad is not None and bool(each.grad.abs().sum() > 0) for each in wanted)
    assert all(
        each.grad is None or not each.grad.any() for each in student.codec.decoder.parameters()
    )


def test_learning_rate_decays_once_every_so_many_steps() -> None:
    optim = CodecOptimConfig(
        steps=100, warmup_steps=10, schedule="decay", decay=0.5, decay_steps=20
    )  # fmt: skip
    rates = [learning_rate(step, optim, 2.0) for step in range(101)]
    assert rates[4] == pytest.approx(1.0)
    assert [rates[step] for step in (10, 29, 30, 49, 50, 100)] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.125]


def test_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    optim = CodecOptimConfig(steps=100, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(step, optim, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == max(rates) == 2.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.2)


def _train_on_rank(file: str, out: str) -> None:
    """Four steps of generator training, on each rank of a launch or on one process.

    Reads the waves of each step from `file`; writes the codebooks after each step and the final
    weights.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    waves = torch.load(file, weights_only=True)
    torch.manual_seed(0)
    codec = Codec(TINY).train()
    model = codec
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(codec, broadcast_buffers=False)
    optimizer = torch.optim.SGD(codec.parameters(), 1e-2)
    config, books = LossConfig(mel_scales=SCALES), []
    for step in range(4):
        batch = waves[step].chunk(world)[rank]
        generator_step(model(batch), batch, None, config, 16_000).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        books.append([book.state_dict() for book in codec.quantizer.codebooks])
        books[-1] = [{name: each.clone() for name, each in book.items()} for book in books[-1]]
    revived = _train_book_on_clusters(rank, world)
    result = {"books": books, "weights": codec.state_dict(), "revived": revived}
    if world > 1:
        result["discriminators"] = _train_discriminators(rank, waves.flatten(0, 1))
    torch.save(result, f"{out}.{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def _train_book_on_clusters(rank: int, world: int) -> torch.Tensor:
    """Entries after 4 updates on 4 clusters, in which some were revived."""
    generator = torch.Generator().manual_seed(1)
    centres = 10 * torch.randn(4, 8, generator=generator)
    # A decay at which entries that a batch does not use are dead at the next but one.
    book = Codebook(8, 64, QuantizerConfig(decay=0.3), seed=1).train()
    revived, revive = [], book._revive

    def spy(joined: Statistics) -> None:
        before = book.cluster_size.clone()
        revive(joined)
        revived.append(not torch.equal(before, book.cluster_size))

    book._revive = spy
    for _ in range(4):
        chosen = torch.randint(0, 4, (256,), generator=generator)
        vectors = centres[chosen] + 0.1 * torch.randn(256, 8, generator=generator)
        mine = vectors.chunk(world)[rank]
        update_codebooks([book.quantize(mine.T[None]).assigned])
    assert any(revived)
    return book.entries


def _train_discriminators(
    rank: int, waves: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter before and after three steps of the loop on waves of this rank's own."""
    accelerator, optim = make_accelerator(), CodecOptimConfig(warmup_steps=0)
    torch.manual_seed(0)
    models = TrainingModels(Student(Codec(TINY), DistillConfig()), Discriminators(DISCRIMINATORS))
    before = [each.detach().clone() for each in models.discriminators.parameters()]
    losses = LossConfig(weights=LossWeights(adversarial=1.0, feature=1.0), mel_scales=SCALES)
    trainer = prepare_trainer(models, accelerator, losses, optim)
    for wave in waves.chunk(2)[rank][..., :4000].split(1)[:3]:
        mine = Crops(wave, torch.tensor([wave.shape[-1]]), ("one",), (0.0,))
        train_step(trainer, mine, adversarial=True)
    after = [each.detach() for each in models.discriminators.parameters()]
    return list(zip(before, after, strict=True))


def test_two_ranks_hold_the_codebooks_of_one_process_on_the_joined_batch(
    wave: torch.Tensor, tmp_path: Path, launch: Callable[..., CompletedProcess[str]]
) -> None:
    """Defect 2 of the public code: there, rank 0's statistics overwrite the others'."""
    generator = torch.Generator().manual_seed(0)
    gains = 0.5 + torch.rand(4, 4, 1, 1, generator=generator)
    waves = gains * wave + 0.02 * torch.randn(4, *wave.shape, generator=generator)
    torch.save(waves, tmp_path / "waves.pt")
    done = launch("ddp", __file__, tmp_path / "waves.pt", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    _train_on_rank(str(tmp_path / "waves.pt"), str(tmp_path / "one"))
    first, second, joined = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("two.0.pt", "two.1.pt", "one.0.pt")
    )
    for step in range(4):
        for index in range(2):
            for name, entries in first["books"][step][index].items():
                assert torch.equal(entries, second["books"][step][index][name]), (step, name)
                torch.testing.assert_close(
                    entries, joined["books"][step][index][name], atol=1e-4, rtol=1e-3
                )
    assert torch.equal(first["revived"], second["revived"])
    torch.testing.assert_close(first["revived"], joined["revived"], atol=1e-4, rtol=1e-3)
    for name, weights in joined["weights"].items():
        torch.testing.assert_close(first["weights"][name], weights, atol=1e-4, rtol=1e-3)
    # LM-SPT's released trainer calls them past their DDP wrapper, and each rank ends with its own.
    for (before, mine), (_, other) in zip(
        first["discriminators"], second["discriminators"], strict=True
    ):
        assert torch.equal(mine, other)
        assert not torch.equal(mine, before)


@pytest.fixture
def recipe(write_wav, tmp_path) -> list[str]:
    """The command line for a miniature with discriminators, accumulation, a teacher, and a Whisper
    that hears what is made of the semantic codes."""
    cuts = [
        Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 1.5, seed=seed)).to_cut()
        for seed in range(5)
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    teacher, whisper = (
        save_speech_teacher(tmp_path / kind, kind) for kind in ("hubert", "whisper")
    )
    settings = {
        "train": tmp_path / "cuts.jsonl.gz", "dev": tmp_path / "cuts.jsonl.gz",
        "codec.family": "lmspt", "codec.lmspt.dimension": 8,
        "codec.lmspt.auxiliary.width": 8,
        "codec.spectral.num_mels": 20, "codec.spectral.encoder_width": 16,
        "codec.spectral.encoder_depths": "[1,1,1]",
        "codec.spectral.decoder_width": 16, "codec.spectral.decoder_depths": "[1,1,1]",
        "codec.quantizer.num_codebooks": 2, "codec.quantizer.codebook_sizes": "[16,8]",
        "codec.quantizer.dropout": 0.5,
        "losses.weights.adversarial": 1, "losses.weights.feature": 1,
        "losses.weights.distill": 1, "distill.speech.model": teacher,
        "losses.weights.resynthesis": 1, "resynthesis.model": whisper,
        "discriminators.periods": "[2]", "discriminators.num_scales": 1,
        "discriminators.stft_windows": "[128]", "discriminators.stft_filters": 4,
        "discriminators.band_windows": "[128]", "discriminators.width_divisor": 64,
        "data.seconds": 0.28, "data.batch_size": 2, "data.num_validation": 2,
        "optim.steps": 6, "optim.accumulate": 2, "optim.save_every": 2,
        "optim.eval_every": 4, "optim.log_every": 2,
    }  # fmt: skip
    script = ROOT / "recipes" / "train_codec.py"
    return [str(script), *(f"{key}={value}" for key, value in settings.items())]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "codec" / "model.safetensors")


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_end_with_the_same_weights(
    recipe: list[str], tmp_path: Path, start: Callable[..., ForkedRun]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = start("ddp", *recipe, f"out={whole}").wait()
    assert first.returncode == 0, first.stderr[-3000:]
    killed = start("ddp", *recipe, f"out={broken}")
    killed.kill_when((broken / "checkpoints" / "step-00000002").exists)
    assert not (broken / "codec").exists()
    last = start("ddp", *recipe, f"out={broken}").wait()
    assert last.returncode == 0, last.stderr[-3000:]
    assert "resuming from" in last.stderr
    expected, found = _weights(whole), _weights(broken)
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    final = [
        load_file(folder / "checkpoints" / "step-00000006" / "model_1.safetensors")
        for folder in (whole, broken)
    ]
    assert all(torch.equal(final[1][name], each) for name, each in final[0].items())
    logged = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (whole, broken)
    ]
    for before, after in zip(*logged, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - {"train/audio_seconds_per_second", "train/teacher_share"}:
            assert before[name] == after[name], name


def test_bad_recordings_are_listed_at_the_end_over_loader_processes(
    recipe: list[str], tmp_path: Path, launch: Callable[..., CompletedProcess[str]]
) -> None:
    (tmp_path / "3.wav").write_bytes(b"")
    more = (f"out={tmp_path / 'run'}", "data.num_workers=2", "optim.steps=4")
    done = launch(None, *recipe, *more)
    assert done.returncode == 0, done.stderr
    # Before the three lines on what was made.
    assert "1 recordings could not be read" in done.stderr.splitlines()[-4]
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 1
    assert "3.wav: the file is empty" in lines[0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"audio": 0})
    tags = events.Reload().Tags()
    heard = {f"dev/0/{name}" for name in ("original", "reconstruction", "resynthesis")}
    assert heard <= set(tags["audio"])
    assert "dev/0/mel" in tags["images"]
    assert {"train/perplexity", "train/resynthesis", "dev/resynthesis"} <= set(tags["scalars"])


def test_a_diverged_run_keeps_its_last_good_checkpoint(
    recipe: list[str], tmp_path: Path, launch: Callable[..., CompletedProcess[str]]
) -> None:
    nan = ("losses.weights.mel=.nan", "optim.max_skipped_steps=1")
    done = launch(None, *recipe, f"out={tmp_path / 'run'}", *nan)
    assert done.returncode == 2
    assert "error: the training diverged before step 2" in done.stderr
    assert not (tmp_path / "run" / "codec").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_full_disk_leaves_the_earlier_codec(tmp_path, monkeypatch) -> None:
    codec = Codec(TINY)
    save_codec(codec, tmp_path / "codec")
    before = (tmp_path / "codec" / "model.safetensors").read_bytes()

    def full(*args, **kwargs) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Codec, "_save_pretrained", full)
    with pytest.raises(OSError, match="make room on the disk"):
        save_codec(codec, tmp_path / "codec")
    assert (tmp_path / "codec" / "model.safetensors").read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["codec"]


if __name__ == "__main__":
    _train_on_rank(*sys.argv[1:])

"""Resynthesis distillation: Whisper features of speech decoded from semantic codes alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lhotse import Recording
from tiny_codec_training import LOSSES, TINY, SingleProcess, crops
from tiny_teachers import save_speech_teacher

from codec import Codec, CodecConfig
from codec.config import AuxiliaryConfig
from codec.distillation import teachers
from codec.distillation.objectives import Student
from codec.distillation.resynthesis import Resynthesis
from codec.training.codec_fit import metrics
from codec.training.codec_step import Trainer, TrainingModels, train_step
from codec.training.config import (
    CodecOptimConfig,
    CropConfig,
    LossWeights,
    ResynthesisConfig,
    SpeechTeacherConfig,
    TextTeacherConfig,
)
from codec.training.validate import Validation, validate


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ResynthesisConfig:
    model = save_speech_teacher(tmp_path_factory.mktemp("models") / "whisper", "whisper")
    return ResynthesisConfig(model=model, bfloat16=False)


def student(config: ResynthesisConfig, codec: CodecConfig = TINY) -> Student:
    torch.manual_seed(0)
    return Student(Codec(codec), resynthesis=config).train()


def has_gradient(module: torch.nn.Module) -> bool:
    """Whether all of its parameters have a gradient; fails where only some have."""
    reached = {each.grad is not None and bool(each.grad.any()) for each in module.parameters()}
    assert len(reached) == 1
    return reached.pop()


@pytest.mark.parametrize("distance", ["mse", "l1"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("rate", [16_000, 24_000])
def test_the_original_has_distance_zero(config, distance, mask, rate) -> None:
    """Through another rate as well: 24 kHz has frames of 1.5 samples to Whisper's one."""
    batch = crops(0.5, 0.3, rate=rate)
    settings = replace(config, distance=distance, mask=mask, decoder="main")
    codec = replace(TINY, family="spectral", sample_rate=rate)
    original = Resynthesis(settings, codec, "cpu").encode_originals(batch)
    assert float(original.distance(batch.wave)) < 1e-9
    assert original.features.lengths.tolist() == ([25, 15] if mask else [1500, 1500])
    other = crops(0.5, 0.3, rate=rate, seed=7).wave
    assert float(original.distance(other)) > 1e-3


def test_the_gradient_reaches_the_semantic_encoder_and_the_auxiliary_decoder(config) -> None:
    batch, made = crops(0.5, 0.4), student(config)
    teacher, codec = Resynthesis(config, TINY, "cpu"), made.codec
    teacher.encode_originals(batch).distance(made(batch.wave).resynthesis).backward()
    assert has_gradient(codec.encoder.semantic)
    assert has_gradient(codec.auxiliary)
    assert not has_gradient(codec.encoder.acoustic)
    assert not has_gradient(codec.decoder)
    assert all(each.grad is None for each in teacher.teacher.parameters())


def test_entries_that_learn_by_gradient_learn_from_it(config) -> None:
    quantizer = replace(TINY.quantizer, learning="gradient", codebook_dimension=2)
    batch, made = crops(0.5, 0.4), student(config, replace(TINY, quantizer=quantizer))
    original = Resynthesis(config, TINY, "cpu").encode_originals(batch)
    original.distance(made(batch.wave).resynthesis).backward()
    (book,) = made.codec.quantizer.semantic.codebooks
    assert has_gradient(book.project_in)
    assert has_gradient(book.project_out)
    assert all(not has_gradient(each) for each in made.codec.quantizer.acoustic.codebooks)


def test_without_gradient_only_the_decoder_learns(config) -> None:
    settings = replace(config, stop_gradient=True)
    batch, made = crops(0.5, 0.4), student(settings)
    original = Resynthesis(settings, TINY, "cpu").encode_originals(batch)
    original.distance(made(batch.wave).resynthesis).backward()
    assert has_gradient(made.codec.auxiliary)
    assert not has_gradient(made.codec.encoder)


def test_the_main_decoder_may_resynthesize(config) -> None:
    settings = replace(config, decoder="main")
    networks = replace(TINY, family="spectral", spectral=replace(TINY.spectral, dimension=8))
    for codec in (TINY, networks):
        batch, made = crops(0.5, 0.4), student(settings, codec)
        original = Resynthesis(settings, codec, "cpu").encode_originals(batch)
        original.distance(made(batch.wave).resynthesis).backward()
        assert has_gradient(made.codec.decoder)
    with pytest.raises(ValueError, match="no auxiliary decoder"):
        student(config, networks)


def test_an_unused_auxiliary_decoder_is_not_trained(config) -> None:
    for settings in (None, replace(config, decoder="main")):
        idle = Student(Codec(TINY), resynthesis=settings).codec.auxiliary
        assert not any(each.requires_grad for each in idle.parameters())


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_padding_does_not_change_the_distance(config, rate) -> None:
    """Of the speech, at its own rate; and an item has the distance that it has alone."""
    lmspt = replace(
        TINY.lmspt, auxiliary=AuxiliaryConfig(width=8, sample_rate=rate, hop=rate // 100)
    )
    teacher = Resynthesis(config, replace(TINY, lmspt=lmspt), "cpu")
    batch, speech = crops(0.5, 0.31), crops(0.52, 0.52, rate=rate, seed=5).wave
    loss = teacher.encode_originals(batch).distance(speech)
    end = round(0.31 * rate)
    wild, noise = speech.clone(), batch.wave.clone()
    wild[1, :, end:] = 3.0
    noise[1, :, round(0.31 * 16_000) :] = 3.0
    assert torch.equal(teacher.encode_originals(batch).distance(wild), loss)
    assert torch.equal(teacher.encode_originals(batch._replace(wave=noise)).distance(speech), loss)
    alone = [
        teacher.encode_originals(crops(seconds, seed=row)).distance(speech[row : row + 1])
        for row, seconds in enumerate((0.5, 0.31))
    ]
    # So gradients averaged over ranks are those of the joined batch, whatever its crops' lengths.
    torch.testing.assert_close(loss, torch.stack(alone).mean(), rtol=1e-4, atol=1e-6)
    wild[1, :, end - 400 : end] = 0.0
    assert not torch.equal(teacher.encode_originals(batch).distance(wild), loss)


def test_padding_dilutes_the_loss_as_released(config) -> None:
    """50 frames of speech among 1500; the others differ little, but attend to those that do."""
    batch, speech = crops(1.0, 1.0), crops(1.0, 1.0, seed=5).wave
    masked, whole = (
        float(Resynthesis(settings, TINY, "cpu").encode_originals(batch).distance(speech))
        for settings in (config, replace(config, mask=False))
    )
    assert 0.8 * 50 / 1500 < whole / masked < 2 * 50 / 1500


def test_only_the_released_floor_couples_the_items(config) -> None:
    """A loud item raises the log-mel floor of the batch, which masks quiet parts of the others."""
    batch, speech = crops(0.5, 0.5), crops(0.5, 0.5, seed=5).wave
    loud = speech * torch.tensor([1.0, 1e4])[:, None, None]
    for per_item in (True, False):
        teacher = Resynthesis(replace(config, per_item=per_item), TINY, "cpu")
        original = teacher.encode_originals(batch)
        first = [_of_first(original, each) for each in (speech, loud)]
        assert torch.equal(*first) == per_item
    # The floor of the originals is per item, as released.
    both = teacher.encode_originals(batch).features.values[0]
    alone = teacher.encode_originals(crops(0.5)).features.values[0]
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def _gradient(config: ResynthesisConfig) -> torch.Tensor:
    """Of the distance, to the speech."""
    teacher, speech = Resynthesis(config, TINY, "cpu"), crops(0.5, 0.5, seed=5).wave
    assert {each.dtype for each in teacher.teacher.parameters()} == {
        torch.bfloat16 if config.bfloat16 else torch.float32
    }
    loss = teacher.encode_originals(crops(0.5, 0.3)).distance(speech.requires_grad_())
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, speech)
    return gradient.flatten()


@pytest.mark.parametrize("layer", ["last", "1"])
def test_a_whisper_in_bfloat16_gives_the_direction_of_the_exact_one(
    config, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        teachers, "network_dtype", lambda _, half: torch.bfloat16 if half else torch.float32
    )
    default = ResynthesisConfig(model=config.model, layer=layer)
    exact, near = (_gradient(each) for each in (replace(default, bfloat16=False), default))
    # Measured 0.9995 to 0.9999 for four seeds; layer 1 and the last one are 0.65 to 0.89 apart.
    assert torch.cosine_similarity(exact, near, dim=0) > 0.99
    torch.testing.assert_close(near.norm(), exact.norm(), rtol=0.05, atol=0)


def test_the_layer_that_is_named_is_compared(config) -> None:
    batch = crops(0.5)
    states = {
        layer: Resynthesis(replace(config, layer=layer), TINY, "cpu")
        .encode_originals(batch)
        .features.values
        for layer in ("last", "0", "1", "2", "3", "mean")
    }
    assert torch.equal(states["3"], states["last"])
    assert not torch.allclose(states["1"], states["last"], atol=0.1)
    mean = torch.stack([states[layer] for layer in "0123"]).mean(0)
    torch.testing.assert_close(states["mean"], mean)
    gradients = [_gradient(replace(config, layer=layer)) for layer in ("1", "last")]
    assert torch.cosine_similarity(*gradients, dim=0) < 0.95


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ResynthesisConfig, "resynthesis"),
        (SpeechTeacherConfig, r"distill\.speech"),
        (TextTeacherConfig, r"distill\.text"),
    ],
)
def test_a_layer_is_mean_last_or_a_number(kind: type, name: str) -> None:
    for layer in ("mean", "last", "0", "12"):
        assert kind(layer=layer).layer == layer
    for layer in ("foo", "", "-1", "1.5"):
        with pytest.raises(ValueError, match=rf"{name}\.layer must be mean, last, or a number"):
            kind(layer=layer)


def _of_first(original, speech: torch.Tensor) -> torch.Tensor:
    """Student features of the first item of a batch."""
    encoder = original.encoder
    return encoder._encode(
        encoder.student_teacher, speech, 16_000, original.lengths, original.samples
    ).values[0]  # fmt: skip


def test_a_teacher_other_than_whisper_is_refused(tmp_path: Path) -> None:
    other = save_speech_teacher(tmp_path, "hubert")
    with pytest.raises(ValueError, match=r"resynthesis\.model: .* is not a Whisper"):
        Resynthesis(ResynthesisConfig(model=other), TINY, "cpu")


def trained(config: ResynthesisConfig | None, clip_norm: float) -> Trainer:
    """Three steps on the same batches."""
    made = Student(Codec(TINY), resynthesis=config) if config is None else student(config)
    torch.manual_seed(0)
    made.codec.load_state_dict(Codec(TINY).state_dict())
    teacher = None if config is None else Resynthesis(config, TINY, "cpu")
    models = TrainingModels(made.train(), resynthesis=teacher)
    optimizer = torch.optim.AdamW([each for each in made.parameters() if each.requires_grad], 1e-3)
    optim = CodecOptimConfig(clip_norm=clip_norm)
    losses = LOSSES if config else replace(LOSSES, weights=LossWeights())
    trainer = Trainer(models, [optimizer], SingleProcess(), losses, optim)
    for step in range(3):
        train_step(trainer, crops(0.5, 0.5, seed=10 * step), adversarial=False)
    return trainer


def test_without_gradient_the_codec_is_a_plain_one_to_the_bit(config) -> None:
    """Gradients are clipped here, and the auxiliary decoder's do not count for the codec's."""
    plain = trained(None, 0.1).models
    control = trained(replace(config, stop_gradient=True), 0.1).models
    distilled = trained(config, 0.1).models
    same, other = [], []
    weights = distilled.student.codec.state_dict()
    for name, each in plain.student.codec.state_dict().items():
        found = control.student.codec.state_dict()[name]
        if name.startswith("auxiliary."):
            other.append(torch.equal(each, found))
        else:
            assert torch.equal(each, found), name
            same.append(torch.equal(each, weights[name]))
    assert not all(other)
    assert not all(same)


def test_a_run_logs_the_distance_and_the_teachers_share_of_time(
    config, write_wav, tmp_path
) -> None:
    trainer = trained(config, 1.0)
    models, reading = trainer.models, trainer.meter.read(SingleProcess())
    values = metrics(trainer, reading, models.student.codec.codebook_sizes, seconds=1.0)
    assert values["resynthesis"] > 0
    assert 0 < values["teacher_share"] < 1
    cuts = [
        Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 0.7, seed=seed)).to_cut()
        for seed in range(2)
    ]
    validation = Validation(models.student, None, models.resynthesis, cuts, CropConfig(), LOSSES)
    logged = validate(validation, SingleProcess(), 0)
    assert logged["dev/n"] == 2
    assert logged["dev/resynthesis"] > 0
    assert 0 < logged["dev/use_3"] <= 1

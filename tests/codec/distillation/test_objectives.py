"""SpeechTokenizer's and DM-Codec's objectives, and words over frames."""

import math

import pytest
import torch

from codec import Codec, CodecConfig
from codec.config import QuantizerConfig, SEANetConfig, SpectralConfig
from codec.distillation.objectives import (
    Student,
    Target,
    average_over_frames,
    d_axis_loss,
    distill_losses,
    frame_overlaps,
    match_lengths,
    pseudo_label_loss,
    t_axis_loss,
    word_per_frame,
    word_states_over_frames,
)
from codec.training.config import DistillConfig, SpeechTeacherConfig, TextTeacherConfig

PERFECT = math.log(1 + math.exp(-1))  # -log sigmoid(1) = 0.3133
TINY = SpectralConfig(
    num_mels=20, encoder_width=8, encoder_depths=(1, 1, 1), dimension=8, decoder_width=8,
    decoder_depths=(1, 1, 1),
)  # fmt: skip
BOTH = DistillConfig(
    speech=SpeechTeacherConfig(model="s", weight=3.0),
    text=TextTeacherConfig(model="t", weight=5.0, transcriber="w"),
)


def features(frames: int = 12, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, frames, width, generator=torch.Generator().manual_seed(seed))


def everywhere(values: torch.Tensor) -> torch.Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool)


def seanet(semantic_dimension: int = 6) -> Codec:
    torch.manual_seed(0)
    networks = SEANetConfig(
        num_filters=2, strides=(4, 2), dimension=8, semantic_dimension=semantic_dimension
    )
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=4)
    return Codec(CodecConfig(family="seanet", seanet=networks, quantizer=quantizer))


def test_d_axis_of_a_perfect_student_and_of_an_ignorant_one() -> None:
    teacher = features()
    loss = d_axis_loss(3 * teacher, teacher, everywhere(teacher))
    assert round(float(loss), 4) == 0.3133
    ignorant = d_axis_loss(torch.zeros_like(teacher), teacher, everywhere(teacher))
    assert float(ignorant) == pytest.approx(math.log(2))
    assert float(d_axis_loss(-teacher, teacher, everywhere(teacher))) == pytest.approx(PERFECT + 1)


def test_d_axis_is_the_cosine_over_time_of_every_feature() -> None:
    student, teacher = features(seed=1), features(seed=2)
    by_hand = [
        -torch.nn.functional.logsigmoid(
            student[item, :, feature] @ teacher[item, :, feature]
            / (student[item, :, feature].norm() * teacher[item, :, feature].norm())
        )
        for item in range(2) for feature in range(6)
    ]  # fmt: skip
    found = d_axis_loss(student, teacher, everywhere(teacher))
    assert float(found) == pytest.approx(float(torch.stack(by_hand).mean()), abs=1e-6)


def test_every_frame_inside_the_mask_gets_gradient_and_no_other() -> None:
    for loss in (d_axis_loss, t_axis_loss):
        student, teacher = features(seed=1).requires_grad_(), features(seed=2)
        mask = everywhere(teacher)
        mask[1, 5:9] = False
        loss(student, teacher, mask).backward()
        assert student.grad is not None
        assert torch.equal(student.grad.abs().sum(2) > 0, mask)
        wild = torch.where(mask.unsqueeze(2), teacher, 1e3)
        same = student.detach()
        assert float(loss(same, wild, mask)) == float(loss(same, teacher, mask))


def test_an_item_without_frames_does_not_count() -> None:
    student, teacher = features(seed=1).requires_grad_(), features(seed=2)
    mask = everywhere(teacher)
    mask[1] = False
    alone = d_axis_loss(student[:1], teacher[:1], mask[:1]).detach()
    assert float(d_axis_loss(student, teacher, mask).detach()) == pytest.approx(float(alone))
    for loss in (d_axis_loss, t_axis_loss):
        nothing = loss(student, teacher, torch.zeros_like(mask))
        assert float(nothing.detach()) == 0
        nothing.backward()
        assert student.grad is not None
        assert bool(student.grad.isfinite().all())


def test_t_axis_is_l1_and_cosine_per_frame() -> None:
    teacher = features()
    assert float(t_axis_loss(teacher, teacher, everywhere(teacher))) == pytest.approx(PERFECT)
    shifted = t_axis_loss(teacher + 0.5, teacher, everywhere(teacher), cosine_weight=0)
    assert float(shifted) == pytest.approx(0.5)


def test_units_are_learnt_where_the_mask_is() -> None:
    units = torch.tensor([[0, 1, 2], [2, 1, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logits = 20.0 * torch.nn.functional.one_hot(units, 4).float()
    assert float(pseudo_label_loss(logits, units, mask)) < 1e-6
    logits[1, 1] = torch.tensor([20.0, 0, 0, 0])  # Wrong, but not asked.
    assert float(pseudo_label_loss(logits, units, mask)) < 1e-6
    assert float(pseudo_label_loss(torch.zeros(2, 3, 4), units, mask)) == pytest.approx(math.log(4))


def test_one_frame_more_or_less_is_trimmed_and_two_are_an_error() -> None:
    student = features(12)
    for frames in (11, 12, 13):
        values = features(frames)
        ours, target = match_lengths(student, Target(values, everywhere(values)))
        assert ours.shape[1] == target.values.shape[1] == target.mask.shape[1] == min(frames, 12)
    for frames in (10, 14):
        values = features(frames)
        with pytest.raises(ValueError, match=f"the teacher has {frames} frames where the codec"):
            match_lengths(student, Target(values, everywhere(values)))


def test_two_teachers_count_half_each() -> None:
    student, teacher = features(seed=1), features(seed=2)
    target = Target(teacher, everywhere(teacher))
    one = float(d_axis_loss(student, teacher, target.mask))
    parts = distill_losses({"speech": student, "text": teacher}, dict.fromkeys(
        ("speech", "text"), target), BOTH)  # fmt: skip
    assert float(parts["distill_speech"]) == pytest.approx(one)
    assert float(parts["distill_text"]) == pytest.approx(PERFECT)
    assert float(parts["distill"]) == pytest.approx((3 * one + 5 * PERFECT) / 2)
    alone = DistillConfig(speech=BOTH.speech)
    found = distill_losses({"speech": student}, {"speech": target}, alone)
    assert float(found["distill"]) == pytest.approx(3 * one)


@pytest.mark.parametrize(("speech", "text"), [(0.0, 1.0), (1.0, 0.0), (0.2, 0.8), (0.5, 0.5)])
def test_equation_11_of_dm_codec(speech: float, text: float) -> None:
    """Half of the weighted sum, also where one weight is 0 and that teacher is not computed."""
    config = DistillConfig(
        speech=SpeechTeacherConfig(model="s", weight=speech),
        text=TextTeacherConfig(model="t", weight=text, transcriber="w"),
    )
    projected, by_name = features(seed=1), {"speech": features(seed=2), "text": features(seed=3)}
    targets = {name: Target(each, everywhere(each)) for name, each in by_name.items()}
    losses = {  # Equations 1 and 2.
        name: -torch.log(
            torch.sigmoid((projected * a).sum(1) / (projected.norm(dim=1) * a.norm(dim=1)))
        ).mean()
        for name, a in by_name.items()
    }
    expected = 0.5 * (speech * losses["speech"] + text * losses["text"])
    targets = {name: targets[name] for name in config.active}
    found = distill_losses(dict.fromkeys(targets, projected), targets, config)
    assert float(found["distill"]) == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == {"distill", *(f"distill_{name}" for name in config.active)}


def test_dm_codec_projects_for_both_teachers_by_one_matrix() -> None:
    """Section 2.1: Q' = W Q for the language model's and for the speech model's loss."""
    config = DistillConfig(
        speech=SpeechTeacherConfig(model="s", codebooks="mean"),
        text=TextTeacherConfig(model="t", transcriber="w"),
        shared_head=True,
    )
    codec = seanet()
    student = Student(codec, config, {"speech": 6, "text": 6}).eval()
    out = student(torch.randn(2, 1, 800, generator=torch.Generator().manual_seed(0)))
    w, bias = codec.semantic_head.weight, codec.semantic_head.bias
    for name, entry in (
        ("text", out.quantized.entries[0]),
        ("speech", torch.stack(out.quantized.entries).mean(0)),
    ):
        by_hand = torch.einsum("of,bft->bto", w, entry) + bias
        torch.testing.assert_close(out.projections[name], by_hand)


@pytest.mark.parametrize("objective", ["t_axis", "units"])
def test_each_objective_has_its_loss(objective: str) -> None:
    config = DistillConfig(
        speech=SpeechTeacherConfig(
            model="s", objective=objective, units="u" if objective == "units" else ""
        )
    )
    student, teacher = features(seed=1), features(seed=2)
    values = teacher if objective == "t_axis" else teacher.argmax(2)
    target = Target(values, everywhere(teacher))
    loss = {"t_axis": t_axis_loss, "units": pseudo_label_loss}[objective]
    found = distill_losses({"speech": student}, {"speech": target}, config)["distill"]
    assert float(found) == float(loss(student, values, target.mask))


def test_features_are_averaged_over_each_frame() -> None:
    ramp, seven = torch.arange(7.0).view(1, 7, 1), torch.tensor([7])
    same, mask = average_over_frames(ramp, seven, 50.0, 7, 50.0)
    torch.testing.assert_close(same, ramp)
    assert mask.all()
    half = average_over_frames(ramp, seven, 50.0, 4, 25.0)
    assert half.values.flatten().tolist() == pytest.approx([0.5, 2.5, 4.5, 6.0])
    assert half.mask.all()  # The last frame is half filled.
    fewer = average_over_frames(ramp, seven, 50.0, 3, 12.5)
    assert fewer.mask.tolist() == [[True, True, False]]
    assert fewer.values.flatten().tolist() == pytest.approx([1.5, 5.0, 0.0])
    more = average_over_frames(ramp, seven, 50.0, 14, 100.0).values.flatten()
    assert more.tolist() == pytest.approx([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6])
    odd = average_over_frames(ramp, seven, 50.0, 10, 75.0)  # 1, then half of 1 and half of 2, 2 ...
    assert odd.values.flatten()[:4].tolist() == pytest.approx([0, 0.5, 1, 2])


def test_padding_never_enters_a_frame() -> None:
    batch = torch.randn(2, 9, 3)
    batch[1, 5:] = 1e6
    target = average_over_frames(batch, torch.tensor([9, 5]), 50.0, 5, 25.0)
    alone = average_over_frames(batch[1:, :5], torch.tensor([5]), 50.0, 5, 25.0)
    torch.testing.assert_close(target.values[1:], alone.values)
    assert target.mask.tolist() == [[True] * 5, [True, True, True, False, False]]


def test_words_lie_on_their_own_frames() -> None:
    spans = torch.tensor([[0.1, 0.3], [0.5, 0.61], [0.61, 0.65], [0.9, 0.93]])
    assert word_per_frame(spans, 10, 10.0).tolist() == [-1, 0, 0, -1, -1, 1, 2, -1, -1, -1]
    seconds = torch.tensor([0.2, 0.11, 0.04, 0.03])
    torch.testing.assert_close(frame_overlaps(spans, 10, 10.0).sum(0), seconds)
    states = torch.tensor([[1.0, 0], [0, 1], [0, -1], [5, 5]])
    (values,), (mask,) = word_states_over_frames(spans, states, 10, 10.0)
    # The last word has less than half of its frame: mostly silence.
    assert mask.nonzero().flatten().tolist() == [1, 2, 5, 6]
    torch.testing.assert_close(values[[1, 2, 5]], states[[0, 0, 1]])
    # Of the seventh frame the second word has 10 ms and the third 40.
    torch.testing.assert_close(values[6], torch.tensor([0.0, (0.01 - 0.04) / 0.05]))


def test_without_words_the_mask_is_empty() -> None:
    spans, states = torch.zeros(0, 2), torch.zeros(0, 5)
    (values,), (mask,) = word_states_over_frames(spans, states, 4, 25.0)
    assert values.shape == (4, 5)
    assert not mask.any()
    assert word_per_frame(spans, 4, 25.0).tolist() == [-1] * 4


def test_dropout_leaves_the_last_codebook_its_teacher() -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=8, dropout=1.0)
    codec = Codec(CodecConfig(spectral=TINY, quantizer=quantizer)).train()
    latent = torch.randn(6, 8, 5)
    codec.quantizer(latent)
    quantized = codec.quantizer(latent)
    whole = torch.stack(quantized.entries).sum(0)
    dropped = (quantized.latent - whole).abs().amax((1, 2)) > 1e-4
    assert dropped.any()
    assert all(bool(each.abs().sum((1, 2)).all()) for each in quantized.entries)


@pytest.mark.parametrize("part", ["first", "mean", "last"])
def test_the_student_shows_the_codebooks_that_are_asked_for(part: str) -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=8)
    codec = Codec(CodecConfig(spectral=TINY, quantizer=quantizer))
    config = DistillConfig(speech=SpeechTeacherConfig(model="s", codebooks=part))
    student, wave = Student(codec, config, {"speech": 6}), torch.randn(2, 1, 3200)
    student.train()(wave)  # Fills the codebooks.
    out = student.eval()(wave)
    entries = torch.stack(
        [
            book.lookup(codes).mT
            for book, codes in zip(
                codec.quantizer.codebooks, out.quantized.codes.unbind(1), strict=True
            )
        ]
    )
    shown = {"first": entries[0], "mean": entries.mean(0), "last": entries[-1]}
    found = out.quantized.part(part)
    torch.testing.assert_close(found, shown.pop(part))
    assert not any(torch.allclose(found, other) for other in shown.values())
    torch.testing.assert_close(out.projections["speech"], student.heads["speech"](found.mT))
    out.projections["speech"].square().sum().backward()
    grads = [parameter.grad for parameter in codec.encoder.parameters()]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)


def test_the_parts_pass_the_gradient_once() -> None:
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codebooks=3, codebook_size=8)
    codec = Codec(CodecConfig(spectral=TINY, quantizer=quantizer)).train()
    latent = torch.randn(2, 8, 5, requires_grad=True)
    for part in ("first", "mean", "last"):
        (grad,) = torch.autograd.grad(codec.quantizer(latent).part(part).sum(), latent)
        torch.testing.assert_close(grad, torch.ones_like(grad))


def test_the_semantic_head_of_published_checkpoints_is_the_one_that_learns() -> None:
    codec = seanet()
    speech = Student(codec, BOTH, {"speech": 6, "text": 5})
    assert list(speech.heads) == ["text"]
    assert codec.semantic_head.weight.requires_grad
    assert list(Student(codec, BOTH, {"text": 6}).heads) == []
    shared = DistillConfig(speech=BOTH.speech, text=BOTH.text, shared_head=True)
    both = Student(codec, shared, {"speech": 6, "text": 6})
    assert list(both.heads) == []
    out = both.eval()(torch.randn(1, 1, 800))
    assert torch.equal(out.projections["speech"], out.projections["text"])
    Student(codec)
    assert not codec.semantic_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"semantic_dimension is 6: set it to 5"):
        Student(codec, BOTH, {"speech": 5})
    with pytest.raises(ValueError, match="teachers of one width"):
        Student(codec, shared, {"speech": 6, "text": 5})


def test_a_teacher_leaves_the_codec_its_initial_weights() -> None:
    def weights(widths: dict[str, int]) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        codec = Codec(CodecConfig(spectral=TINY))
        return Student(codec, BOTH, widths).codec.state_dict()

    plain, distilled = weights({}), weights({"speech": 6, "text": 4})
    assert all(torch.equal(plain[name], distilled[name]) for name in plain)


def test_the_distillation_loss_falls() -> None:
    """The loss reaches the encoder through the first codebook, and falls."""
    torch.manual_seed(0)
    quantizer = QuantizerConfig(num_codebooks=2, codebook_size=16, decay=0.8)
    codec = Codec(CodecConfig(spectral=TINY, quantizer=quantizer))
    config = DistillConfig(speech=SpeechTeacherConfig(model="s"))
    student = Student(codec, config, {"speech": 4}).train()
    wave = torch.randn(4, 1, 6400) * torch.linspace(0, 1, 6400)
    loud = torch.linspace(-1, 1, 10).view(1, 10, 1).expand(4, 10, 4)
    optimizer, seen = torch.optim.Adam(student.parameters(), 1e-2), []
    for _ in range(40):
        out = student(wave)
        loss = distill_losses(
            out.projections, {"speech": Target(loud, everywhere(loud))}, config
        )["distill"]  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.4 < seen[0]

"""A training step by parts: the same gradients, and a table of where its time goes."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from lhotse import CutSet, Recording
from tiny_codec_training import LOSSES, TINY, crops
from tiny_teachers import save_speech_teacher

from codec import Codec
from codec.distillation.objectives import Student
from codec.distillation.resynthesis import Resynthesis
from codec.distillation.targets import Teachers
from codec.modules.discriminators import Discriminators
from codec.training.config import (
    DiscriminatorConfig,
    DistillConfig,
    LossWeights,
    OptimConfig,
    ResynthesisConfig,
    SpeechTeacherConfig,
)
from codec.training.loop import Models, _Loop, _train_step
from codec.training.validate import Window
from recipes.lib.run import make_accelerator
from recipes.tools.profile_codec import Parts, Step, divided, main, table

LOUD = replace(
    LOSSES,
    weights=LossWeights(
        wave=1.0, codebook=1.0, adversarial=1.0, feature=1.0, distill=1.0, resynthesis=1.0
    ),
)
FACTORISED = replace(TINY.quantizer, learning="gradient", codebook_dimension=2, dropout=0.5)
CODECS = {
    "dual": TINY,
    "shared": replace(TINY, lmspt=replace(TINY.lmspt, shared_encoder=True)),
    "factorised": replace(TINY, quantizer=FACTORISED),
    "main decoder": replace(TINY, family="spectral"),
}


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Precision is a launch's, and accelerate's states are global."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_speech_teacher(folder / kind, kind) for kind in ("whisper", "hubert")}


class Recorder:
    """An optimiser that only looks at the gradients."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.seen = module, {}

    def step(self) -> None:
        self.seen = {
            name: each.grad.clone()
            for name, each in self.module.named_parameters()
            if each.grad is not None
        }

    def zero_grad(self) -> None:
        self.module.zero_grad()


def build(kind: str, names: dict[str, str]) -> Models:
    """Everything that a step can have."""
    torch.manual_seed(0)
    decoder = "main" if kind == "main decoder" else "auxiliary"
    config = replace(CODECS[kind], spectral=replace(CODECS[kind].spectral, dimension=8))
    told = ResynthesisConfig(model=names["whisper"], decoder=decoder, half=False)
    distill = DistillConfig(speech=SpeechTeacherConfig(model=names["hubert"]), half=False)
    teachers = Teachers(distill, config, "cpu")
    student = Student(Codec(config), distill, teachers.widths, told).train()
    critics = DiscriminatorConfig(
        periods=(2,), num_scales=1, stft_windows=(128,), stft_filters=4, band_windows=(128,),
        width_divisor=64,
    )  # fmt: skip
    return Models(student, Discriminators(critics), teachers, Resynthesis(told, config, "cpu"))


def step(models: Models, parts: Parts | None) -> list[dict[str, torch.Tensor]]:
    """The gradients of the codec and of the discriminators in one step."""
    assert models.discriminators is not None
    recorders = [Recorder(models.student), Recorder(models.discriminators)]
    optim = OptimConfig(clip_norm=0.0)
    loop = _Loop(models, recorders, make_accelerator(), LOUD, optim, Window(models.student.codec))
    torch.manual_seed(1)
    if parts is None:
        _train_step(loop, crops(0.5, 0.4), adversarial=True)
    else:
        with divided(loop, parts):
            _train_step(loop, crops(0.5, 0.4), adversarial=True)
    return [each.seen for each in recorders]


@pytest.mark.parametrize("kind", CODECS)
def test_the_parts_gradients_are_the_steps(models, kind: str) -> None:
    one = build(kind, models)
    step(one, None)  # Codebooks are filled, so that a near tie is all that could differ.
    other = replace(
        one, student=copy.deepcopy(one.student), discriminators=copy.deepcopy(one.discriminators)
    )
    parts = Parts(torch.device("cpu"))
    for whole, divided_ones in zip(step(one, None), step(other, parts), strict=True):
        assert whole.keys() == divided_ones.keys()
        assert len(whole) > 10
        for name, gradient in whole.items():
            apart = (divided_ones[name] - gradient).norm()
            assert float(apart) <= 1e-5 * float(gradient.norm()), name
    names = parts.read()
    assert all(seconds > 0 for seconds in names.values())
    encoders = ["semantic encoder", "acoustic encoder"]
    if kind in ("shared", "main decoder"):
        encoders = ["encoder"]
    auxiliary = [] if kind == "main decoder" else ["auxiliary decoder"]
    both = [
        *encoders, "quantiser", "decoder", *auxiliary, "projections to teachers",
        "teachers, losses", "Whisper, resynthesis", "mel loss", "magnitude loss", "wave loss",
        "discriminators, their own step", "discriminators, for the generator",
        "adversarial and feature loss",
    ]  # fmt: skip
    assert {name for name, way in names if way == "backward"} == set(both)
    forward = {*both, "teachers, targets", "Whisper, original", "optimisers"}
    assert {name for name, way in names if way == "forward"} == forward
    assert "forward" not in vars(other.student.codec.decoder), "the parts are whole again"


def test_shares_and_sums() -> None:
    steps = [
        Step(0.1, {("a", "forward"): 0.02, ("a", "backward"): 0.04, ("b", "forward"): 0.01}),
        Step(0.3, {("a", "forward"): 0.02, ("a", "backward"): 0.06, ("b", "forward"): 0.01}),
        Step(0.1, {("a", "forward"): 0.02, ("a", "backward"): 0.04, ("b", "forward"): 0.02}),
    ]
    lines = table([Step(0.08, {}), Step(0.09, {}), Step(0.2, {})], steps).splitlines()[2:]
    assert lines == [
        "| a | 20.0 | 40.0 | 60.0% |",
        "| b | 10.0 |  | 10.0% |",
        "| between the parts | 30.0 | | 30.0% |",
        "| sum of the parts | 70.0 | | 70.0% |",
        "| the divided step | 100.0 | | 100.0% |",
        "| an ordinary step | 90.0 | | 90.0% |",
    ]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_program_prints_a_table(
    models, write_wav, tmp_path: Path, capsys, monkeypatch, precision: str
) -> None:
    """With clipping, accumulation and the launch's precision; it leaves no run folder."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setattr("recipes.lib.run.has_bf16", lambda _: True)
    cuts = [
        Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 0.6, seed=seed)).to_cut()
        for seed in range(2)
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    (tmp_path / "tiny.yaml").write_text(
        "codec: {family: lmspt, lmspt: {dimension: 8, auxiliary: {width: 8}}, quantizer: "
        "{num_codebooks: 2, codebook_sizes: [16, 8]}, spectral: {num_mels: 20, encoder_width: 8, "
        "encoder_depths: [1, 1, 1], decoder_width: 8, decoder_depths: [1, 1, 1]}}\n"
        "data: {seconds: 0.5, batch_size: 2}\noptim: {accumulate: 2}\n"
    )
    main(
        ["--config", str(tmp_path / "tiny.yaml"), "--steps", "2", "--warmup=1",
         f"train={tmp_path / 'cuts.jsonl.gz'}", f"out={tmp_path / 'run'}",
         "losses.weights.resynthesis=1", f"resynthesis.model={models['whisper']}"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    named = re.findall(r"^\| ([^|]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    times = {name: float(milliseconds) for name, milliseconds in named}
    assert {"loading of crops", "clipping", "optimisers", "auxiliary decoder"} < times.keys()
    assert times["sum of the parts"] <= 1.1 * times["the divided step"]
    assert (
        f"n = 2 steps after 1; 2 x 2 crops of 0.5 s a step; 1 thread(s), precision {precision}"
        in (printed)
    )
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="at least 1"):
        main(["--steps", "0"])
    with pytest.raises(ValueError, match="--steps: invalid int value: 'x'"):
        main(["--steps", "x"])

"""The published configurations in miniature, from the command line, with every teacher beside."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lhotse import CutSet, Recording
from safetensors.torch import load_file
from tiny_teachers import save_ctc, save_speech_teacher, save_text_teacher

from codec import Codec, load_codec
from recipes.lib.codec_training import TrainCodecConfig, build_models, check_codec
from recipes.lib.run import load_config

CONFIGS = ROOT / "recipes" / "configs" / "codec"
TINY = ["--config", str(CONFIGS / "tiny.yaml")]


@pytest.fixture
def settings(tmp_path: Path, write_wav: Callable[..., Path]) -> list[str]:
    """Miniatures of everything, given as overrides."""
    cuts = [
        Recording.from_file(write_wav(tmp_path / f"{seed}.wav", seconds, seed=seed)).to_cut()
        # Shorter and longer than a crop, and no whole number of frames.
        for seed, seconds in enumerate((0.4, 0.3751, 1.0031, 0.4503))
    ]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    return [
        *TINY,
        "distill.bfloat16=false",
        *(f"{name}={tmp_path / 'cuts.jsonl.gz'}" for name in ("train", "dev")),
        f"out={tmp_path / 'run'}",
    ]


def speech_model(tmp_path: Path) -> str:
    return f"distill.speech.model={save_speech_teacher(tmp_path / 'hubert', 'hubert')}"


def text_models(tmp_path: Path) -> list[str]:
    return [
        f"distill.text.model={save_text_teacher(tmp_path / 'bert')}",
        f"distill.text.transcriber={save_ctc(tmp_path / 'ctc')}",
    ]


def train(launch: Callable, *arguments: str, ranks: int = 1) -> None:
    script = ROOT / "recipes" / "train_codec.py"
    done = launch("ddp" if ranks > 1 else None, script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def logged(tmp_path: Path) -> dict[str, float]:
    """The last value of everything that the run has logged."""
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


def initial_head(config: str, settings: list[str]) -> torch.Tensor:
    found = load_config(TrainCodecConfig, ["--config", str(CONFIGS / config), *settings])
    torch.manual_seed(found.seed)
    return Codec(found.codec).semantic_head.weight


def trained_head(tmp_path: Path) -> torch.Tensor:
    load_codec(tmp_path / "run" / "codec")  # Whole.
    return load_file(tmp_path / "run" / "codec" / "model.safetensors")["semantic_head.weight"]


def test_speechtokenizer(settings: list[str], tmp_path: Path, launch: Callable) -> None:
    config = ["--config", str(CONFIGS / "speechtokenizer.yaml")]
    train(launch, *config, *settings, speech_model(tmp_path))
    values = logged(tmp_path)
    assert {"train/distill_speech", "dev/distill_speech", "train/teacher_share"} <= values.keys()
    assert 0.31 < values["dev/distill_speech"] < 1.32
    assert values["train/distill"] == values["train/distill_speech"]
    assert 0 < values["train/teacher_share"] < 1
    assert not torch.equal(
        trained_head(tmp_path), initial_head("speechtokenizer.yaml", settings)
    )  # fmt: skip


def test_dm_codec_with_the_speech_teacher_at_weight_0(
    settings: list[str], tmp_path: Path, launch: Callable
) -> None:
    """The end (0, 1) of table 3: HuBERT is not even loaded, and equation 11 halves what is left."""
    config = ["--config", str(CONFIGS / "dmcodec_lm_sm.yaml"), "distill.speech.weight=0"]
    train(launch, *config, *settings, *text_models(tmp_path))
    values = logged(tmp_path)
    assert values["train/distill"] == values["train/distill_text"] / 2 > 0
    assert "dev/distill_text" in values
    assert not [name for name in values if name.endswith("distill_speech")]


def test_without_any_weight_no_teacher_is_loaded(settings: list[str]) -> None:
    config = ["--config", str(CONFIGS / "dmcodec_lm_sm.yaml"), *settings]
    zeros = ["distill.speech.weight=0", "distill.text.weight=0"]
    models = build_models(load_config(TrainCodecConfig, [*config, *zeros]), "cpu")
    assert models.teachers is None
    spt = ["--config", str(CONFIGS / "lmspt_compare.yaml"), *WHISPER[:1], "data.seconds=1"]
    assert build_models(load_config(TrainCodecConfig, spt), "cpu").resynthesis is None


@pytest.mark.slow
def test_dm_codec_with_both_teachers_on_two_ranks(
    settings: list[str], tmp_path: Path, launch: Callable
) -> None:
    """As released: one head for both, which the checkpoints hold as the codec's own."""
    config = ["--config", str(CONFIGS / "dmcodec_lm_sm_released.yaml")]
    models = [speech_model(tmp_path), *text_models(tmp_path)]
    train(launch, *config, *settings, *models, ranks=2)
    values = logged(tmp_path)
    both = values["train/distill_speech"] + values["train/distill_text"]
    assert values["train/distill"] == pytest.approx(both / 2, rel=1e-5)
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "model.safetensors")
    assert "codec.semantic_head.weight" in state
    assert not [name for name in state if name.startswith("heads.")]
    head = trained_head(tmp_path)
    assert torch.equal(state["codec.semantic_head.weight"], head)
    assert not torch.equal(head, initial_head("dmcodec_lm_sm.yaml", settings))


def preset(name: str) -> TrainCodecConfig:
    return load_config(TrainCodecConfig, ["--config", str(CONFIGS / f"{name}.yaml")])


LIBRISPEECH, CLEAN_100 = 281_241, 28_539
"""Recordings of the training sets."""


@pytest.mark.parametrize(
    ("name", "recordings", "epochs", "batch", "lr", "decay"),
    [
        ("speechtokenizer", LIBRISPEECH, 20, 2 * 20, 4e-4, 0.98),
        ("speechtokenizer_released", LIBRISPEECH, 10, 6, 1e-4, None),
        ("dmcodec_lm", CLEAN_100, 100, 6, 1e-4, 0.98),
        ("dmcodec_lm_released", CLEAN_100, 10, 6, 1e-4, None),
        ("dmcodec_lm_sm", CLEAN_100, 100, 6, 1e-4, 0.98),
        ("dmcodec_lm_sm_released", CLEAN_100, 10, 6, 1e-4, None),
    ],
)
def test_presets_state_the_papers_training_and_the_released_one(
    name: str, recordings: int, epochs: int, batch: int, lr: float, decay: float | None
) -> None:
    config, paper = preset(name), decay is not None
    losses, optim, distill = config.losses, config.optim, config.distill
    assert optim.steps == pytest.approx(epochs * recordings / batch, abs=1)
    assert (optim.lr, optim.discriminator_lr, config.data.seconds) == (lr, lr, 3.0)
    assert config.train.endswith("train.jsonl.gz" if "speech" in name else "clean-100.jsonl.gz")
    assert config.seed == (0 if "speech" in name else 42)
    if paper:
        assert (optim.schedule, optim.decay) == ("decay", decay)
        assert optim.decay_steps == pytest.approx(recordings / batch, abs=1)
    else:
        assert (optim.schedule, optim.final_lr_share) == ("cosine", 0)
    assert (losses.mel_l2_weight, len(losses.mel_scales)) == ((1.0, 7) if paper else (0.0, 4))
    assert losses.adversarial_form == ("hinge" if paper else "least_squares")
    assert losses.normalize_features is paper
    if name.startswith("dmcodec_lm_sm"):
        assert distill.shared_head
        assert distill.speech.codebooks == ("mean" if paper else "first")
    if name.startswith("dmcodec"):
        assert (distill.text.codebooks, distill.text.align) == (
            "first",
            "ctc" if paper else "index",
        )
    assert (distill.any, config.losses.weights.distill) == (True, 120.0)


def test_a_weight_needs_a_teacher(settings: list[str]) -> None:
    with pytest.raises(ValueError, match=r"losses\.weights\.distill needs a teacher"):
        load_config(TrainCodecConfig, [*settings, "losses.weights.distill=1"])


WHISPER = ["resynthesis.model=whisper", "losses.weights.resynthesis=1"]


@pytest.mark.parametrize(
    ("given", "reported"),
    [
        (WHISPER[1:], r"losses\.weights\.resynthesis needs a teacher: name resynthesis\.model"),
        ([*WHISPER, "resynthesis.decoder=mine"], r"resynthesis\.decoder"),
        ([*WHISPER, "resynthesis.distance=far"], r"resynthesis\.distance"),
        (WHISPER, "spectral has no such decoder"),
        (
            [*WHISPER, "codec.family=lmspt", "codec.lmspt.auxiliary.kind=none"],
            r"set codec\.lmspt\.auxiliary\.kind",
        ),
        (["codec.quantizer.learning=gradient"], "nothing trains the entries"),
    ],
)
def test_a_resynthesis_that_cannot_be_is_refused_in_words(given: list[str], reported: str) -> None:
    with pytest.raises(ValueError, match=reported):
        check(given)


def check(arguments: list[str]) -> TrainCodecConfig:
    config = load_config(TrainCodecConfig, arguments)
    check_codec(config.codec, config.losses, config.resynthesis)
    return config


@pytest.mark.parametrize("name", ["control", "feature", "large_auxiliary", "shared_decoder"])
def test_each_ablation_is_a_file_on_top(name: str) -> None:
    stack = ["lmspt_compare.yaml", "resynthesis.yaml", f"resynthesis_{name}.yaml"]
    each = [check([f"--config={CONFIGS / file}" for file in stack[:count]]) for count in (2, 3)]
    (plain, ablation), settings = each, [config.resynthesis for config in each]
    assert settings[1].stop_gradient == (name in ("control", "feature"))
    assert ablation.distill.any == (name == "feature")
    assert (settings[1].decoder == "main") == (name == "shared_decoder")
    assert (ablation.codec == plain.codec) == (name in ("control", "feature"))


def test_the_released_resynthesis_is_a_file_on_top() -> None:
    released = ["lmspt_v2_12.5hz.yaml", "resynthesis_released.yaml"]
    config = check([f"--config={CONFIGS / file}" for file in released])
    settings = config.resynthesis
    assert config.losses.weights.resynthesis == 500
    assert (settings.mask, settings.per_item, settings.bfloat16) == (False, False, False)
    assert settings.distance == "mse"


def test_the_second_form_has_the_losses_of_the_preset() -> None:
    """But for the resynthesis, the number of steps and the rhythm."""
    second, preset = (
        load_config(TrainCodecConfig, [f"--config={CONFIGS / file}"])
        for file in ("lmspt_v2_12.5hz.yaml", "lmspt_losses.yaml")
    )
    plain = replace(second.losses.weights, resynthesis=0.0)
    assert replace(second.losses, weights=plain) == preset.losses
    assert second.discriminators == preset.discriminators
    own = {"steps", "log_every", "eval_every", "save_every"}
    same = {name: getattr(second.optim, name) for name in own}
    assert replace(preset.optim, **same) == second.optim


RATES = ("25hz", "12.5hz", "6.25hz")
STACKS = {
    **{f"small {rate}": ["lmspt_small.yaml", f"rate_{rate}.yaml"] for rate in RATES},
    **{rate: [f"lmspt_{rate}.yaml"] for rate in RATES},
}
STACKS["small 25hz"] = ["lmspt_small.yaml"]


@pytest.mark.parametrize("name", STACKS)
def test_a_crop_has_as_many_frames_at_every_rate(name: str) -> None:
    config = check([f"--config={CONFIGS / file}" for file in STACKS[name]])
    codec = config.codec
    assert codec.sample_rate / codec.hop_length == float(name.split()[-1].removesuffix("hz"))
    frames = config.data.seconds * codec.sample_rate / codec.hop_length
    assert frames == (60 if name.startswith("small") else 150)
    if name.startswith("small"):
        sizes = [each.numel() for each in Codec(codec).parameters()]
        assert 16e6 < sum(sizes) <= 20e6


def test_the_large_auxiliary_decoder_is_as_large_as_the_main_one() -> None:
    stack = ["lmspt_compare.yaml", "resynthesis.yaml", "resynthesis_large_auxiliary.yaml"]
    config = check([f"--config={CONFIGS / file}" for file in stack])
    codec = Codec(config.codec)
    sizes = [
        sum(each.numel() for each in part.parameters()) for part in (codec.decoder, codec.auxiliary)
    ]
    assert sizes[0] == sizes[1]

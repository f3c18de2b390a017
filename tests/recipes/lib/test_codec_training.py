"""start_from: codecs that are trained further, and what cannot be one."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from lhotse import CutSet, Recording
from original_lmspt import RELEASED, state_of
from original_lmspt import TINY as ORIGINAL
from safetensors.torch import load_file, save_file
from tiny_codec_training import TINY as LM_SPT
from tiny_teachers import save_speech_teacher

from codec import Codec, CodecConfig
from codec.__main__ import main as codec_main
from codec.interop.lmspt import config_from_lmspt
from recipes.lib import codec_training
from recipes.lib.codec_training import TrainCodecConfig, check_codec, starting_architecture
from recipes.lib.run import load_config
from recipes.train_codec import main
from tests.codec.training.test_config import WHISPER, train

CONFIGS = ROOT / "recipes" / "configs" / "codec"
RELEASED_FORM = f"--config={CONFIGS / 'lmspt_v2_12.5hz.yaml'}"
# Short of steps, crops and discriminators.
SHORT = [
    "data.seconds=0.6", "data.batch_size=2", "data.num_workers=0", "data.num_validation=0",
    "optim.steps=1", "optim.lr=1e-9", "optim.discriminator_lr=1e-9", "discriminators.periods=[2]",
    "discriminators.band_windows=[128]", "discriminators.width_divisor=64",
]  # fmt: skip


@pytest.fixture
def cuts(tmp_path: Path, write_wav: Callable[..., Path]) -> list[str]:
    """Settings that name a few recordings, and the run's folder."""
    recordings = [
        Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 0.7, seed=seed)).to_cut()
        for seed in range(4)
    ]
    CutSet.from_cuts(recordings).to_file(tmp_path / "cuts.jsonl.gz")
    named = [f"{name}={tmp_path / 'cuts.jsonl.gz'}" for name in ("train", "dev")]
    return [*named, f"out={tmp_path / 'run'}"]


def written(folder: Path, content: Any) -> Path:
    """A folder that holds config.json alone."""
    folder.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def architecture(*arguments: str) -> CodecConfig:
    config = load_config(TrainCodecConfig, arguments)
    return starting_architecture(config.codec, config.start_from)


def unchanged(before: Path, after: Path) -> None:
    """The networks, but for a step of next to no length."""
    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    names = [name for name in old if name.startswith(("encoder.", "decoder."))]
    assert names
    assert all(torch.allclose(new[name], old[name], atol=1e-6) for name in names)


def test_a_start_without_auxiliary_decoder_is_refused_before_the_run(tmp_path: Path) -> None:
    codec = Codec(LM_SPT)
    codec.without_auxiliary().save_pretrained(tmp_path / "shipped")
    given = [f"start_from={tmp_path / 'shipped'}", f"out={tmp_path / 'run'}"]
    with pytest.raises(ValueError, match=r"still has it, set resynthesis\.decoder to main"):
        main([*given, *WHISPER])
    with pytest.raises(ValueError, match="no such folder"):
        main(["start_from=../none", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_trained_codec_is_trained_further(
    cuts: list[str], tmp_path: Path, tiny_codec_folder: Path, launch: Callable[..., Any]
) -> None:
    train(launch, *cuts, *SHORT, "losses.weights.adversarial=0", f"start_from={tiny_codec_folder}")
    after = tmp_path / "run" / "codec"
    unchanged(tiny_codec_folder, after)
    counts = [
        int(load_file(folder / "model.safetensors")["quantizer.codebooks.0.num_updates"])
        for folder in (tiny_codec_folder, after)
    ]
    assert counts[1] == counts[0] + 1


DAMAGED = '{"family": "spec'


@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (
            {"model_type": "mimi", "audio_channels": 1},
            r"NAME/config\.json: is a model of transformers \(mimi\): load_codec uses it",
        ),
        ({"familie": "lmspt"}, r"NAME/config\.json: config: unknown key 'familie'"),
        ({"family": "none"}, r"NAME/config\.json: config\.family: 'none' is not"),
        (DAMAGED, r"DIR/config\.json: corrupted file \(not a JSON object\); copy it again"),
        ("[1]", r"DIR/config\.json: corrupted file \(not a JSON object\); copy it again"),
    ],
)
def test_what_is_no_codec_of_ours_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, shown: str, from_hub: bool
) -> None:
    folder, name = written(tmp_path / "started", content), "some/codec"
    file = str(folder / "config.json")
    monkeypatch.setattr(codec_training, "hf_hub_download", lambda *_: file if from_hub else None)
    name = name if from_hub else str(folder)
    shown = shown.replace("NAME", re.escape(name)).replace("DIR", re.escape(str(folder)))
    with pytest.raises(ValueError, match=f"^start_from {shown}"):
        main([f"start_from={name}", f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_name_in_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(codec_training, "hf_hub_download", None)  # Calling it fails.
    (tmp_path / "models" / "empty").mkdir(parents=True)
    shown = r"^start_from models/none: no such folder; give a hub id .* \(models is a folder here"
    with pytest.raises(ValueError, match=shown):
        architecture("start_from=models/none")
    with pytest.raises(ValueError, match=r"^start_from models/empty: no config\.json there"):
        architecture("start_from=models/empty")


def test_the_guides_command_trains_what_is_published(tmp_path: Path) -> None:
    """The import spells out what the file leaves to other keys; that is no difference."""
    guide = (ROOT / "docs" / "coming_from.md").read_text()
    section = guide.split("## LM-SPT")[1].split("\n##")[0]
    command = re.search(r"recipes/train_codec\.py (--config \S+ start_from=DIR)$", section, re.M)
    assert command is not None
    published = config_from_lmspt(RELEASED)
    folder = written(tmp_path / "published", asdict(published))
    given = command[1].replace("DIR", str(folder)).replace("recipes/", f"{ROOT}/recipes/").split()
    config = load_config(TrainCodecConfig, given)
    assert config.codec != published
    assert starting_architecture(config.codec, config.start_from) == published
    check_codec(published, config.losses, config.resynthesis, config.start_from)


def test_another_architecture_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    published = config_from_lmspt(RELEASED)
    folder = written(tmp_path / "published", asdict(published))
    given = [RELEASED_FORM, f"start_from={folder}"]
    shown = (
        f"^start_from {folder} has another architecture than the keys of codec: "
        r"codec\.quantizer\.dropout is 0\.25 here, 0\.5 there; remove these keys, or set"
    )
    with pytest.raises(ValueError, match=shown):
        main([*given, "codec.quantizer.dropout=0.25", f"out={tmp_path / 'run'}"])
    small = ["width=16", "semantic_width=8", "decoder_strides=[8,2,6,5,4]", "kernel_size=5"]
    with pytest.raises(ValueError, match=r"codec\.lmspt\.conv\.width is 16 here, 32.*and 1 more"):
        architecture(*given, *(f"codec.lmspt.conv.{each}" for each in small))
    auxiliary = replace(published.lmspt.auxiliary, kind="none")
    shipped = replace(published, lmspt=replace(published.lmspt, auxiliary=auxiliary))
    given[1] = f"start_from={written(tmp_path / 'shipped', asdict(shipped))}"
    with pytest.raises(ValueError, match=r"auxiliary\.kind is conv here, none there"):
        architecture(*given)
    assert not (tmp_path / "run").exists()


def test_what_was_imported_is_trained_further_with_its_configuration(
    tmp_path: Path, cuts: list[str], launch: Callable[..., Any]
) -> None:
    """The guide's commands, with a miniature of the released form and of Whisper."""
    started = tmp_path / "started"
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(ORIGINAL))
    save_file(state_of(ORIGINAL), tmp_path / "theirs.safetensors")
    files = [str(tmp_path / f"theirs.{suffix}") for suffix in ("yaml", "safetensors")]
    codec_main(["import", "lmspt", *files, str(started)])
    codec = {
        "sample_rate": 8000,
        "lmspt": {
            "dimension": 8,
            "conv": {"width": 2, "strides": [2, 3], "decoder_width": 12},
            "auxiliary": {"sample_rate": 4000, "width": 4, "strides": [3]},
        },
        "quantizer": {"num_codebooks": 3, "codebook_sizes": [16] * 3, "codebook_dimension": 4},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"codec": codec}))
    whisper = f"resynthesis.model={save_speech_teacher(tmp_path / 'whisper', 'whisper')}"
    scales = "losses.mel_scales=[{window: 256, hop: 64, num_mels: 20}]"
    train(
        launch,
        *(RELEASED_FORM, f"--config={tmp_path / 'tiny.yaml'}", f"start_from={started}"),
        *(*cuts, *SHORT, whisper, "resynthesis.bfloat16=false", scales),
    )
    unchanged(started, tmp_path / "run" / "codec")

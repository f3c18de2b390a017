"""recipes/tts.py and recipes/asr.py as people start them; killed under DeepSpeed as well."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, voiced
from forking import ForkedRun
from tiny_slm import SMALL, quiet, save_shard, voice_inputs

from codec.training.run import leaves, resolved
from recipes.asr import ASRConfig
from recipes.asr import main as asr
from recipes.export_tokens import ExportConfig
from recipes.lib.codec_training import TrainCodecConfig
from recipes.lib.run import load_config
from recipes.tools.overfit_check import main as overfit_check
from recipes.tts import TTSConfig
from recipes.tts import main as tts
from slm.data.prompts import Prompt
from slm.voice import Voice

pytestmark = quiet()

CONFIGS = ROOT / "recipes" / "configs"
FILES = ("ar/adapter_model.safetensors", "nar/model.safetensors")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> list[str]:
    return voice_inputs(tmp_path_factory.mktemp("inputs"), tiny_codec_folder)


@pytest.mark.parametrize("path", sorted((CONFIGS / "tts").glob("*.yaml")), ids=lambda p: p.name)
def test_every_tts_config_is_read(path: Path) -> None:
    config = load_config(TTSConfig, ["--config", str(path)])
    if path.name == "paper.yaml":
        sizes = (config.nar.num_layers, config.nar.num_heads, config.nar.width)
        assert (*sizes, config.nar.feedforward) == (12, 16, 1024, 4096)


@pytest.mark.parametrize(("kind", "cls"), [("tts", TTSConfig), ("asr", ASRConfig)])
def test_presets_of_tokenizers_differ_in_the_tokens_alone(kind: str, cls: type) -> None:
    """Each is of the codec's and the export's preset of its name; the LLM and the steps are
    LM-SPT's (2506.16738, section 4.1)."""
    codecs = {
        "speechtokenizer": "speechtokenizer", "dmcodec": "dmcodec_lm_sm", "lmspt": "lmspt_25hz",
        "lmspt_12.5hz": "lmspt_12.5hz",
    }  # fmt: skip
    first = None
    for name in [*codecs, "valle"][: 5 if kind == "tts" else 4]:
        config = load_config(cls, ["--config", str(CONFIGS / kind / f"{name}.yaml")])
        export = load_config(ExportConfig, ["--config", str(CONFIGS / "export" / f"{name}.yaml")])
        assert (config.codec, config.train) == (export.codec, str(export.out))
        assert config.dev == str(export.out.parent / "dev")
        if name in codecs:
            file = CONFIGS / "codec" / f"{codecs[name]}.yaml"
            codec = load_config(TrainCodecConfig, ["--config", str(file)])
            assert export.codec == f"{codec.out}/codec"
            rate = codec.codec.sample_rate / codec.codec.hop_length
            assert kind == "asr" or config.nar.prompt_frames == int(3 * rate)
        assert (config.ar.base, config.optim.steps) == ("Qwen/Qwen2.5-0.5B-Instruct", 10_000)
        tokens = {"out", "codec", "train", "dev", "nar.prompt_frames"}
        rest = {key: value for key, value in leaves(resolved(config)) if key not in tokens}
        first = first or rest
        assert rest == first


@pytest.mark.parametrize("path", sorted((CONFIGS / "asr").glob("*.yaml")), ids=lambda p: p.name)
def test_every_asr_config_is_read(path: Path) -> None:
    assert load_config(ASRConfig, ["--config", str(path)]).ar.tasks.tts == 0


def test_one_process_trains_speaks_and_scores(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    small = [
        *(*inputs, *SMALL, "tts_eval.num_items=3", "tts_eval.prompt_seconds=0.5"),
        "tts_eval.sampling.frames_per_token=[0.2,1.0]",
    ]
    tts([f"out={out}", *small])
    assert "dev-continuation" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["list"].partition("@")[0] for row in rows} == {
        "dev-asr", "dev-continuation", "dev-cross",
    }  # fmt: skip
    waves = sorted((out / "speak" / "continuation").glob("*.wav"))
    assert len(waves) == 3
    assert soundfile.info(waves[0]).samplerate == 16000
    for stage in ("ar", "nar"):
        lines = [json.loads(s) for s in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert any("dev/loss" in line for line in lines)
    voice = Voice.from_pretrained(out / "voice")
    assert sorted(voice.prompts) == ["dev-1", "dev-2", "dev-3"]
    assert "speaker s0" in voice.prompts["dev-1"].credit + voice.prompts["dev-2"].credit
    assert voice.prepare("the dog", voice.prompts["dev-2"]).prompt.codes.shape[0] == 3
    prompt = Prompt(codes=np.zeros((3, 10), np.int64), text="a cat")
    assert voice.tts("the dog", prompt).codes.shape[0] == 3
    assert isinstance(voice.asr([voiced(0.5)])[0], str)
    capsys.readouterr()
    overfit_check([f"voice={out / 'voice'}", inputs[2].replace("train=", "tokens=")])
    result = json.loads(capsys.readouterr().out)
    # What the shares count, tests/test_speak.py checks; here they must be a number of real items.
    assert result.keys() == {"items", "ar_share", "nar_share", "asr_wer"}
    assert all(math.isfinite(value) for value in result.values())
    # Started again it has nothing to do but speak.
    before = [(out / "voice" / name).read_bytes() for name in FILES]
    tts([f"out={out}", *small])
    assert [(out / "voice" / name).read_bytes() for name in FILES] == before


def test_asr_says_its_dev_wer(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = [key for key in SMALL if not key.startswith("nar")]
    asr([f"out={tmp_path / 'run'}", *inputs, *small, "num_asr_items=2"])
    assert "dev-asr" in capsys.readouterr().out
    rows = [json.loads(s) for s in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert any(row["metric"] == "asr_wer" and row["utterance"] is None for row in rows)
    assert Voice.from_pretrained(tmp_path / "run" / "voice").nar is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("codec=/no/codec", "/no/codec"),
        ("train=nowhere.parquet", "nowhere.parquet"),
        ("ar.base=/no/llm", "/no/llm"),
        ("ar.num_layers=9", "ar.num_layers"),
        ("ar.lora.rank=0", "lora.rank must be positive"),
        ("nar.codebook_sizes=[4,4]", "nar.codebook_sizes"),
        ("batch.positions=3", "minimum of batch.positions"),
        ("optim.lr=fast", "lr"),
    ],
)
def test_what_people_get_wrong(
    inputs: list[str], tmp_path: Path, override: str, message: str
) -> None:
    steps = ["optim.steps=0", "nar_optim.steps=0"]
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        tts([f"out={tmp_path / 'run'}", *inputs, *SMALL, *steps, override])


@pytest.mark.parametrize("stage", ["ar", "nar"])
def test_a_training_that_diverges_ships_no_voice(
    stage: str, inputs: list[str], tmp_path: Path
) -> None:
    out, optim = tmp_path / "run", {"ar": "optim", "nar": "nar_optim"}[stage]
    absurd = [f"{optim}.lr=1e30", f"{optim}.clip_norm=0", f"{optim}.warmup_steps=1"]
    with pytest.raises(ValueError, match="the training diverged before step 6"):
        tts([f"out={out}", *inputs, *SMALL, *absurd])
    assert not (out / "voice" / stage).exists()
    assert not (out / "voice" / "README.md").exists()
    for line in (out / stage / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_tokens_of_another_codec_are_refused(inputs: list[str], tmp_path: Path) -> None:
    other = save_shard(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet.*codec"):
        tts([f"out={tmp_path / 'run'}", *inputs, *SMALL, f"train={other}"])


def logged(stage: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if "_per_s" not in key} for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("zero", "stage"), [(2, "nar"), (3, "ar")])
def test_killed_under_deepspeed_it_ends_with_the_very_same_weights(
    zero: int,
    stage: str,
    inputs: list[str],
    tmp_path: Path,
    start: Callable[..., ForkedRun],
) -> None:
    """ZeRO-3 for the AR, whose adapters and embedding rows it gathers; ZeRO-2 for the NAR."""

    def train(out: Path) -> ForkedRun:
        script, more = ROOT / "recipes" / "tts.py", (*SMALL, "tts_eval.num_items=0")
        return start(f"zero{zero}", script, f"out={out}", *inputs, *more)

    first = train(tmp_path / "whole").wait()
    assert first.returncode == 0, first.stderr[-3000:]
    engine = f"DeepSpeedEngine, ZeRO stage {zero}, world size 2"
    assert first.stderr.count(engine) == 2, first.stderr  # one for the AR, one for the NAR
    out = tmp_path / "killed"
    train(out).kill_when((out / stage / "checkpoints" / "step-00000002").exists)
    assert not (out / "voice" / stage).exists()
    last = train(out).wait()
    assert last.returncode == 0, last.stderr[-3000:]
    assert "resuming from" in last.stderr
    for name in FILES:
        whole, resumed = (folder / "voice" / name for folder in (tmp_path / "whole", out))
        assert whole.read_bytes() == resumed.read_bytes(), name
    # Losses and learning rates of every step, each written once.
    whole, resumed = (logged(folder / stage) for folder in (tmp_path / "whole", out))
    assert whole == resumed

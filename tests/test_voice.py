"""recipes/voice.py: any mixture of tasks, plain texts, and tokens of any codec."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import voiced
from tiny_baselines import save_baseline
from tiny_lmspt import SPECTRAL, made
from tiny_slm import quiet, save_base, save_shard

from codec import Codec, CodecConfig, load_codec
from codec.config import QuantizerConfig, SEANetConfig
from recipes.asr import main as asr
from recipes.tts import main as tts
from recipes.voice import VoiceConfig, read
from slm.pipeline import Voice

pytestmark = [
    *quiet(),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

STEP = [
    "batch.positions=400", "nar_batch.positions=400", "ar.lora.rank=2",
    "nar.num_layers=1", "nar.num_heads=2", "nar.width=16", "nar.feedforward=16",
    *(f"{optim}.{key}" for optim in ("optim", "nar_optim")
      for key in ("steps=1", "eval_batches=1", "log_every=1")),
    "speak.num_items=1", "speak.prompt_seconds=0.2", "speak.sampling.tries=1",
    "speak.sampling.frames_per_token=[0.1,0.3]", "speak.sampling.spare_seconds=0.1",
]  # fmt: skip
BASELINES = ("encodec", "dac", "mimi")
# SpeechTokenizer's and DM-Codec's architecture differs in its sizes alone.
SEANET = {
    "speechtokenizer": QuantizerConfig(num_codebooks=4, codebook_size=32),
    "dmcodec": QuantizerConfig(num_codebooks=2, codebook_size=16),
}


def save_codec(folder: Path, kind: str) -> Path:
    """A tiny codec of a published kind."""
    if kind in BASELINES:
        return save_baseline(folder, kind)
    if kind == "lmspt":
        made(SPECTRAL).save_pretrained(folder)
        return folder
    torch.manual_seed(0)
    seanet = SEANetConfig(num_filters=2, dimension=8, strides=(8, 5, 4, 2))
    codec = Codec(CodecConfig(family="seanet", seanet=seanet, quantizer=SEANET[kind]))
    codec.train()(torch.from_numpy(voiced(2.0))[None, None])
    codec.eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("kind", [*BASELINES, *SEANET, "lmspt"])
def test_a_voice_of_any_codec_speaks(kind: str, base: Path, tmp_path: Path) -> None:
    codec = load_codec(save_codec(tmp_path / "codec", kind))
    shard = save_shard(tmp_path / "tokens.parquet", 6, codec.stamp)
    tts([
        f"out={tmp_path / 'run'}", f"ar.base={base}", f"codec={tmp_path / 'codec'}",
        f"train={shard}", f"dev={shard}", "ar.tasks.asr=0", *STEP,
    ])  # fmt: skip
    (wave,) = (tmp_path / "run" / "speak" / "cross").glob("*.wav")
    assert soundfile.info(wave).samplerate == codec.sample_rate
    (line,) = (json.loads(s) for s in results(tmp_path / "run") if '"list": "cross"' in s)
    assert line["speaker"] in ("s0", "s1")
    assert line["prompt_seconds"] > 0


def results(folder: Path) -> list[str]:
    return (folder / "speak" / "results.jsonl").read_text().splitlines()


def test_text_is_mixed_in_and_its_perplexity_told(
    base: Path, tmp_path: Path, tiny_codec_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    shard = save_shard(tmp_path / "tokens.parquet", 6, load_codec(tiny_codec_folder).stamp)
    (tmp_path / "train.txt").write_text("the cat sat on a mat\n\na red hen ran away\n")
    (tmp_path / "dev.txt").write_text("the dog ran far away from the sun\n")
    given = [
        f"ar.base={base}", f"codec={tiny_codec_folder}", f"train={shard}", f"dev={shard}",
        f"texts={tmp_path / 'train.txt'}", f"texts_dev={tmp_path / 'dev.txt'}",
        *(key for key in STEP if not key.startswith("nar")), "num_items=1",
    ]  # fmt: skip
    out = tmp_path / "run"
    asr([f"out={out}", *given, "ar.tasks.text=0.5", "ar.tasks.continuation=0.5"])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    told = {row["system"]: row for row in rows if row["metric"] == "perplexity"}
    assert set(told) == {"base", "slm"}
    assert told["base"]["value"] > 1
    assert told["slm"]["list"] == told["base"]["list"]
    assert "torch" in told["slm"]["library"]
    lines = [json.loads(s) for s in (out / "ar" / "metrics.jsonl").read_text().splitlines()]
    assert any("dev/text_loss" in line for line in lines)
    assert json.loads((out / "ar" / "seen.json").read_text())["hours_per_step"] > 0
    assert not (out / "nar").exists()
    voice = Voice.from_pretrained(out / "voice")
    assert voice.lm.origin["tasks"]["text"] == 0.5
    assert "perplexity" in capsys.readouterr().out


def test_texts_without_a_weight_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("A held-out text.")
    config = VoiceConfig(texts=str(tmp_path / "missing.txt"), texts_dev=str(tmp_path / "a.txt"))
    assert read(config) == ([], ["A held-out text."])
    assert "missing.txt is not used: ar.tasks.text is 0" in caplog.text


def test_what_people_get_wrong(base: Path) -> None:
    with pytest.raises(ValueError, match=r"ar\.tasks\.text needs texts"):
        tts([f"ar.base={base}", "ar.tasks.text=1"])
    with pytest.raises(ValueError, match="num_items must not be negative"):
        asr(["num_items=-1"])

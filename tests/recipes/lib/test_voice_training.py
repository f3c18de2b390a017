"""recipes/lib/voice_training.py: any mixture of tasks, plain texts, and tokens of any codec."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import voiced
from tiny_baselines import save_baseline
from tiny_lmspt import SPECTRAL, made
from tiny_slm import make_rows, quiet, save_base, save_shard

from codec import Codec, CodecConfig, load_codec
from codec.config import QuantizerConfig, SEANetConfig
from codec.tokens import TokenShard, write_shard
from recipes.asr import main as asr
from recipes.lib.voice_training import VoiceConfig, open_tokens, read
from recipes.scoring.synthesis import TTSEvalConfig
from recipes.scoring.voice import check_scores
from recipes.tts import main as tts
from slm.config import ARConfig, TaskConfig
from slm.data.interleaving import write_word_boundaries
from slm.models.ar import Letters
from slm.models.nar import NAR
from slm.voice import Voice

pytestmark = [
    *quiet(),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

STEP = [
    "batch.positions=400", "nar_batch.positions=400", "ar.lora.rank=2",
    "nar.num_layers=1", "nar.num_heads=2", "nar.width=16", "nar.feedforward=16",
    *(f"{optim}.{key}" for optim in ("optim", "nar_optim")
      for key in ("steps=1", "eval_batches=1", "log_every=1")),
    "tts_eval.num_items=1", "tts_eval.prompt_seconds=0.2", "tts_eval.sampling.max_attempts=1",
    "tts_eval.sampling.frames_per_token=[0.1,0.3]", "tts_eval.sampling.spare_seconds=0.1",
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


@pytest.mark.parametrize("kind", ["encodec", "lmspt"])
def test_a_nar_begins_with_the_codecs_entries(kind: str, base: Path, tmp_path: Path) -> None:
    codec = load_codec(save_codec(tmp_path / "codec", kind))
    shard = save_shard(tmp_path / "tokens.parquet", 6, codec.stamp)
    given = [
        f"out={tmp_path / 'run'}", f"ar.base={base}", f"codec={tmp_path / 'codec'}",
        f"train={shard}", "dev=null", "tts_eval.num_items=0", "nar.from_codec=true",
        # Steps that change nothing.
        *(key for key in STEP if key != "tts_eval.num_items=1"), "nar_optim.lr=1e-12",
        "nar_optim.weight_decay=0.0",
    ]  # fmt: skip
    if kind == "encodec":
        with pytest.raises(ValueError, match="has no codebook entries"):
            tts(given)
        assert not (tmp_path / "run").exists()
        return
    tts(given)
    entries = codec.entries()
    assert entries is not None
    nar = NAR.load(tmp_path / "run" / "voice" / "nar")
    expected = NAR(nar.config)
    expected.init_from_codec(entries, seed=0)
    torch.testing.assert_close(nar.codes.weight, expected.codes.weight.detach())
    torch.testing.assert_close(nar.head.weight, expected.head.weight.detach())


@pytest.mark.parametrize("kind", ["mimi", *SEANET, "lmspt"])
def test_a_voice_of_any_codec_speaks(kind: str, base: Path, tmp_path: Path) -> None:
    codec = load_codec(save_codec(tmp_path / "codec", kind))
    shard = save_shard(tmp_path / "tokens.parquet", 6, codec.stamp)
    tts([
        f"out={tmp_path / 'run'}", f"ar.base={base}", f"codec={tmp_path / 'codec'}",
        f"train={shard}", f"dev={shard}", "ar.tasks.asr=0", *STEP,
        "tts_eval.prompt_seconds=0.05",  # With LM-SPT's frame rate utterances have 0.4 s.
    ])  # fmt: skip
    (wave,) = (tmp_path / "run" / "speak" / "cross").glob("*.wav")
    assert soundfile.info(wave).samplerate == codec.sample_rate
    (line,) = (json.loads(s) for s in results(tmp_path / "run") if '"list": "cross"' in s)
    assert line["speaker"] in ("s0", "s1")
    assert line["prompt_seconds"] > 0


def test_the_ar_learns_from_clips_and_letters_as_well_and_the_nar_does_not(
    base: Path, tmp_path: Path, tiny_codec_folder: Path
) -> None:
    stamp = load_codec(tiny_codec_folder).stamp
    rows = make_rows(9, sizes=stamp.codebook_sizes)
    write_shard(tmp_path / "tokens.parquet", rows[:6], stamp)
    write_shard(tmp_path / "clips" / "clips.parquet", rows[6:], stamp)
    Letters("at", np.full((stamp.codebook_sizes[0], 3), 0.5)).save(tmp_path / "letters.json")
    out = tmp_path / "run"
    tts([
        f"out={out}", f"ar.base={base}", f"codec={tiny_codec_folder}",
        f"train={tmp_path / 'tokens.parquet'}", f"dev={tmp_path / 'tokens.parquet'}",
        f"clips={tmp_path / 'clips'}", f"ar.letter_init={tmp_path / 'letters.json'}", *STEP,
    ])  # fmt: skip
    # Hours a step are those of the first epoch over a whole number of steps; the AR's is of clips,
    # each in two tasks.
    for stage, part, tasks in (("ar", rows[6:], 2), ("nar", rows[:6], 1)):
        lines = (out / stage / "metrics.jsonl").read_text().splitlines()
        last = [each for each in map(json.loads, lines) if "train/hours" in each][-1]
        per_step = last["train/hours"] / last["step"]
        steps = tasks * sum(row.num_frames for row in part) / 25 / 3600 / per_step
        assert steps == pytest.approx(round(steps), abs=1e-6)


def test_a_voice_that_goes_word_by_word(
    base: Path, tmp_path: Path, tiny_codec_folder: Path
) -> None:
    shard = save_shard(tmp_path / "tokens.parquet", 6, load_codec(tiny_codec_folder).stamp)
    rows = TokenShard.open(shard)
    write_word_boundaries(
        tmp_path / "e.jsonl.gz", [(row.id, [0, 3, 8, row.num_frames]) for row in rows]
    )
    given = [
        f"out={tmp_path / 'run'}", f"ar.base={base}", f"codec={tiny_codec_folder}",
        f"train={shard}", f"dev={shard}", "ar.text.interleaved=true",
    ]  # fmt: skip
    for wrong in (
        [],
        [f"word_boundaries=[{tmp_path / 'e.jsonl.gz'}]", "ar.text.interleaved=false"],
    ):
        with pytest.raises(ValueError, match="interleaved and word_boundaries belong together"):
            tts([*given, *wrong])
    tts([*given, f"word_boundaries=[{tmp_path / 'e.jsonl.gz'}]", *STEP])
    voice = Voice.from_pretrained(tmp_path / "run" / "voice")
    assert voice.lm.tokenizer.text.interleaved
    utterance = voice.prepare("the cat sat", next(iter(voice.prompts.values())))
    assert len(utterance.forced.parts) == 2
    for listed in ("cross", "continuation"):
        assert list((tmp_path / "run" / "speak" / listed).glob("*.wav"))


def test_clips_that_cannot_be_used_are_told_before_the_run(
    base: Path, tmp_path: Path, tiny_codec_folder: Path
) -> None:
    stamp = load_codec(tiny_codec_folder).stamp
    shard = save_shard(tmp_path / "tokens.parquet", 3, stamp)
    other = save_shard(tmp_path / "other.parquet", 3, replace(stamp, digest="f" * 16))
    out = tmp_path / "run"
    given = [f"out={out}", f"ar.base={base}", f"codec={tiny_codec_folder}", f"train={shard}",
             f"dev={shard}"]  # fmt: skip
    for clips, reported in (
        (other, "only one codec's shards go together"),
        (tmp_path / "none", "no such token shard"),
    ):
        with pytest.raises(ValueError, match=reported):
            tts([*given, f"clips={clips}"])
    with pytest.raises(ValueError, match="limit is for utterances"):
        tts([*given, f"clips={shard}", "limit=2"])
    with pytest.raises(ValueError, match="clip_epochs must be 0 or more"):
        tts([*given, "clip_epochs=-1"])
    assert not out.exists()


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
        *(key for key in STEP if not key.startswith("nar")), "num_asr_items=1",
    ]  # fmt: skip
    out = tmp_path / "run"
    asr([f"out={out}", *given, "ar.tasks.text=0.5", "ar.tasks.continuation=0.5"])
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    reported = {row["system"]: row for row in rows if row["metric"] == "perplexity"}
    assert set(reported) == {"base", "slm"}
    assert reported["base"]["value"] > 1
    assert reported["slm"]["list"] == reported["base"]["list"]
    assert "torch" in reported["slm"]["library"]
    # The rows of speech take their share of the probability.
    for system in ("base", "slm"):
        (whole,) = (
            row["value"] for row in rows
            if (row["metric"], row["system"]) == ("perplexity_all", system)
        )  # fmt: skip
        assert whole > reported[system]["value"]
    lines = [json.loads(s) for s in (out / "ar" / "metrics.jsonl").read_text().splitlines()]
    assert any("dev/text_loss" in line for line in lines)
    assert [line["train/hours"] for line in lines if "train/hours" in line][-1] > 0
    assert not (out / "nar").exists()
    voice = Voice.from_pretrained(out / "voice")
    assert voice.lm.origin["tasks"]["text"] == 0.5
    assert "perplexity" in capsys.readouterr().out


def test_a_voice_without_texts_goes_on_and_is_scored(
    base: Path, tmp_path: Path, tiny_codec_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = save_shard(tmp_path / "tokens.parquet", 6, load_codec(tiny_codec_folder).stamp)
    out = tmp_path / "run"
    tts([
        f"out={out}", f"ar.base={base}", f"codec={tiny_codec_folder}", f"train={shard}",
        f"dev={shard}", "ar.tasks.tts=0", "ar.tasks.asr=0", "ar.tasks.continuation=1", *STEP,
        "tts_eval.num_items=2", "tts_eval.sampling.checks=[]",
    ])  # fmt: skip
    assert "nar.text_dropout=0.1 is a good share" in caplog.text
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    whole = {(row["system"], row["metric"]): row for row in rows if row["utterance"] is None}
    assert whole.keys() == {
        (system, metric) for system in ("slm", "codec") for metric in ("failure", "seconds")
    }  # fmt: skip
    assert whole["slm", "failure"]["list"].startswith("dev-textless@")
    longest = max(r["value"] for r in rows if (r["system"], r["metric"]) == ("codec", "seconds"))
    lines = [json.loads(line) for line in results(out)]
    assert [line["list"] for line in lines] == ["textless"] * 2
    for line in lines:
        assert line["wer"] is None
        assert 0 < line["seconds"] <= longest
        heard = soundfile.info(out / "speak" / "textless" / line["audio"]).duration
        assert heard == pytest.approx(line["prompt_seconds"] + line["seconds"], abs=1e-3)


def test_a_finished_voice_is_scored_anew_with_other_settings(
    base: Path, tmp_path: Path, tiny_codec_folder: Path
) -> None:
    shard = save_shard(tmp_path / "tokens.parquet", 6, load_codec(tiny_codec_folder).stamp)
    out = tmp_path / "run"
    given = [
        f"out={out}", f"ar.base={base}", f"codec={tiny_codec_folder}", f"train={shard}",
        f"dev={shard}", *STEP,
    ]  # fmt: skip
    tts(given)

    def trained() -> dict[str, bytes]:
        paths = [
            *out.glob("*/metrics.jsonl"), *out.rglob("*.safetensors"), *out.rglob("whole.json"),
        ]  # fmt: skip
        return {str(path): path.read_bytes() for path in paths if path.parent.name != "speak"}

    before = trained()
    assert len(before) > 4
    tts([*given, "tts_eval.num_items=2", "num_asr_items=3", "tts_eval.sampling.temperature=0.5"])
    assert trained() == before
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    numbers = {row["list"].partition("@")[0]: row["n"] for row in rows if row["utterance"] is None}
    assert numbers == {"dev-asr": 3, "dev-continuation": 2, "dev-cross": 2}
    assert "temperature: 0.5" in (out / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"another configuration: optim\.lr"):
        tts([*given, "optim.lr=0.5"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("tts_eval.sampling.num_candidates=2 ar.tasks.asr=0", "own ASR reranks"),
        ("tts_eval.judge=/no/judge", "/no/judge: no such folder; `make models`"),
        ("tts_eval.speaker=/no/encoder", "/no/encoder: no such folder; `make models`"),
        ("tts_eval.sexes=/no/sexes.json", "/no/sexes.json: cannot be read"),
        ("tts_eval.aligner=/no/aligner", "/no/aligner"),
    ],
)
def test_scores_that_cannot_be_had_are_told_before_training(
    base: Path, tmp_path: Path, tiny_codec_folder: Path, settings: str, message: str
) -> None:
    shard = save_shard(tmp_path / "tokens.parquet", 6, load_codec(tiny_codec_folder).stamp)
    given = [f"ar.base={base}", f"codec={tiny_codec_folder}", f"train={shard}", f"dev={shard}"]
    with pytest.raises(ValueError, match=message):
        tts([f"out={tmp_path / 'run'}", *given, *STEP, *settings.split()])
    assert not (tmp_path / "run").exists()


def test_wrong_sexes_are_reported_before_training(tmp_path: Path, tiny_codec_folder: Path) -> None:
    stamp = load_codec(tiny_codec_folder).stamp
    shard = TokenShard.open(save_shard(tmp_path / "tokens.parquet", 6, stamp))
    (tmp_path / "sexes.json").write_text('{"nobody": "f"}')
    speak = TTSEvalConfig(sexes=str(tmp_path / "sexes.json"))
    with pytest.raises(ValueError, match="has no speaker of"):
        check_scores(VoiceConfig(tts_eval=speak), shard, shard)
    # Where nothing is spoken nobody asks.
    check_scores(VoiceConfig(tts_eval=speak, ar=ARConfig(tasks=TaskConfig(tts=0.0))), shard, shard)
    check_scores(VoiceConfig(tts_eval=speak), shard, None)


def test_only_the_rank_that_scores_tries_its_gpu(
    tmp_path: Path, tiny_codec_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = load_codec(tiny_codec_folder).stamp
    shard = TokenShard.open(save_shard(tmp_path / "tokens.parquet", 6, stamp))
    devices = []
    monkeypatch.setattr(
        "recipes.scoring.voice.load_judges", lambda *_, device, **__: devices.append(device)
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        check_scores(VoiceConfig(), shard, shard)
    assert devices == ["auto", "cpu"]


def test_texts_without_a_weight_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("A held-out text.")
    config = VoiceConfig(texts=str(tmp_path / "missing.txt"), texts_dev=str(tmp_path / "a.txt"))
    assert read(config) == ([], ["A held-out text."])
    assert "missing.txt is not used: ar.tasks.text is 0" in caplog.text


def test_what_people_get_wrong(base: Path) -> None:
    with pytest.raises(ValueError, match=r"ar\.tasks\.text needs texts"):
        tts([f"ar.base={base}", "ar.tasks.text=1"])
    with pytest.raises(ValueError, match="num_asr_items must not be negative"):
        asr(["num_asr_items=-1"])


def test_missing_tokens_or_codecs_name_their_key(tmp_path: Path, tiny_codec_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^codec: out/none/codec/codec: no such folder; give a"):
        open_tokens(VoiceConfig(codec="out/none/codec/codec", train="tokens"))
    config = VoiceConfig(codec=str(tiny_codec_folder), train=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"^train: .*none"):
        open_tokens(config)

"""Training of the semantic codebook, and of the codec around it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from lhotse import CutSet, Recording, SupervisionSegment
from safetensors.torch import load_file
from tiny_semantic import noise
from tiny_teachers import save_speech_teacher

from codec import Codec
from codec.distillation.ctc_reader import CodeRecognizer
from codec.modules.ssl_encoders import WhisperEncoder
from codec.tokens import TokenShard, write_shard
from recipes.export_tokens import main as export_tokens
from recipes.train_codec import main as train_codec
from recipes.train_semantic import main as train_semantic

TEXTS = ["Ann had a plan.", "AN APPLE, A PEAR", "Dad's pal", "a lad", "Anna"]


@pytest.fixture
def settings(tmp_path: Path, write_wav: Callable[..., Path]) -> list[str]:
    """Of a miniature run on five recordings; a sixth has a number, a seventh no words."""
    cuts = []
    for seed, text in enumerate([*TEXTS, "room 2", ""]):
        recording = Recording.from_file(write_wav(tmp_path / f"{seed}.wav", 1.2, seed=seed))
        cut = recording.to_cut()
        cut.supervisions = [
            SupervisionSegment(id=cut.id, recording_id=cut.id, start=0, duration=1.2, text=text)
        ]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    given = {
        "train": tmp_path / "cuts.jsonl.gz", "dev": tmp_path / "cuts.jsonl.gz",
        "whisper": save_speech_teacher(tmp_path / "whisper", "whisper"), "codec.lmspt.dimension": 8,
        "codec.spectral.num_mels": 20, "codec.spectral.encoder_width": 16,
        "codec.spectral.encoder_depths": "[1,1,1]", "codec.spectral.decoder_width": 16,
        "codec.spectral.decoder_depths": "[1,1,1]", "codec.quantizer.num_codebooks": 2,
        "codec.quantizer.codebook_size": 16, "codec.lmspt.auxiliary.kind": "none",
        "codec.lmspt.whisper.adapter_width": 8, "codec.lmspt.semantic_subtraction":
        "false",
        "batch.positions": 70, "optim.steps": 6, "optim.save_every": 3, "optim.eval_every": 6,
        "optim.log_every": 1, "optim.warmup_steps": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def test_both_stages_end_to_end_and_the_semantic_half_stays(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, caplog
) -> None:
    train_semantic([*settings, f"out={tmp_path / 'semantic'}"])
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["codec"] == str(tmp_path / "semantic" / "codec")
    reader, codec = (
        CodeRecognizer.load(shown["reader"]),
        Codec.from_pretrained(shown["codec"]),
    )
    assert torch.equal(reader.entries, codec.entries()[0])
    assert isinstance(reader.transcribe(codec.encode(noise(1, 1, 9_000)).codes[0, 0].numpy()), str)
    assert shown["dev_cer"] > 0
    assert 0 < shown["entries_used"] <= 1
    assert "2 recordings left out, without a transcript in letters: 5, 6" in caplog.text
    lists = [each for each in settings if each.startswith(("train=", "dev="))]
    train_codec([
        *lists, f"out={tmp_path / 'codec'}", f"start_from={shown['codec']}", "freeze_semantic=true",
        "data.seconds=0.6", "data.batch_size=2", "optim.steps=3", "data.num_validation=1",
    ])  # fmt: skip
    before, after = (
        load_file(tmp_path / stage / "codec" / "model.safetensors")
        for stage in ("semantic", "codec")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        stays = name.startswith(("encoder.semantic.", "quantizer.semantic."))
        assert torch.equal(tensor, after[name]) == stays or not tensor.any(), name
    first, last = (
        Codec.from_pretrained(tmp_path / stage / "codec") for stage in ("semantic", "codec")
    )
    wave = noise(1, 1, 9_000)
    assert torch.equal(first.encode(wave).codes[:, 0], last.encode(wave).codes[:, 0])


def test_codes_of_whole_recordings_stand_in_for_the_semantic_encoder(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_semantic([*settings, f"out={tmp_path / 'semantic'}"])
    codec = f"{tmp_path / 'semantic' / 'codec'}"
    cuts = f"{tmp_path / 'cuts.jsonl.gz'}"
    export_tokens([f"cuts={cuts}", f"codec={codec}", f"out={tmp_path / 'tokens'}"])
    given = [
        f"train={cuts}", f"dev={cuts}", f"start_from={codec}", "freeze_semantic=true",
        f"semantic_codes={tmp_path / 'tokens'}", "data.batch_size=2", "optim.steps=2",
        "data.num_validation=0", "losses.weights.stoi=1", "data.seconds=0.6",
        "optim.log_every=1",
    ]  # fmt: skip
    heard = []
    features = WhisperEncoder.features
    monkeypatch.setattr(
        WhisperEncoder, "features", lambda *given: heard.append(1) or features(*given)
    )
    train_codec([*given, f"out={tmp_path / 'codec'}"])
    assert len(heard) == 4  # Of some recordings, to see that the codes are its own; of no crop.
    lines = map(json.loads, (tmp_path / "codec" / "metrics.jsonl").read_text().splitlines())
    assert any("train/stoi" in line for line in lines)
    first, last = (Codec.from_pretrained(tmp_path / run / "codec") for run in ("semantic", "codec"))
    assert torch.equal(first.entries()[0], last.entries()[0])
    assert not torch.equal(first.entries()[1], last.entries()[1])
    with pytest.raises(ValueError, match=r"data\.seconds 0\.5: .* a multiple of 0\.04"):
        train_codec([*given, "data.seconds=0.5", f"out={tmp_path / 'other'}"])
    with pytest.raises(ValueError, match="set freeze_semantic"):
        train_codec([*given, "freeze_semantic=false", f"out={tmp_path / 'other'}"])
    shard = TokenShard.open(tmp_path / "tokens")
    rows = [row._replace(codes=(row.codes + 1) % 16) for row in shard]
    write_shard(tmp_path / "wrong.parquet", rows, shard.stamp)
    write_shard(tmp_path / "few.parquet", list(shard)[:2], shard.stamp)
    for name, shown in (
        ("wrong", "codebook 1 is not that of start_from"),
        ("few", "lacks 5 of 7"),
    ):
        with pytest.raises(ValueError, match=shown):
            train_codec([
                *given, f"semantic_codes={tmp_path / name}.parquet", f"out={tmp_path / 'other'}",
            ])  # fmt: skip


def test_stopped_and_started_again_it_ends_with_the_same_weights(
    settings: list[str], tmp_path: Path
) -> None:
    train_semantic([*settings, f"out={tmp_path / 'once'}"])
    import recipes.train_semantic as recipe

    class Stopped(Exception):
        pass

    steps = recipe.semantic_step

    def stop(*given, **named):
        stop.calls += 1
        if stop.calls == 5:
            raise Stopped
        return steps(*given, **named)

    stop.calls = 0
    recipe.semantic_step = stop
    try:
        with pytest.raises(Stopped):
            train_semantic([*settings, f"out={tmp_path / 'twice'}"])
    finally:
        recipe.semantic_step = steps
    train_semantic([*settings, f"out={tmp_path / 'twice'}"])
    once, twice = (
        load_file(tmp_path / run / "codec" / "model.safetensors") for run in ("once", "twice")
    )
    semantic = [name for name in once if ".semantic." in name]
    assert semantic
    assert all(torch.equal(once[name], twice[name]) for name in semantic)
    readers = [
        CodeRecognizer.load(tmp_path / run / "reader").state_dict() for run in ("once", "twice")
    ]
    assert all(torch.equal(one, two) for one, two in zip(*map(dict.values, readers), strict=True))


def test_a_training_that_diverges_writes_no_codec(settings: list[str], tmp_path: Path) -> None:
    absurd = ["optim.lr=1e30", "optim.clip_norm=0", "optim.max_skipped_steps=1"]
    with pytest.raises(ValueError, match=r"the training diverged before step \d"):
        train_semantic([*settings, *absurd, f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "codec").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_an_unreadable_recording_costs_itself_alone(settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "1.wav").write_bytes(b"")
    alone = ["batch.max_items=1", "optim.steps=12"]
    train_semantic([*settings, *alone, f"out={tmp_path / 'run'}"])
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["1"]
    for seed in range(5):
        (tmp_path / f"{seed}.wav").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the recordings can be read"):
        train_semantic([*settings, *alone, f"out={tmp_path / 'none'}"])


def test_a_transcript_longer_than_its_frames_is_left_out(
    settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = list(CutSet.from_jsonl(tmp_path / "cuts.jsonl.gz"))
    cuts[0].supervisions[0].text = "a" * 31  # 30 frames of 1.2 s are 60 steps, and it needs 61.
    cuts[1].supervisions[0].text = "ab" * 30
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    train_semantic([*settings, f"out={tmp_path / 'run'}"])
    assert "1 recordings left out, needing more than 2 CTC steps a frame: 0" in caplog.text


def test_deepspeed_is_refused_in_words(settings: list[str], monkeypatch) -> None:
    import recipes.train_semantic as recipe

    kind = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    monkeypatch.setattr(recipe, "make_accelerator", lambda *_, **__: kind)
    with pytest.raises(ValueError, match="does not train under DeepSpeed; launch with"):
        train_semantic(settings)


def test_two_ranks_train_one_codebook(settings: list[str], tmp_path: Path, launch) -> None:
    """Ranks hold batches of other sizes, which must not make them wait for each other."""
    script = ROOT / "recipes" / "train_semantic.py"
    done = launch("ddp", script, *settings, f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    codec = Codec.from_pretrained(shown["codec"])
    assert torch.equal(CodeRecognizer.load(shown["reader"]).entries, codec.entries()[0])
    assert codec.quantizer.semantic.codebooks[0].num_updates == 6


def test_a_run_learns_to_read(settings: list[str], tmp_path: Path) -> None:
    longer = ["optim.steps=60", "optim.lr=0.01", "optim.save_every=60", "optim.eval_every=60"]
    train_semantic([*settings, *longer, f"out={tmp_path / 'run'}"])
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/letters_loss"] for line in lines if "train/letters_loss" in line]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["codec.family=spectral"], r"codec\.family must be lmspt"),
        (["batch.packed=70"], r"batch\.packed: recordings are not packed here"),
        (["weights.letters=-1"], r"weights\.letters must be at least 0"),
        (["whisper=../none"], "no such folder"),
        (["batch.positions=5"], "no recording is left"),
        (["codec.quantizer.learning=gradient"], r"codec\.quantizer\.learning"),
    ],
)
def test_settings_that_make_no_sense(
    settings: list[str], tmp_path: Path, given: list[str], shown: str
) -> None:
    with pytest.raises(ValueError, match=shown):
        train_semantic([*settings, *given, f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([], "freeze_semantic without start_from would keep random weights"),
        (["start_from=x", "losses.weights.distill=1", "distill.speech.model=x"], "leaves no"),
    ],
)
def test_freezing_that_makes_no_sense(tmp_path: Path, given: list[str], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        train_codec([f"out={tmp_path / 'run'}", "freeze_semantic=true", *given])

"""The semantic encoder that is Whisper's, and how its codebook is trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from safetensors.torch import load_file
from test_speech_teachers import save
from tiny_semantic import LM_SPT, tiny_semantic

from codec import Codec, load_codec
from codec.reader import BLANK, CodeReader
from codec.semantic import SemanticStudent, Spoken, read, spelling_loss
from codec.teachers import load_speech_teacher
from codec.whisper_encoder import WhisperEncoder, architecture_of, load_whisper
from recipes.train_codec import main as train_codec
from recipes.train_semantic import main as train_semantic

TEXTS = ["Ann had a plan.", "AN APPLE, A PEAR", "Dad's pal", "a lad", "Anna"]


def noise(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_features_are_whispers_those_of_a_frame_side_by_side(tmp_path: Path) -> None:
    codec, whisper = tiny_semantic(tmp_path)
    encoder, wave = codec.encoder.semantic, noise(1, 1, 5 * 640)
    assert isinstance(encoder, WhisperEncoder)
    teacher = load_speech_teacher(whisper, layer="last", half=False)
    values = teacher(wave).values
    features = encoder.features(wave)
    assert features.shape == (1, 2 * teacher.dimension, 5)
    expected = torch.cat([values[0, 0::2], values[0, 1::2]], dim=1)
    torch.testing.assert_close(features[0].T, expected)


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 7 * 640 + 5])
def test_an_item_of_a_padded_batch_gets_the_codes_that_it_gets_alone(
    tmp_path: Path, samples: int
) -> None:
    codec, _ = tiny_semantic(tmp_path)
    wave = noise(2, 1, 9 * 640 + 3)
    alone = codec.encode(wave[:1, :, :samples])
    both = codec.encode(wave, torch.tensor([samples, wave.shape[-1]]))
    count = -(-samples // 640)
    assert alone.codes.shape[-1] == both.lengths[0] == count
    assert torch.equal(both.codes[:1, :, :count], alone.codes)


def test_items_may_all_be_shorter_than_the_batch_is_wide(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    wave = noise(2, 1, 9 * 640)
    both = codec.encode(wave, torch.tensor([5 * 640, 3 * 640]))
    assert both.codes.shape == (2, 3, 9)
    alone = codec.encode(wave[:1, :, : 5 * 640])
    assert torch.equal(both.codes[:1, :, :5], alone.codes)


def test_a_piece_of_a_long_recording_fits_into_whispers_window(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    kept, context = codec._chunk_frames
    assert (kept + 2 * context) / codec.frame_rate <= 30
    wave = noise(1, 1, 47 * 16_000)
    codes = codec.encode(wave).codes
    assert codes.shape == (1, 3, 1175)
    first = codec.encode(wave[..., : (kept + context) * 640]).codes
    assert torch.equal(codes[..., :kept], first[..., :kept])
    assert np.array_equal(codec.encode_stream(wave[0, 0].numpy().reshape(47, -1)), codes[0])


def test_shifts_move_whispers_positions_and_nothing_else(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    encoder, wave = codec.encoder.semantic, noise(2, 1, 10 * 640)
    assert isinstance(encoder, WhisperEncoder)
    lengths = torch.tensor([10 * 640, 29 * 16_000])
    torch.manual_seed(0)
    drawn = []
    for _ in range(200):
        with encoder.shifted(lengths):
            assert encoder.whisper.first is not None
            drawn.append(encoder.whisper.first.tolist())
    low, high = min(one for one, _ in drawn), max(one for one, _ in drawn)
    assert 0 <= low < 200
    assert 1200 < high <= 1500 - 20
    assert max(one for _, one in drawn) <= 50
    assert encoder.whisper.first is None
    plain = encoder.features(wave[:1])
    encoder.whisper.first = torch.tensor([7])
    moved = encoder.features(wave[:1])
    table = encoder.whisper.network.embed_positions.weight
    with torch.no_grad():
        table.copy_(table.roll(-7, dims=0))
    encoder.whisper.first = None
    torch.testing.assert_close(encoder.features(wave[:1]), moved)
    assert not torch.allclose(plain, moved)


def test_codes_are_trained_at_two_places_and_made_at_one(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    torch.manual_seed(1)
    student = SemanticStudent(codec, "ab")
    batch = batch_of(12 * 640, 5 * 640)
    torch.manual_seed(0)
    once, again = student(batch), student(batch)
    assert not torch.equal(once.features, again.features)
    student.eval()
    assert torch.equal(student(batch).features, student(batch).features)


def test_it_is_saved_whole_and_its_whisper_does_not_learn(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    codec.save_pretrained(tmp_path / "codec")
    loaded, wave = load_codec(str(tmp_path / "codec")), noise(1, 1, 6400)
    assert torch.equal(loaded.encode(wave).codes, codec.encode(wave).codes)
    codec.train()(wave).wave.square().sum().backward()
    learning = {name for name, each in codec.named_parameters() if each.requires_grad}
    assert not any("whisper" in name for name in learning)
    assert {"encoder.semantic.embed.weight", "encoder.semantic.project.bias"} <= learning
    assert codec.encoder.semantic.embed.weight.grad.abs().sum() > 0
    assert not any(part.training for part in codec.encoder.semantic.whisper.modules())


def test_another_whisper_is_refused_by_name(tmp_path: Path) -> None:
    codec, whisper = tiny_semantic(tmp_path)
    encoder = codec.encoder.semantic
    assert isinstance(encoder, WhisperEncoder)
    hubert = save(tmp_path / "hubert", "hubert")
    with pytest.raises(ValueError, match="is no Whisper"):
        architecture_of(hubert, LM_SPT)
    other = Codec(replace(codec.config, lmspt=replace(LM_SPT.lmspt, semantic="whisper")))
    assert isinstance(other.encoder.semantic, WhisperEncoder)
    with pytest.raises(ValueError, match=r"of other sizes than codec\.lmspt\.whisper"):
        load_whisper(other.encoder.semantic, whisper)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: replace(c, sample_rate=24_000), "Whisper hears 16000 Hz"),
        (
            lambda c: replace(c, spectral=replace(c.spectral, hop=100, window=400)),
            "frames of 400 samples do not fit",
        ),
        (lambda c: replace(c, lmspt=replace(c.lmspt, shared_encoder=True)), "an encoder apart"),
        (
            lambda c: replace(
                c, lmspt=replace(c.lmspt, whisper=replace(c.lmspt.whisper, num_heads=5))
            ),
            "5 heads cannot share 384 features",
        ),
    ],
)
def test_configurations_that_cannot_be(change: Callable, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        change(LM_SPT)


def batch_of(*samples: int) -> Spoken:
    labels = torch.tensor([[2, 3, 1, 2], [3, 2, BLANK, BLANK]])[: len(samples)]
    return Spoken(noise(len(samples), 1, max(samples)), torch.tensor(samples), labels)


def test_padding_changes_neither_what_is_read_nor_the_codebook(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    torch.manual_seed(1)
    student = SemanticStudent(codec, "ab").eval()
    batch = batch_of(12 * 640, 5 * 640)
    both = student(batch)
    alone = student(Spoken(batch.wave[1:, :, : 5 * 640], batch.lengths[1:], batch.labels[1:, :2]))
    torch.testing.assert_close(both.letters[1, :10], alone.letters[0])
    assert both.codes[12:].tolist() == alone.codes.tolist()
    assert both.codes.numel() == 17
    loud = Spoken(batch.wave.clone(), batch.lengths, batch.labels)
    loud.wave[1, :, 5 * 640 :] = 1.0
    entries = []
    for one in (batch, loud):
        again = Codec(codec.config)
        again.load_state_dict(codec.state_dict())
        fresh = SemanticStudent(again, "ab")
        fresh.load_state_dict(student.state_dict())
        torch.manual_seed(2)  # Of the places at which Whisper hears them.
        fresh.train()(one)
        entries.append(again.quantizer.semantic.codebooks[0].entries)
    assert torch.equal(*entries)
    assert not torch.equal(entries[0], codec.quantizer.semantic.codebooks[0].entries)


def test_the_spelling_loss_sums_every_path_of_the_transcript(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    student = SemanticStudent(codec, "ab").eval()
    batch = batch_of(3 * 640)._replace(labels=torch.tensor([[2, 2]]))
    told = student(batch)
    chances = told.letters[0].exp()
    total = torch.zeros(())
    for path in product(range(4), repeat=6):
        kept = [a for a, b in zip(path, (None, *path), strict=False) if a != b and a != BLANK]
        if kept == [2, 2]:
            total = total + chances[torch.arange(6), list(path)].prod()
    torch.testing.assert_close(spelling_loss(told, batch, 640)[0], -total.log())


def test_reading_drops_blanks_and_repetitions(tmp_path: Path) -> None:
    codec, _ = tiny_semantic(tmp_path)
    told = SemanticStudent(codec, "ab")(batch_of(3 * 640))
    best = torch.tensor([[2, 2, 0, 2, 3, 1]])
    letters = torch.nn.functional.one_hot(best, 4).float()
    told = told._replace(letters=letters)
    assert read(told, torch.tensor([3 * 640]), 640) == [[2, 2, 3, 1]]
    assert read(told, torch.tensor([640]), 640) == [[2]]


def test_a_codec_without_such_an_encoder_is_refused() -> None:
    own = replace(LM_SPT, lmspt=replace(LM_SPT.lmspt, semantic="own"))
    with pytest.raises(ValueError, match=r"lmspt\.semantic is whisper"):
        SemanticStudent(Codec(own), "ab")


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
        "whisper": save(tmp_path / "whisper", "whisper"), "codec.lmspt.dimension": 8,
        "codec.spectral.num_mels": 20, "codec.spectral.encoder_width": 16,
        "codec.spectral.encoder_depths": "[1,1,1]", "codec.spectral.decoder_width": 16,
        "codec.spectral.decoder_depths": "[1,1,1]", "codec.quantizer.num_codebooks": 2,
        "codec.quantizer.codebook_size": 16, "codec.lmspt.auxiliary.kind": "none",
        "codec.lmspt.whisper.adapter_width": 8, "codec.lmspt.semantic_subtraction": "false",
        "batch.positions": 70, "optim.steps": 6, "optim.save_every": 3, "optim.eval_every": 6,
        "optim.log_every": 1, "optim.warmup_steps": 1,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in given.items()]


def test_both_stages_end_to_end_and_the_semantic_half_stays(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, caplog
) -> None:
    train_semantic([*settings, f"out={tmp_path / 'semantic'}"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["codec"] == str(tmp_path / "semantic" / "codec")
    reader, codec = CodeReader.load(told["reader"]), Codec.from_pretrained(told["codec"])
    assert torch.equal(reader.entries, codec.entries()[0])
    assert isinstance(reader.read(codec.encode(noise(1, 1, 9_000)).codes[0, 0].numpy()), str)
    assert told["dev_cer"] > 0
    assert 0 < told["entries_used"] <= 1
    assert "2 recordings left out, without a transcript in letters: 5, 6" in caplog.text
    lists = [each for each in settings if each.startswith(("train=", "dev="))]
    train_codec([
        *lists, f"out={tmp_path / 'codec'}", f"start_from={told['codec']}", "freeze_semantic=true",
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
    readers = [CodeReader.load(tmp_path / run / "reader").state_dict() for run in ("once", "twice")]
    assert all(torch.equal(one, two) for one, two in zip(*map(dict.values, readers), strict=True))


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


def test_a_text_that_cannot_be_said_in_the_time_is_left_out(
    settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuts = list(CutSet.from_jsonl(tmp_path / "cuts.jsonl.gz"))
    cuts[0].supervisions[0].text = "a" * 31  # 30 frames of 1.2 s are 60 steps, and it needs 61.
    cuts[1].supervisions[0].text = "ab" * 30
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    train_semantic([*settings, f"out={tmp_path / 'run'}"])
    assert "1 recordings left out, with more letters than can be said in them: 0" in caplog.text


def test_deepspeed_is_refused_in_words(settings: list[str], monkeypatch) -> None:
    import recipes.train_semantic as recipe

    kind = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    monkeypatch.setattr(recipe, "make_accelerator", lambda *_, **__: kind)
    with pytest.raises(ValueError, match="does not train under DeepSpeed; launch with"):
        train_semantic(settings)


def test_two_ranks_train_one_codebook(settings: list[str], tmp_path: Path, launch) -> None:
    """Ranks hold batches of other sizes, which must not make them wait for each other."""
    script = Path(__file__).parent.parent / "recipes" / "train_semantic.py"
    done = launch("ddp", script, *settings, f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    codec = Codec.from_pretrained(told["codec"])
    assert torch.equal(CodeReader.load(told["reader"]).entries, codec.entries()[0])
    assert codec.quantizer.semantic.codebooks[0].num_updates == 6


def test_a_run_learns_to_read(settings: list[str], tmp_path: Path) -> None:
    longer = ["optim.steps=60", "optim.lr=0.01", "optim.save_every=60", "optim.eval_every=60"]
    train_semantic([*settings, *longer, f"out={tmp_path / 'run'}"])
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/letters_loss"] for line in lines if "train/letters_loss" in line]
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["codec.family=spectral"], r"codec\.family must be lmspt"),
        (["batch.packed=70"], r"batch\.packed: recordings stand one in a row"),
        (["weights.letters=-1"], r"weights\.letters must be at least 0"),
        (["whisper=../none"], "no such folder"),
        (["batch.positions=5"], "no recording is left"),
        (["codec.quantizer.learning=gradient"], r"codec\.quantizer\.learning"),
    ],
)
def test_settings_that_make_no_sense(
    settings: list[str], tmp_path: Path, given: list[str], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        train_semantic([*settings, *given, f"out={tmp_path / 'run'}"])
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "keeps random weights without start_from"),
        (["start_from=x", "losses.weights.distill=1", "distill.speech.model=x"], "leaves no"),
    ],
)
def test_freezing_that_makes_no_sense(tmp_path: Path, given: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        train_codec([f"out={tmp_path / 'run'}", "freeze_semantic=true", *given])


def test_a_codec_without_a_semantic_half_cannot_freeze_it(tiny_codec_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"codec\.family lmspt, without lmspt\.shared"):
        Codec.from_pretrained(tiny_codec_folder).freeze_semantic()

"""Checkpoints of SpeechTokenizer and DM-Codec in and out."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from original_seanet import (
    PLAIN,
    PLAIN_SHAPES,
    SNAKE,
    SNAKE_SHAPES,
    ByNumber,
    Shapes,
    random_state,
)
from safetensors.torch import save_file
from torch import Tensor

from codec import Codec, load_codec
from codec.interop.checkpoint import Original
from codec.interop.speechtokenizer import (
    export_speechtokenizer,
    from_original,
    import_speechtokenizer,
    to_original,
)

GOLDEN = ROOT / "tests" / "golden" / "speechtokenizer_tiny.pt"

# Of the published config.json; training reads these, the model does not.
TRAINING = {
    "resblock": "1",
    "num_mels": 80,
    "betas": [0.9, 0.99],
    "mel_loss_lambdas": [45, 1, 1, 1],
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def published(golden: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """config.json and SpeechTokenizer.pt as the original's trainer leaves them."""
    return written(golden["config"] | TRAINING, golden["state_dict"], tmp_path / "published")


def written(config: dict[str, Any], state: Any, folder: Path) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "SpeechTokenizer.pt")
    return folder / "config.json", folder / "SpeechTokenizer.pt"


def parametrized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {"weight_g": "parametrizations.weight.original0"}
    names |= {"weight_v": "parametrizations.weight.original1"}
    return {
        ".".join(names.get(part, part) for part in name.split(".")): tensor
        for name, tensor in state.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def test_a_published_checkpoint_becomes_a_codec(
    golden: dict[str, Any], published: tuple[Path, Path], tmp_path: Path
) -> None:
    codec = import_speechtokenizer(*published)
    assert not codec.training
    assert (codec.num_codebooks, codec.hop_length, codec.sample_rate) == (8, 320, 16_000)
    assert codec.config.quantizer.decay == 0.99
    assert codec.config.quantizer.kmeans_iterations == 50
    codec.save_pretrained(tmp_path / "ours")
    loaded = load_codec(tmp_path / "ours")
    for suffix in ("", "_odd_batch2"):
        codes = loaded.encode(golden[f"input{suffix}"]).codes
        assert torch.equal(codes, golden[f"codes{suffix}"].transpose(0, 1))
        wave = loaded.decode(codes)
        torch.testing.assert_close(wave, golden[f"output{suffix}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["trainer", "new names", "new names, trainer", "safetensors"])
def test_every_form_gives_the_same_codec(
    golden: dict[str, Any], published: tuple[Path, Path], form: str, tmp_path: Path
) -> None:
    expected = import_speechtokenizer(*published).stamp
    state: Any = golden["state_dict"]
    if "new names" in form:
        state = parametrized(state)
        assert any("parametrizations" in name for name in state)
    if "trainer" in form:
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        state = {
            "generator": state,
            "discriminators": {"mpd": {"weight": torch.zeros(2)}},
            "optim_g": optimizer.state_dict(),
            "scheduler_g": schedule.state_dict(),
            "best_dev_mel_loss": 0.357,
        }
    if form == "safetensors":
        checkpoint = tmp_path / "model.safetensors"
        save_file(state, checkpoint)
    else:
        checkpoint = tmp_path / "SpeechTokenizerTrainer_00002500"
        torch.save(state, checkpoint)
    assert import_speechtokenizer(published[0], checkpoint).stamp == expected


def test_export_is_bit_exact(
    golden: dict[str, Any], published: tuple[Path, Path], tmp_path: Path
) -> None:
    codec = import_speechtokenizer(*published)
    codec.save_pretrained(tmp_path / "ours")
    export_speechtokenizer(load_codec(tmp_path / "ours", fold=False), tmp_path / "back")
    files = tmp_path / "back" / "config.json", tmp_path / "back" / "SpeechTokenizer.pt"
    assert json.loads(files[0].read_text()) == golden["config"]
    assert same(torch.load(files[1], weights_only=True), golden["state_dict"])
    assert same(import_speechtokenizer(*files).state_dict(), codec.state_dict())
    export_speechtokenizer(codec, tmp_path / "new", parametrized=True)
    state = torch.load(tmp_path / "new" / "SpeechTokenizer.pt", weights_only=True)
    assert same(state, parametrized(golden["state_dict"]))


@pytest.mark.parametrize(
    ("config", "shapes"), [(SNAKE, SNAKE_SHAPES), (PLAIN, PLAIN_SHAPES)], ids=["snake", "plain"]
)
def test_other_configurations(config: dict[str, Any], shapes: Shapes, tmp_path: Path) -> None:
    state = random_state(shapes)
    codec = import_speechtokenizer(*written(config, state, tmp_path))
    original = to_original(codec)
    assert original.config == {"bidirectional": False, "lstm_layers": 0} | config
    assert same(original.state, state)
    assert same(from_original(original).state_dict(), codec.state_dict())
    assert codec.sample_rate == config["sample_rate"]

    wave = torch.randn(2, 1, 240, generator=torch.Generator().manual_seed(1))
    theirs = ByNumber(config, state)
    with torch.no_grad():
        latent = theirs.run("encoder", wave)
        torch.testing.assert_close(codec.encoder(wave), latent, atol=1e-4, rtol=1e-5)
        decoded = theirs.run("decoder", latent)
        torch.testing.assert_close(codec.decoder(latent), decoded, atol=1e-4, rtol=1e-5)
    codes = codec.encode(wave).codes
    for item in range(2):
        residual = latent[item].T
        for index, row in enumerate(codes[item]):
            embed = state[f"quantizer.vq.layers.{index}._codebook.embed"]
            assert torch.equal(row, torch.cdist(residual, embed).argmin(1))
            residual = residual - embed[row]


def test_round_trip_of_our_codec(golden: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = from_original(Original(SNAKE, random_state(SNAKE_SHAPES))).config
    codec = Codec(config).train()
    for _ in range(3):
        codec(golden["input"])
    export_speechtokenizer(codec.eval(), tmp_path)
    state = torch.load(tmp_path / "SpeechTokenizer.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SNAKE_SHAPES
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    again = import_speechtokenizer(tmp_path / "config.json", tmp_path / "SpeechTokenizer.pt")
    ours, theirs = codec.state_dict(), again.state_dict()
    for name in [name for name in ours if name.endswith("num_updates")]:
        assert (int(ours.pop(name)), int(theirs.pop(name))) == (3, 1)
    assert same(ours, theirs)


def test_misfits_are_named(published: tuple[Path, Path], golden: dict[str, Any]) -> None:
    state = dict(golden["state_dict"])

    def error_of(changed: Any) -> str:
        torch.save(changed, published[1])
        with pytest.raises(ValueError, match=r"SpeechTokenizer\.pt: ") as caught:
            import_speechtokenizer(*published)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    lstm = {name: tensor for name, tensor in state.items() if ".lstm." not in name}
    assert "missing: decoder.model.1.lstm.bias_hh_l0" in error_of(lstm)
    assert "and 21 more" in error_of(lstm)
    assert "unknown: transform.scale" in error_of({**state, "transform.scale": torch.ones(1)})
    name = "decoder.model.3.convtr.convtr.weight_g"
    wrong = error_of({**state, name: torch.ones(32, 1, 1)})
    assert f"of another shape: {name} (32, 1, 1) and not (64, 1, 1)" in wrong
    assert "with NaN or infinity: decoder" in error_of(
        {**state, name: torch.full((64, 1, 1), torch.nan)}
    )
    assert "neither a state_dict nor" in error_of([1, 2])
    assert "neither a state_dict nor" in error_of({"model": state})
    assert "neither a state_dict nor" in error_of({})
    # A tensor of that name is no trainer's generator.
    assert "unknown: generator" in error_of({**state, "generator": torch.ones(1)})


def test_damaged_files_are_named(published: tuple[Path, Path], tmp_path: Path) -> None:
    config, checkpoint = published
    whole = checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint", b"\x80\x02}."):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"SpeechTokenizer\.pt: ") as caught:
            import_speechtokenizer(config, checkpoint)
        assert "\n" not in str(caught.value)
    torch.save(Path("code"), checkpoint)  # Unpickling this would run code.
    with pytest.raises(ValueError, match=r"more than tensors \(pathlib\."):
        import_speechtokenizer(config, checkpoint)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a complete"):
        import_speechtokenizer(config, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"none\.pt: no such file"):
        import_speechtokenizer(config, tmp_path / "none.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: is a folder; name the checkpoint file in it"):
        import_speechtokenizer(config, tmp_path / "folder")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_with_more_than_tensors(
    golden: dict[str, Any], published: tuple[Path, Path], *, is_zip: bool
) -> None:
    whole = {"generator": golden["state_dict"], "best_dev_mel_loss": np.float64(0.357)}
    torch.save(whole, published[1], _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="has more than tensors") as caught:
        import_speechtokenizer(*published)
    message = str(caught.value)
    assert "save the state_dict of its generator alone" in message
    assert message.isprintable()
    assert "weights_only" not in message


def test_tensors_that_are_no_real_numbers_are_named(
    golden: dict[str, Any], published: tuple[Path, Path]
) -> None:
    name, tensor = next(iter(golden["state_dict"].items()))
    torch.save({**golden["state_dict"], name: tensor.to(torch.complex64)}, published[1])
    with pytest.raises(ValueError, match=f"{re.escape(name)} is not a plain tensor of real num"):
        import_speechtokenizer(*published)


def test_bad_configurations_are_named(published: tuple[Path, Path], golden: dict[str, Any]) -> None:
    def error_of(text: str) -> str:
        published[0].write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: ") as caught:
            import_speechtokenizer(*published)
        return str(caught.value)

    config = golden["config"]
    without = {key: value for key, value in config.items() if key not in ("n_q", "dimension")}
    assert "lacks dimension, n_q" in error_of(json.dumps(without))
    assert "got 'ReLU'" in error_of(json.dumps(config | {"activation": "ReLU"}))
    assert "activation" in error_of(json.dumps(config | {"activation": ["ELU"]}))
    assert "strides must be a list" in error_of(json.dumps(config | {"strides": 320}))
    assert "strides must be a list" in error_of(json.dumps(config | {"strides": []}))
    assert "strides must be an integer" in error_of(json.dumps(config | {"strides": [8, 2.5]}))
    assert "bidirectional must be true" in error_of(json.dumps(config | {"bidirectional": "yes"}))
    assert "not a complete JSON object" in error_of('{"n_q": 8')
    assert "not a complete JSON object" in error_of("[8]")
    assert "is the configuration of a codec" in error_of('{"family": "seanet", "quantizer": {}}')
    for value in ("4", True, 0, 4.5, float("inf"), float("nan"), [4]):
        wrong = error_of(json.dumps(config | {"n_filters": value}))
        assert (
            f"config.json: n_filters must be an integer from 1 to 2147483647, got {value!r}"
            in wrong
        )
    for key in ("n_q", "n_residual_layers", "dimension", "sample_rate", "dilation_base"):
        assert f"{key} must be an integer" in error_of(json.dumps(config | {key: 0}))
    assert "lstm_layers must be an integer from 0 to 1000" in error_of(
        json.dumps(config | {"lstm_layers": -1})
    )
    for size in (1, 65_537):
        assert "codebook_size must be an integer from 2 to 65536" in error_of(
            json.dumps(config | {"codebook_size": size})
        )
    (published[0].parent / "c.yaml").write_text("model: {}")
    with pytest.raises(ValueError, match=r"c\.yaml: is YAML; this kind has a config\.json"):
        import_speechtokenizer(published[0].parent / "c.yaml", published[1])
    published[0].unlink()
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        import_speechtokenizer(*published)


def test_what_cannot_be_exported(
    golden: dict[str, Any], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="family seanet can be exported, not spectral"):
        export_speechtokenizer(load_codec(tiny_codec_folder), tmp_path)
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    export_speechtokenizer(codec, tmp_path)
    before = (tmp_path / "SpeechTokenizer.pt").read_bytes()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"SpeechTokenizer\.pt: exists already") as caught:
        export_speechtokenizer(codec, tmp_path)
    assert "--overwrite" not in str(caught.value)
    assert (tmp_path / "SpeechTokenizer.pt").read_bytes() == before
    assert not (tmp_path / "config.json").exists()
    export_speechtokenizer(codec, tmp_path, overwrite=True)
    assert (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match=r"fold=False\) to export it"):
        export_speechtokenizer(codec.fold_weight_norm(), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
    (tmp_path / "file").touch()
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    with pytest.raises(ValueError, match="file: is a file; name a folder"):
        export_speechtokenizer(codec, tmp_path / "file", overwrite=True)


def test_an_export_never_replaces_a_codecs_configuration(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    codec.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"has model\.safetensors.*choose another folder"):
        export_speechtokenizer(codec, tmp_path, overwrite=True)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_export_that_fails_leaves_what_was_there(
    golden: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = from_original(Original(golden["config"], golden["state_dict"]))
    export_speechtokenizer(codec, tmp_path / "there")
    (tmp_path / "there" / "config.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()}

    def full(_state: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for folder in (tmp_path / "there", tmp_path / "new"):
        with pytest.raises(OSError, match="No space left"):
            export_speechtokenizer(codec, folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "there").iterdir()} == before
    assert not (tmp_path / "new").exists()

"""The released LM-SPT's files in and out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_lmspt import OTHERS, TINY, other, same, state_of
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from codec import Codec, load_codec
from codec.__main__ import main
from codec.interop.checkpoint import Original
from codec.interop.lmspt import export_lmspt, from_lmspt, import_lmspt, lmspt_files, to_lmspt

CONFIG, CHECKPOINT = "lmspt_1333d33hz_16_16_3vq.yaml", "lmspt_1333d33hz_16_16.safetensors"


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    """As the package and the hub have them."""
    return written(TINY, state_of(TINY), tmp_path / "published")


def written(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    folder.mkdir()
    model = {"_target_": "lmspt.model_codec.lmspt_model.LMSPT", **config}
    if config["aux_decoder"] is not None:
        auxiliary = {"_target_": "lmspt.model_codec.dac_model.Decoder", **config["aux_decoder"]}
        model["aux_decoder"] = auxiliary
    (folder / "c.yaml").write_text(f"# Inference\n{yaml.safe_dump({'model': model})}")
    save_file(state, folder / "c.safetensors")
    return folder / "c.yaml", folder / "c.safetensors"


def parametrized(state: dict[str, Tensor]) -> dict[str, Tensor]:
    new = {"weight_g": "parametrizations.weight.original0"}
    new |= {"weight_v": "parametrizations.weight.original1"}
    return {
        ".".join(new.get(part, part) for part in name.split(".")): tensor
        for name, tensor in state.items()
    }


def stand_in(state: dict[str, Tensor]) -> nn.Module:
    """A module with the original's tensors, made of zeros."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, torch.zeros_like(tensor))
    return root


@pytest.mark.parametrize("name", ["", *OTHERS])
def test_round_trip_of_files(name: str, tmp_path: Path) -> None:
    config = other(name) if name else TINY
    state = state_of(config)
    files = written(config, state, tmp_path / "published")
    codec = import_lmspt(*files)
    assert same(codec.state_dict(), from_lmspt(Original(config, state)).state_dict())
    export_lmspt(codec, tmp_path / "back")
    made = [tmp_path / "back" / file for file in lmspt_files(codec.config)]
    assert sorted(made) == sorted((tmp_path / "back").iterdir())
    # As the original loads them: every tensor has to be there once.
    theirs = stand_in(state)
    if config.get("use_shared_encoder"):
        theirs.acoustic_encoder = theirs.semantic_encoder
    assert load_model(theirs, made[1], strict=False) == (set(), [])
    assert same(theirs.state_dict(), state)
    assert same(import_lmspt(*made).state_dict(), codec.state_dict())
    assert import_lmspt(*made).config == codec.config
    model = yaml.safe_load(made[0].read_text())["model"]
    assert model["_target_"] == "lmspt.model_codec.lmspt_model.LMSPT"
    assert model["aux_decoder"]["_target_"] == "lmspt.model_codec.dac_model.Decoder"


def test_names_of_files(published: tuple[Path, Path], tmp_path: Path) -> None:
    codec = import_lmspt(*published)
    assert lmspt_files(codec.config) == (CONFIG, CHECKPOINT)
    config = TINY | {"sample_rate": 75, "aux_decoder": None, "acoustic_codebook_size": [16, 8]}
    state = state_of(config | {"acoustic_codebook_dim": [4, 4]})
    made = from_lmspt(Original(config, state))
    assert lmspt_files(made.config)[1] == "lmspt_12d5hz_16_16_8.safetensors"


@pytest.mark.parametrize("form", ["torch", "new names", "flat json", "bfloat16", "float16"])
def test_every_form_gives_the_same_codec(
    form: str, published: tuple[Path, Path], tmp_path: Path
) -> None:
    config, checkpoint = published
    state = state_of(TINY)
    expected = state
    if form == "flat json":
        config = tmp_path / "c.json"
        config.write_text(json.dumps(TINY))
    elif form == "torch":
        checkpoint = tmp_path / "c.pt"
        torch.save(state, checkpoint)
    else:
        kept = parametrized(state)
        if form != "new names":
            kept = {name: tensor.to(getattr(torch, form)) for name, tensor in state.items()}
            expected = {name: tensor.float() for name, tensor in kept.items()}
        save_file(kept, checkpoint)
    assert same(to_lmspt(import_lmspt(config, checkpoint)).state, expected)


def test_a_shared_encoder_has_either_name_or_both(tmp_path: Path) -> None:
    config = other("shared")
    state = state_of(config)
    files = written(config, state, tmp_path / "published")
    expected = import_lmspt(*files).state_dict()
    for absent in ("semantic_encoder", "acoustic_encoder"):
        some = {name: state[name] for name in state if not name.startswith(absent)}
        save_file(some, files[1])
        assert same(import_lmspt(*files).state_dict(), expected)
        save_file(parametrized(some), files[1])
        assert same(import_lmspt(*files).state_dict(), expected)
    name = "acoustic_encoder.block.0.bias"
    save_file(state | {name: state[name] + 1}, files[1])
    with pytest.raises(ValueError, match=f"two encoders with different {name}"):
        import_lmspt(*files)


def test_misfits_are_named(published: tuple[Path, Path]) -> None:
    state, bias = state_of(TINY), "decoder.model.0.bias"

    def error_of(changed: dict[str, Tensor]) -> str:
        save_file(changed, published[1])
        with pytest.raises(ValueError, match=r"c\.safetensors: does not match") as caught:
            import_lmspt(*published)
        return str(caught.value)

    without = {name: state[name] for name in state if name != "aux_decoder.model.0.bias"}
    assert "missing: aux_decoder.model.0.bias" in error_of(without)
    assert "unknown: decoder.model.9.bias" in error_of(
        state | {"decoder.model.9.bias": torch.ones(1)}
    )
    assert f"of another shape: {bias} (5,) and not (12,)" in error_of(state | {bias: torch.ones(5)})
    usage = "quantizer.acoustic_vocab_usage"
    assert f"{usage} (2, 4) and not (2, 16)" in error_of(state | {usage: torch.ones(2, 4)})
    assert f"NaN or infinity: {bias}" in error_of(state | {bias: torch.full((12,), torch.inf)})
    assert f"not floating-point: {bias}" in error_of(state | {bias: torch.ones(12).long()})
    assert "missing: semantic_encoder.block.0.conv.bias" not in error_of({bias: state[bias]})


def test_a_checkpoint_without_auxiliary_decoder(
    published: tuple[Path, Path], tmp_path: Path
) -> None:
    whole, state = import_lmspt(*published), state_of(TINY)
    save_file({name: state[name] for name in state if "aux_decoder" not in name}, published[1])
    codec = import_lmspt(*published)
    assert codec.config.lmspt.auxiliary.kind == "none"
    assert codec.stamp.digest == whole.stamp.digest
    with pytest.raises(ValueError, match="export the folder of the training run"):
        export_lmspt(codec, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("text", ["model: [1", "just words", "- 1", "", "\tmodel: {}", "\x00"])
def test_damaged_configurations_are_named(text: str, published: tuple[Path, Path]) -> None:
    published[0].write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml: has no keys and values in YAML") as caught:
        import_lmspt(*published)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="published: is a folder; name the configuration"):
        import_lmspt(published[0].parent, published[1])
    published[0].unlink()
    with pytest.raises(ValueError, match=r"c\.yaml: cannot be read"):
        import_lmspt(*published)


def test_what_cannot_be_exported(
    published: tuple[Path, Path], tiny_codec_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="family lmspt can be exported, not spectral"):
        export_lmspt(Codec.from_pretrained(str(tiny_codec_folder)), tmp_path / "out")
    codec = import_lmspt(*published)
    codec.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"config\.json: is the configuration of a codec of ours"):
        import_lmspt(tmp_path / "ours" / "config.json", published[1])
    export_lmspt(codec, tmp_path / "out")
    (tmp_path / "out" / CONFIG).unlink()
    with pytest.raises(ValueError, match=rf"{CHECKPOINT}: exists already"):
        export_lmspt(codec, tmp_path / "out")
    assert not (tmp_path / "out" / CONFIG).exists()
    export_lmspt(codec, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / CONFIG).exists()
    with pytest.raises(ValueError, match=r"fold=False\) to export it"):
        export_lmspt(codec.fold_weight_norm(), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_commands(
    published: tuple[Path, Path],
    tiny_codec_folder: Path,
    write_wav: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    command = ["import", "lmspt", *map(str, published), str(ours)]
    main(command)
    made = json.loads(capsys.readouterr().out)
    assert (made["id"], made["codebook_sizes"], made["sample_rate"]) == (str(ours), [16] * 3, 8000)
    assert made["digest"] == load_codec(ours).stamp.digest
    assert "config.json: exists already (and 1 more)" in failure(capsys, *command)
    main([*command, "--overwrite"])

    main(["export", "lmspt", str(ours), str(theirs)])
    assert sorted(path.name for path in theirs.iterdir()) == sorted([CONFIG, CHECKPOINT])
    assert same(load_file(theirs / CHECKPOINT), state_of(TINY))
    message = failure(capsys, "export", "lmspt", ours, theirs)
    assert "exists already (and 1 more); choose another folder or use --overwrite" in message
    main(["export", "lmspt", str(ours), str(theirs), "--overwrite"])
    assert "only codecs of the family lmspt" in failure(
        capsys, "export", "lmspt", tiny_codec_folder, tmp_path / "none"
    )
    assert "only codecs of the family seanet" in failure(
        capsys, "export", "speechtokenizer", ours, tmp_path / "none"
    )
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    assert "is a file" in failure(capsys, "export", "lmspt", ours, tmp_path / "file")

    wave = write_wav(tmp_path / "x.wav", 0.2003, 8000)
    main(["reconstruct", "--codec", str(ours), str(wave), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "x.wav").exists()
    published[1].write_bytes(published[1].read_bytes()[:100])
    message = failure(capsys, *command, "--overwrite")
    assert "c.safetensors: not a complete checkpoint" in message

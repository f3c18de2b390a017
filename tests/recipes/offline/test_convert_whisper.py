import json
import re
import struct
from pathlib import Path

import pytest
import torch
from tiny_whisper import LANGUAGES, tiny_tokenizer, tiny_whisper
from torch import Tensor

from recipes.offline.convert_whisper import convert_whisper, read_container

HEADS = [[0, 1], [1, 0]]


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def variable(name: str, tensor: Tensor) -> bytes:
    kind = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}[tensor.dtype]
    data = tensor.detach().contiguous().numpy().tobytes()
    head = struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
    return text(name) + head + struct.pack("<BI", kind, len(data)) + data


def container(variables: dict[str, Tensor], specification: str = "WhisperSpec") -> bytes:
    parts = [struct.pack("<I", 6), text(specification), struct.pack("<II", 3, len(variables))]
    parts += [variable(name, tensor) for name, tensor in variables.items()]
    parts += [struct.pack("<I", 1), text("decoder/projection/weight")]
    return b"".join([*parts, text("decoder/embeddings/weight")])


def described(name: str, *, kind: int, count: int) -> bytes:
    """A container of one variable of two numbers, as its description has it."""
    head = struct.pack("<I", 6) + text("AnySpec") + struct.pack("<II", 3, 1)
    fields = struct.pack("<BI", 1, 2) + struct.pack("<BI", kind, count)
    return head + text(name) + fields + bytes(count) + struct.pack("<I", 0)


def attention(state: dict[str, Tensor], here: str, there: str, crossed: bool) -> dict[str, Tensor]:
    """CTranslate2's matrices of one attention."""

    def fused(names: str, part: str) -> Tensor:
        none = torch.zeros(16)
        return torch.cat([state.get(f"{here}.{name}_proj.{part}", none) for name in names])

    made = {f"{there}/layer_norm/{new}": state[f"{here}_layer_norm.{old}"] for new, old in NORM}
    for part in ("weight", "bias"):
        for number, names in enumerate(("q", "kv") if crossed else ("qkv",)):
            made[f"{there}/linear_{number}/{part}"] = fused(names, part)
        made[f"{there}/linear_{2 if crossed else 1}/{part}"] = state[f"{here}.out_proj.{part}"]
    return made


NORM = (("gamma", "weight"), ("beta", "bias"))


def as_variables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float16 variables that CTranslate2 would keep of a tiny Whisper."""
    made = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}
    for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        made[f"encoder/{name.replace('.', '/')}"] = state[f"model.encoder.{name}"]
    for side in ("encoder", "decoder"):
        root = f"model.{side}"
        made[f"{side}/position_encodings/encodings"] = state[f"{root}.embed_positions.weight"]
        made |= {f"{side}/layer_norm/{new}": state[f"{root}.layer_norm.{old}"] for new, old in NORM}
        for layer in range(2):
            here, there = f"{root}.layers.{layer}", f"{side}/layer_{layer}"
            made |= attention(state, f"{here}.self_attn", f"{there}/self_attention", False)
            if side == "decoder":
                made |= attention(state, f"{here}.encoder_attn", f"{there}/attention", True)
            for new, old in NORM:
                made[f"{there}/ffn/layer_norm/{new}"] = state[f"{here}.final_layer_norm.{old}"]
            for number in (0, 1):
                for part in ("weight", "bias"):
                    source = f"{here}.fc{number + 1}.{part}"
                    made[f"{there}/ffn/linear_{number}/{part}"] = state[source]
    made = {name: tensor.half() for name, tensor in made.items()}
    made |= {f"{side}/num_heads": torch.tensor(2).short() for side in ("encoder", "decoder")}
    return made | {"decoder/activation": torch.tensor(3, dtype=torch.int8)}


def write_source(folder: Path, variables: dict[str, Tensor]) -> Path:
    """A CTranslate2 folder."""
    folder.mkdir()
    (folder / "model.bin").write_bytes(container(variables))
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    facts = {
        "alignment_heads": HEADS,
        "lang_ids": tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in LANGUAGES]),
        "suppress_ids": [5, 6],
        "suppress_ids_begin": [0],
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("multilingual", [True, False])
def test_a_converted_whisper_equals_the_original(tmp_path: Path, multilingual: bool) -> None:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model = tiny_whisper(multilingual)
    source = write_source(tmp_path / "source", as_variables(model.state_dict()))
    convert_whisper(source, tmp_path / "made")
    made = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "made", dtype=torch.float32
    ).eval()
    expected = model.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, expected[name].half().float()), name
    assert made.proj_out.weight is made.model.decoder.embed_tokens.weight
    features, tokens = torch.randn(1, 80, 3000), torch.tensor([[98, 3, 4]])
    with torch.no_grad():
        logits = made(input_features=features, decoder_input_ids=tokens).logits
        model.load_state_dict({name: tensor.half() for name, tensor in expected.items()})
        assert torch.equal(logits, model(features, decoder_input_ids=tokens).logits)
    facts = made.generation_config
    assert facts.alignment_heads == HEADS
    assert facts.suppress_tokens == [5, 6]
    assert facts.begin_suppress_tokens == [0]
    assert facts.is_multilingual is multilingual
    tokenizer = WhisperProcessor.from_pretrained(tmp_path / "made").tokenizer
    assert facts.no_timestamps_token_id == tokenizer.convert_tokens_to_ids("<|notimestamps|>")
    assert tokenizer(" the cat", add_special_tokens=False) == tiny_tokenizer()(
        " the cat", add_special_tokens=False
    )
    options = {"language": "de", "task": "transcribe"} if multilingual else {}
    assert made.generate(features, max_new_tokens=2, **options).shape[1] <= 6
    ids = tokenizer.get_added_vocab()
    assert facts.prev_sot_token_id == ids["<|startofprev|>"]
    # Of openai/whisper: the first time stamp of a recording is no later than a second.
    assert facts.max_initial_timestamp_index == 50
    if multilingual:
        assert facts.task_to_id == {
            name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")
        }
        assert facts.lang_to_id == {
            f"<|{name}|>": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in LANGUAGES
        }


def test_weights_may_be_stored_in_a_wider_type(tmp_path: Path) -> None:
    from transformers import AutoConfig

    variables = as_variables(tiny_whisper().state_dict())
    source = write_source(tmp_path / "source", variables)
    for dtype in (torch.float16, torch.float32):
        convert_whisper(source, tmp_path / str(dtype), dtype)
        assert AutoConfig.from_pretrained(tmp_path / str(dtype)).dtype == dtype


def test_a_container_has_variables_and_aliases(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    variables = {"decoder/embeddings/weight": weight, "n": torch.tensor(7, dtype=torch.int16)}
    (tmp_path / "model.bin").write_bytes(container(variables, "AnySpec"))
    found = read_container(tmp_path / "model.bin")
    assert found.specification == "AnySpec"
    assert torch.equal(found.variables["decoder/projection/weight"], weight)
    assert found.variables["n"].shape == ()
    assert int(found.variables["n"]) == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4 something else", "not a CTranslate2 file of version 6"),
        (b"", "truncated"),
        (container({"a": torch.ones(9)})[:50], "truncated"),
        (container({"a": torch.ones(9)}), "is an alias of decoder/embeddings/weight"),
        (described("a", kind=9, count=8), "a has the unknown type 9"),
        (described("a", kind=0, count=12), r"a of shape \(2,\) and torch.float32 has 12 bytes"),
        (described("a", kind=0, count=7), "has 7 bytes"),
        (
            described("\N{LATIN SMALL LETTER E WITH ACUTE}", kind=0, count=8).replace(
                b"\xc3", b"\xff"
            ),
            "is corrupted .*codec can't decode",
        ),
    ],
)
def test_corrupted_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/model.bin .*{message}"):
        read_container(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("variables", "specification", "message"),
    [
        (
            {"decoder/embeddings/weight": torch.ones(1)},
            "TransformerSpec",
            "a TransformerSpec, not",
        ),
        (
            {"decoder/embeddings/weight": torch.ones(1), "a/weight_scale": torch.ones(1)},
            "WhisperSpec",
            "quantized: convert the float16",
        ),
    ],
)
def test_other_models_are_refused(
    tmp_path: Path, variables: dict[str, Tensor], specification: str, message: str
) -> None:
    (tmp_path / "model.bin").write_bytes(container(variables, specification))
    with pytest.raises(ValueError, match=message):
        convert_whisper(tmp_path, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def biased(variables: dict[str, Tensor]) -> None:
    variables["decoder/layer_1/attention/linear_1/bias"][3] = 1


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (biased, "decoder/layer_1/attention has a key bias"),
        (lambda all_of: all_of.update({"decoder/activation": torch.tensor(0).short()}), "GELU"),
        (lambda all_of: all_of.pop("encoder/conv1/bias"), "lacks 'encoder/conv1/bias'"),
        (
            lambda all_of: all_of.update({"encoder/conv1/bias": torch.ones(3)}),
            r"cannot be converted: .*encoder\.conv1\.bias",
        ),
    ],
)
def test_failed_conversions_leave_no_files(tmp_path: Path, corrupt, message: str) -> None:
    variables = {
        name: tensor.clone() for name, tensor in as_variables(tiny_whisper().state_dict()).items()
    }
    corrupt(variables)
    source = write_source(tmp_path / "source", variables)
    with pytest.raises(ValueError, match=f"source .*{message}"):
        convert_whisper(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "cannot be converted"),
        ("config.json", "{}", "lacks 'alignment_heads'"),
        ("tokenizer.json", '{"version": "1.0"}', "cannot be loaded as a tokenizer"),
    ],
)
def test_corrupted_configuration_files_are_reported(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    source = write_source(tmp_path / "source", as_variables(tiny_whisper().state_dict()))
    (source / file).write_text(content)
    kept = tmp_path / "made" / "kept"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(ValueError, match=f"source.*{message}"):
        convert_whisper(source, tmp_path / "made")
    assert list(kept.parent.iterdir()) == [kept]

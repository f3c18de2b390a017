"""slm/models/ar.py: base LLMs, adapters that train only new rows, saving and loading."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base, save_shard

from codec.tokens import TokenShard
from slm.config import ARConfig, BatchConfig, LoRAConfig, TaskConfig
from slm.data.ar import ARBatch, ARData
from slm.models.ar import BASE_FILE, SpeechLM, digest_of, load_base

pytestmark = quiet()

BASES = [("llama", True), ("llama", False), ("gpt2", True), ("gpt2", False)]


def make(tmp_path: Path, lora: LoRAConfig | None = LoRAConfig(rank=2), **kwargs) -> SpeechLM:  # noqa: B008
    base = save_base(tmp_path / "base", **kwargs)
    return SpeechLM.create(ARConfig(base=str(base), lora=lora), STAMP, seed=0)


def batch_of(lm: SpeechLM, path: Path) -> ARBatch:
    shard = TokenShard.open(save_shard(path, 6))
    data = ARData.open(
        shard, lm.tokenizer, TaskConfig(), BatchConfig(positions=300), 0, longest=256
    )
    # The first two utterances as tts, two others as asr.
    return data.collate([np.array([item]) for item in (0, 8, 1, 9)])


def train(lm: SpeechLM, batch: ARBatch, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in lm.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        (lm(batch).nll.sum() / 50).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "tied"), BASES)
def test_adapters_train_only_themselves_and_new_rows(tmp_path: Path, kind: str, tied: bool) -> None:
    lm = make(tmp_path, kind=kind, tied=tied)
    trained = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    frozen = {n: p.detach().clone() for n, p in lm.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad}
    train(lm, batch_of(lm, tmp_path / "a.parquet"))
    after = dict(lm.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    deltas = [name for name in before if "trainable_tokens_delta" in name]
    assert len(deltas) == (1 if tied else 2)
    for name in deltas:
        assert before[name].shape[0] == len(lm.vocabulary.new_ids)
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(("kind", "tied"), BASES)
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
def test_a_saved_folder_gives_the_same_losses(
    tmp_path: Path, kind: str, tied: bool, lora: LoRAConfig | None
) -> None:
    lm = make(tmp_path, lora, kind=kind, tied=tied)
    batch = batch_of(lm, tmp_path / "a.parquet")
    train(lm, batch)
    expected = lm.eval()(batch)
    state = {n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad}
    lm.save(tmp_path / "ar", state)
    assert not list((tmp_path / "ar").glob("*.bin"))
    loaded = SpeechLM.load(tmp_path / "ar")  # adapters merged
    torch.testing.assert_close(loaded(batch).nll, expected.nll, rtol=1e-5, atol=1e-3)
    assert loaded.vocabulary == lm.vocabulary
    embedding, head = (loaded.lm.get_input_embeddings(), loaded.lm.get_output_embeddings())
    assert (embedding.weight is head.weight) == tied


def test_two_loads_are_equal_where_the_tokenizer_is_larger_than_the_table(tmp_path: Path) -> None:
    lm = make(tmp_path, pad_rows=-3)
    lm.save(tmp_path / "ar")
    states = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(SpeechLM.load(tmp_path / "ar").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    table = lm.lm.merge_and_unload().get_input_embeddings().weight
    (name,) = (each for each in states[0] if each.endswith("embed_tokens.weight"))
    assert torch.equal(states[0][name], table)


def test_start_from_fully_trained_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = make(tmp_path, None)
    batch = batch_of(lm, tmp_path / "a.parquet")
    train(lm, batch)
    lm.save(tmp_path / "ar")
    base = str(tmp_path / "base")
    config = ARConfig(base=base, lora=None, start_from=str(tmp_path / "ar"))
    again = SpeechLM.create(config, STAMP, seed=9)
    torch.testing.assert_close(again.eval()(batch).nll, lm.eval()(batch).nll)
    assert all(each.requires_grad for each in again.parameters())
    adapted = make(tmp_path / "other", LoRAConfig(rank=2))
    adapted.save(tmp_path / "adapters")
    other = save_base(tmp_path / "stranger", seed=5)
    for changes, stamp, reported in (
        ({"start_from": str(tmp_path / "adapters")}, STAMP, "has LoRA adapters"),
        ({"base": str(other)}, STAMP, "another text LLM"),
        ({"num_layers": 1}, STAMP, "another number of layers"),
        ({}, replace(STAMP, codebook_sizes=(9, 16, 16)), "another number of rows"),
    ):
        with pytest.raises(ValueError, match=reported):
            SpeechLM.create(replace(config, **changes), stamp, seed=0)
    slower = replace(STAMP, frame_rate=12.5)
    with pytest.raises(ValueError, match="another frame rate"):
        SpeechLM.create(config, slower, seed=0)
    SpeechLM.create(config, replace(STAMP, digest="f" * 16), seed=0)
    assert "it must have the same codebook 1" in caplog.text
    with pytest.raises(ValueError, match=r"ar\.start_from continues full fine-tuning"):
        ARConfig(base=base, start_from="x")


@pytest.mark.parametrize(("kind", "tied"), BASES)
@pytest.mark.parametrize("lora", [LoRAConfig(rank=2), None])
def test_merged_weights_give_the_same_logits(
    tmp_path: Path, kind: str, tied: bool, lora: LoRAConfig | None
) -> None:
    from transformers import AutoModelForCausalLM

    lm = make(tmp_path, lora, kind=kind, tied=tied)
    batch = batch_of(lm, tmp_path / "a.parquet")
    train(lm, batch)
    expected = lm.eval().lm(input_ids=batch.tokens).logits
    lm.save(tmp_path / "ar")
    merged = SpeechLM.load(tmp_path / "ar").lm
    merged.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for one in (merged, plain):
        # Measured 1e-6 and below; logits are some units large.
        assert (one(input_ids=batch.tokens).logits - expected).abs().max() < 1e-4
        embedding, head = one.get_input_embeddings(), one.get_output_embeddings()
        assert (embedding.weight is head.weight) == tied
    if lora is None:
        return
    old = load_base(tmp_path / "base").lm
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = (getattr(model, name)().weight for model in (old, plain))
        rows = lm.vocabulary.text_size
        assert torch.equal(after[:rows], before)
        trained = SpeechLM.create(ARConfig(base=str(tmp_path / "base"), lora=lora), STAMP, seed=0)
        drawn = getattr(trained.lm.get_base_model(), name)().weight
        assert not torch.equal(after[rows:], drawn[rows:])


def test_first_layers_only(tmp_path: Path) -> None:
    base = load_base(save_base(tmp_path), num_layers=1)
    assert len(base.lm.model.layers) == 1
    with pytest.raises(ValueError, match=r"ar\.num_layers is 3.*only 2 layers"):
        load_base(tmp_path, num_layers=3)


def test_digest_identifies_an_llm_in_any_precision(tmp_path: Path) -> None:
    one, other = (save_base(tmp_path / str(seed), seed=seed) for seed in range(2))
    digests = {digest_of(load_base(one).lm), load_base(one, dtype=torch.bfloat16).digest}
    assert len(digests) == 1
    assert load_base(other).digest not in digests


def test_another_base_is_refused(tmp_path: Path) -> None:
    lm = make(tmp_path)
    lm.save(tmp_path / "ar")
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="not the text LLM"):
        SpeechLM.load(tmp_path / "ar", base=other)


def test_voice_and_base_move_together(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    lm = make(tmp_path / "here")
    lm.save(tmp_path / "here" / "voice" / "ar")
    shutil.move(tmp_path / "here", tmp_path / "there")
    SpeechLM.load(tmp_path / "there" / "voice" / "ar")


def test_a_missing_base_is_named_and_can_be_replaced(tmp_path: Path) -> None:
    lm = make(tmp_path)
    folder = tmp_path / "voice" / "ar"
    lm.save(folder)
    shutil.move(tmp_path / "base", tmp_path / "voice" / "llm")
    with pytest.raises(ValueError, match=r"base\.json.*is not there"):
        SpeechLM.load(folder)
    SpeechLM.load(folder, base=tmp_path / "voice" / "llm")
    record = json.loads((folder / BASE_FILE).read_text())
    (folder / BASE_FILE).write_text(json.dumps({**record, "name": "llm"}))
    SpeechLM.load(folder)


def save_gguf(base: Path, path: Path) -> None:
    """The LLM of a folder as one .gguf file."""
    from gguf import GGUFWriter

    source = load_base(base)
    config = source.lm.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    names = {index: token for token, index in source.tokenizer.get_vocab().items()}
    writer.add_token_list([names[index] for index in range(len(names))])
    writer.add_token_types([1] * len(names))
    writer.add_token_merges(["a t"])
    writer.add_eos_token_id(source.tokenizer.eos_token_id)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "model.layers": "blk", "model.norm": "output_norm",
        "model.embed_tokens": "token_embd",
    }  # fmt: skip
    for name, value in source.lm.named_parameters():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, value.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore")  # of reading the file, all of transformers' own
def test_a_gguf_file_is_a_base_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", pad_rows=0)
    (tmp_path / "a file").mkdir()
    path = tmp_path / "a file" / "tiny.gguf"
    save_gguf(base, path)
    rows = load_base(base).lm.get_input_embeddings().weight
    lm = SpeechLM.create(ARConfig(base=str(path), num_layers=1), STAMP, seed=0).eval()
    assert torch.equal(lm.lm.get_input_embeddings().weight[: len(rows)], rows)
    batch = batch_of(lm, tmp_path / "a.parquet")
    lm.save(tmp_path / "ar")
    loaded = SpeechLM.load(tmp_path / "ar")
    torch.testing.assert_close(loaded(batch).nll, lm(batch).nll, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["nowhere", "no/such/folder", "gone.gguf"])
def test_a_missing_base_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        load_base(tmp_path / name)


def test_a_folder_that_is_no_llm_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded as a text LLM"):
        load_base(tmp_path)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    base = save_base(tmp_path)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_base(base)


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    kept = {key: value for key, value in tensors.items() if key != name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack {name}"):
        load_base(base)
    save_file({**kept, name: torch.zeros(3, 3)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_base(base)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "base.json", "vocabulary.json"])
def test_an_ar_folder_that_lacks_a_file(tmp_path: Path, file: str) -> None:
    make(tmp_path).save(tmp_path / "ar")
    (tmp_path / "ar" / file).unlink()
    with pytest.raises(ValueError, match=file):
        SpeechLM.load(tmp_path / "ar")


@pytest.mark.parametrize("file", ["adapter_config.json", "base.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "{", "7"])
def test_a_damaged_file_of_an_ar_folder_is_named(tmp_path: Path, file: str, content: str) -> None:
    make(tmp_path).save(tmp_path / "ar")
    (tmp_path / "ar" / file).write_text(content)
    with pytest.raises(ValueError, match=file):
        SpeechLM.load(tmp_path / "ar")


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make(tmp_path).save(tmp_path / "ar")
    file = tmp_path / "ar" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.zeros(1, 1)}, file)
    with pytest.raises(ValueError, match="does not fit"):
        SpeechLM.load(tmp_path / "ar")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match="lacks"):
        SpeechLM.load(tmp_path / "ar")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        SpeechLM.load(tmp_path / "ar")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("megatron_core", "os"),
        ("megatron_config", {"a": 1}),
        ("peft_type", "PROMPT_TUNING"),
        ("r", 2**40),
        ("rank_pattern", {"(a+)+$": 2**40}),
        ("target_modules", "(.*a){20}"),
        ("init_lora_weights", "pissa"),
        ("layer_replication", [[0, 2**30]]),
    ],
)
def test_settings_of_adapters_that_voices_do_not_have(tmp_path: Path, key: str, value: Any) -> None:
    """peft would import modules by name, match patterns, or allocate memory."""
    make(tmp_path).save(tmp_path / "ar")
    file = tmp_path / "ar" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: a voice has no {key}"):
        SpeechLM.load(tmp_path / "ar")


@pytest.mark.parametrize("change", [{"text_size": 2**40}, {"num_merges": 2**40}])
def test_a_vocabulary_of_another_size_is_refused_before_it_is_made(
    tmp_path: Path, change: dict[str, int]
) -> None:
    make(tmp_path).save(tmp_path / "ar")
    file = tmp_path / "ar" / "vocabulary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=r"its vocabulary\.json has 10995116"):
        SpeechLM.load(tmp_path / "ar")


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2**30},
        {"hidden_size": 2**20},
        {"vocab_size": 2**40},
        {"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.B"}, "model_type": "own"},
    ],
)
def test_an_llm_that_is_larger_than_its_file_or_has_code(
    tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers asks on the terminal whether to run a model's code.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    base = save_base(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    (base / "a.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_base(base)

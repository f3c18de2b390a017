"""The exported causal LM: equal logits, equal tokens, and a card whose example runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base

from slm.config import ARConfig, LoRAConfig, SpeechFormConfig, TextConfig
from slm.data.coverage import Coverage
from slm.data.sequences import asr_context, tts_context
from slm.export.causal_lm import SAMPLES, export, load_export
from slm.export.voice_folder import voice_card
from slm.generation.asr import transcribe
from slm.models.ar import SpeechLM
from slm.tokenization.acoustic_bpe import AcousticBPE
from slm.tokenization.vocabulary import encode_texts

pytestmark = quiet()


def trained(
    folder: Path,
    *,
    lora: bool = True,
    text: TextConfig | None = None,
    units: SpeechFormConfig | None = None,
    **base,
) -> SpeechLM:
    """A loaded AR, every trained weight of which has moved."""
    config = ARConfig(
        base=str(save_base(folder / "base", **base)),
        lora=LoRAConfig(rank=2) if lora else None,
        text=text or TextConfig(normalize=False),
        speech=units or SpeechFormConfig(),
    )
    lm = SpeechLM.create(config, STAMP, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    lm.save(folder / "ar")
    return SpeechLM.load(folder / "ar")


@pytest.mark.parametrize(
    ("lora", "base"),
    [
        (True, {"tied": True}),
        (True, {"tied": False}),
        (False, {"tied": True, "kind": "gpt2"}),
        (False, {"tied": False, "eos": False}),
    ],
)
def test_logits_are_equal(tmp_path: Path, lora: bool, base: dict) -> None:
    from transformers import AutoModelForCausalLM

    lm = trained(tmp_path, lora=lora, **base)
    export(lm, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(lm.vocabulary.size, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = lm.lm(input_ids=ids).logits
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == base["tied"]
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(input_ids=ids).logits, expected)
    assert loaded.generation_config.eos_token_id == [lm.vocabulary.eos, lm.vocabulary.speech_end]


@pytest.mark.parametrize("eos", [True, False])
def test_every_id_has_a_token_and_strings_are_layouts(tmp_path: Path, eos: bool) -> None:
    from transformers import AutoTokenizer

    units = SpeechFormConfig()
    if not eos:  # Merges, in the same go.
        random = np.random.default_rng(0)
        codes = [np.repeat(random.integers(0, 24, 20), 2) for _ in range(40)]
        AcousticBPE.train(iter(codes), STAMP, size=30).save(tmp_path / "u.model")
        units = SpeechFormConfig(bpe_model=str(tmp_path / "u.model"), tts_form="bpe")
    lm = trained(tmp_path, units=units, eos=eos, pad_rows=5)
    export(lm, tmp_path / "out")
    assert (tmp_path / "out" / "units.model").is_file() == (not eos)
    assert lm.vocabulary.num_merges == (0 if eos else 30)
    old = AutoTokenizer.from_pretrained(tmp_path / "base")
    new = AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary = lm.vocabulary
    names = new.convert_ids_to_tokens(list(range(vocabulary.size)))
    assert None not in names
    assert len(set(names)) == len(new) == vocabulary.size
    assert new.convert_tokens_to_ids("<|speech|>") == vocabulary.speech
    assert new.convert_tokens_to_ids("<|s_7|>") == vocabulary.first_speech + 7
    speech = vocabulary.encode_speech(np.array([3, 1, 4])).tolist()
    for text in SAMPLES:
        assert new(text)["input_ids"] == old(text)["input_ids"]
        (ids,) = encode_texts(old, [text])
        written = f"<|text|>{text}<|speech|><|s_3|><|s_1|><|s_4|>"
        layout = tts_context(vocabulary, ids, speech)
        assert new(written, add_special_tokens=False)["input_ids"] == layout
        assert new.decode(layout) == written
    written = "<|speech|><|s_3|><|s_1|><|s_4|><|/speech|><|text|>"
    assert new(written, add_special_tokens=False)["input_ids"] == asr_context(vocabulary, speech)


@pytest.mark.parametrize("spoken", ["tokens", "characters"])
def test_the_example_of_the_card_runs(
    tmp_path: Path, spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What codes are made from takes no merges, which the table has all the same.
    AcousticBPE.train(iter([np.tile(np.arange(24), 4)] * 8), STAMP, size=30).save(
        tmp_path / "u.model"
    )
    units = SpeechFormConfig(bpe_model=str(tmp_path / "u.model"), asr_form="bpe")
    text = TextConfig(normalize=False, tts_form=spoken, asr_form=spoken)
    lm = trained(tmp_path, text=text, units=units)
    out, vocabulary = tmp_path / "out", lm.vocabulary
    export(lm, out)
    card = (out / "README.md").read_text()
    assert f"| {vocabulary.speech_end} | `<|/speech|>` |" in card
    speak, hear = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert max(len(code.strip().splitlines()) for code in (speak, hear)) <= 16
    monkeypatch.chdir(out)
    names: dict = {}
    torch.manual_seed(0)
    exec(speak, names)
    (text,) = lm.tokenizer.text_ids("tts", ["red hen the cat"])
    layout = tts_context(vocabulary, text, vocabulary.encode_speech(np.array([3, 1, 4])))
    assert names["ids"].tolist() == [layout]
    made = names["made"][0, len(layout) :].tolist()
    spoken_ids = made[:-1] if made[-1] == vocabulary.speech_end else made
    assert set(spoken_ids) <= set(lm.tokenizer.speech_range("tts"))
    assert len(made) >= 10
    assert names["codes"] == [token - vocabulary.first_speech for token in spoken_ids]
    exec(hear, names)
    layout = asr_context(vocabulary, vocabulary.encode_speech(np.array([3, 1, 4])))
    assert names["ids"].tolist() == [layout]
    made = names["made"][0, len(layout) :].tolist()
    asked = range(256 if spoken == "characters" else vocabulary.num_text)
    assert f"text = {{*range({asked.start}, {asked.stop}), {vocabulary.eos}}}" in hear
    assert set(made) <= {*asked, vocabulary.eos}
    assert isinstance(names["transcript"], str)


@pytest.mark.parametrize("spoken", ["tokens", "characters"])
def test_the_examples_of_an_interleaved_model_run(
    tmp_path: Path, spoken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextConfig(normalize=False, tts_form=spoken, asr_form=spoken, interleaved=True)
    lm = trained(tmp_path, text=text)
    out, v = tmp_path / "out", lm.vocabulary
    export(lm, out)
    speak, hear = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(out)
    names: dict = {}
    torch.manual_seed(0)
    exec(speak, names)
    prompt = v.encode_speech(np.array([3, 1, 4]))
    (whole,) = lm.tokenizer.text_ids("tts", ["red hen the cat"])
    the, cat = lm.tokenizer.text_ids("tts", ["the", "cat"])
    codes = v.encode_speech(np.array(names["codes"])).tolist()
    context = [*tts_context(v, whole, prompt), v.speech_end, *the, v.speech]
    ids, between = names["ids"], [v.speech_end, *cat, v.speech]
    assert ids[: len(context)] == context
    first = ids.index(v.speech_end, len(context)) - len(context)
    assert 0 < first < len(codes)
    assert ids[len(context) :] == [*codes[:first], *between, *codes[first:]]
    exec(hear, names)
    ids = names["ids"]
    lead = [v.speech, *prompt.tolist(), v.text]
    assert ids[: len(lead)] == lead
    assert ids[-1] == v.eos
    second = [v.eos, v.speech, *v.encode_speech(np.array([1, 5])).tolist(), v.speech_end, v.text]
    assert any(ids[at : at + len(second)] == second for at in range(len(ids)))
    assert isinstance(names["transcript"], str)


def test_it_replaces_an_earlier_export_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = trained(tmp_path)
    with pytest.raises(ValueError, match="contains other files than an export"):
        export(lm, tmp_path / "base")
    with pytest.raises(ValueError, match="is a file"):
        export(lm, tmp_path / "base" / "config.json")
    out = tmp_path / "deep" / "out"
    export(lm, out)
    (out / "left-over").write_text("")
    before = json.loads((out / "export.json").read_text())
    assert before["base"]["digest"] == lm.origin["digest"]
    export(lm, out)
    assert not (out / "left-over").exists()
    # A failed one leaves the earlier one, and nothing beside it.
    monkeypatch.setattr("slm.export.causal_lm.export_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(lm, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "model.safetensors").is_file()


def test_an_earlier_export_survives_a_failed_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, out = trained(tmp_path), tmp_path / "deep" / "out"
    export(lm, out)
    (out / "mine").write_text("")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError("not today")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError, match="not today"):
        export(lm, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "mine").exists()


def test_an_export_has_no_absolute_paths(tmp_path: Path) -> None:
    lm = trained(tmp_path, text=TextConfig(normalize=False))
    assert lm.origin["name"].startswith(str(tmp_path))
    export(lm, tmp_path / "out")
    for path in (tmp_path / "out").glob("*"):
        if path.suffix in (".json", ".md"):
            assert str(tmp_path) not in path.read_text(), path.name
    name = f"{tmp_path.name}/base"
    assert f"# {name} with speech" in (tmp_path / "out" / "README.md").read_text()
    card = voice_card(lm.origin, STAMP, Coverage.of(["a cat"], longest_frames=9), {})
    assert f"# A voice trained from {name}" in card
    assert str(tmp_path) not in card


def test_an_export_transcribes_as_the_voice_did(tmp_path: Path) -> None:
    lm = trained(tmp_path)
    export(lm, tmp_path / "out")
    codes = [np.random.default_rng(seed).integers(0, 8, 20 + seed) for seed in range(3)]
    loaded = load_export(tmp_path / "out")
    assert transcribe(loaded, codes) == transcribe(lm, codes)
    with pytest.raises(ValueError, match=r"is no LLM that `slm export` wrote"):
        load_export(tmp_path / "base")

"""recipes/ship_voice.py, and the consistency of models/small."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, voiced
from safetensors.torch import load_file
from tiny_slm import TEXT, quiet, save_voice

from codec import Codec, load_codec
from codec.models.codec import is_half_precision, save_half_precision, to_half_precision
from recipes.ship_voice import main
from slm.config import ARConfig, SamplingConfig
from slm.data.coverage import Coverage
from slm.data.prompts import load_prompts
from slm.export.voice_folder import load_sampling
from slm.models.ar import SpeechLM
from slm.models.nar import NAR
from slm.tokenization.vocabulary import Vocabulary
from slm.voice import Voice

pytestmark = quiet()

SHIPPED = ROOT / "models" / "small"
MEGABYTE = 1_000_000
MOST_PARAMETERS = 20_000_000


@pytest.fixture
def folder(tmp_path: Path, tiny_codec_folder: Path) -> Path:
    """A voice around a codec in half precision, whose AR has trained every weight."""
    save_half_precision(
        to_half_precision(Codec.from_pretrained(tiny_codec_folder)), tmp_path / "codec"
    )
    voice = save_voice(tmp_path, tmp_path / "codec")
    config = ARConfig(base=str(tmp_path / "base"), lora=None)
    lm = SpeechLM.create(config, Codec.from_pretrained(tmp_path / "codec").stamp, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    lm.save(voice / "ar")
    for file in (voice / "ar").glob("adapter*"):
        file.unlink()
    Coverage.of([TEXT], longest_frames=60).save(voice / "ar")
    (voice / "README.md").write_text("its card")
    return voice


def ship(folder: Path, *given: str) -> Voice:
    out = folder.parent / "shipped"
    main([f"voice={folder}", f"out={out}", f"base={folder.parent / 'base'}", *given])
    return Voice.from_pretrained(out)


def test_shipped_voice_is_close_to_the_trained_one(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    before, after = Voice.from_pretrained(folder), ship(folder, "rank=64")
    printed = json.loads(capsys.readouterr().out.splitlines()[0])
    assert printed["mb"] == pytest.approx(
        sum(file.stat().st_size for file in Path(printed["out"]).rglob("*") if file.is_file())
        / 1e6,
        abs=0.01,
    )
    assert after.codec.stamp.digest == before.codec.stamp.digest
    assert list(after.prompts) == list(before.prompts) == ["ann"]
    ids = torch.tensor([[*before.lm.vocabulary.new_ids]])
    with torch.no_grad():
        one, other = before.lm.lm(ids).logits, after.lm.lm(ids).logits
    new = list(before.lm.vocabulary.new_ids)
    torch.testing.assert_close(one[..., new], other[..., new], atol=0.05, rtol=0.05)
    out = folder.parent / "shipped"
    for file in ("codec/model", "nar/model", "ar/adapter_model"):
        kinds = {tensor.dtype for name, tensor in load_file(out / f"{file}.safetensors").items()
                 if "cluster_size" not in name and "num_updates" not in name}  # fmt: skip
        assert kinds == {torch.float16}
    assert not list((out / "ar").glob("tokenizer*"))
    assert str(folder.parent) not in (out / "ar" / "vocabulary.json").read_text()
    assert "- `ann`: nobody" in (out / "README.md").read_text()
    # Shipping again keeps an edited card.
    (out / "README.md").write_text("edited")
    (out / "codec" / "README.md").write_text("the codec's")
    ship(folder, "rank=2")
    assert (out / "README.md").read_text() == "edited"
    assert (out / "codec" / "README.md").read_text() == "the codec's"


def test_prompts_keep_their_credits(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", voiced(1.0), 16_000)
    record = {"name": "me", "audio": "a.wav", "text": "the cat", "credit": "me, CC0"}
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    voice = ship(folder, f"prompts={tmp_path / 'p.jsonl'}")
    assert list(voice.prompts) == ["me"]
    assert voice.prompts["me"].credit == "me, CC0"
    assert voice.prompts["me"].text == "the cat"
    assert voice.prompts["me"].codes.shape[0] == 3
    assert isinstance(voice.prompts["me"].codes, np.ndarray)
    (tmp_path / "p.jsonl").write_text('{"name": "me"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: needs name, audio, text and credit"):
        ship(folder, f"prompts={tmp_path / 'p.jsonl'}")


def test_voice_with_adapters_keeps_them_and_its_sampling(
    tmp_path: Path, tiny_codec_folder: Path
) -> None:
    save_half_precision(
        to_half_precision(Codec.from_pretrained(tiny_codec_folder)), tmp_path / "codec"
    )
    folder = save_voice(tmp_path, tmp_path / "codec")
    voice = Voice.from_pretrained(folder)
    voice.sampling = SamplingConfig(temperature=0.77, checks=("loop",))
    voice.save_pretrained(folder)
    shipped = ship(folder)
    assert shipped.sampling == voice.sampling
    ids = torch.tensor([[*voice.lm.vocabulary.new_ids]])
    with torch.no_grad():
        one, other = voice.lm.lm(ids).logits, shipped.lm.lm(ids).logits
    torch.testing.assert_close(one, other, atol=0.05, rtol=0.05)


def test_invalid_result_keeps_the_earlier_voice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(folder)
    before = (folder.parent / "shipped" / "ar" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("recipes.ship_voice.halve_file", lambda path: path.write_bytes(b""))
    with pytest.raises(ValueError, match="safetensors"):
        ship(folder)
    after = folder.parent / "shipped" / "ar" / "adapter_model.safetensors"
    assert after.read_bytes() == before


def test_user_errors(folder: Path, tmp_path: Path, tiny_codec_folder: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="neither empty nor a voice"):
        main([f"voice={folder}", f"out={tmp_path / 'full'}"])
    whole = save_voice(tmp_path / "other", tiny_codec_folder)
    with pytest.raises(ValueError, match="is not in half precision"):
        main([f"voice={whole}", f"out={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="rank must be at least 1"):
        main([f"voice={folder}", "rank=0"])


def test_models_small_is_small_and_has_no_absolute_paths() -> None:
    files = [file for file in SHIPPED.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 45 * MEGABYTE
    assert sum(sizes) <= 90 * MEGABYTE
    for file in files:
        if file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not re.search(r'"/|(^|\s)/(home|root|tmp)/', text), file
    base = json.loads((SHIPPED / "ar" / "base.json").read_text())
    assert base["relative"] == "../../smollm2-135m-instruct"


@pytest.mark.parametrize("part", ["", "codec"])
def test_cards_have_their_sections(part: str) -> None:
    card = (SHIPPED / part / "README.md").read_text(encoding="utf-8")
    for heading in ("Scores", "Data", "Training", "Limits"):
        assert f"\n## {heading}\n" in card
    assert "license: apache-2.0" in card


def test_parts_of_models_small_are_consistent() -> None:
    codec = load_codec(SHIPPED / "codec")
    assert is_half_precision(codec)
    nar = NAR.load(SHIPPED / "nar")
    for model in (codec, nar):
        assert sum(parameter.numel() for parameter in model.parameters()) <= MOST_PARAMETERS
    stamp = codec.stamp
    assert Vocabulary.load(SHIPPED / "ar").codec.digest == stamp.digest
    assert nar.config.codebook_sizes == stamp.codebook_sizes
    bits = sum(torch.tensor(stamp.codebook_sizes).log2().tolist())
    assert bits * stamp.frame_rate <= 2000
    sampling = load_sampling(SHIPPED)
    assert sampling is not None
    assert sampling.max_attempts > 1
    prompts = load_prompts(SHIPPED / "prompts")
    assert len(prompts) >= 2
    for prompt in prompts.values():
        prompt.check(stamp.codebook_sizes)
        assert prompt.text
        assert re.search(r"CC0|CC BY|public domain", prompt.credit or "")
    one = prompts["kathleen"]
    (made,) = nar.decode([""], [one.codes[:, :20]], [one.codes[0, 20:40]])
    assert made.shape == (8, 20)
    # The true codes are predicted more often than by chance (1 in 1,024).
    assert (made[1] == one.codes[1, 20:40]).mean() > 0.02

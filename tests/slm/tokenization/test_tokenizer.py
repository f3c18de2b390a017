"""tokenizer.py: each form of text and speech comes back from its ids, from a saved voice too."""

import copy
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import STAMP, quiet, save_base
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from slm.config import ARConfig, LoRAConfig, SpeechFormConfig, TextConfig
from slm.models.ar import Base, SpeechLM, load_base
from slm.tokenization import tokenizer as alphabet_module
from slm.tokenization.acoustic_bpe import AcousticBPE
from slm.tokenization.tokenizer import BPE_FILE, FILE_NAME, SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary

pytestmark = quiet()
SIZE = STAMP.codebook_sizes[0]
CODES = np.array([1, 2, 3, 1, 2, 3, 3, 3, 9, 1, 2, 3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


def save_units(path: Path, remove_runs: bool = False, digest: str = STAMP.digest) -> str:
    stamp = dataclasses.replace(STAMP, digest=digest)
    AcousticBPE.train([np.tile([1, 2, 3], 20)], stamp, 2, remove_runs).save(path)
    return str(path)


def make(
    base: Base, text: TextConfig | None = None, speech: SpeechFormConfig | None = None
) -> SpeechTextTokenizer:
    text, speech = text or TextConfig(), speech or SpeechFormConfig()
    return SpeechTextTokenizer.create(base.lm, base.tokenizer, STAMP, text, speech)


TEXTS = ["The cat. ", "at a mat", "Zoe\u0308 \u4f60\u597d \U0001f600 a . b  c\n", "<|end|>", ""]


@pytest.mark.parametrize("form", ["tokens", "characters"])
def test_transcripts_come_back(base: Base, form: str) -> None:
    tokenizer = make(base, TextConfig(asr_form=form))
    for ids, text in zip(tokenizer.text_ids("asr", TEXTS), TEXTS, strict=True):
        came = tokenizer.decode_text(ids)
        composed = text.replace("e\u0308", "\u00eb")
        assert came == (composed if form == "characters" else text).strip()


def test_characters_are_the_llms_tokens_of_each_alone(base: Base) -> None:
    tokenizer = make(base, TextConfig(tts_form="characters", asr_form="characters"))
    alone = {c: base.tokenizer(c, add_special_tokens=False)["input_ids"] for c in "at \u00eb"}
    assert len(alone["\u00eb"]) == 2
    (ids,) = tokenizer.text_ids("tts", ["at \u00eb"])
    assert ids == [token for c in "at \u00eb" for token in alone[c]]
    assert tokenizer.text_ids("asr", ["at \u00eb"]) == [ids]
    # Text alone, and the other forms, have the tokenizer's own merge of a and t.
    assert len(tokenizer.text_ids("text", ["at"])[0]) == 1
    assert len(make(base).text_ids("tts", ["at"])[0]) == 1


def test_characters_are_of_bytes_and_those_alone(base: Base) -> None:
    """What is never written need not be a row of the head; a merge of bytes is no character's."""
    core = json.loads(base.tokenizer.backend_tokenizer.to_str())
    core["model"]["merges"].append(["\u00c3", "\u00ab"])  # The bytes of e with two dots.
    core["model"]["vocab"]["\u00c3\u00ab"] = len(core["model"]["vocab"])
    core["added_tokens"] = []
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    assert len(merging("\u00eb", add_special_tokens=False)["input_ids"]) == 1
    for text_tokenizer in (base.tokenizer, merging):
        vocabulary = Vocabulary.of(base.lm, text_tokenizer, STAMP)
        tokenizer = SpeechTextTokenizer(
            vocabulary, text_tokenizer, TextConfig(asr_form="characters")
        )
        made = tokenizer.text_range("asr")
        assert len(made) == 256
        assert set(made) == set(text_tokenizer.convert_tokens_to_ids(ByteLevel.alphabet()))
        written = tokenizer.text_ids("asr", [*TEXTS, "\u00eb"])
        assert {token for ids in written for token in ids} <= set(made)
        assert tokenizer.decode_text(written[-1]) == "\u00eb"
        assert tokenizer.text_range("text") == range(vocabulary.num_text)
        # What is spoken is spelt by each character's own tokens, as it always was.
        spoken = SpeechTextTokenizer(vocabulary, text_tokenizer, TextConfig(tts_form="characters"))
        assert spoken.text_ids("tts", ["\u00eb"]) == [text_tokenizer("\u00eb")["input_ids"]]
    assert make(base).text_range("asr") == range(len(base.tokenizer))


def test_bytes_that_are_scattered_or_lacking_are_not_taken(base: Base) -> None:
    core = json.loads(base.tokenizer.backend_tokenizer.to_str())
    text = TextConfig(asr_form="characters")

    def made_of(vocabulary: dict[str, int], unknown: str | None = None) -> SpeechTextTokenizer:
        core["model"] |= {"vocab": vocabulary, "merges": [], "unk_token": unknown}
        core["added_tokens"] = []
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(core)), unk_token=unknown
        )
        return SpeechTextTokenizer(make(base).vocabulary, tokenizer, text)

    names = sorted(ByteLevel.alphabet())
    spread = {name: 3 * index for index, name in enumerate(names)}
    assert not made_of(spread).writes_bytes
    assert made_of({name: index for index, name in enumerate(names)}).writes_bytes
    # Neither the space nor any other byte: what it makes of a space is what it makes of a byte.
    assert not made_of({"<unk>": 0, "\u4f60": 1}, "<unk>").writes_bytes


def test_voices_from_before_write_as_they_did(base: Base, tmp_path: Path) -> None:
    tokenizer = make(base, TextConfig(asr_form="characters"))
    tokenizer.save(tmp_path)
    assert SpeechTextTokenizer.load(tmp_path, base.tokenizer).writes_bytes
    record = json.loads((tmp_path / FILE_NAME).read_text())
    del record["bytes"]
    (tmp_path / FILE_NAME).write_text(json.dumps(record))
    older = SpeechTextTokenizer.load(tmp_path, base.tokenizer)
    assert older.text_range("asr") == range(older.vocabulary.num_text)
    older.save(tmp_path)
    assert not SpeechTextTokenizer.load(tmp_path, base.tokenizer).writes_bytes


class Prefixing:
    """A tokenizer that puts a space before every text, but has characters and bytes."""

    unk_token_id = 0

    def __init__(self, pieces: list[str]):
        self.pieces = ["<unk>", "\u2581a", *pieces]

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] for _ in texts]}

    def convert_tokens_to_ids(self, names: list[str]) -> list[int]:
        return [self.pieces.index(name) if name in self.pieces else 0 for name in names]

    def decode(self, ids: list[int], **_: object) -> str:
        pieces = [self.pieces[token] for token in ids]
        if all(piece.startswith("<0x") for piece in pieces):
            return bytes(int(piece[3:5], 16) for piece in pieces).decode()
        return "".join(pieces).replace("\u2581", " ")


def test_tokenizers_that_put_a_space_before_words(base: Base) -> None:
    vocabulary, text = make(base).vocabulary, TextConfig(asr_form="characters")
    tokenizer = SpeechTextTokenizer(
        vocabulary, Prefixing(["a", "\u2581", "<0xC3>", "<0xAB>"]), text, SpeechFormConfig()
    )
    assert tokenizer.text_ids("asr", ["a \u00eb"]) == [[2, 3, 4, 5]]
    assert tokenizer.text_range("asr") == range(vocabulary.num_text)
    with pytest.raises(ValueError, match="cannot spell 'b' by itself"):
        tokenizer.text_ids("asr", ["ab"])


def test_only_what_is_spoken_is_normalised(base: Base) -> None:
    tokenizer, plain = make(base), make(base, TextConfig(normalize=False))
    assert tokenizer.tts_form("5 cats") == "five cats"
    assert plain.tts_form("5 cats") == "5 cats"
    assert tokenizer.text_ids("tts", ["5 cats"]) == plain.text_ids("tts", ["five cats"])
    for task in ("asr", "text"):
        assert tokenizer.text_ids(task, ["5 cats"]) == plain.text_ids(task, ["5 cats"])


def test_what_is_all_in_capitals_is_lowered_but_in_text_alone(base: Base) -> None:
    tokenizer = make(base)
    assert tokenizer.tts_form("5 RED CATS") == "five red cats"
    assert tokenizer.normalize("RED CATS").num_tokens == tokenizer.normalize("red cats").num_tokens
    for task in ("tts", "asr"):
        assert tokenizer.text_ids(task, ["RED CATS"]) == tokenizer.text_ids(task, ["red cats"])
    assert tokenizer.text_ids("text", ["RED CATS"]) != tokenizer.text_ids("text", ["red cats"])


def test_phonemes_are_spelt_as_characters(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alphabet_module, "phonemes", lambda text: text.replace("a", "\u00e6"))
    tokenizer = make(base, TextConfig(tts_form="phonemes"))
    assert tokenizer.tts_form("5 cats") == "five c\u00e6ts"
    (ids,) = tokenizer.text_ids("tts", ["5 cats"])
    assert base.tokenizer.decode(ids) == "five c\u00e6ts"
    assert tokenizer.text_ids("asr", ["cats"]) == make(base).text_ids("asr", ["cats"])


@pytest.mark.parametrize("form", ["tokens", "characters"])
def test_how_much_there_is_to_say_does_not_depend_on_the_form(base: Base, form: str) -> None:
    tokenizer = make(base, TextConfig(tts_form=form))
    assert tokenizer.normalize("at 5").num_tokens == len(make(base).text_ids("tts", ["at five"])[0])


@pytest.mark.parametrize(
    ("spoken", "heard"), [("codes", "codes"), ("bpe", "codes"), ("codes", "bpe"), ("bpe", "bpe")]
)
def test_each_task_has_its_units(base: Base, tmp_path: Path, spoken: str, heard: str) -> None:
    model = save_units(tmp_path / "units.model")
    tokenizer = make(
        base, speech=SpeechFormConfig(bpe_model=model, tts_form=spoken, asr_form=heard)
    )
    first = tokenizer.vocabulary.first_speech
    merges = 2 if "bpe" in (spoken, heard) else 0
    assert tokenizer.vocabulary.size == first + SIZE + merges
    for task, form in (("tts", spoken), ("continuation", spoken), ("asr", heard)):
        ids = tokenizer.speech_ids(task, CODES)
        assert len(ids) == (6 if form == "bpe" else len(CODES))
        assert tokenizer.codes_of(ids).tolist() == CODES.tolist()
        assert tokenizer.frames(ids).sum() == len(CODES)
        assert tokenizer.uses_bpe(task) == (form == "bpe")
        allowed = tokenizer.speech_range(task)
        assert set(ids) <= set(allowed)
        assert len(allowed) == SIZE + (2 if form == "bpe" else 0)
    with pytest.raises(ValueError, match="is not"):
        tokenizer.codes_of([tokenizer.vocabulary.size])


def test_units_without_runs_are_for_hearing(base: Base, tmp_path: Path) -> None:
    model = save_units(tmp_path / "units.model", remove_runs=True)
    tokenizer = make(base, speech=SpeechFormConfig(bpe_model=model, asr_form="bpe"))
    ids = tokenizer.speech_ids("asr", np.array([4, 4, 1, 2, 3]))
    assert tokenizer.codes_of(ids).tolist() == [4, 1, 2, 3]
    with pytest.raises(ValueError, match=r"speech\.tts_form=bpe: .*removes runs"):
        make(base, speech=SpeechFormConfig(bpe_model=model, tts_form="bpe"))


def test_units_of_another_codec_are_refused(base: Base, tmp_path: Path) -> None:
    model = save_units(tmp_path / "units.model", digest="f" * 16)
    with pytest.raises(ValueError, match="train a model on them"):
        make(base, speech=SpeechFormConfig(bpe_model=model, asr_form="bpe"))


def test_a_voice_keeps_its_units(folder: Path, base: Base, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "my.model"
    model = save_units(path)
    config = ARConfig(
        base=str(folder),
        lora=LoRAConfig(rank=2),
        text=TextConfig(tts_form="characters", normalize=False),
        speech=SpeechFormConfig(bpe_model=model, tts_form="bpe", asr_form="bpe"),
    )
    lm = SpeechLM.create(config, STAMP, seed=0)
    assert lm.lm.get_output_embeddings().weight.shape[0] == lm.vocabulary.size
    lm.save(tmp_path / "ar")
    shutil.rmtree(path.parent)
    assert str(path.parent) not in (tmp_path / "ar" / FILE_NAME).read_text()
    loaded = SpeechLM.load(tmp_path / "ar").tokenizer
    assert loaded.vocabulary == lm.vocabulary
    assert loaded.text == config.text
    assert (
        loaded.speech_ids("tts", CODES).tolist() == lm.tokenizer.speech_ids("tts", CODES).tolist()
    )
    # What was loaded can be saved again.
    loaded.save(tmp_path / "again")
    assert SpeechTextTokenizer.load(tmp_path / "again", base.tokenizer).speech == loaded.speech
    (tmp_path / "ar" / BPE_FILE).unlink()
    with pytest.raises(ValueError, match="no such acoustic BPE model"):
        SpeechTextTokenizer.load(tmp_path / "ar", base.tokenizer)


def test_units_that_do_not_fit_the_vocabulary_are_refused(base: Base, tmp_path: Path) -> None:
    model = save_units(tmp_path / "units.model")
    make(base, speech=SpeechFormConfig(bpe_model=model, asr_form="bpe")).save(tmp_path / "ar")
    AcousticBPE.train([np.array([1, 2])], STAMP, 1).save(tmp_path / "ar" / BPE_FILE)
    with pytest.raises(ValueError, match="has 1 merges, the vocabulary 2"):
        SpeechTextTokenizer.load(tmp_path / "ar", base.tokenizer)
    with pytest.raises(ValueError, match=r"use SpeechTextTokenizer\.create"):
        SpeechTextTokenizer(
            make(base).vocabulary,
            base.tokenizer,
            None,
            SpeechFormConfig(bpe_model="x", asr_form="bpe"),
        )


@pytest.mark.parametrize("heard", ["codes", "bpe"])
def test_units_that_nothing_uses_are_told(base: Base, tmp_path: Path, caplog, heard: str) -> None:
    make(base, speech=SpeechFormConfig(bpe_model=save_units(tmp_path / "my.units"), asr_form=heard))
    assert ("my.units is not used" in caplog.text) == (heard == "codes")


def test_older_and_damaged_voices(base: Base, tmp_path: Path) -> None:
    make(base).save(tmp_path)
    for damaged in (
        {"text": {"normalise": True}, "units": {}},
        {"text": {"spoken": "letters"}, "units": {}},
        {"text": {"written": "phonemes"}, "units": {}},
        {"text": {}, "units": {"heard": "words"}},
        {"text": {}, "units": {"spoken": "words"}},
        {"text": {}},
    ):
        (tmp_path / FILE_NAME).write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=FILE_NAME):
            SpeechTextTokenizer.load(tmp_path, base.tokenizer)
    (tmp_path / FILE_NAME).unlink()
    assert SpeechTextTokenizer.load(tmp_path, base.tokenizer).text == TextConfig(normalize=False)


@pytest.mark.parametrize("name", ["<|text|>", "<|s_3|>", "<|unused_260|>"])
def test_a_text_llm_that_has_one_of_the_new_tokens_is_refused(base: Base, name: str) -> None:
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens([name])
    with pytest.raises(ValueError, match=rf"already has the token {re.escape(name)}.*ar\.base"):
        SpeechTextTokenizer.create(base.lm, tokenizer, STAMP, TextConfig(), SpeechFormConfig())


@pytest.mark.parametrize("form", ["tokens", "characters"])
def test_half_of_a_surrogate_pair_is_named(base: Base, form: str) -> None:
    tokenizer = make(base, TextConfig(tts_form=form))
    for spell in (tokenizer.normalize, tokenizer.tts_form):
        with pytest.raises(ValueError, match=r"has \\udc80, half of a surrogate pair"):
            spell("half \udc80")

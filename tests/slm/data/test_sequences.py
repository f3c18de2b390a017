"""slm/data/sequences.py: the layouts, what the loss covers, what may be said."""

import logging
from pathlib import Path

import numpy as np
import pytest
from tiny_slm import STAMP, quiet, save_base, save_shard

from codec.tokens import TokenShard
from codec.transcripts import lowercase_if_all_caps
from slm.data.corpus import Ragged, usable
from slm.data.coverage import Coverage
from slm.data.sequences import (
    ASR,
    CONTINUATION,
    TASKS,
    TEXT,
    TTS,
    Context,
    ForcedTokens,
    PlainFormat,
    layout,
    tts_context,
)
from slm.models.ar import Base, load_base
from slm.tokenization.text_normalization import join_texts, script_of
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary

pytestmark = quiet()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(save_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def vocabulary(base: Base) -> Vocabulary:
    return Vocabulary.of(base.lm, base.tokenizer, STAMP)


def test_layouts(vocabulary: Vocabulary) -> None:
    v = vocabulary
    text, speech = [5, 6], vocabulary.encode_speech(np.array([3, 0])).tolist()
    expected = {
        TTS: ([v.text, *text, v.speech], [*speech, v.speech_end]),
        ASR: ([v.speech, *speech, v.speech_end, v.text], [*text, v.eos]),
        CONTINUATION: ([v.speech], [*speech, v.speech_end]),
        TEXT: ([5], [6]),
    }
    for task, (context, target) in expected.items():
        tokens, num_context, _ = layout(task, vocabulary, text, speech)
        assert tokens.tolist() == context + target
        assert num_context == len(context)


def test_a_prompt_stands_where_its_codes_stood_in_training(vocabulary: Vocabulary) -> None:
    speech = vocabulary.encode_speech(np.array([3, 0, 2, 1]))
    trained = layout(TTS, vocabulary, [5, 6], speech).tokens.tolist()
    context = tts_context(vocabulary, [5, 6], speech[:2])
    assert trained[: len(context)] == context


def test_texts_are_joined_like_one_transcript() -> None:
    assert join_texts(" one two ", "three") == "one two three"
    assert join_texts("", "three") == "three"


def test_what_is_all_in_capitals_is_lowered() -> None:
    assert lowercase_if_all_caps("IT'S 5 O'CLOCK, I SAY") == "it's 5 o'clock, i say"
    for kept in ("I", "NASA", "NASA - ", "Good MORNING", "12 34", "\u4f60\u597d \u4f60", ""):
        assert lowercase_if_all_caps(kept) == kept


COVERAGE = Coverage.of(["Hello there.", "bye 7"], longest_frames=100)


def test_coverage_names_the_letter_and_its_script() -> None:
    with pytest.raises(ValueError, match=r"'\u043f' of the script CYRILLIC.*trained on LATIN"):
        COVERAGE.check("hello \u043f")


def test_forms_of_a_letter_are_of_its_script() -> None:
    assert [script_of(letter) for letter in "\u00ba\u00aa\uff21\u00b5"] == [*["LATIN"] * 3, "GREEK"]
    COVERAGE.check("N\u00ba 7")


@pytest.mark.parametrize("text", ["", "  ", "...!", "\u3002"])
def test_a_text_with_nothing_to_say(text: str) -> None:
    with pytest.raises(ValueError, match="has no words"):
        COVERAGE.check(text)


def test_known_scripts_pass_and_unseen_characters_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        COVERAGE.log_unseen("Hello")
        assert not caplog.records
        COVERAGE.check("h\u00e9llo")
        COVERAGE.log_unseen("h\u00e9llo")
    assert "\u00e9" in caplog.text


def test_coverage_comes_back(tmp_path: Path) -> None:
    COVERAGE.save(tmp_path)
    assert Coverage.load(tmp_path) == COVERAGE
    (tmp_path / "coverage.json").write_text("{}")
    with pytest.raises(ValueError, match=r"coverage\.json"):
        Coverage.load(tmp_path)


class Halves(SpeechTextTokenizer):
    """Every other code of speech has an id, as if pieces of acoustic BPE had two codes."""

    def uses_bpe(self, task: str) -> bool:
        return True

    def speech_ids(self, task: str, codes: np.ndarray) -> np.ndarray:
        return super().speech_ids(task, codes)[::2]


@pytest.mark.parametrize("kind", [SpeechTextTokenizer, Halves])
def test_plain_sequences_have_the_lengths_they_state(
    base: Base, vocabulary: Vocabulary, tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slm.data.sequences.TEXTS_AT_ONCE", 2)
    form = PlainFormat(kind(vocabulary, base.tokenizer))
    corpus = usable(TokenShard.open(save_shard(tmp_path / "a.parquet", 5)))
    codes = [corpus.codes(row)[0] for row in range(5)]
    for task, name in enumerate(TASKS[:3]):
        examples = form.examples(task, corpus, Ragged(codes, np.uint16), seed=0)
        assert len(examples.lengths) == len(examples.targets) == 5
        for row, (length, targets) in enumerate(
            zip(examples.lengths, examples.targets, strict=True)
        ):
            made = examples[row]
            assert (len(made.tokens), len(made.tokens) - made.num_context) == (length, targets)
            text = form.tokenizer.text_ids("asr", [corpus.texts[row]])[0]
            speech = form.tokenizer.speech_ids(name, codes[row].astype(np.int64))
            expected = layout(task, vocabulary, [] if task == CONTINUATION else text, speech)
            assert made.tokens.tolist() == expected.tokens.tolist()
    assert form.num_forced(form.tokenizer.normalize("a cat")) == 0
    assert (form.asr_tokens_per_second, form.scores_text) == (8.0, True)
    assert form.asr_context(np.arange(4)).ids == form.asr_context(np.arange(4)).tokens


def test_forced_tokens_count_the_end_tokens_before_them() -> None:
    forced = ForcedTokens(((5, 6), (7,)), (1, 2, 3))
    assert (forced.ids, forced.least) == ([0, 5, 6, 0, 7], 0)
    assert Context([3, 4], forced).ids == [3, 4, 0, 5, 6, 0, 7]

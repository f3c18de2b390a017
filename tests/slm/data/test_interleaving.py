"""Speech word by word: training sequences, and what generation is given."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, make_rows, quiet, save_base, tokenizer_of

from codec.tokens import TokenShard, write_shard
from slm import voice as preparing
from slm.config import ARConfig, BatchConfig, SamplingConfig, TaskConfig, TextConfig
from slm.data.ar import IGNORE, ARData
from slm.data.corpus import usable
from slm.data.coverage import Coverage
from slm.data.interleaving import (
    InterleavedFormat,
    read_word_boundaries,
    spelled_words,
    write_word_boundaries,
)
from slm.data.prompts import Prompt
from slm.data.sequences import TTS, tts_context
from slm.generation.asr import transcribe
from slm.generation.rerank import transcripts
from slm.generation.sampling import (
    Generated,
    RepetitionAwareSampler,
    Request,
    TokenStream,
    generate,
    speech_only,
)
from slm.generation.tts import Models
from slm.models.ar import SpeechLM
from slm.tokenization.text_normalization import NO_TEXT
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.voice import Voice, num_words_in_prompt

pytestmark = quiet()

TEXT = TextConfig(interleaved=True)
CODES = np.arange(9)
EDGES = [0, 2, 5, 9]


class Chance(np.random.Generator):
    """Says `draw`, then `number`."""

    def __init__(self, draw: float, number: int = 1):
        super().__init__(np.random.PCG64(0))
        self.draw, self.number = draw, number

    def random(self, *_) -> float:
        return self.draw

    def integers(self, low: int, high: int) -> int:
        assert low <= self.number < high
        return self.number


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SpeechTextTokenizer:
    plain = tokenizer_of(save_base(tmp_path_factory.mktemp("base")))
    return SpeechTextTokenizer(plain.vocabulary, plain.text_tokenizer, TEXT)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    base = save_base(tmp_path_factory.mktemp("base"))
    config = ARConfig(base=str(base), lora=None, text=TEXT)
    return SpeechLM.create(config, STAMP, seed=1).double().eval()


def parts(tokenizer: SpeechTextTokenizer, *texts: str) -> list[list[int]]:
    return tokenizer.text_ids("tts", texts)


def test_a_word_stands_right_before_its_codes(tokenizer: SpeechTextTokenizer) -> None:
    made = InterleavedFormat(tokenizer).tts_layout(
        tokenizer.normalize("the cat sat"), CODES, EDGES, Chance(0.0)
    )
    v, said = tokenizer.vocabulary, tokenizer.vocabulary.encode_speech(CODES).tolist()
    the, cat, sat = parts(tokenizer, "the", "cat", "sat")
    (whole,) = parts(tokenizer, "the cat sat")
    assert made.tokens.tolist() == [
        v.text, *whole, v.speech,
        v.speech_end, *the, v.speech, *said[:2],
        v.speech_end, *cat, v.speech, *said[2:5],
        v.speech_end, *sat, v.speech, *said[5:], v.speech_end,
    ]  # fmt: skip
    assert made.forced is not None
    targets = made.tokens[made.num_context :][~made.forced]
    assert targets.tolist() == [
        *said[:2], v.speech_end, *said[2:5], v.speech_end, *said[5:], v.speech_end,
    ]  # fmt: skip


def test_a_prompt_is_speech_of_the_first_words_and_no_target(
    tokenizer: SpeechTextTokenizer,
) -> None:
    made = InterleavedFormat(tokenizer).tts_layout(
        tokenizer.normalize("the cat sat"), CODES, EDGES, Chance(0.9, 1)
    )
    v, said = tokenizer.vocabulary, tokenizer.vocabulary.encode_speech(CODES).tolist()
    (whole,), (cat,) = parts(tokenizer, "the cat sat"), parts(tokenizer, "cat")
    context = tts_context(v, whole, said[:2])
    assert made.tokens[: made.num_context].tolist() == [*context, v.speech_end, *cat, v.speech]
    assert made.forced is not None
    assert int((~made.forced).sum()) == 7 + 2
    assert made.tokens[made.num_context :][~made.forced][-1] == v.speech_end


@pytest.mark.parametrize("edges", [None, [0, 9], [0, 2, 5, 8]])
def test_what_has_no_edges_is_one_word(
    tokenizer: SpeechTextTokenizer, edges: list[int] | None
) -> None:
    made = InterleavedFormat(tokenizer).tts_layout(
        tokenizer.normalize("the cat sat"), CODES, edges, Chance(0.9)
    )
    (whole,), v = parts(tokenizer, "the cat sat"), tokenizer.vocabulary
    context = [*tts_context(v, whole, []), v.speech_end, *whole, v.speech]
    assert made.tokens[: made.num_context].tolist() == context
    assert made.forced is not None
    assert not made.forced.any()


def test_a_transcript_is_written_stretch_by_stretch(tokenizer: SpeechTextTokenizer) -> None:
    """0.8 s are 20 frames, 0.16 s are 4."""
    codes = np.arange(50) % 24
    made = InterleavedFormat(tokenizer).asr_layout("The cat sat on", codes, [0, 10, 17, 35, 50])
    v, said = tokenizer.vocabulary, tokenizer.vocabulary.encode_speech(codes).tolist()
    first, second = tokenizer.text_ids("asr", ["The ", "cat sat on "])
    assert made.tokens.tolist() == [
        v.speech, *said[:20], v.text, *first, v.eos,
        v.speech, *said[20:], v.speech_end, v.text, *second, v.eos,
    ]  # fmt: skip
    assert made.forced is not None
    targets = made.tokens[made.num_context :][~made.forced]
    assert targets.tolist() == [*first, v.eos, *second, v.eos]
    assert made.num_context == 22


def test_stretches_may_have_no_word_and_short_speech_has_one(
    tokenizer: SpeechTextTokenizer,
) -> None:
    v, codes = tokenizer.vocabulary, np.arange(60) % 24
    made = InterleavedFormat(tokenizer).asr_layout("THE CAT", codes, [0, 30, 60])
    assert made.tokens.tolist().count(v.eos) == 3
    assert made.tokens[21:23].tolist() == [v.text, v.eos]
    last = tokenizer.text_ids("asr", ["cat "])[0]
    assert made.tokens[-len(last) - 1 : -1].tolist() == last
    for edges, size in (([0, 8, 12], 12), (None, 60), ([0, 60], 60)):
        made = InterleavedFormat(tokenizer).asr_layout("the cat", codes[:size], edges)
        said = v.encode_speech(codes[:size]).tolist()
        (text,) = tokenizer.text_ids("asr", ["the cat "])
        assert made.tokens.tolist() == [v.speech, *said, v.speech_end, v.text, *text, v.eos]


def test_what_is_heard_is_given_as_in_training(lm: SpeechLM, monkeypatch) -> None:
    tokenizer, codes = lm.tokenizer, np.arange(70) % 24
    lead, script = InterleavedFormat(tokenizer).asr_context(codes)
    made = InterleavedFormat(tokenizer).asr_layout("the cat", codes, [0, 30, 70])
    end = lm.vocabulary.eos
    parts = [lead, *script.parts]
    texts = tokenizer.text_ids("asr", ["", "the ", "", "cat "])
    joined = [one for part, text in zip(parts, texts, strict=True) for one in [*part, *text, end]]
    assert joined == made.tokens.tolist()
    assert script.least == 0
    reported = []
    monkeypatch.setattr(
        "slm.generation.asr.generate", lambda _, requests, *__: reported.extend(requests) or answers
    )
    ids = tokenizer.text_ids("asr", ["the cat "])[0]
    answers = [Generated(tokens=tuple(ids), failure=None, tries=1, seed=0)]
    assert transcribe(lm, [codes])[0].text == "the cat"
    assert reported[0].forced == script
    assert list(reported[0].context) == lead


def test_hearing_a_batch_is_hearing_each_alone(lm: SpeechLM) -> None:
    random = np.random.default_rng(0)
    codes = [random.integers(0, 24, size) for size in (45, 12, 30)]
    alone = [transcribe(lm, [one])[0] for one in codes]
    assert transcribe(lm, codes) == alone


def test_numbers_are_words_where_they_stand(tokenizer: SpeechTextTokenizer) -> None:
    assert spelled_words(tokenizer, tokenizer.normalize("the cat sat")) == ["the", "cat", "sat"]
    assert spelled_words(tokenizer, tokenizer.normalize("sat 21 hens")) == [
        "sat",
        "twenty one",
        "hens",
    ]
    assert spelled_words(tokenizer, tokenizer.normalize("sat 121 hens")) == [
        "sat", tokenizer.tts_form("121"), "hens",
    ]  # fmt: skip


def test_edges_are_kept_in_files(tmp_path: Path) -> None:
    write_word_boundaries(tmp_path / "a.jsonl.gz", [("a", [0, 2]), ("b", [0, 1, 3])])
    write_word_boundaries(tmp_path / "b.jsonl.gz", [("c", [0, 4])])
    both = read_word_boundaries([tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"])
    assert both == {"a": [0, 2], "b": [0, 1, 3], "c": [0, 4]}
    assert read_word_boundaries([]) == {}
    cut = (tmp_path / "a.jsonl.gz").read_bytes()[:-12]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    with gzip.open(tmp_path / "other.jsonl.gz", "wt") as file:
        file.write('{"id": "a"}\n')
    for name in ("cut", "other", "none"):
        with pytest.raises(ValueError, match=rf"{name}.jsonl.gz: missing or damaged"):
            read_word_boundaries([tmp_path / f"{name}.jsonl.gz"])


def test_batches_ask_for_codes_and_their_ends_alone(
    tokenizer: SpeechTextTokenizer, tmp_path: Path
) -> None:
    rows = make_rows(6)
    write_shard(tmp_path / "a.parquet", rows, STAMP)
    shard = TokenShard.open(tmp_path / "a.parquet")
    edges = {row.id: [0, 3, 8, row.num_frames] for row in rows[:-1]}
    corpus = replace(usable(shard), word_boundaries=edges)
    data = ARData(
        corpus, tokenizer, TaskConfig(asr=1.0), BatchConfig(positions=900), 0, longest=256
    )
    batch = data.collate([np.array([item]) for item in range(6)])
    v, prompts = tokenizer.vocabulary, 0
    for row in range(6):
        labels = batch.labels[row][batch.labels[row] != IGNORE]
        said = v.encode_speech(rows[row].codes[0].astype(np.int64)).tolist()
        codes = [one for one in labels.tolist() if one != v.speech_end]
        assert said[len(said) - len(codes) :] == codes
        assert int(labels[-1]) == v.speech_end
        prompts += len(codes) < len(said)
        assert len(labels) == data.layout(row).tokens.size - data.layout(row).num_context - int(
            data.layout(row).forced.sum()
        )
        # A label is the next token.
        at = (batch.labels[row] != IGNORE).nonzero()[:, 0]
        assert bool((batch.tokens[row][at[:-1] + 1] == batch.labels[row][at[:-1]]).all())
    assert 0 < prompts < 6
    counted = [data._targets[item] for item in range(6)]
    assert counted == [int((batch.labels[row] != IGNORE).sum()) for row in range(6)]
    assert batch.tasks[0, 0] == TTS


def request(lm: SpeechLM, words: list[str], **bounds: int) -> Request:
    text = lm.tokenizer.normalize(" ".join(words))
    context, script = lm.format.tts_context(NO_TEXT, text, np.zeros(0, np.int64))
    limits = {"min_tokens": 0, "max_tokens": 60, "seed": 3} | bounds
    return Request(context=context, forced=script, **limits)


def test_generation_gives_each_word_when_the_one_before_is_over(lm: SpeechLM) -> None:
    words = ["the", "cat", "sat"]
    asked = request(lm, words)
    asked = replace(asked, forced=asked.forced._replace(most=(3, 4, 5)))
    config = SamplingConfig(max_attempts=1, checks=())
    allowed = speech_only(lm, config)
    (made,) = generate(lm, [asked], allowed, config)
    assert 3 <= len(made.tokens) <= 12
    # What the model was given: teacher-forced over the same sequence it must draw the same.
    v = lm.vocabulary
    end, heard = v.speech_end, list(asked.context)
    generator = torch.Generator().manual_seed(3)
    drawn: list[int] = []
    for number, part in enumerate([*asked.forced.parts, None]):
        since = 0
        while True:
            with torch.no_grad():
                logits = lm.lm(torch.tensor([heard])).logits[0, -1].float()
            kept = torch.cat([logits[allowed.first : allowed.stop], logits[end : end + 1]])
            token = end
            if since < asked.forced.most[number]:
                if since == 0:
                    kept[-1] = -torch.inf
                token = _drawn(kept, drawn, generator, config, allowed.first, end)
            heard.append(token)
            if token == end:
                break
            drawn.append(token)
            since += 1
        heard += part or []
    assert list(made.tokens) == drawn


def _drawn(logits, drawn, generator, config, first: int, end: int) -> int:
    recent = torch.tensor([token - first for token in drawn[-config.repetition_window :]])
    sampler = RepetitionAwareSampler(config)
    index = int(sampler(logits[None], recent[None].long(), [generator], torch.tensor([False])))
    return end if index == len(logits) - 1 else index + first


def test_batches_and_streams_say_what_one_alone_says(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1, checks=())
    allowed = speech_only(lm, config)
    texts = (["the", "cat"], ["a"], ["far", "away", "now"])
    asked = [request(lm, words, seed=seed) for seed, words in enumerate(texts)]
    asked = [
        replace(one, forced=one.forced._replace(most=(4,) * len(one.forced.most))) for one in asked
    ]
    alone = [generate(lm, [one], allowed, config)[0].tokens for one in asked]
    assert [one.tokens for one in generate(lm, asked, allowed, config)] == alone
    for one, tokens in zip(asked, alone, strict=True):
        assert tuple(TokenStream(lm, one, allowed, config)) == tokens


def test_the_last_word_does_not_end_before_the_least(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1, checks=())
    lengths = []
    for least in (0, 30):
        asked = request(lm, ["the", "cat"], min_tokens=least)
        asked = replace(asked, forced=asked.forced._replace(most=(2, 50)))
        (made,) = generate(lm, [asked], speech_only(lm, config), config)
        lengths.append(len(made.tokens))
    assert lengths[0] < 30 <= lengths[1]


@pytest.mark.parametrize(
    ("most", "failure"), [((50, 50), None), ((1, 50), None), ((50, 1), "cut"), ((1, 1), "cut")]
)
def test_words_that_do_not_end_are_cut(
    lm: SpeechLM, most: tuple[int, int], failure: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn are three codes for each word, then its end."""
    drawn = iter([0, 1, 2, -1] * 4)
    monkeypatch.setattr(
        RepetitionAwareSampler,
        "__call__",
        lambda _, logits, *__: torch.tensor(
            [one if (one := next(drawn)) >= 0 else logits.shape[1] - 1]
        ),
    )
    asked = request(lm, ["the", "cat"])
    asked = replace(asked, forced=asked.forced._replace(most=most))
    config = SamplingConfig(max_attempts=1, checks=())
    (made,) = generate(lm, [asked], speech_only(lm, config), config)
    assert made.failure == failure


def test_marks_alone_are_no_words_to_say(lm: SpeechLM) -> None:
    prompt = Prompt(codes=np.array([[1, 2, 3]]), text="a mat")
    made = Voice(models(lm)).prepare("the - cat !", prompt)
    assert len(made.forced.parts) == 1
    (whole,) = parts(lm.tokenizer, "a mat the - cat !")
    assert made.context[1 : 1 + len(whole)] == whole


def test_a_voice_that_does_not_hear_goes_by_time(lm: SpeechLM, tmp_path: Path) -> None:
    config = ARConfig(
        base=str(save_base(tmp_path)), lora=None, text=TEXT, tasks=TaskConfig(asr=0.0)
    )
    deaf = SpeechLM.create(config, STAMP, seed=1).eval()
    words = ["the", "cat", "sat", "on", "a", "mat"]
    assert num_words_in_prompt(deaf, words, np.zeros(25, np.int64)) == 3
    assert num_words_in_prompt(deaf, words, np.zeros(2500, np.int64)) == 6


def test_edges_of_other_tokens_are_noticed(
    tokenizer: SpeechTextTokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = make_rows(3)
    write_shard(tmp_path / "a.parquet", rows, STAMP)
    corpus = usable(TokenShard.open(tmp_path / "a.parquet"))
    settings = (tokenizer, TaskConfig(asr=0.0), BatchConfig(positions=900), 0)
    for edges in ({}, {row.id: [0, 1, 2, row.num_frames + 1] for row in rows}):
        with pytest.raises(ValueError, match=r"word_boundaries: none are those of .*a\.parquet"):
            ARData(replace(corpus, word_boundaries=edges), *settings, longest=256)
    some = {rows[0].id: [0, 1, 2, rows[0].num_frames]}
    ARData(replace(corpus, word_boundaries=some), *settings, longest=256)
    assert "2 of 3 items have no word boundaries that fit" in caplog.text


def test_a_long_text_is_split_where_its_words_leave_no_room(lm: SpeechLM) -> None:
    """The model holds 256 positions; each word is read twice."""
    text = " ".join(["the cat sat on a mat"] * 6)
    prompt = Prompt(codes=np.array([[1, 2, 3]]), text="a mat")
    made = Voice(models(lm)).prepare_long(text, prompt)
    assert len(made.utterances) > 1
    assert " ".join(one.text.text for one in made.utterances) == text
    for one in made.utterances:
        assert len(one.context) + len(one.forced.ids) < lm.max_positions


def test_speech_that_leaves_no_room_is_not_transcribed(lm: SpeechLM) -> None:
    """Stretches take more positions than their codes."""
    assert transcripts(lm, [np.zeros(240, np.int64), np.zeros(9, np.int64)])[0] == ""
    assert len(lm.format.asr_context(np.zeros(240, np.int64)).ids) > 256


def models(lm: SpeechLM) -> Models:
    class Codec:
        codebook_sizes, frame_rate, num_codebooks, stamp = (24,), 25.0, 1, STAMP

    return Models(Codec(), lm, None, Coverage.of(["the cat sat on a mat"], 100))


def test_an_utterance_is_prepared_word_by_word(lm: SpeechLM) -> None:
    prompt = Prompt(codes=np.array([[1, 2, 3]]), text="a mat")
    made = Voice(models(lm)).prepare("The cat", prompt)
    v = lm.vocabulary
    the, cat = parts(lm.tokenizer, "The", "cat")
    assert made.context[-len(the) - 2 :] == [v.speech_end, *the, v.speech]
    assert [list(part) for part in made.forced.parts] == [[*cat, v.speech]]
    assert len(made.forced.most) == 2
    assert min(made.forced.most) > 20


def test_a_continuation_goes_on_behind_the_words_it_has_said(
    lm: SpeechLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = {"": 0, "th kat": 2, "the cat sat": 3, "the cat sat on": 3}
    words = ["the", "cat", "sat"]
    for said, count in heard.items():
        monkeypatch.setattr(preparing, "transcripts", lambda _, __, said=said: [said])
        assert num_words_in_prompt(lm, words, np.array([1])) == count
        prompt = Prompt(codes=np.array([[1, 2, 3]]), text="", continuation=True)
        made = Voice(models(lm)).prepare("the cat sat", prompt)
        # Something is always left to say.
        assert len(made.forced.most) == max(1, 3 - count)

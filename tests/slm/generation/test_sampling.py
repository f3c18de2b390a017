"""sampling.py: cached equals uncached, batched equals single, bounds, failures and retries."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base
from torch.nn import functional

from slm.config import ARConfig, SamplingConfig, TextConfig
from slm.data.sequences import ForcedTokens, asr_context, tts_context
from slm.generation.sampling import (
    AllowedIds,
    RepetitionAwareSampler,
    Request,
    TokenStream,
    generate,
    restrict_context,
    restrict_speech,
    speech_bounds,
    speech_only,
    text_bound,
    text_only,
)
from slm.models.ar import SpeechLM
from slm.tokenization.tokenizer import SpeechTextTokenizer

pytestmark = quiet()

TEXTS = [("hello", 3), ("a", 0), ("the cat sat", 10)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    base = save_base(tmp_path_factory.mktemp("base"), kind=request.param)
    config = ARConfig(base=str(base), lora=None)
    # In float64 a near tie between two tokens does not depend on how they were batched.
    return SpeechLM.create(config, STAMP, seed=1).double().eval()


def requests(lm: SpeechLM, least: int = 3, most: int = 40) -> list[Request]:
    vocabulary = lm.vocabulary
    return [
        Request(
            context=tts_context(
                vocabulary,
                lm.tokenizer.text_ids("tts", [text])[0],
                vocabulary.encode_speech(np.arange(frames)),
            ),
            min_tokens=least,
            max_tokens=most,
            seed=seed,
        )
        for seed, (text, frames) in enumerate(TEXTS)
    ]


def uncached(lm: SpeechLM, request: Request, allowed: AllowedIds) -> tuple[int, ...]:
    """The reference: a full pass for every token, argmax over the allowed ids."""
    tokens = list(request.context)
    ids = torch.tensor([*range(allowed.first, allowed.stop), allowed.end])
    while len(tokens) - len(request.context) < request.max_tokens:
        logits = lm.lm(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        mask = torch.full_like(logits, -torch.inf)
        mask[ids] = 0
        if len(tokens) - len(request.context) < request.min_tokens:
            mask[allowed.end] = -torch.inf
        token = int((logits + mask).argmax())
        if token == allowed.end:
            break
        tokens.append(token)
    return tuple(tokens[len(request.context) :])


NO_LOOPS = SamplingConfig(greedy=True, max_attempts=1, loop_seconds=1000.0)


def test_cached_greedy_equals_uncached(lm: SpeechLM) -> None:
    allowed = speech_only(lm, NO_LOOPS)
    made = generate(lm, requests(lm), allowed, NO_LOOPS)
    assert [one.tokens for one in made] == [uncached(lm, r, allowed) for r in requests(lm)]
    assert len({len(one.tokens) for one in made}) > 1 or made[0].tokens != made[1].tokens


@pytest.mark.parametrize("greedy", [True, False])
def test_batched_equals_single_under_the_same_seeds(lm: SpeechLM, greedy: bool) -> None:
    config = SamplingConfig(greedy=greedy, max_attempts=2)
    allowed = speech_only(lm, config)
    # Items end at different steps and leave the batch.
    asked = [replace(one, max_tokens=10 * n) for n, one in enumerate(requests(lm), start=1)]
    together = generate(lm, asked, allowed, config)
    assert len({len(one.tokens) for one in together}) > 1
    assert together == [generate(lm, [one], allowed, config)[0] for one in asked]


def test_a_stream_equals_one_attempt(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1)
    allowed = speech_only(lm, config)
    for request in requests(lm):
        (whole,) = generate(lm, [request], allowed, config)
        stream = TokenStream(lm, request, allowed, config)
        first = next(stream)
        assert (first, *stream) == whole.tokens
        assert stream.failure == whole.failure
        assert list(stream) == []


@pytest.mark.parametrize(("task", "num_rows"), [("tts", 25), ("asr", None)])
def test_no_other_row_of_the_head_is_computed(
    lm: SpeechLM, monkeypatch: pytest.MonkeyPatch, task: str, num_rows: int | None
) -> None:
    speaks = task == "tts"
    allowed = speech_only(lm, NO_LOOPS) if speaks else text_only(lm)
    made = generate(lm, requests(lm, most=6), allowed, NO_LOOPS)
    plain, wide = functional.linear, []

    def linear(x, weight, bias=None):
        if weight.shape[1] == lm.config.hidden_size:
            wide.append((x.shape[:-1].numel(), weight.shape[0]))
        return plain(x, weight, bias)

    monkeypatch.setattr(functional, "linear", linear)
    assert generate(lm, requests(lm, most=6), allowed, NO_LOOPS) == made
    assert (len(TEXTS), num_rows or lm.vocabulary.num_text) in wide
    assert max(rows for _, rows in wide) <= max(lm.vocabulary.num_text * (not speaks), 128)


def test_seeds_matter(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1)
    same = requests(lm)[0]
    other = Request(context=same.context, min_tokens=10, max_tokens=40, seed=99)
    one = Request(context=same.context, min_tokens=10, max_tokens=40, seed=98)
    first, second = generate(lm, [one, other], speech_only(lm, config), config)
    assert first.tokens != second.tokens


def test_only_allowed_ids_are_sampled(lm: SpeechLM) -> None:
    vocabulary, config = lm.vocabulary, SamplingConfig(top_p=1.0, top_k=10_000)
    for made in generate(lm, requests(lm), speech_only(lm, config), config):
        vocabulary.decode_speech(np.array(made.tokens))
    context = asr_context(vocabulary, vocabulary.encode_speech(np.arange(5)))
    request = Request(context=context, min_tokens=20, max_tokens=40, seed=0)
    (made,) = generate(lm, [request], text_only(lm), config)
    assert all(token < vocabulary.num_text for token in made.tokens)
    assert vocabulary.eos not in made.tokens


def test_a_transcript_in_characters_has_bytes_alone(lm: SpeechLM) -> None:
    tokenizer = SpeechTextTokenizer(
        lm.vocabulary, lm.tokenizer.text_tokenizer, TextConfig(asr_form="characters")
    )
    spelt = SpeechLM(lm.lm, tokenizer, lm.origin)
    allowed, every = text_only(spelt), text_only(lm)
    assert (allowed.first, allowed.stop) == (0, 256)
    assert every.stop == lm.vocabulary.num_text > 256
    assert text_bound(50, lm.tokenizer) == 68
    assert text_bound(50, tokenizer) == 188


def test_length_bounds_are_kept(lm: SpeechLM) -> None:
    config = SamplingConfig(loop_seconds=1000.0)
    for least, most in ((0, 5), (30, 32)):
        for made in generate(lm, requests(lm, least, most), speech_only(lm, config), config):
            assert least <= len(made.tokens) <= most


def test_bounds_follow_text_and_frame_rate() -> None:
    config = SamplingConfig(frames_per_token=(2.0, 20.0), spare_seconds=0.0)
    assert speech_bounds(10, 25.0, config) == (20, 201)
    assert speech_bounds(10, 50.0, config) == (40, 401)
    # A word takes 0.3 s.
    assert speech_bounds(1, 25.0, config)[0] == speech_bounds(4, 25.0, config)[0] == 8
    assert speech_bounds(5, 25.0, config)[0] == 10
    short = replace(config, frames_per_token=(0.0, 0.1), spare_seconds=0.0)
    assert speech_bounds(1, 25.0, short) == (8, 8)


def test_a_text_that_cannot_fit_is_refused() -> None:
    assert restrict_context(100, [0] * 40, 20, 300, "text") == 60
    with pytest.raises(ValueError, match="too long for the model"):
        restrict_context(100, [0] * 90, 20, 300, "text")


class Script(torch.nn.Module):
    """A language model that generates scripts of codes, one for each attempt."""

    def __init__(self, real: SpeechLM, scripts: list[list[int]]):
        super().__init__()
        self.config, self.vocabulary = real.config, real.vocabulary
        self.scripts, self.tries = scripts, 0
        size = real.vocabulary.size
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(size))

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_):
        if input_ids.shape[1] > 1:  # a new try
            self.said, self.tries = 0, self.tries + 1
        script = self.scripts[min(self.tries, len(self.scripts)) - 1]
        logits = torch.full((1, 1, self.vocabulary.size), -30.0)
        code = script[self.said % len(script)]
        token = self.vocabulary.speech_end if code < 0 else self.vocabulary.first_speech + code
        logits[0, 0, token] = 30.0
        self.said += 1
        return type("Output", (), {"last_hidden_state": logits})()

    @property
    def base_model(self) -> torch.nn.Module:
        return self


def stub(real: SpeechLM, scripts: list[list[int]]) -> SpeechLM:
    return SpeechLM(Script(real, scripts), real.tokenizer, {})


GOOD = [*range(12), -1]
END = [-1]


@pytest.mark.parametrize(
    ("bad", "failure"), [([3], "loop"), ([1, 2, 3, 4], "loop"), (END, "empty")]
)
def test_a_failure_is_found_and_retried(lm: SpeechLM, bad: list[int], failure: str) -> None:
    config = SamplingConfig(loop_seconds=0.8)
    request = Request(context=[0, 1, 2], min_tokens=0, max_tokens=200, seed=5)
    (made,) = generate(stub(lm, [bad, GOOD]), [request], speech_only(lm, config), config)
    assert (made.failure, made.tries) == (None, 2)
    assert made.seed != 5
    assert len(made.tokens) == 12
    (made,) = generate(stub(lm, [bad]), [request], speech_only(lm, config), config)
    assert (made.failure, made.tries) == (failure, config.max_attempts)
    assert len(made.tokens) < 60  # a loop is not followed to the upper bound


def test_a_sequence_without_end_is_cut(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1, loop_seconds=10.0)
    request = Request(context=[0, 1], min_tokens=0, max_tokens=30, seed=0)
    script = np.random.default_rng(0).integers(0, 24, 100).tolist()
    (made,) = generate(stub(lm, [script]), [request], speech_only(lm, config), config)
    assert made.failure == "cut"
    assert len(made.tokens) == 30


def test_the_loop_check_can_be_disabled(lm: SpeechLM) -> None:
    config = SamplingConfig(max_attempts=1, loop_seconds=0.8, checks=("silence",))
    request = Request(context=[0, 1], min_tokens=0, max_tokens=50, seed=0)
    (made,) = generate(stub(lm, [[3]]), [request], speech_only(lm, config), config)
    assert (made.failure, len(made.tokens)) == ("cut", 50)


@pytest.mark.parametrize(("script", "failure"), [(GOOD, None), (END, "empty"), ([3], "loop")])
def test_a_stream_ends_with_its_failure(lm: SpeechLM, script: list[int], failure: str) -> None:
    config = SamplingConfig(loop_seconds=0.8)
    request = Request(context=[0, 1], min_tokens=0, max_tokens=50, seed=0)
    stream = TokenStream(stub(lm, [script, GOOD]), request, speech_only(lm, config), config)
    num_told = len(list(stream))
    assert (num_told == 0) == (failure == "empty")
    assert num_told < 50
    assert stream.failure == failure


class Threes(SpeechTextTokenizer):
    """Each id of speech stands for three codes."""

    def frames(self, ids):
        return np.full(len(ids), 3)

    def codes_of(self, ids):
        return np.repeat(super().codes_of(ids), 3)


def test_bounds_and_loops_of_speech_count_frames(lm: SpeechLM) -> None:
    threes = Threes(lm.vocabulary, lm.tokenizer.text_tokenizer)
    config = SamplingConfig(max_attempts=1, loop_seconds=1.0)

    def made(script: list[int], least: int, most: int):
        reported = SpeechLM(Script(lm, [script]), threes, {})
        request = Request(context=[0, 1], min_tokens=least, max_tokens=most, seed=0)
        return generate(reported, [request], speech_only(reported, config), config)[0]

    varied = np.random.default_rng(0).integers(0, 24, 100).tolist()
    cut = made(varied, 0, 30)
    assert (cut.failure, len(cut.tokens)) == ("cut", 10)
    # The end is not drawn before 12 frames, which are four tokens.
    assert len(made([1, 2, -1], 12, 60).tokens) >= 4
    first = lm.vocabulary.first_speech
    assert made([1, 2, -1], 6, 60).tokens == (first + 1, first + 2)
    # 25 frames of one code are nine tokens: found at the first look.
    loop = made([5], 0, 300)
    assert (loop.failure, len(loop.tokens)) == ("loop", 16)


def test_the_context_length_counts_tokens_not_frames(lm: SpeechLM) -> None:
    threes = Threes(lm.vocabulary, lm.tokenizer.text_tokenizer)
    room = 20
    reported = SpeechLM(
        Script(lm, [np.random.default_rng(0).integers(0, 24, 100).tolist()]), threes, {}
    )
    context = [0] * (reported.max_positions - room)
    assert restrict_speech(reported, context, 30, 300, "text") == 3 * room
    with pytest.raises(ValueError, match="at least 21 new tokens"):
        restrict_speech(reported, context, 3 * room + 1, 300, "text")
    config = SamplingConfig(max_attempts=1, loop_seconds=100.0)
    request = Request(context=context, min_tokens=0, max_tokens=300, seed=0)
    (made,) = generate(reported, [request], speech_only(reported, config), config)
    assert (made.failure, len(made.tokens)) == ("cut", room)


def test_nucleus_and_repetition() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    config = SamplingConfig(top_p=0.7, top_k=25)

    def drawn(recent: list[int], config: SamplingConfig) -> set[int]:
        generator, sampler = torch.Generator().manual_seed(0), RepetitionAwareSampler(config)
        inputs = logits[None], torch.tensor([recent]).long(), [generator], torch.tensor([False])
        return {int(sampler(*inputs)) for _ in range(300)}

    assert drawn([], config) == {0, 1}
    assert drawn([], SamplingConfig(top_p=1.0, top_k=3)) == {0, 1, 2}
    # What came just before is drawn again from the whole distribution.
    assert drawn([0, 1], config) == {0, 1, 2, 3}
    assert drawn([], SamplingConfig(top_p=0.7, repetition_window=0)) == {0, 1}


def test_greedy_rows_take_the_most_likely_token() -> None:
    logits = torch.tensor([0.0, 0.1, 0.05])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    sampler, recent = RepetitionAwareSampler(SamplingConfig()), torch.ones(2, 10).long()
    for greedy in ([True, True], [True, False]):
        inputs = logits.repeat(2, 1), recent, generators, torch.tensor(greedy)
        drawn = torch.stack([sampler(*inputs) for _ in range(20)])
        assert (drawn[:, 0] == 1).all()
        assert bool((drawn[:, 1] == 1).all()) == greedy[1]


def test_an_empty_batch(lm: SpeechLM) -> None:
    assert generate(lm, [], speech_only(lm, NO_LOOPS), NO_LOOPS) == []


def test_forced_tokens_are_read_in_one_pass(lm: SpeechLM, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SamplingConfig(max_attempts=1, checks=())
    parts = ((1, 2, 3), (4, 5))
    asked = replace(requests(lm)[0], forced=ForcedTokens(parts, (3, 4, 5), least=1))
    lengths = []
    forward = lm.lm.base_model.forward

    def counted(**inputs):
        lengths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    monkeypatch.setattr(lm.lm.base_model, "forward", counted)
    (made,) = generate(lm, [asked], speech_only(lm, config), config)
    # An end brings all of the next part; the last end is not read.
    assert [length for length in lengths[1:] if length > 1] == [1 + len(part) for part in parts]
    assert len(lengths) == 1 + len(made.tokens) + len(parts)
    # In a batch whose items are elsewhere meanwhile, each is what it is alone.
    others = [asked, requests(lm)[1]]
    first, _ = generate(lm, others, speech_only(lm, config), config)
    assert first.tokens == made.tokens

"""slm/generation/tts.py: attempts, evaluation and best-of-N."""

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base, tokenizer_of

from slm.config import ARConfig, SamplingConfig
from slm.data.coverage import Coverage
from slm.data.prompts import Prompt
from slm.generation import tts as speaking
from slm.generation.sampling import NEXT_CANDIDATE, NEXT_TRY
from slm.generation.tts import Models, Speech, Utterance, candidates, rerank, synthesize
from slm.models.ar import SpeechLM
from slm.tokenization.text_normalization import NO_TEXT, NormalizedText
from slm.tokenization.tokenizer import SpeechTextTokenizer

pytestmark = quiet()

END, SILENT = -1, 14
"""Codes from SILENT on are silence."""
ANN, BEN = 0, 1
"""Codes of the prompts, after which the LM starts one of its chains."""
GOOD = [2, 3, 4, 5, 6, 7]
OTHER = [8, 9, 10, 11, 12]
PAUSE = [13, *range(14, 22), 12]
NOTHING = [22, 23]


class Chains(torch.nn.Module):
    """An LM that generates chains of codes: one for each attempt of each prompt, in order."""

    def __init__(self, tokenizer: SpeechTextTokenizer, chains: dict[int, list[list[int]]]):
        super().__init__()
        from transformers import LlamaConfig

        self.config = LlamaConfig(num_hidden_layers=1)
        self.vocabulary, self.chains = tokenizer.vocabulary, chains
        size = self.vocabulary.size
        self.head = torch.nn.Linear(size, size, bias=False)
        self.head.weight = torch.nn.Parameter(torch.eye(size))
        self.begun: Counter[int] = Counter()
        self.batches: list[int] = []
        every = [chain for tries in chains.values() for chain in tries if chain]
        self.next = {a: b for one in every for a, b in zip(one, [*one[1:], END], strict=True)}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        last = (input_ids[:, -1] - self.vocabulary.first_speech).tolist()
        if input_ids.shape[1] > 1:
            self.batches.append(len(last))
            codes = [self._begin(code) for code in last]
        else:
            codes = [self.next[code] for code in last]
        logits = torch.full((len(last), 1, self.vocabulary.size), -30.0)
        first, end = self.vocabulary.first_speech, self.vocabulary.speech_end
        for row, code in enumerate(codes):
            logits[row, 0, end if code == END else first + code] = 30.0
        return type("Output", (), {"last_hidden_state": logits})()

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def _begin(self, prompt: int) -> int:
        tries = self.chains[prompt]
        chain = tries[min(self.begun[prompt], len(tries) - 1)]
        self.begun[prompt] += 1
        return chain[0] if chain else END


class Codec:
    sample_rate, hop_length, num_codebooks = 16000, 640, 1
    device = torch.device("cpu")

    def decode(self, codes: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        loud = (codes[:, :1] < SILENT).float().repeat_interleave(self.hop_length, dim=2)
        return loud * 0.3


class Nar:
    """Its second codebook depends on the first."""

    def decode(self, texts: Any, prompts: Any, first: Any, **options: Any) -> list[np.ndarray]:
        self.texts, self.options = texts, options
        return [np.stack([row, row + 1]) for row in first]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SpeechTextTokenizer:
    return tokenizer_of(save_base(tmp_path_factory.mktemp("base")))


def models(
    tokenizer: SpeechTextTokenizer, *, asr: float = 0.0, nar: Any = None, **chains: list[list[int]]
) -> Models:
    said = {{"ann": ANN, "ben": BEN}[name]: tries for name, tries in chains.items()}
    lm = SpeechLM(Chains(tokenizer, said), tokenizer, {"tasks": {"tts": 1.0, "asr": asr}})
    return Models(Codec(), lm, nar, Coverage(scripts=(), characters="", longest_frames=0))


def utterance(prompt: int, seed: int = 5, text: str = "the cat sat on a mat") -> Utterance:
    codes = np.array([[23, prompt]])
    begun = Prompt(codes=codes, text="a dog")
    return Utterance(
        text=normalized(text), prompt=begun, prompt_text=normalized("a dog"), context=[0],
        bounds=(0, 60), seed=seed,
    )  # fmt: skip


def normalized(text: str) -> NormalizedText:
    return replace(NO_TEXT, original=text, text=text, tts_form=text)


def asked(lm: SpeechLM, *utterances: Utterance) -> list[Utterance]:
    """With their prompts' codes in the context."""
    return [
        replace(one, context=[0, *map(int, lm.tokenizer.speech_ids("tts", one.prompt.codes[0]))])
        for one in utterances
    ]


SHORT = SamplingConfig(silence_seconds=0.2)


def said(made: Speech) -> list[int]:
    return made.codes[0].tolist()


def test_only_failed_attempts_are_repeated(tokenizer: SpeechTextTokenizer) -> None:
    voice = models(tokenizer, ann=[PAUSE, GOOD], ben=[OTHER])
    ann, ben = synthesize(voice, asked(voice.lm, utterance(ANN), utterance(BEN)), SHORT)
    assert (said(ann), ann.failure, ann.tries, ann.seed) == (GOOD, None, 2, 5 + NEXT_TRY)
    assert (said(ben), ben.failure, ben.tries, ben.seed) == (OTHER, None, 1, 5)
    assert voice.lm.lm.batches == [2, 1]
    assert ann.score is None


def test_each_failed_attempt_is_logged_once(
    tokenizer: SpeechTextTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    voice = models(tokenizer, ann=[PAUSE, GOOD])
    synthesize(voice, asked(voice.lm, utterance(ANN)), SHORT)
    assert [record.getMessage() for record in caplog.records] == [
        f"attempt 1 of {SHORT.max_attempts} failed for 1 item"
    ]


def test_the_least_severe_failure_is_kept(tokenizer: SpeechTextTokenizer) -> None:
    voice = models(tokenizer, ann=[NOTHING, PAUSE, []])
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), SHORT)
    assert (said(made), made.failure, made.tries, made.seed) == (PAUSE, "silence", 3, 5 + NEXT_TRY)
    # Switched off, a pause is no failure; what is empty always is.
    voice = models(tokenizer, ann=[NOTHING, PAUSE, []])
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, checks=()))
    assert (said(made), made.failure, made.tries) == (PAUSE, None, 2)


@pytest.mark.parametrize("chain", [NOTHING, []])
def test_a_silent_wave_is_a_failure(tokenizer: SpeechTextTokenizer, chain: list[int]) -> None:
    voice = models(tokenizer, ann=[chain])
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, max_attempts=2))
    assert (made.failure, made.tries, made.seed) == ("empty", 2, 5)


@pytest.mark.parametrize(("peak", "expected"), [(0.3, 0.3), (1.0, 1.0), (1.5, 1.0)])
def test_a_wave_beyond_full_scale_is_divided_by_its_peak(
    monkeypatch: pytest.MonkeyPatch, peak: float, expected: float
) -> None:
    codec = Codec()
    wave = torch.zeros(1, 1, 3 * codec.hop_length)
    wave[..., codec.hop_length + 1], wave[..., -1] = peak, -peak / 2
    monkeypatch.setattr(codec, "decode", lambda codes, lengths=None: wave, raising=False)
    made = speaking.decode(codec, np.zeros((1, 1)), np.zeros((1, 2)))
    assert len(made) == 2 * codec.hop_length
    assert (made.max(), made.min()) == pytest.approx((expected, -expected / 2))


def test_repeating_the_prompt_is_a_leak(tokenizer: SpeechTextTokenizer) -> None:
    words = list(range(2, 16))
    voice = models(tokenizer, ann=[words, [1, 0]])
    one = utterance(ANN)
    one = replace(one, prompt=Prompt(codes=np.array([[*words, 23, ANN]]), text="a dog"))
    (made,) = synthesize(voice, asked(voice.lm, one), SamplingConfig())
    assert (said(made), made.tries) == ([1, 0], 2)


def test_speech_far_too_short_for_the_prompts_rate_is_early(tokenizer: SpeechTextTokenizer) -> None:
    voice = models(tokenizer, ann=[GOOD])
    slow = Prompt(codes=np.array([[23] * 20 + [ANN]]), text="a dog and a cat")
    one = replace(utterance(ANN), prompt=slow, prompt_text=normalized(slow.text))
    (made,) = synthesize(voice, asked(voice.lm, one), replace(SHORT, max_attempts=1))
    assert made.failure == "early"
    (made,) = synthesize(
        voice, asked(voice.lm, one), replace(SHORT, max_attempts=1, checks=("leak",))
    )
    assert made.failure is None


def test_the_models_own_asr_checks_what_passed(
    tokenizer: SpeechTextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = {tuple(GOOD): "the cat sat on a mat", tuple(OTHER): "a dog the cat sat"}
    asked_for = []

    def transcripts(_lm: Any, codes: Any) -> list[str]:
        asked_for.append([one.tolist() for one in codes])
        return [heard[tuple(one.tolist())] for one in codes]

    monkeypatch.setattr(speaking, "transcripts", transcripts)
    voice = models(tokenizer, asr=1.0, ann=[OTHER, GOOD], ben=[PAUSE, GOOD])
    ann, ben = synthesize(voice, asked(voice.lm, utterance(ANN), utterance(BEN)), SHORT)
    assert (said(ann), ann.tries, said(ben), ben.tries) == (GOOD, 2, GOOD, 2)
    assert asked_for == [[OTHER], [GOOD, GOOD]]  # What had failed already is not transcribed.
    heard[tuple(GOOD)] = "the cat"
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, max_attempts=1))
    assert made.failure == "early"
    # Without ASR, or without the checks that need it, no one is asked.
    asked_for.clear()
    deaf = models(tokenizer, ann=[OTHER])
    assert synthesize(deaf, asked(deaf.lm, utterance(ANN)), SHORT)[0].failure is None
    synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, checks=("loop", "silence")))
    assert asked_for == []


def test_speech_far_below_its_prompt_is_empty(
    tokenizer: SpeechTextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = models(tokenizer, ann=[GOOD, OTHER])
    quiet_codes = torch.tensor(GOOD)

    def decode(codec: Codec, codes: torch.Tensor, lengths: torch.Tensor | None = None) -> Any:
        level = torch.where(torch.isin(codes, quiet_codes), 0.01, 0.3)
        return level.repeat_interleave(codec.hop_length, dim=2)

    monkeypatch.setattr(Codec, "decode", decode)
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, checks=()))
    assert (said(made), made.tries, made.failure) == (OTHER, 2, None)


def test_other_words_than_the_texts_are_a_mismatch(
    tokenizer: SpeechTextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = {tuple(OTHER): "yours", tuple(GOOD): "hello", (23, ANN): "a dog", (30,): "hello"}
    monkeypatch.setattr(
        speaking, "transcripts", lambda _lm, codes: [heard[tuple(one.tolist())] for one in codes]
    )
    encoded = []

    def encode(_codec: Any, waves: Any) -> list[np.ndarray]:
        encoded.append(len(waves))
        return [np.array([[30], [31]])] * len(waves)

    monkeypatch.setattr(speaking, "encode", encode)
    text = utterance(ANN, text="hello")

    def failure(one: Utterance = text, **changed: Any) -> str | None:
        voice = models(tokenizer, asr=1.0, ann=[OTHER, GOOD])
        config = replace(SHORT, max_attempts=1, **changed)
        (made,) = synthesize(voice, asked(voice.lm, one), config)
        return made.failure

    voice = models(tokenizer, asr=1.0, ann=[OTHER, GOOD])
    (made,) = synthesize(voice, asked(voice.lm, text), SHORT)
    assert (said(made), made.tries, made.failure) == (GOOD, 2, None)
    assert failure() == "mismatch"
    assert not encoded
    heard[tuple(OTHER)] = ""
    assert failure() == "empty"
    assert failure(checks=("leak", "early")) is None
    # Markup may spell words in a way that no transcript does.
    assert failure(replace(text, text=replace(text.text, respelled=True))) is None
    # An ASR that does not recognize the prompt is no judge of the speech.
    heard[23, ANN] = "eight hogs"
    assert failure() is None
    heard[23, ANN] = "a dog"

    # A short text's wave is transcribed as well; the mean of both counts.
    heard[tuple(OTHER)], heard[30,] = "hellish", "hello"  # 3 of 5 letters, and none
    assert failure() is None
    assert encoded == [1]
    heard[30,] = "hill"  # 2 of 5
    assert failure() == "mismatch"
    assert encoded == [1, 1]
    long = utterance(ANN, text="hello hello hello hello")
    heard[tuple(OTHER)] = "hello hello hello yours"
    assert failure(long) is None
    assert encoded == [1, 1]


def scored(monkeypatch: pytest.MonkeyPatch, scores: dict[int, float]) -> None:
    """Scores by the first code; transcripts are empty."""
    monkeypatch.setattr(
        speaking, "text_scores", lambda _lm, _texts, codes: [
            scores[int(one[0])] if len(one) else -9.0 for one in codes
        ]
    )  # fmt: skip
    monkeypatch.setattr(speaking, "transcripts", lambda _lm, codes: [""] * len(codes))


def test_best_of_n_keeps_the_highest_score(
    tokenizer: SpeechTextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch, {GOOD[0]: -2.0, OTHER[0]: -1.0, NOTHING[0]: -0.1, PAUSE[0]: -0.5})
    config = replace(SHORT, num_candidates=2)
    voice = models(tokenizer, asr=1.0, ann=[GOOD, OTHER], ben=[OTHER, GOOD])
    ann, ben = synthesize(voice, asked(voice.lm, utterance(ANN), utterance(BEN)), config)
    assert (said(ann), ann.score, ann.seed, ann.tries) == (OTHER, -1.0, 5 + NEXT_CANDIDATE, 1)
    assert (said(ben), ben.score, ben.seed, ben.tries) == (OTHER, -1.0, 5, 1)
    assert voice.lm.lm.batches == [4]
    # A failed attempt ranks last, also where only its wave fails a check.
    for bad in ([], NOTHING, PAUSE):
        voice = models(tokenizer, asr=1.0, ann=[bad, GOOD])
        (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), config)
        assert (said(made), made.failure, made.score, made.tries) == (GOOD, None, -2.0, 1)
    # All of them failed: all are made again.
    voice = models(tokenizer, asr=1.0, ann=[NOTHING, PAUSE, GOOD, OTHER])
    (made,) = synthesize(voice, asked(voice.lm, utterance(ANN)), config)
    assert (said(made), made.tries) == (OTHER, 2)
    assert made.seed == 5 + NEXT_TRY + NEXT_CANDIDATE


def test_best_of_one_is_the_first_candidate(tokenizer: SpeechTextTokenizer, tmp_path: Path) -> None:
    real = SpeechLM.create(ARConfig(base=str(save_base(tmp_path)), lora=None), STAMP, seed=1)
    lm = SpeechLM(real.lm.double(), tokenizer, {})
    said = asked(lm, utterance(ANN, seed=3), utterance(BEN, seed=4))
    plain = candidates(lm, said, replace(SHORT, checks=()))
    config = replace(SHORT, checks=(), num_candidates=3)
    several = candidates(lm, said, config)
    ranked = rerank(models(tokenizer)._replace(lm=lm), several, config)
    for (alone,), group, best in zip(plain, several, ranked, strict=True):
        assert alone.score is None
        assert len({one.seed for one in group}) == 3
        assert group[0].seed == alone.seed
        assert group[0].first.tolist() == alone.first.tolist()
        scores = [one.score for one in best]
        assert scores == sorted(scores, reverse=True)
        passed = [one.seed for one in group if one.failure is None]
        assert sorted(one.seed for one in best) == (sorted(passed) or [best[0].seed])


def test_best_of_n_needs_asr(tokenizer: SpeechTextTokenizer) -> None:
    voice = models(tokenizer, ann=[GOOD])
    with pytest.raises(ValueError, match="trained without asr; set it to 1"):
        synthesize(voice, asked(voice.lm, utterance(ANN)), replace(SHORT, num_candidates=2))


def test_inputs_of_the_nar(tokenizer: SpeechTextTokenizer) -> None:
    nar = Nar()
    spelling = SpeechTextTokenizer(tokenizer.vocabulary, tokenizer.text_tokenizer)
    voice = models(spelling, nar=nar, ann=[PAUSE, GOOD])
    config = replace(SHORT, nar_temperature=0.5)
    prompt = Prompt(codes=np.array([[23, ANN], [0, 0]]), text="a dog")
    one = replace(utterance(ANN), text=spelling.normalize("2 cats"), prompt=prompt)
    (made,) = synthesize(voice, asked(voice.lm, one), config)
    assert made.codes.shape == (2, len(GOOD))
    assert nar.options == {"temperature": 0.5, "seeds": [5 + NEXT_TRY]}
    assert nar.texts == ["a dog two cats"]


def test_no_utterances(tokenizer: SpeechTextTokenizer) -> None:
    voice = models(tokenizer, ann=[GOOD])
    assert synthesize(voice, [], SHORT) == []

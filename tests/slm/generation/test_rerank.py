"""slm/generation/rerank.py: scores of a batch equal those of single passes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_slm import STAMP, quiet, save_base

from slm.config import ARConfig, TaskConfig, TextConfig
from slm.data.sequences import asr_context
from slm.generation import rerank as selfcheck
from slm.generation.rerank import can_transcribe, text_scores, transcripts
from slm.models.ar import SpeechLM
from slm.tokenization.text_normalization import NormalizedText
from slm.tokenization.tokenizer import SpeechTextTokenizer

pytestmark = quiet()

TEXTS = ["hello", "a", "the cat sat"]
CODES = [np.arange(10), np.arange(3), np.arange(20)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    base = save_base(tmp_path_factory.mktemp("base"), kind=request.param)
    return SpeechLM.create(ARConfig(base=str(base), lora=None), STAMP, seed=1).double().eval()


def texts(lm: SpeechLM, *texts: str) -> list[NormalizedText]:
    return [lm.tokenizer.normalize(text) for text in texts]


@torch.inference_mode()
def alone(lm: SpeechLM, text: str, codes: np.ndarray) -> float:
    vocabulary = lm.vocabulary
    target = [*lm.tokenizer.text_ids("asr", [text])[0], vocabulary.eos]
    context = asr_context(vocabulary, lm.tokenizer.speech_ids("asr", codes))
    logits = lm.lm(input_ids=torch.tensor([[*context, *target]]), use_cache=False).logits[0]
    barred = torch.ones(logits.shape[-1], dtype=torch.bool)
    written = lm.tokenizer.text.asr_form
    barred[: 256 if written == "characters" else vocabulary.num_text] = False
    barred[vocabulary.eos] = False
    reported = logits[len(context) - 1 : -1].masked_fill(barred, -torch.inf).log_softmax(-1)
    return float(reported[range(len(target)), target].mean())


@pytest.mark.parametrize("positions", [1, 8192])
@pytest.mark.parametrize("written", ["tokens", "characters"])
def test_scores_are_those_of_single_items(
    lm: SpeechLM, positions: int, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = SpeechTextTokenizer(
        lm.vocabulary, lm.tokenizer.text_tokenizer, TextConfig(asr_form=written)
    )
    lm = SpeechLM(lm.lm, tokenizer, lm.origin)
    monkeypatch.setattr(selfcheck, "POSITIONS", positions)
    expected = [alone(lm, text, codes) for text, codes in zip(TEXTS, CODES, strict=True)]
    assert text_scores(lm, texts(lm, *TEXTS), CODES) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


def test_speech_that_is_too_long_has_the_lowest_score(lm: SpeechLM) -> None:
    long = np.arange(lm.max_positions) % 24
    scores = text_scores(lm, texts(lm, "a", "a"), [long, CODES[0]])
    assert scores[0] == -np.inf
    assert np.isfinite(scores[1])
    assert transcripts(lm, [long, np.zeros(0, np.int64)]) == ["", ""]


def test_transcripts_do_not_depend_on_the_batch(lm: SpeechLM) -> None:
    together = transcripts(lm, CODES)
    assert together == [transcripts(lm, [one])[0] for one in CODES]


def test_scores_need_asr(lm: SpeechLM) -> None:
    assert can_transcribe(lm)
    deaf = SpeechLM(lm.lm, lm.tokenizer, {"tasks": {"tts": TaskConfig().tts, "asr": 0.0}})
    assert not can_transcribe(deaf)
    with pytest.raises(ValueError, match="cannot transcribe"):
        text_scores(deaf, texts(lm, *TEXTS), CODES)


def test_an_interleaved_model_compares_its_transcripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextConfig(interleaved=True, normalize=False)
    config = ARConfig(base=str(save_base(tmp_path / "base")), lora=None, text=text)
    lm = SpeechLM.create(config, STAMP, seed=0).eval()
    monkeypatch.setattr(selfcheck, "transcripts", lambda *_: ["The cat", "a dgo", ""])
    codes = [np.arange(5)] * 3
    assert text_scores(lm, texts(lm, "the cat", "a dog", "sun"), codes) == [0.0, -2 / 5, -1.0]

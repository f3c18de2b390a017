"""models/small: what it generates for fixed seeds is pinned by digests of codes."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import ROOT, voiced

from codec import load_codec
from slm.data.prompts import load_prompts
from slm.models.nar import NAR
from slm.voice import Voice

VOICE = ROOT / "models" / "small"
BASE = ROOT / "models" / "smollm2-135m-instruct"


def digest(codes: np.ndarray) -> str:
    """16 hex digits over codes (Q, T)."""
    return hashlib.sha256(np.ascontiguousarray(codes, dtype=np.int64).tobytes()).hexdigest()[:16]


@torch.inference_mode()
def test_codec_and_nar_give_the_same_codes() -> None:
    """Codes of a generated wave, and codebooks 2 to 8 from its first, after a shipped prompt."""
    codec, nar = load_codec(VOICE / "codec"), NAR.load(VOICE / "nar")
    prompt = load_prompts(VOICE / "prompts")["kathleen"]
    wave = torch.from_numpy(voiced(2.0, codec.sample_rate))[None, None]
    codes = codec.encode(wave).codes[0].numpy()
    assert digest(codes) == "37d265c4d869bc65"
    (completed,) = nar.decode([""], [prompt.codes], [codes[0]])
    assert digest(completed) == "b639c42859bf99bf"
    decoded = codec.decode(torch.from_numpy(completed)[None])
    assert decoded.shape == (1, 1, 32_000)


@pytest.mark.skipif(not BASE.is_dir(), reason="the voice's text LLM is fetched by make models")
def test_a_voice_gives_the_same_codes_and_transcript() -> None:
    voice = Voice.from_pretrained(VOICE, base=BASE)
    speech = voice.tts("Good morning, that costs $9.", "kathleen", seed=0)
    assert (speech.failure, digest(speech.codes)) == (None, "b101e95f6788982f")
    assert voice.asr([speech.wave]) == ["good morning that cost nine dollars."]
    converted = voice.convert(speech.wave, "reader-27")
    assert digest(converted.codes) == "5c576a3240433e0c"

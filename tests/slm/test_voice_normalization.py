"""A text is normalized once, however it comes to the voice."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_slm import quiet, run_slm, save_voice, speak_briefly

from codec.program import CHECKS_FAILED
from slm.tokenization import tokenizer
from slm.voice import Voice

pytestmark = quiet()

TEXT = "the cat sat on 2 mats"
LONG = "The cat sat on a mat, Mr. Hen. It cost 3.50 in all! " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_codec_folder: Path) -> Path:
    return save_voice(tmp_path_factory.mktemp("voices"), tiny_codec_folder)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Texts that are given to the normalizer."""
    counted: Counter[str] = Counter()
    normalize = tokenizer.normalize

    def counting(text: str) -> str:
        if text:  # The empty one is a transcript, see below.
            counted[text] += 1
        return normalize(text)

    monkeypatch.setattr(tokenizer, "normalize", counting)
    speak_briefly(monkeypatch)
    # The checks normalize the transcripts of what was generated: other texts.
    monkeypatch.setattr("slm.generation.tts.transcripts", lambda _, codes: [""] * len(codes))
    return counted


@pytest.mark.parametrize("text", [TEXT, LONG])
def test_tts(folder: Path, calls: Counter[str], text: str) -> None:
    voice = Voice.from_pretrained(folder)
    for _ in range(2):
        calls[text] = 0
        voice.tts(text, "ann")
        assert calls == {text: 1, voice.prompts["ann"].text: 1}


def test_batches_and_streams(folder: Path, calls: Counter[str]) -> None:
    voice = Voice.from_pretrained(folder)
    texts = [TEXT, LONG, "a dog"]
    voice.tts_batch(texts, ["ann"] * 3)
    assert calls == dict.fromkeys([*texts, voice.prompts["ann"].text], 1)
    list(voice.stream("far away", "ann"))
    assert calls["far away"] == 1


def test_command_line(folder: Path, calls: Counter[str], tmp_path: Path) -> None:
    prompt = Voice.from_pretrained(folder).prompts["ann"].text
    arguments = ["--voice", folder, "--prompt", "ann", "--out", tmp_path / "o.wav"]
    # What an untrained voice generates within its brief bounds is cut.
    assert run_slm("tts", *arguments, "--text", TEXT) == CHECKS_FAILED
    assert calls == {TEXT: 1, prompt: 1}
    calls.clear()
    lines = [{"id": str(i), "text": f"{i} cats", "prompt": "ann"} for i in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ["--voice", folder, "--list", tmp_path / "list.jsonl", "--out", tmp_path / "out"]
    assert run_slm("tts", *arguments) == CHECKS_FAILED
    assert calls == {"0 cats": 1, "1 cats": 1, "2 cats": 1, prompt: 1}

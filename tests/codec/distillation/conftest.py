"""Recordings and tiny teachers that several test files use."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lhotse import Recording, SupervisionSegment
from lhotse.cut import MonoCut
from tiny_teachers import save_speech_teacher, save_text_teacher

from codec.distillation.teachers import (
    SpeechTeacher,
    TextTeacher,
    load_speech_teacher,
    load_text_teacher,
)

SECONDS = [0.9, 1.7, 0.6, 1.25, 0.4]
TEXTS = ["the cats sat", "on the mat", "sat", "the cat", "on"]


@pytest.fixture
def cuts(tmp_path: Path, write_wav: Callable[..., Path]) -> list[MonoCut]:
    made = []
    for number, (seconds, text) in enumerate(zip(SECONDS, TEXTS, strict=True)):
        path = write_wav(tmp_path / "audio" / f"{number}.wav", seconds, seed=number)
        recording = Recording.from_file(path, recording_id=f"rec/{number}")
        supervision = SupervisionSegment(f"s{number}", recording.id, 0.0, seconds, text=text)
        made.append(
            MonoCut(
                f"cut/{number}", 0.0, seconds, 0, recording=recording, supervisions=[supervision]
            )
        )
    return made


@pytest.fixture
def speech(tmp_path: Path) -> SpeechTeacher:
    return load_speech_teacher(save_speech_teacher(tmp_path / "hubert", "hubert"), half=False)


@pytest.fixture
def text(tmp_path: Path) -> TextTeacher:
    return load_text_teacher(save_text_teacher(tmp_path / "bert"), half=False)

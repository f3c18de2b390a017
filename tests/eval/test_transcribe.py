import ctypes
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_teachers import save_ctc, save_speech_teacher, save_text_teacher
from tiny_whisper import save_whisper
from torchaudio.functional import edit_distance

from codec.distillation.word_alignment import load_transcriber
from eval.transcribe import (
    LIBRARIES,
    SAMPLE_RATE,
    TRANSFORMERS_LIBRARIES,
    Judge,
    blocks_at_pauses,
    judge_libraries,
    load_judge,
    max_tokens,
)


class FakeWhisper:
    """Says how many blocks of which length it was given."""

    def __init__(self) -> None:
        self.blocks: list[np.ndarray] = []
        self.options: dict[str, Any] = {}

    def transcribe(self, wave: np.ndarray, **options: Any) -> tuple[list[Any], None]:
        self.blocks.append(wave)
        self.options = options
        return [
            SimpleNamespace(text=" hello "),
            SimpleNamespace(text=""),
            SimpleNamespace(text="you"),
        ], None


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    (tmp_path / "model.bin").touch()
    judge = Judge(tmp_path, device="cpu")
    vars(judge)["model"] = FakeWhisper()
    return judge


def noise(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.1, 0.1, round(seconds * rate)).astype(np.float32)


def test_segments_are_joined_and_the_wave_is_resampled(judge: Judge) -> None:
    assert judge.transcribe(noise(1.0, 24000), 24000) == "hello you"
    assert judge.model.blocks[0].size == SAMPLE_RATE
    assert judge.model.options["temperature"] == 0.0
    assert judge.model.options["language"] == "en"


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros(16000), np.full(16000, 5e-5)])
def test_silence_has_no_transcript(judge: Judge, wave: np.ndarray) -> None:
    assert judge.transcribe(wave.astype(np.float32), 16000) == ""
    assert not judge.model.blocks


def test_nan_is_refused(judge: Judge) -> None:
    with pytest.raises(ValueError, match="NaN"):
        judge.transcribe(np.array([0.1, np.nan], np.float32), 16000)


def test_long_recording_is_split_at_a_pause(judge: Judge) -> None:
    wave = noise(400.0)
    wave[285 * SAMPLE_RATE : 286 * SAMPLE_RATE] = 0
    pieces = list(blocks_at_pauses(wave))
    assert [285 <= pieces[0].size / SAMPLE_RATE <= 286, len(pieces)] == [True, 2]
    assert np.array_equal(np.concatenate(pieces), wave)
    judge.transcribe(wave, SAMPLE_RATE)
    assert len(judge.model.blocks) == 2


def test_output_length_is_bounded() -> None:
    assert max_tokens(1.0) == 28
    assert max_tokens(300.0) == 200


def test_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.bin.*make models"):
        Judge(tmp_path / "none")


@pytest.mark.filterwarnings("default")
def test_broken_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"nothing of a model")
    with pytest.raises(ValueError, match="cannot read the judge"):
        _ = Judge(tmp_path, device="cpu").model


class FakeGPU:
    """faster_whisper on a machine with one GPU, which lacks libraries or the memory, or works."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure, self.loaded = failure, []

    def __call__(self, _folder: str, *, device: str, compute_type: str, **_: Any) -> Any:
        self.loaded.append((device, compute_type))
        whisper, plain = FakeWhisper(), FakeWhisper.transcribe

        def transcribe(wave: np.ndarray, **options: Any) -> Any:
            if device == "cuda" and self.failure:
                raise self.failure
            return plain(whisper, wave, **options)

        whisper.transcribe = transcribe
        return whisper


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[FakeGPU, Judge]]:
    """`on_gpu(failure)`: a GPU that fails with it, or not, and a judge there."""

    def make(failure: Exception | None, device: str = "auto") -> tuple[FakeGPU, Judge]:
        gpu = FakeGPU(failure)
        counts = SimpleNamespace(get_cuda_device_count=lambda: 1)
        monkeypatch.setitem(sys.modules, "ctranslate2", counts)
        monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=gpu))
        (tmp_path / "model.bin").touch()
        return gpu, Judge(tmp_path, device=device)

    return make


NO_CUBLAS = RuntimeError("Library libcublas.so.12 is not found or cannot be loaded")


def test_a_gpu_transcribes_a_second_before_rows_have_its_name(
    on_gpu: Callable[..., tuple[FakeGPU, Judge]], caplog: pytest.LogCaptureFixture
) -> None:
    gpu, judge = on_gpu(None)
    assert judge.name.endswith(" float16")
    assert [block.size for block in judge.model.blocks] == [SAMPLE_RATE]
    assert judge.transcribe(noise(1.0), SAMPLE_RATE) == "hello you"
    assert gpu.loaded == [("cuda", "float16")]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (NO_CUBLAS, f"{NO_CUBLAS}; `pip install nvidia-cublas-cu12` has it"),
        (ValueError("the target device\ndoes not support float16"), "the target device does not"),
    ],
)
def test_without_its_libraries_the_judge_is_on_the_cpu_and_rows_state_it(
    on_gpu: Callable[..., tuple[FakeGPU, Judge]], caplog: pytest.LogCaptureFixture,
    failure: Exception, reason: str,
) -> None:  # fmt: skip
    gpu, judge = on_gpu(failure)
    assert judge.name.endswith(" int8")
    assert judge.transcribe(noise(1.0), SAMPLE_RATE) == "hello you"
    assert gpu.loaded == [("cuda", "float16"), ("cpu", "int8")]
    [line] = caplog.messages
    assert f"transcribes on the CPU in int8, because the GPU failed: {reason}" in line
    assert "\n" not in line


def test_a_gpu_that_is_asked_for_by_name_is_used_or_an_error(
    on_gpu: Callable[..., tuple[FakeGPU, Judge]],
) -> None:
    gpu, judge = on_gpu(NO_CUBLAS, "cuda")
    with pytest.raises(ValueError, match=r"cannot use the GPU: Library .*pip install nvidia-c"):
        _ = judge.name
    gpu, judge = on_gpu(NO_CUBLAS, "cpu")
    assert judge.transcribe(noise(1.0), SAMPLE_RATE) == "hello you"
    assert gpu.loaded == [("cpu", "int8")]


def test_cublas_of_a_package_is_loaded_for_the_gpu(
    on_gpu: Callable[..., tuple[FakeGPU, Judge]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("nvidia_cublas_cu12-12.9.dist-info", "nvidia/cublas/lib"):
        (tmp_path / name).mkdir(parents=True)
    info = tmp_path / "nvidia_cublas_cu12-12.9.dist-info"
    (info / "METADATA").write_text("Name: nvidia-cublas-cu12\nVersion: 12.9\n")
    libraries = [f"nvidia/cublas/lib/{name}" for name in ("libcublas.so.12", "libcublasLt.so.12")]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in libraries))
    for name in libraries:
        (tmp_path / name).touch()
    loaded: list[str] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda path, mode: loaded.append(path))
    monkeypatch.syspath_prepend(tmp_path)
    assert on_gpu(None)[1].name.endswith(" float16")
    # libcublas needs libcublasLt.
    assert loaded == [str(tmp_path / name) for name in reversed(libraries)]
    loaded.clear()
    assert on_gpu(None, "cpu")[1].name.endswith(" int8")
    assert not loaded


@pytest.fixture(scope="module")
def whispers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of transformers: multilingual and english."""
    from transformers import WhisperFeatureExtractor

    folder = tmp_path_factory.mktemp("whispers")
    for name in ("multilingual", "english"):
        save_whisper(folder / name, name == "multilingual")
        WhisperFeatureExtractor().save_pretrained(folder / name)
    return folder


@pytest.mark.filterwarnings("default")
def test_whisper_of_transformers(whispers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = load_judge(whispers / "multilingual", language="de-AT", num_threads=1)
    assert re.fullmatch("multilingual@[0-9a-f]{16} transformers float(16|32)", judge.name)
    assert judge_libraries(judge.name) == TRANSFORMERS_LIBRARIES
    asked: list[dict[str, Any]] = []
    generate = judge.model.generate
    monkeypatch.setattr(
        judge.model, "generate", lambda **given: asked.append(given) or generate(**given)
    )
    first = judge.transcribe(noise(1.0), SAMPLE_RATE)
    assert first
    assert first == judge.transcribe(noise(1.0), SAMPLE_RATE)
    assert (asked[0]["language"], asked[0]["task"]) == ("de", "transcribe")
    assert asked[0]["num_beams"] > 1
    assert not asked[0]["do_sample"]
    english = load_judge(whispers / "english", num_threads=1)
    assert english.transcribe(noise(0.1), SAMPLE_RATE) != ""
    assert english.transcribe(np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE) == ""
    with pytest.raises(ValueError, match="NaN"):
        english.transcribe(np.array([0.1, np.nan], np.float32), SAMPLE_RATE)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_ctc_of_transformers_is_greedy(norm: str, tmp_path: Path) -> None:
    folder = save_ctc(tmp_path / "ctc", norm)
    wave = noise(2.0)
    aligned = load_transcriber(str(folder)).words(torch.from_numpy(wave)[None, None])[0]
    judge = load_judge(folder, language="fi", num_threads=1)
    transcript, expected = (
        judge.transcribe(wave, SAMPLE_RATE),
        " ".join(one.text for one in aligned),
    )
    # Frames of random weights have labels that are equal within rounding.
    assert edit_distance(transcript, expected) <= 0.1 * len(expected)
    assert len(aligned) > 1


@pytest.mark.filterwarnings("default")
def test_long_recordings_of_transformers_judges(whispers: Path) -> None:
    judge = load_judge(whispers / "english")
    wave, sizes = noise(70.0), []
    wave[25 * SAMPLE_RATE : 26 * SAMPLE_RATE] = 0
    vars(judge)["_texts"] = lambda block: sizes.append(block.size) or [f" {len(sizes)}"]
    assert judge.transcribe(wave, SAMPLE_RATE) == "1 2 3"
    assert 25 <= sizes[0] / SAMPLE_RATE <= 26
    assert sum(sizes) == wave.size
    assert max(sizes) <= 30 * SAMPLE_RATE


@pytest.mark.filterwarnings("default")
def test_models_that_do_not_transcribe(whispers: Path, tmp_path: Path) -> None:
    bert = save_text_teacher(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"a bert model is no speech recognizer; .*whisper"):
        load_judge(bert)
    headless = load_judge(save_speech_teacher(tmp_path / "wavlm", "wavlm"))
    with pytest.raises(ValueError, match="it has no CTC head"):
        headless.transcribe(noise(1.0), SAMPLE_RATE)
    (tmp_path / "bert" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded as a speech recognizer"):
        load_judge(bert)
    with pytest.raises(ValueError, match="english transcribes English only, and --language is fr"):
        load_judge(whispers / "english", language="fr")
    with pytest.raises(ValueError, match="multilingual does not know the language ga"):
        load_judge(whispers / "multilingual", language="ga")
    with pytest.raises(ValueError, match="does not know the language yue"):
        load_judge(whispers / "multilingual", language="yue")


def test_ctranslate2_folders_by_their_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / "vocabulary.txt").write_text("a\n" * 51864)
    judge = load_judge(tmp_path, device="cpu")
    # The string of earlier rows: the name, SHA-256 of model.bin, and the arithmetic.
    digest = hashlib.sha256(b"weights").hexdigest()[:16]
    assert judge.name == f"{tmp_path.name}@{digest} int8"
    assert (judge_libraries(judge.name), judge_libraries("")) == (LIBRARIES, ())
    with pytest.raises(ValueError, match="transcribes English only"):
        load_judge(tmp_path, language="zh")
    (tmp_path / "vocabulary.txt").unlink()
    (tmp_path / "vocabulary.json").write_text(json.dumps(["a"] * 51865))
    assert load_judge(tmp_path, language="zh-CN", device="cpu").language == "zh"


MODEL = ROOT / "models" / "whisper-base"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="`make models` has not run")
@pytest.mark.filterwarnings("default")
def test_real_judge_is_deterministic_and_bounded() -> None:
    judge = Judge(MODEL, num_threads=1, device="cpu")
    first = judge.transcribe(noise(2.0), SAMPLE_RATE)
    assert judge.transcribe(noise(2.0), SAMPLE_RATE) == first
    assert len(first.split()) <= max_tokens(2.0)

"""The ASR that scores, deterministic: Whisper (arXiv 2212.04356) through faster-whisper, other
encoder-decoders through transformers (beam search, temperature 0), CTC models through transformers
(greedy)."""

import ctypes
import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from eval.models import (
    ModelFolder,
    find_model,
    loading_scorer,
    read_config,
    torch_device,
    without_reports,
)
from eval.speech import resample_for_scoring
from eval.text import WHISPER_LANGUAGES, language_code

logger = logging.getLogger(__name__)

LIBRARIES = ("faster-whisper", "ctranslate2")
TRANSFORMERS_LIBRARIES = ("transformers", "torch")

SAMPLE_RATE = 16000
SILENCE_PEAK = 1e-4
"""A wave with a lower peak (-80 dBFS) is silence."""
BLOCK_SECONDS = 300.0
"""Maximum length of a wave that faster-whisper transcribes at once."""
PAUSE_SEARCH_SECONDS = 30.0
"""Such a block ends at the quietest point of its last seconds."""
WINDOW_SECONDS = 30.0
"""Maximum length of a wave that a model of transformers transcribes at once."""
WINDOW_SEARCH_SECONDS = 10.0
MIN_SECONDS = 0.5
"""Shorter waves are padded for models of transformers."""
TOKENS_PER_SECOND = 12
"""Upper limit of the output; fast speech has about 6."""
BEAM_SIZE = 5
ENCODER_DECODERS = ("whisper", "moonshine", "speech_to_text", "speech-encoder-decoder", "speecht5")
"""Model types of transformers that transcribe without a prompt."""
MULTILINGUAL_TOKENS = 51865
"""Size of the vocabulary of a multilingual Whisper; English-only ones have one token less."""
PROBE_SECONDS = 1.0
CUBLAS_PACKAGE = "nvidia-cublas-cu12"
CUBLAS = ("libcublasLt.so.12", "libcublas.so.12")
"""Libraries of CUDA 12 that CTranslate2 opens by name; torch's are those of CUDA 13."""
REMEDY = (
    "`make models` makes models/whisper-base; docs/evaluation.md, Judges, has larger and other ones"
)


class _Judge:
    """Checks and splits waves; a subclass transcribes the blocks."""

    block_seconds, search_seconds = WINDOW_SECONDS, WINDOW_SEARCH_SECONDS

    def transcribe(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> str:
        """Returns the transcript of a wave, "" if it is empty or silent. Long waves are split.

        Raises:
            ValueError: the wave is not finite, or the model cannot be loaded.
        """
        if wave.size and not np.isfinite(wave).all():
            raise ValueError("the wave to transcribe holds NaN or infinite samples")
        if not wave.size or np.abs(wave).max() < SILENCE_PEAK:
            return ""
        wave = resample_for_scoring(np.asarray(wave, np.float32), sample_rate, SAMPLE_RATE)
        blocks = blocks_at_pauses(wave, self.block_seconds, self.search_seconds)
        texts = [text.strip() for block in blocks for text in self._texts(block)]
        return " ".join(text for text in texts if text)

    def _texts(self, block: Float[np.ndarray, " S"]) -> list[str]:
        raise NotImplementedError


class Judge(_Judge):
    """Transcribes waves with a Whisper model in CTranslate2's format."""

    block_seconds, search_seconds = BLOCK_SECONDS, PAUSE_SEARCH_SECONDS

    def __init__(
        self,
        folder: str | Path,
        *,
        num_threads: int = 2,
        device: str = "auto",
        language: str | None = "en",
        beam_size: int = BEAM_SIZE,
        label: str | None = None,
    ) -> None:
        """
        Args:
            folder: has model.bin.
            device: cpu, cuda or auto.
            language: None: the model detects it.
            label: name in rows (default: the folder's).

        Raises:
            ValueError: the folder has no model.bin.
        """
        self.folder = Path(folder)
        if not (self.folder / "model.bin").is_file():
            raise ValueError(
                f"{self.folder} holds no CTranslate2 Whisper model (model.bin); {REMEDY}"
            )
        self.source = ModelFolder(
            label or self.folder.name, self.folder, (self.folder / "model.bin",)
        )
        self.num_threads = num_threads
        self.language = language
        self.beam_size = beam_size
        self.device = device

    @cached_property
    def name(self) -> str:
        """Name, digest and arithmetic, as in rows."""
        return f"{self.source.label} {self.compute_type}"

    @property
    def compute_type(self) -> str:
        """Arithmetic of CTranslate2: int8 on CPUs, float16 on GPUs.

        Raises:
            ValueError: the device is cuda, and it cannot be used.
        """
        return "int8" if self._on_gpu is None else "float16"

    @cached_property
    def _on_gpu(self) -> Any | None:
        """The model on a GPU, if it can transcribe there; None: on the CPU."""
        if self.device == "cpu" or (self.device == "auto" and not _num_gpus()):
            return None
        _preload_cublas()
        noise = np.random.default_rng(0).normal(0, 0.01, round(PROBE_SECONDS * SAMPLE_RATE))
        try:
            model = self._load("cuda", "float16")
            self._transcribe(model, noise.astype(np.float32))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            remedy = f"; `pip install {CUBLAS_PACKAGE}` has it" if "libcublas" in reason else ""
            if self.device == "cuda":
                raise ValueError(
                    f"the judge in {self.folder} cannot use the GPU: {reason}{remedy}"
                ) from error
            logger.warning(
                "%s: transcribes on the CPU in int8, because the GPU failed: %s%s",
                self.source.name, reason, remedy,
            )  # fmt: skip
            return None
        return model

    @cached_property
    def model(self) -> Any:
        """The faster-whisper model, loaded at first use.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._on_gpu is not None:
            return self._on_gpu
        try:
            return self._load("cpu", "int8")
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read the judge in {self.folder}: {error}") from error

    def _load(self, device: str, compute_type: str) -> Any:
        from faster_whisper import WhisperModel

        return WhisperModel(
            str(self.folder),
            device=device,
            compute_type=compute_type,
            cpu_threads=self.num_threads,
            local_files_only=True,
        )

    def _texts(self, block: Float[np.ndarray, " S"]) -> list[str]:
        return self._transcribe(self.model, block)

    def _transcribe(self, model: Any, block: Float[np.ndarray, " S"]) -> list[str]:
        segments, _ = model.transcribe(
            block,
            language=self.language,
            beam_size=self.beam_size,
            temperature=0.0,
            condition_on_previous_text=False,
            max_new_tokens=max_tokens(block.size / SAMPLE_RATE),
        )
        return [segment.text for segment in segments]


class TransformersJudge(_Judge):
    """Transcribes waves with an encoder-decoder or a CTC model of transformers."""

    def __init__(
        self,
        source: ModelFolder,
        *,
        num_threads: int = 2,
        device: str = "auto",
        language: str = "en",
    ) -> None:
        """
        Raises:
            ValueError: the model is not known to transformers, or of a kind that does not
                transcribe.
        """
        from transformers.models.auto import modeling_auto

        self.source = source
        self.num_threads, self.language = num_threads, language
        self.device = torch_device(device)
        self.config = read_config(source, "speech recognizer")
        kind = self.config.model_type
        self.is_ctc = kind in modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES
        if not self.is_ctc and kind not in ENCODER_DECODERS:
            raise ValueError(
                f"{source.folder}: a {kind} model is no speech recognizer; those of transformers "
                f"are {', '.join(ENCODER_DECODERS)} and CTC models"
            )

    @cached_property
    def name(self) -> str:
        """Name, digest, library and arithmetic, as in rows."""
        return f"{self.source.label} transformers {self.arithmetic}"

    @property
    def arithmetic(self) -> str:
        """float32 on CPUs, float16 on GPUs."""
        return "float32" if self.device == "cpu" else "float16"

    def build(self) -> Any:
        """Returns the network with random weights."""
        return self._class().from_config(self.config, trust_remote_code=False)

    def _class(self) -> Any:
        import transformers

        if self.is_ctc:
            return transformers.AutoModelForCTC
        return transformers.AutoModelForSpeechSeq2Seq

    @cached_property
    def model(self) -> Any:
        """The network, loaded at first use.

        Raises:
            ValueError: it cannot be loaded, or lacks a head that transcribes.
        """
        import torch

        with loading_scorer(self.source, "speech recognizer"):
            network, facts = self._class().from_pretrained(
                self.source.folder,
                dtype=getattr(torch, self.arithmetic),
                output_loading_info=True,
                trust_remote_code=False,
            )
            if any(key.startswith("lm_head") for key in facts["missing_keys"] if self.is_ctc):
                raise ValueError("it has no CTC head; take a model that transcribes")
        return network.to(self.device).eval()

    @cached_property
    def _extractor(self) -> Any:
        from transformers import AutoFeatureExtractor

        with loading_scorer(self.source, "speech recognizer"):
            extractor: Any = AutoFeatureExtractor.from_pretrained(
                self.source.folder, trust_remote_code=False
            )
            if extractor.sampling_rate != SAMPLE_RATE:
                raise ValueError(f"it takes {extractor.sampling_rate} Hz, not {SAMPLE_RATE}")
        return extractor

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with loading_scorer(self.source, "speech recognizer"):
            return AutoTokenizer.from_pretrained(self.source.folder, trust_remote_code=False)

    def _texts(self, block: Float[np.ndarray, " S"]) -> list[str]:
        import torch

        seconds = block.size / SAMPLE_RATE
        block = np.pad(block, (0, max(0, round(MIN_SECONDS * SAMPLE_RATE) - block.size)))
        inputs = self._extractor(block, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        inputs = inputs.to(self.device, self.model.dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(self.num_threads)
        try:
            with torch.inference_mode(), without_reports():
                if self.is_ctc:
                    tokens = self.model(**inputs).logits.argmax(-1)
                else:
                    tokens = self.model.generate(**inputs, **self._options(seconds))
        finally:
            torch.set_num_threads(before)
        ids, options = tokens[0].tolist(), {}
        if self.is_ctc:
            # Here, because transformers' decoding without special tokens joins the two letters of
            # a double letter: it removes the blank between them first.
            ids = [token for token, _ in groupby(ids) if token != self.config.pad_token_id]
            options["group_tokens"] = False
        return [self._tokenizer.decode(ids, skip_special_tokens=True, **options)]

    def _options(self, seconds: float) -> dict[str, Any]:
        """Options of the generation for a wave of this length."""
        options = {
            "num_beams": BEAM_SIZE, "do_sample": False, "max_new_tokens": max_tokens(seconds)
        }  # fmt: skip
        if self.config.model_type == "whisper" and self.config.vocab_size >= MULTILINGUAL_TOKENS:
            options |= {"language": self.language, "task": "transcribe"}
        return options


def load_judge(
    source: str | Path, *, language: str = "en", num_threads: int = 2, device: str = "auto"
) -> Judge | TransformersJudge:
    """Returns an ASR: `transcribe(wave, sample_rate)` and `name`. Its weights are loaded at the
    first wave.

    Args:
        source: folder or hub id of a Whisper in CTranslate2's format, or of an encoder-decoder or
            CTC model of transformers.
        language: of the speech, a code of eval.text.LANGUAGES.
        device: cpu, cuda or auto.

    Raises:
        ValueError: the model cannot be found, does not transcribe, or lacks the language.
    """
    code = language_code(language)
    found = find_model(source, REMEDY)
    if found.weights[0].name == "model.bin":
        vocabulary = _num_tokens(found.folder)
        whisper = Judge(
            found.folder, num_threads=num_threads, device=device, language=code, label=found.name
        )
    else:
        whisper = TransformersJudge(found, num_threads=num_threads, device=device, language=code)
        is_whisper = whisper.config.model_type == "whisper"
        vocabulary = whisper.config.vocab_size if is_whisper else None
    if vocabulary is not None:
        _check_language(found.name, vocabulary, code)
    return whisper


def _num_gpus() -> int:
    import ctranslate2

    return ctranslate2.get_cuda_device_count()


def _preload_cublas() -> None:
    """Loads CUBLAS of CUBLAS_PACKAGE, where it is installed: the linker does not search its folder,
    but finds a library that is loaded."""
    try:
        found = {file.name: file.locate() for file in files(CUBLAS_PACKAGE) or ()}
    except PackageNotFoundError:
        return
    for name in CUBLAS:
        with suppress(KeyError, OSError):  # What is missing is in CTranslate2's message.
            ctypes.CDLL(str(found[name]), mode=ctypes.RTLD_GLOBAL)


def judge_libraries(name: str) -> tuple[str, ...]:
    """Returns the distributions behind a judge of this name; none for ""."""
    if not name:
        return ()
    return TRANSFORMERS_LIBRARIES if " transformers " in name else LIBRARIES


def _num_tokens(folder: Path) -> int | None:
    """Returns the size of a CTranslate2 Whisper's vocabulary, None if it has no such file."""
    import json

    for file in (folder / "vocabulary.json", folder / "vocabulary.txt"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            return (
                len(json.loads(text))
                if file.suffix == ".json"
                else text.rstrip("\n").count("\n") + 1
            )
    return None


def _check_language(name: str, vocabulary: int, code: str) -> None:
    """Raises ValueError for a language that a Whisper with `vocabulary` tokens does not have."""
    if code == "en":
        return
    if vocabulary < MULTILINGUAL_TOKENS:
        raise ValueError(f"{name} transcribes English only, and --language is {code}; {REMEDY}")
    if code not in WHISPER_LANGUAGES or (code == "yue" and vocabulary == MULTILINGUAL_TOKENS):
        raise ValueError(
            f"{name} does not know the language {code}; take a model of that language "
            "(docs/evaluation.md, Judges)"
        )


def max_tokens(seconds: float) -> int:
    """Returns the maximum number of tokens, which bounds hallucinated loops on noise."""
    return min(200, 16 + math.ceil(TOKENS_PER_SECOND * seconds))


def blocks_at_pauses(
    wave: Float[np.ndarray, " S"],
    seconds: float = BLOCK_SECONDS,
    search_seconds: float = PAUSE_SEARCH_SECONDS,
) -> Iterator[Float[np.ndarray, " P"]]:
    """Yields pieces of at most `seconds` of a 16 kHz wave, split at the quietest 0.2 s of each
    piece's last `search_seconds`."""
    size, search = int(seconds * SAMPLE_RATE), int(search_seconds * SAMPLE_RATE)
    window = SAMPLE_RATE // 5
    while wave.size > size:
        tail = np.square(wave[size - search : size], dtype=np.float64)
        energy = tail.reshape(-1, window).sum(1)
        cut = size - search + int(energy.argmin()) * window + window // 2
        yield wave[:cut]
        wave = wave[cut:]
    yield wave

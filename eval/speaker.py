"""Speaker similarity: cosine of speaker embeddings. Trim long silences before embedding.

Three kinds of encoders:

- an LSTM trained with the GE2E loss (Wan et al. 2018, arXiv 1710.10467), which
  recipes/offline_models.py makes from Resemblyzer's weights. Features as in Resemblyzer: 40 Slaney
  mel bands of the power spectrum (no logarithm), 25 ms windows every 10 ms, quiet recordings raised
  to -30 dBFS, embeddings of 1.6 s windows averaged; without its voice activity detector.
- x-vector models of transformers: WavLM (arXiv 2110.13900, section V-B), UniSpeech-SAT,
  wav2vec 2.0.
- ONNX files of WeSpeaker (arXiv 2210.17016): ECAPA-TDNN (arXiv 2005.07143), ResNet and others.
  Features as in WeSpeaker: 80 Kaldi filter banks, 25 ms Hamming windows every 10 ms, minus their
  mean over time.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from eval.models import ModelFolder, find_model, loading_scorer, read_config, torch_device
from eval.speech import check_scorable, resample_for_scoring

LIBRARIES = ("torch", "torchaudio")
ONNX_LIBRARIES = ("onnxruntime", "torchaudio")

VOLUME_DBFS = -30.0
PARTIALS_PER_SECOND = 1.3
MIN_COVERAGE = 0.75
"""A last window with a smaller share of the recording is left out."""
MIN_SECONDS = 0.4
BATCH_SIZE = 64
SAMPLE_RATE = 16000
"""Of x-vector models and ONNX files."""
PIECE_SECONDS = 30.0
"""x-vectors of longer recordings are averages over equal pieces of at most this length."""
NUM_FILTER_BANKS = 80
REMEDY = "`make models` makes models/speaker-encoder; docs/evaluation.md, Judges, has other ones"


class SpeakerEncoder(nn.Module):
    """Embeds a recording of one speaker as a unit vector."""

    bands: Tensor
    window: Tensor
    name = ""
    """Name and digest, as in rows; "" for one that was not loaded."""

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        num_mels: int = 40,
        window_seconds: float = 0.025,
        hop_seconds: float = 0.01,
        hidden_size: int = 256,
        num_layers: int = 3,
        embedding_size: int = 256,
        partial_frames: int = 160,
    ) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.sample_rate = sample_rate
        self.partial_frames = partial_frames
        self.hop_length = round(hop_seconds * sample_rate)
        self.window_length = round(window_seconds * sample_rate)
        self.lstm = nn.LSTM(num_mels, hidden_size, num_layers, batch_first=True)
        self.linear = nn.Linear(hidden_size, embedding_size)
        bands = melscale_fbanks(
            self.window_length // 2 + 1,
            0.0,
            sample_rate / 2,
            num_mels,
            sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("window", torch.hann_window(self.window_length), persistent=False)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "SpeakerEncoder":
        """Loads config.json and model.safetensors.

        Raises:
            ValueError: a file is missing or invalid.
        """
        folder = Path(folder)
        config, weights = folder / "config.json", folder / "model.safetensors"
        for path in (config, weights):
            if not path.is_file():
                raise ValueError(f"{path} is missing; `make models` makes the speaker encoder")
        try:
            encoder = cls(**json.loads(config.read_text(encoding="utf-8")))
            encoder.load_state_dict(load_file(weights))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{folder}: no valid speaker encoder: {reason}") from error
        encoder.name = ModelFolder(folder.name, folder, (weights,)).label
        return encoder.eval().to(device)

    def forward(self, mel: Float[Tensor, "B T D"]) -> Float[Tensor, "B E"]:
        """Returns unit vectors of mel windows."""
        _, (hidden, _) = self.lstm(mel)
        return functional.normalize(functional.relu(self.linear(hidden[-1])), dim=1)

    def mel(self, wave: Float[Tensor, " S"]) -> Float[Tensor, "T D"]:
        """Returns power mel bands, a frame per hop, with zero padding at the edges."""
        spectrum = torch.stft(
            wave,
            n_fft=self.window_length,
            hop_length=self.hop_length,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum.abs().square().T @ self.bands

    def partial_starts(self, num_samples: int) -> list[int]:
        """Returns the first frames of the windows that cover a recording, evenly spaced."""
        num_frames = -(-(num_samples + 1) // self.hop_length)
        step = round(self.sample_rate / PARTIALS_PER_SECOND / self.hop_length)
        starts = list(range(0, max(1, num_frames - self.partial_frames + step + 1), step))
        first = starts[-1] * self.hop_length
        coverage = (num_samples - first) / (self.partial_frames * self.hop_length)
        return starts[:-1] if coverage < MIN_COVERAGE and len(starts) > 1 else starts

    @torch.inference_mode()
    def embed(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " E"]:
        """Returns the unit vector of a recording.

        Raises:
            ValueError: it is silent, not finite or shorter than 0.4 s.
        """
        wave = _checked(wave, sample_rate, self.sample_rate)
        volume = 10 * np.log10(np.mean(np.square(wave, dtype=np.float64)))
        wave = wave * np.float32(10 ** (max(0.0, VOLUME_DBFS - volume) / 20))
        starts = self.partial_starts(wave.size)
        padding = (starts[-1] + self.partial_frames) * self.hop_length - wave.size
        mel = self.mel(
            functional.pad(torch.from_numpy(wave), (0, max(0, padding))).to(self.bands.device)
        )
        partials = torch.stack([mel[start : start + self.partial_frames] for start in starts])
        vectors = torch.cat([self(batch) for batch in partials.split(BATCH_SIZE)])
        return functional.normalize(vectors.mean(0), dim=0).cpu().numpy()


class XVectorEncoder:
    """Embeds a recording with an x-vector model of transformers."""

    def __init__(self, source: ModelFolder, device: str = "cpu") -> None:
        """
        Raises:
            ValueError: the model is not known to transformers, or has no x-vectors.
        """
        from transformers.models.auto import modeling_auto

        self.source, self.device = source, device
        self.name = f"{source.label} transformers"
        self.config = read_config(source, "speaker encoder")
        kinds = modeling_auto.MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES
        if self.config.model_type not in kinds:
            raise ValueError(
                f"{source.folder}: a {self.config.model_type} model is no speaker encoder; those "
                f"of transformers are x-vector models of {', '.join(kinds)}"
            )

    def build(self) -> Any:
        """Returns the network with random weights."""
        from transformers import AutoModelForAudioXVector

        return AutoModelForAudioXVector.from_config(self.config, trust_remote_code=False)

    @cached_property
    def model(self) -> Any:
        """The network, loaded at first use.

        Raises:
            ValueError: it cannot be loaded, or lacks the head that makes x-vectors.
        """
        from transformers import AutoModelForAudioXVector

        with loading_scorer(self.source, "speaker encoder"):
            network, facts = AutoModelForAudioXVector.from_pretrained(
                self.source.folder,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
            if any(key.startswith("tdnn") for key in facts["missing_keys"]):
                raise ValueError("it has no x-vector head; take a model of speaker verification")
        return network.to(self.device).eval()

    @cached_property
    def _extractor(self) -> Any:
        from transformers import AutoFeatureExtractor

        with loading_scorer(self.source, "speaker encoder"):
            return AutoFeatureExtractor.from_pretrained(self.source.folder, trust_remote_code=False)

    @torch.inference_mode()
    def embed(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " E"]:
        """Returns the unit vector of a recording; see `SpeakerEncoder.embed`."""
        wave = _checked(wave, sample_rate, SAMPLE_RATE)
        pieces = np.array_split(wave, -(-wave.size // round(PIECE_SECONDS * SAMPLE_RATE)))
        vectors = []
        for piece in pieces:
            inputs = self._extractor(piece, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            vectors.append(self.model(**inputs.to(self.device)).embeddings[0])
        vectors = functional.normalize(torch.stack(vectors).float(), dim=1)
        return functional.normalize(vectors.mean(0), dim=0).cpu().numpy()


class OnnxEncoder:
    """Embeds a recording with an ONNX file of WeSpeaker: filter banks (1,T,80) in, a vector out."""

    def __init__(self, source: ModelFolder, device: str = "cpu") -> None:
        """
        Raises:
            ValueError: the file cannot be read, or takes no filter banks.
        """
        import onnxruntime

        self.name = f"{source.label} onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ["CUDAExecutionProvider"] * (device == "cuda") + ["CPUExecutionProvider"]
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        with loading_scorer(source, "speaker encoder"):
            self.session = onnxruntime.InferenceSession(
                str(source.weights[0]), options, providers=providers
            )
            [features] = self.session.get_inputs()
            if len(features.shape) != 3 or features.shape[2] != NUM_FILTER_BANKS:
                raise ValueError(
                    f"its input {features.name} has the shape {features.shape}, not "
                    f"(1, T, {NUM_FILTER_BANKS}): take an ONNX file of WeSpeaker"
                )
        self.input = features.name

    def features(self, wave: Float[np.ndarray, " S"]) -> Float[np.ndarray, "T D"]:
        """Returns filter banks of a 16 kHz wave without their mean over time."""
        from torchaudio.compliance import kaldi

        banks = kaldi.fbank(
            torch.from_numpy(wave)[None] * 2**15,
            num_mel_bins=NUM_FILTER_BANKS,
            sample_frequency=SAMPLE_RATE,
            window_type="hamming",
        )
        return (banks - banks.mean(0)).numpy()

    def embed(self, wave: Float[np.ndarray, " S"], sample_rate: int) -> Float[np.ndarray, " E"]:
        """Returns the unit vector of a recording; see `SpeakerEncoder.embed`."""
        features = self.features(_checked(wave, sample_rate, SAMPLE_RATE))
        vector = np.ravel(np.asarray(self.session.run(None, {self.input: features[None]})[-1]))
        return (vector / np.linalg.norm(vector)).astype(np.float32)


def load_speaker_encoder(
    source: str | Path, device: str = "cpu"
) -> SpeakerEncoder | XVectorEncoder | OnnxEncoder:
    """Returns a speaker encoder: `embed(wave, sample_rate)` and `name`.

    Args:
        source: folder of recipes/offline_models.py, folder or hub id of an x-vector model of
            transformers, or an ONNX file of WeSpeaker, its folder or hub id.
        device: cpu, cuda or auto.

    Raises:
        ValueError: the model cannot be found, or is no speaker encoder.
    """
    device, path = torch_device(device), Path(source)
    if path.suffix == ".onnx" and path.is_file():
        return OnnxEncoder(ModelFolder(path.stem, path.parent, (path,)), device)
    found = find_model(source, REMEDY)
    if found.weights[0].suffix == ".onnx":
        if len(found.weights) > 1:
            raise ValueError(f"{source}: holds {len(found.weights)} ONNX files; name one of them")
        return OnnxEncoder(found, device)
    config = found.folder / "config.json"
    if config.is_file() and "model_type" in config.read_text(encoding="utf-8"):
        return XVectorEncoder(found, device)
    return SpeakerEncoder.from_folder(found.folder, device)


def speaker_libraries(name: str) -> tuple[str, ...]:
    """Returns the distributions behind a speaker encoder of this name."""
    kind = name.rpartition(" ")[2]
    return {"transformers": ("transformers", "torch"), "onnx": ONNX_LIBRARIES}.get(kind, LIBRARIES)


def _checked(
    wave: Float[np.ndarray, " S"], sample_rate: int, target_rate: int
) -> Float[np.ndarray, " R"]:
    """Returns a wave at the encoder's rate.

    Raises:
        ValueError: it is silent, not finite or shorter than 0.4 s.
    """
    check_scorable(wave, "speaker's")
    if wave.size < MIN_SECONDS * sample_rate:
        raise ValueError(
            f"a speaker embedding needs {MIN_SECONDS} s, got {wave.size / sample_rate:.2f} s"
        )
    return resample_for_scoring(np.asarray(wave, np.float32), sample_rate, target_rate)


def similarity(first: Float[np.ndarray, " E"], second: Float[np.ndarray, " E"]) -> float:
    """Returns the cosine of two embeddings, in [-1, 1]."""
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))

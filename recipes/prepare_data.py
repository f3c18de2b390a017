"""Writes corpora as lists of cuts: OUT/<split>.jsonl.gz for lhotse, and OUT/skipped.jsonl.

    python recipes/prepare_data.py librispeech|libritts|ljspeech|vctk CORPUS --out OUT [--download]
    python recipes/prepare_data.py folder FOLDER --out OUT      recordings with NAME.txt
    python recipes/prepare_data.py list LIST.jsonl --out OUT    audio, text, offset, duration, ...
    python recipes/prepare_data.py prompts --out OUT            Debian's recorded telephone prompts
    python recipes/prepare_data.py synthetic --out OUT          synthetic speech of many voices

The parts of a corpus (train-clean-100, dev-other, ...) are also joined to OUT/train.jsonl.gz and
OUT/dev.jsonl.gz. --dev-speakers and --dev-cuts hold out from everything but dev and test parts.

Every recording is decoded once to check it. An unusable one is skipped, counted, and listed with
the reason.
"""

import argparse
import logging
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from codec.audio import audio_info, recordings_in, stream_audio
from codec.io import atomic_files, sha256_of
from codec.json_lines import decode_utf8, read_json_lines, write_json_lines
from codec.program import ArgumentParser, counted, did_you_mean
from codec.training.data import load_cut
from recipes.lib.config import check_seed_of_recipe
from recipes.lib.run import finished, run_recipe

if TYPE_CHECKING:
    from lhotse.cut import Cut

logger = logging.getLogger(__name__)

CORPORA = ("librispeech", "libritts", "ljspeech", "vctk")
LIST_KEYS = ("audio", "text", "id", "speaker", "language", "split", "offset", "duration")
"""Of the lines of a list."""
MAX_SECONDS = 1e9
MAX_DEV_CUTS = 40
"""Cuts that the suggested command holds out: a tenth of them, and no more than these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedRecording:
    """An utterance whose recording is not checked yet."""

    id: str
    audio: Path
    text: str
    speaker: str
    language: str
    split: str = "all"
    offset: float | None = None
    """Start of the segment, in seconds; None: the recording's."""
    duration: float | None = None
    """Of the segment, in seconds; None: to the end. A shorter recording is truncated."""
    error: str | None = None
    """Why it cannot be used, if that is known already."""


class SkippedFile(NamedTuple):
    """A line of skipped.jsonl."""

    id: str
    audio: str
    reason: str


class Prepared(NamedTuple):
    """Usable cuts by split, and skipped recordings."""

    cuts: dict[str, list["Cut"]]
    skipped: list[SkippedFile]


def entries_of_list(
    path: Path, language: str, ignored: Collection[str] = ()
) -> Iterator[ListedRecording]:
    """Yields the lines of a JSON Lines list; relative paths start at the list's folder.

    Args:
        ignored: further keys that lines may have.

    Raises:
        ValueError: a line is no object, or a key is missing, unknown or invalid.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    for number, stored, _ in read_json_lines(path):
        where = f"{path}, line {number}"
        if not isinstance(stored, dict):
            raise ValueError(f"{where}: needs an object with the key audio")
        for key in stored:
            if key not in LIST_KEYS and key not in ignored:
                raise ValueError(
                    f"{where}: {key!r}: no such key{did_you_mean(key, LIST_KEYS)}; the keys are "
                    f"{', '.join(LIST_KEYS)}"
                )
        if not isinstance(stored.get("audio"), str):
            raise ValueError(f"{where}: needs an object with the key audio")
        if any(character < " " for character in stored["audio"]):
            raise ValueError(f"{where}: audio has a control character: {stored['audio']!r}")
        if not isinstance(stored.get("text"), str):
            raise ValueError(f'{where}: needs the key text ("" where there is no transcript)')
        offset, duration = _seconds(stored, where)
        split = stored.get("split", "all")
        # A file name.
        if not isinstance(split, str) or not re.fullmatch(r"\w[\w.-]*", split):
            raise ValueError(f"{where}: split must be a plain name like train, got {split!r}")
        keys = ("id", "speaker", "language")
        given = {key: str(stored[key]) for key in keys if stored.get(key) is not None}
        audio = path.parent / stored["audio"]
        name: str = audio.stem
        if offset is not None:
            name += f"-{round(1000 * offset)}"
        yield ListedRecording(
            id=given.get("id", name),
            audio=audio,
            text=stored["text"].strip(),
            speaker=given.get("speaker", "unknown"),
            language=given.get("language", language),
            split=split,
            offset=offset,
            duration=duration,
        )


def _seconds(stored: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    """The offset and the duration of a line."""
    found: list[float | None] = []
    for key in ("offset", "duration"):
        value = stored.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise ValueError(f"{where}: {key} must be a number of seconds, got {value!r}")
        if value is not None and not (0 < value < MAX_SECONDS or (key == "offset" and value == 0)):
            least = "at least 0" if key == "offset" else "positive"
            raise ValueError(f"{where}: {key} must be {least}, in seconds, got {value!r}")
        found.append(None if value is None else float(value))
    return found[0], found[1]


def entries_of_folder(
    folder: Path, language: str, *, need_text: bool = True
) -> Iterator[ListedRecording]:
    """Yields every recording below a folder, with the text of NAME.txt; subfolders are speakers.

    Args:
        need_text: skip a recording without NAME.txt.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of recordings")
    for audio in recordings_in(folder, expected=(".txt",)):
        relative = audio.relative_to(folder)
        text, error = "", None
        try:
            words = audio.with_suffix(".txt")
            text = decode_utf8(words.read_bytes(), words.name).replace("\r\n", "\n").strip()
        except FileNotFoundError:
            if need_text:
                error = f"{audio.stem}.txt is missing (--no-text allows that)"
        except ValueError as found_error:
            error = str(found_error)
        yield ListedRecording(
            id=relative.with_suffix("").as_posix().replace("/", "-"),
            audio=audio,
            text=text,
            speaker=audio.parent.name if len(relative.parts) > 1 else folder.resolve().name,
            language=language,
            error=error,
        )


def cut_of(entry: ListedRecording) -> "Cut":
    """Returns a cut of an entry's recording.

    Raises:
        ValueError: the recording is missing, unreadable, empty or truncated.
    """
    from lhotse import AudioSource, Recording, SupervisionSegment

    path = entry.audio.resolve()
    if entry.error is not None:
        raise ValueError(entry.error)
    if not path.is_file():
        raise ValueError(f"{path}: no such recording")
    header = audio_info(path)
    duration = header.num_samples / header.sample_rate
    if header.num_samples <= 0:
        raise ValueError(f"{path}: holds no samples")
    rest = duration - (entry.offset or 0.0)
    if rest <= 0:
        raise ValueError(f"{path}: offset {entry.offset} s is behind its end, {duration:.2f} s")
    if entry.duration is not None and rest < 0.98 * entry.duration - 0.1:
        raise ValueError(f"{path}: truncated: {rest:.2f} of {entry.duration:.2f} s are there")
    channels = list(range(header.num_channels))
    recording = Recording(
        id=entry.id,
        sources=[AudioSource(type="file", channels=channels, source=str(path))],
        sampling_rate=header.sample_rate,
        num_samples=header.num_samples,
        duration=duration,
        channel_ids=channels,
    )
    cut: Any = recording.to_cut().with_id(entry.id)
    segment = rest if entry.duration is None else min(rest, entry.duration)
    # Without an offset, the stated duration of a recording may differ a little from the file's.
    if entry.offset is None and segment >= 0.98 * duration - 0.1:
        segment = duration
    if segment * header.sample_rate < 1:
        raise ValueError(f"{path}: its segment of {segment:g} s is shorter than a sample")
    if segment < duration:
        cut = cut.truncate(offset=entry.offset or 0.0, duration=segment).with_id(entry.id)
    cut.supervisions = [
        SupervisionSegment(
            id=entry.id,
            recording_id=entry.id,
            start=0.0,
            duration=cut.duration,
            channel=channels if len(channels) > 1 else 0,
            text=entry.text,
            language=entry.language,
            speaker=entry.speaker,
        )
    ]
    return cut


class CorpusCuts(NamedTuple):
    """Cuts by split, and the errors of unreadable recordings by path."""

    cuts: dict[str, list["Cut"]]
    errors: dict[str, str]


def read_corpus(corpus: str, folder: Path, parts: Sequence[str]) -> CorpusCuts:
    """Returns the cuts of a published corpus through lhotse's recipe; cut ids are recording ids.

    Raises:
        ValueError: the folder does not exist, or is not laid out like the corpus.
    """
    from lhotse import CutSet

    with tolerant_headers() as errors:
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
    return CorpusCuts(cuts, errors)


@contextmanager
def tolerant_headers() -> Iterator[dict[str, str]]:
    """Makes lhotse's recipes skip recordings with unreadable headers; yields the errors by path.

    lhotse stops at the first such file. Here it gets a placeholder, which the caller leaves out.
    """
    from lhotse import AudioSource, Recording

    errors: dict[str, str] = {}
    original: Callable[..., Any] = Recording.from_file

    def from_file(path: Any, recording_id: Any = None, **options: Any) -> Recording:
        try:
            return original(path, recording_id=recording_id, **options)
        except Exception as error:
            errors[str(path)] = f"{path}: cannot be read as audio ({error})"
            name: Any = recording_id(path) if callable(recording_id) else recording_id
            source = AudioSource(type="file", channels=[0], source=str(path))
            return Recording(
                id=name or Path(path).stem,
                sources=[source],
                sampling_rate=16000,
                num_samples=16000,
                duration=1.0,
            )

    patched: Any = Recording  # lhotse's recipes look up the method for each recording.
    patched.from_file = staticmethod(from_file)
    try:
        yield errors
    finally:
        patched.from_file = staticmethod(original)


def manifests_of(corpus: str, folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Returns lhotse's recordings and supervisions of a corpus on disk, by split.

    Raises:
        ValueError: the folder does not exist, or is not laid out like the corpus.
    """
    import lhotse.recipes as recipes
    from lhotse.recipes.libritts import LIBRITTS

    if not folder.is_dir():
        raise ValueError(f"{folder}: no such corpus folder; --download fetches it")
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
    """Downloads a corpus to `folder` with lhotse; returns the corpus folder.

    Raises:
        ConnectionError: the download failed.
    """
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


def source_of(cut: Any) -> str:
    """Returns the path of a cut's recording."""
    return cut.recording.sources[0].source


def check_decodes(cut: Any) -> None:
    """Decodes a cut from end to end; an entire recording in bounded memory.

    Raises:
        ValueError, OSError: it cannot be decoded, is silent or not finite.
    """
    if cut.duration < cut.recording.duration - 1e-3:
        load_cut(cut, cut.recording.sampling_rate)
        return
    for _ in stream_audio(source_of(cut), cut.recording.sampling_rate):
        pass


def check_ids(names: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError if two recordings (id, path) share an id."""
    seen: dict[str, str] = {}
    for name, audio in names:
        if name in seen:
            raise ValueError(f"two recordings have the id {name!r}: {seen[name]} and {audio}")
        seen[name] = audio


class UncheckedRecording(NamedTuple):
    """A recording to check: `item` is a ListedRecording or a cut."""

    id: str
    audio: str
    split: str
    item: Any


def collect(
    sources: Sequence[UncheckedRecording],
    examine: Callable[[Any], "Cut"],
    label: str,
    num_threads: int,
    prepared: Prepared,
) -> None:
    """Adds usable cuts and skipped recordings to `prepared`.

    Args:
        examine: returns the cut of an item; ValueError or OSError has the reason to skip it.
        label: of the progress bar.

    Raises:
        ValueError: two recordings have the same id.
    """
    check_ids((source.id, source.audio) for source in sources)

    def attempt(source: UncheckedRecording) -> "Cut | str":
        try:
            return examine(source.item)
        except (ValueError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(num_threads) as pool:  # Decoding releases the GIL.
        results = tqdm(pool.map(attempt, sources), label, total=len(sources), unit="file")
        for source, cut in zip(sources, results, strict=True):
            if isinstance(cut, str):
                prepared.skipped.append(SkippedFile(source.id, source.audio, cut))
            else:
                prepared.cuts[source.split].append(cut)


def prepare_entries(
    entries: Iterable[ListedRecording], *, check: bool, num_threads: int
) -> Prepared:
    """Returns the cuts of the entries with usable recordings.

    Args:
        check: decode every recording.

    Raises:
        ValueError: two recordings have the same id.
    """

    def examine(entry: ListedRecording) -> "Cut":
        cut = cut_of(entry)
        if check:
            check_decodes(cut)
        return cut

    prepared = Prepared(defaultdict(list), [])
    sources = [
        UncheckedRecording(entry.id, str(entry.audio), entry.split, entry) for entry in entries
    ]
    collect(sources, examine, "recordings", num_threads, prepared)
    return prepared


def prepare_corpus(
    corpus: str, folder: Path, parts: Sequence[str], *, check: bool, num_threads: int
) -> Prepared:
    """Returns the cuts of a published corpus with usable recordings; see `prepare_entries`."""
    found = read_corpus(corpus, folder, parts)
    prepared = Prepared(defaultdict(list), [])

    def examine(cut: "Cut") -> "Cut":
        if source_of(cut) in found.errors:
            raise ValueError(found.errors[source_of(cut)])
        if check:
            check_decodes(cut)
        return cut

    for split, cuts in found.cuts.items():
        sources = [UncheckedRecording(cut.id, source_of(cut), split, cut) for cut in cuts]
        collect(sources, examine, split, num_threads, prepared)
    return prepared


def join_parts(prepared: Prepared) -> Prepared:
    """Adds the splits `train` (all parts train-*) and `dev` (all parts dev-*), and returns all.

    Raises:
        ValueError: two recordings of a joined split have the same id.
    """
    for side in ("train", "dev"):
        parts = [split for split in prepared.cuts if split.startswith(f"{side}-")]
        if parts:
            prepared.cuts[side] = [cut for part in parts for cut in prepared.cuts[part]]
            check_ids((cut.id, source_of(cut)) for cut in prepared.cuts[side])
    return prepared


def hold_out(prepared: Prepared, num_speakers: int, num_cuts: int) -> Prepared:
    """Moves speakers and cuts of `train` and `all` to `dev`, chosen by hashes of their names; the
    rest becomes `train`. Returns the changed splits.

    Raises:
        ValueError: `train` or `dev` would be empty.
    """
    if not num_speakers and not num_cuts:
        return prepared
    cuts = [*prepared.cuts.pop("train", []), *prepared.cuts.pop("all", [])]

    def speaker(cut: Any) -> str:
        return cut.supervisions[0].speaker

    speakers = sorted({speaker(cut) for cut in cuts}, key=sha256_of)[:num_speakers]
    names = sorted((cut.id for cut in cuts), key=sha256_of)[:num_cuts]
    held = {cut.id for cut in cuts if speaker(cut) in set(speakers) or cut.id in set(names)}
    if not 0 < len(held) < len(cuts):
        raise ValueError(
            f"cannot hold out {num_speakers} speakers and {num_cuts} cuts of {len(cuts)} cuts: "
            "one side would be empty"
        )
    prepared.cuts["train"] = [cut for cut in cuts if cut.id not in held]
    prepared.cuts["dev"] = [*prepared.cuts.get("dev", []), *(c for c in cuts if c.id in held)]
    return prepared


def save(prepared: Prepared, out: Path, argv: Sequence[str]) -> None:
    """Writes the lists atomically, and prints their numbers of cuts, hours and speakers.

    Args:
        argv: the command line, for the command to run next.

    Raises:
        ValueError: no recording is usable.
    """
    from lhotse import CutSet

    out.mkdir(parents=True, exist_ok=True)
    for reason in prepared.skipped[:5]:
        logger.warning("skipped %s", reason.reason)
    # Cuts of parts are in the joined lists too.
    total = len({cut.id for cuts in prepared.cuts.values() for cut in cuts})
    if not total:
        reasons = "; ".join(skipped.reason for skipped in prepared.skipped[:3])
        raise ValueError(f"no usable recording: {reasons or 'the source is empty'}")
    with atomic_files(out) as partial:
        write_json_lines(partial / "skipped.jsonl", [each._asdict() for each in prepared.skipped])
        for split, cuts in prepared.cuts.items():
            CutSet.from_cuts(cuts).to_file(partial / f"{split}.jsonl.gz")
    for split, cuts in prepared.cuts.items():
        hours = sum(cut.duration for cut in cuts) / 3600
        speakers = Counter(cut.supervisions[0].speaker for cut in cuts)
        path = out / f"{split}.jsonl.gz"
        counts = f"{counted(len(cuts), 'cut')}, {hours:.2f} h, {counted(len(speakers), 'speaker')}"
        print(f"{path}: {counts}")
    num_skipped = len(prepared.skipped)
    print(f"{out / 'skipped.jsonl'}: {num_skipped} of {total + num_skipped} skipped")
    what = f"{counted(len(prepared.cuts), 'list')} of {counted(total, 'recording')}"
    finished(what, out, next_command(prepared, out, argv))


def next_command(prepared: Prepared, out: Path, argv: Sequence[str]) -> str:
    """Returns the command to run after this one: training, if there are train and dev lists; else
    this one with a share of its cuts held out as dev; else, if there is nothing to hold out from,
    an evaluation on the list."""
    if {"train", "dev"} <= prepared.cuts.keys():
        lists = f"train={out}/train.jsonl.gz dev={out}/dev.jsonl.gz"
        config = "recipes/configs/codec/small.yaml"
        return f"accelerate launch recipes/train_codec.py --config {config} {lists}"
    size = sum(len(prepared.cuts.get(split, ())) for split in ("train", "all"))
    if size < 2:
        listed = out / f"{next(iter(prepared.cuts))}.jsonl.gz"
        return (
            "python recipes/benchmark.py reconstruction --codec models/small/codec "
            f"--cuts {listed} --judge models/whisper-base --out out/benchmark"
        )
    again = f"python recipes/prepare_data.py {shlex.join(map(str, argv))}"
    num_dev = min(MAX_DEV_CUTS, max(1, size // 10))
    return f"{again} --dev-cuts {num_dev}   (training needs a dev list as well)"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, required=True, help="folder for the lists")
    shared.add_argument("--no-check", action="store_true", help="do not decode every recording")
    shared.add_argument("--threads", type=int, default=2, help="for decoding (default: 2)")
    shared.add_argument("--dev-speakers", type=int, default=0, help="speakers to hold out as dev")
    shared.add_argument("--dev-cuts", type=int, default=0, help="cuts to hold out as dev")
    parser = ArgumentParser(description="Writes corpora as lists of cuts.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for corpus in CORPORA:
        kind = kinds.add_parser(corpus, parents=[shared], help=f"{corpus} through lhotse's recipe")
        kind.add_argument("source", type=Path, help="corpus folder (with --download: its parent)")
        kind.add_argument("--parts", nargs="*", default=[], help="default: all that exist")
        kind.add_argument("--download", action="store_true", help="download it first")
    lines = f"JSON Lines with {', '.join(LIST_KEYS)}"
    for name, what in (("folder", "recordings with NAME.txt"), ("list", lines)):
        kind = kinds.add_parser(name, parents=[shared], help=what)
        kind.add_argument("source", type=Path)
        kind.add_argument("--language", default="en", help="of entries without one (default: en)")
        if name == "folder":
            kind.add_argument("--no-text", action="store_true", help="allow missing transcripts")
    kind = kinds.add_parser("prompts", parents=[shared], help="Debian's recorded prompts")
    kind.add_argument("--packages", type=Path, help="folder of the .deb files (default: download)")
    kind = kinds.add_parser("synthetic", parents=[shared], help="speech synthesized by Kokoro-82M")
    kind.add_argument("--hours", type=float, default=5.0, help="of speech (default: 5)")
    kind.add_argument("--voices", type=int, default=200, help="(default: 200)")
    kind.add_argument("--texts", type=Path, help=".txt or .jsonl (default: WordNet's examples)")
    kind.add_argument("--without", type=Path, help="list of cuts whose texts are excluded")
    kind.add_argument("--processes", type=int, default=2, help="with one thread each (default: 2)")
    kind.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    check_seed_of_recipe(getattr(args, "seed", 0), "--seed")
    return args


def main(argv: Sequence[str]) -> None:
    """Prepares one corpus."""
    args = _parse(argv)
    how: dict[str, Any] = {"check": not args.no_check, "num_threads": max(1, args.threads)}
    if args.kind in CORPORA:
        folder = args.source
        if args.download:
            folder = download_corpus(args.kind, folder, args.parts)
        prepared = join_parts(prepare_corpus(args.kind, folder, args.parts, **how))
    elif args.kind == "list":
        prepared = prepare_entries(entries_of_list(args.source, args.language), **how)
    elif args.kind == "folder":
        found = entries_of_folder(args.source, args.language, need_text=not args.no_text)
        prepared = prepare_entries(found, **how)
    elif args.kind == "synthetic":
        from recipes.offline.synthetic import SyntheticConfig, make_speech

        keys = ("out", "hours", "voices", "texts", "without", "processes", "seed")
        listed = make_speech(SyntheticConfig(**{key: getattr(args, key) for key in keys}))
        prepared = prepare_entries(entries_of_list(listed, "en", ignored=("wer",)), **how)
    else:
        from recipes.offline.debian_prompts import unpack_prompts

        prompts = unpack_prompts(args.out, args.packages)
        prepared = prepare_entries(entries_of_list(prompts, "en"), **how)
    save(hold_out(prepared, args.dev_speakers, args.dev_cuts), args.out, argv)


if __name__ == "__main__":
    run_recipe(main)

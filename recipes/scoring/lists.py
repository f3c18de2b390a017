"""Lists of the benchmark: JSON Lines, folders of waves with texts, lists of cuts."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from codec.audio import AUDIO_SUFFIXES
from codec.json_lines import read_json_lines

TEXT_KEYS = ("text", "hypothesis", "audio", "prompt", "prompt_text", "source", "target")


def read_entries(path: Path, needed: Sequence[str], *, unique: bool = True) -> list[dict[str, Any]]:
    """Returns the entries of a JSON Lines list, or of a folder of waves with a .txt for each.

    Args:
        unique: ids, or names of recordings without one, must differ.

    Raises:
        ValueError: a line is no JSON, lacks a needed key or repeats an id; a wave has no text; the
            list is empty.
    """
    if path.is_dir():
        return entries_of_waves(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such list")
    entries: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, entry, _ in read_json_lines(path):
        lacking = [key for key in needed if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(lacking)}")
        for key in TEXT_KEYS:
            value = entry.get(key, "")
            if not isinstance(value, str) and (key == "text" or value is not None):
                raise ValueError(f"{path}, line {number}: {key} is not a text: {value!r}")
        name = entry_name(entry, path)
        if "id" in entry:
            entry["id"] = name
        if unique and name in seen:
            raise ValueError(f"{path}, line {number}: {name!r} is there twice")
        seen.add(name)
        entries.append(entry)
    if not entries:
        raise ValueError(f"{path}: the list is empty")
    return entries


def entries_of_waves(folder: Path) -> list[dict[str, Any]]:
    """Returns id, text and audio of the waves of a folder, with the texts of the .txt files next
    to them.

    Raises:
        ValueError: there is no wave, or one has no text.
    """
    waves = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not waves:
        raise ValueError(f"{folder}: has no recording ({', '.join(AUDIO_SUFFIXES)})")
    entries = []
    for wave in waves:
        text = wave.with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"{wave}: has no text; write it to {text}")
        name = wave.relative_to(folder).with_suffix("").as_posix()
        try:
            words = text.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text}: is not UTF-8 ({error})") from error
        entries.append({"id": name, "text": words, "audio": str(wave)})
    if len({entry["id"] for entry in entries}) < len(entries):
        raise ValueError(f"{folder}: two recordings differ in their suffix alone")
    return entries


def entry_name(entry: dict[str, Any], path: Path) -> str:
    """Returns an entry's id, or its recording's name without the suffix.

    Args:
        path: the list, for the message.

    Raises:
        ValueError: the entry has neither.
    """
    if "id" not in entry and "audio" not in entry:
        raise ValueError(f"{path}: a line has neither id nor audio")
    return str(entry["id"]) if "id" in entry else Path(entry["audio"]).stem


def locate(name: str, path: Path, folder: Path | None = None) -> Path:
    """Returns a recording's path: `name` itself, relative to the list, or to `folder`."""
    places = [Path(name), path.parent / name] + ([folder / name] if folder else [])
    return next((place for place in places if place.is_file()), places[1])


def read_columns(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the columns of each id of a JSON Lines file.

    Raises:
        ValueError: it is no such list.
    """
    return {str(entry["id"]): entry for entry in read_entries(path, ("id",))}


def recordings_of(cuts: Iterable[Any]) -> list[Path]:
    """Returns the audio files of cuts."""
    recordings = [cut.recording for cut in cuts if getattr(cut, "recording", None) is not None]
    return [
        Path(source.source)
        for recording in recordings
        for source in recording.sources
        if source.type == "file"
    ]


def columns_of_cut(cut: Any) -> dict[str, Any]:
    """Returns the columns of a cut and of its first supervision: speaker, gender, language
    and custom fields."""
    found: dict[str, Any] = dict(getattr(cut, "custom", None) or {})
    for part in cut.supervisions[:1]:
        found |= part.custom or {}
        named = {"speaker": part.speaker, "gender": part.gender, "language": part.language}
        found |= {name: value for name, value in named.items() if value is not None}
    return found

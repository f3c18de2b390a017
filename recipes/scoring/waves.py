"""Lists of waves by several systems, scored alike: what `tts` and `vc` share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from codec.audio import read_audio
from codec.io import sha256_of
from recipes.scoring.judges import Judges, digest_of_voice, state_of_files
from recipes.scoring.lists import locate, read_entries
from recipes.scoring.options import (
    Columns,
    ScoredSystem,
    check_distinct,
    chosen,
    list_name_of,
    named,
    origin_of,
    write_scores,
)
from recipes.scoring.rows import ORIGINAL
from recipes.scoring.scores import Score, score_all

Entry = dict[str, Any]


class SystemList(NamedTuple):
    """What one system made of a list."""

    system: str
    model: str
    """Digest of the system; "": unknown."""
    list_name: str
    file: Path
    """The list or folder that names the items."""
    entries: list[Entry]
    """Of the sample; `audio` is None where nothing was made."""


def given_list(args: argparse.Namespace, argument: str, needed: Sequence[str]) -> SystemList:
    """Returns a list of --list. A system without a name is called as the list's folder.

    Args:
        needed: keys of the entries.
    """
    name, value = named(argument)
    path = Path(value)
    folder = path if path.is_dir() else path.resolve().parent
    system = args.name or (name if argument != value else folder.name)
    model = digest_of_voice(args.voice[0]) if args.voice else args.model_digest
    entries = chosen(read_entries(path, needed), args)
    return SystemList(system, model, args.list_name or list_name_of(path), path, entries)


def score_lists(
    args: argparse.Namespace, part: str, lists: Sequence[SystemList],
    original: Callable[[Entry], Entry | None], item_of: Callable[[Entry, Path], Any],
    make: Callable[[], Score], judges: Judges, reference: str, inputs: str = "", **options: Any,
) -> None:  # fmt: skip
    """Scores lists and writes the scores, with a row of the recordings themselves for each list.

    Args:
        original: an entry to that of its recording; None: there is none.
        item_of: an entry and the list's file to a NamedTuple with `id`, whose paths are recordings.
        make: see `score_all`.
        reference: field of the item that is the clips' reference recording.
        inputs: what the scores depend on besides models, items and options.
        options: settings of the part that its scores depend on.

    Raises:
        ValueError: two systems of a list have one name, or no item of a system can be scored.
    """
    check_distinct((each.system, each.list_name) for each in lists)
    columns, found = Columns(args), []
    for each in [*_originals(lists, original), *lists]:
        items = [item_of(entry, each.file) for entry in each.entries]
        files = [field for item in items for field in item if isinstance(field, Path)]
        listed = sha256_of(str([tuple(map(str, item)) for item in items]), 16)
        key = f"{each.system} {each.model} {listed} {state_of_files(files)} {judges.judge_name} "
        key += f"{judges.speaker_name} {args.language} {sorted(options.items())} {inputs}"
        scored = score_all(args.out, items, {each.system: key}, make, args.processes)[each.system]
        entries = {item.id: entry for item, entry in zip(items, each.entries, strict=True)}
        origin = origin_of(
            args, part, each.system, [each.file] if each.file.is_file() else [], judges,
            each.model, min((one.seed for one in scored if one.seed is not None), default=0),
            **options,
        )  # fmt: skip
        references = {
            item.id: path and str(path.resolve())
            for item in items
            for path in [getattr(item, reference)]
        }
        found.append(
            ScoredSystem(
                list_name=each.list_name, scored=scored, origin=origin, constants={},
                columns=columns.of(scored, entries, each.list_name), references=references,
            )
        )  # fmt: skip
    write_scores(part, args, found)


def _originals(
    lists: Sequence[SystemList], original: Callable[[Entry], Entry | None]
) -> list[SystemList]:
    """The recordings themselves, once for each list that has them."""
    found: dict[str, SystemList] = {}
    for each in lists:
        entries = [one for one in map(original, each.entries) if one is not None]
        if entries and each.list_name not in found:
            found[each.list_name] = SystemList(ORIGINAL, "", each.list_name, each.file, entries)
    return list(found.values())


def wave_or_failure(
    audio: Path | None, sample_rate: int, failure: str | None
) -> tuple[Float[np.ndarray, " S"], str | None]:
    """Returns a wave (S,), empty if it is missing, silent or not finite, and why it has failed.

    Args:
        failure: what the system reports.
    """
    if audio is None:
        return np.zeros(0, np.float32), failure or "refused"
    try:
        return read_audio(audio, sample_rate), failure
    except ValueError as error:
        return np.zeros(0, np.float32), failure or str(error)


def located(
    entry: Mapping[str, Any], key: str, path: Path, folder: Path | None = None
) -> Path | None:
    """Returns the path of an entry's recording; None if it has none. See `locate`."""
    name = entry.get(key)
    return None if not name else locate(name, path, folder)

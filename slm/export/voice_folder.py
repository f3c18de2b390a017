"""A voice's folder, copied whole: models, prompts, settings and card, or nothing."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from codec.tokens import written_whole
from slm.ar import SpeechLM
from slm.cards import voice_card
from slm.config import SamplingConfig
from slm.prompts import Coverage, Prompt, load_prompts

logger = logging.getLogger(__name__)

SAMPLING_FILE = "sampling.json"


def is_voice(folder: Path) -> bool:
    """Whether there are a codec and an LLM."""
    return (folder / "codec").is_dir() and (folder / "ar").is_dir()


def load_sampling(folder: Path) -> SamplingConfig | None:
    """How a saved voice is to speak; None where its folder does not say."""
    path = folder / SAMPLING_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in record.items()
        }
        return SamplingConfig(**values)
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: no settings of sampling ({error}); mend it, or remove it for the defaults"
        ) from error


def ship(source: Path, folder: Path, finish: Callable[[Path], None]) -> None:
    """Copies a voice's folder to `folder`, which is an earlier voice or not there yet, or leaves it
    in its place; `finish` adds to it."""
    source, folder = source.resolve(), folder.resolve()
    if folder == source:
        finish(folder)
        return
    if folder in source.parents or source in folder.parents:
        raise ValueError(f"{folder}: one of it and the voice {source} is in the other; save apart")
    if folder.exists() and not is_voice(folder) and not _is_empty(folder):
        raise ValueError(f"{folder}: neither empty nor a voice; name a new folder")
    with anew(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        finish(partial)


def write_extras(
    folder: Path,
    lm: SpeechLM,
    coverage: Coverage,
    prompts: Mapping[str, Prompt],
    sampling: SamplingConfig,
) -> None:
    """Writes what is not a model. A card that a person has edited stays as it is."""
    # As the training's card has it: the codec in the folder is called by the folder's name.
    origin, stamp = lm.origin, lm.vocabulary.codec
    before = voice_card(origin, stamp, coverage, load_prompts(folder / "prompts"))
    after = voice_card(origin, stamp, coverage, dict(sorted(prompts.items())))
    for name, prompt in prompts.items():
        prompt.save(folder / "prompts", name)
    with written_whole(folder / SAMPLING_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(sampling), indent=1), encoding="utf-8")
    card = folder / "README.md"
    if card.exists() and card.read_text(encoding="utf-8") != before:
        if before != after:
            logger.warning("%s: it was edited and stays; it lacks the prompts that are new", card)
        return
    with written_whole(card) as temporary:
        temporary.write_text(after, encoding="utf-8")


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def anew(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, whose place it takes at the end; after an error an
    earlier `folder` is as it was."""
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{k}") for k in ("new", "old"))
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)

"""A voice's folder as training leaves it: models, codec, card and prompts, each whole or absent."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from codec import Codec, load_codec
from codec.tokens import TokenShard, written_whole
from recipes.checkpoints import is_write_failure, sync
from recipes.scoring import digest_of_text
from slm.cards import short_path as short_path
from slm.prompts import Prompt, has_words

NUM_PROMPTS = 3
PROMPT_SECONDS = 4.0
"""Long enough to tell a voice."""


def finish_voice(voice: Path, codec: str, card: str, prompts: Mapping[str, Prompt]) -> None:
    """Puts the codec, the card and some prompts beside the models."""
    with whole_folder(voice / "codec") as partial:
        shipped = load_codec(codec, fold=False)
        if isinstance(shipped, Codec) and shipped.auxiliary is not None:
            shipped = shipped.without_auxiliary()
        shipped.save_pretrained(partial)
    if prompts:
        with whole_folder(voice / "prompts") as partial:
            for name, prompt in prompts.items():
                prompt.save(partial, name)
    with written_whole(voice / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def pick_prompts(dev: TokenShard, source: str, longest: float) -> dict[str, Prompt]:
    """Up to three dev recordings to take voices from, of different speakers where there are such.

    They last the nearest to PROMPT_SECONDS, or to a third of the `longest` training recording, in
    seconds: prompt and text together must not be longer than that.
    """
    aim = min(PROMPT_SECONDS, longest / 3)
    usable = [i for i, text in enumerate(dev.texts) if has_words(text) and dev.num_frames[i] > 0]
    usable.sort(key=lambda i: abs(float(dev.durations[i]) - aim))
    first_of: dict[str, int] = {}
    for index in usable:
        first_of.setdefault(dev.speakers[index], index)
    chosen = list(dict.fromkeys([*first_of.values(), *usable]))[:NUM_PROMPTS]
    prompts = {}
    for number, row in enumerate((dev[index] for index in chosen), start=1):
        credit = f"{row.id} of {source}" + (f", speaker {row.speaker}" if row.speaker else "")
        prompts[f"dev-{number}"] = Prompt(
            codes=row.codes.astype(np.int64), text=row.text, credit=credit
        )
    return prompts


def described(shard: TokenShard, path: str) -> str:
    """What shards hold, so that others can tell whether theirs are the same."""
    hours = float(np.sum(shard.durations)) / 3600
    digest = digest_of_text(json.dumps([list(shard.ids), list(shard.texts)]))[:8]
    return f"{short_path(path)}@{digest}, {len(shard)} utterances, {hours:.2f} hours"


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside `folder`; at the end it is synced and takes its place.

    After an error it is gone and an earlier `folder` is as it was. A full disk is an OSError.
    """
    partial, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            sync(path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_write_failure(error) and not isinstance(error, OSError):
            raise OSError(f"{folder}: cannot be written ({error}); is the disk full?") from error
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)

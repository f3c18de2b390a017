"""SLMTokBench's text alignment: error rates of a small CTC network trained on a codec's codes.

    python recipes/probe.py --train TOKENS --dev TOKENS [--codebooks 1] [--seed 0] --out rows.jsonl
    python recipes/probe.py --train TOKENS --dev native=A --dev accented=B     two dev lists
    python recipes/probe.py --train TOKENS --dev TOKENS --group read='ls'      and a part of one

TOKENS is a token shard or a folder of them (recipes/export_tokens.py). Prints one JSON line per
list; --out appends rows of all utterances and lists to a rows.jsonl.

--setting small (the default) is for a few hours of speech and one core; paper is SpeechTokenizer's
network (arXiv 2308.16692, section 4), for a hundred hours and a GPU.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from codec.io import sha256_of
from codec.models.codec import check_device
from codec.program import ArgumentParser
from codec.tokens import CodecStamp, TokenShard
from codec.training.run import git_revision
from eval.benchmark import (
    ASR_PREFIX,
    Provenance,
    Row,
    machine,
    rows_of,
    score_asr,
)
from eval.text import LIBRARIES
from eval.text_probe import Probe, ProbeConfig, ProbeCorpus, ProbeResult, train_probe
from recipes.lib.config import check_seed_of_recipe
from recipes.scoring.rows import append_rows

SETTINGS = {
    "small": ProbeConfig(
        hidden=128,
        embedding=128,
        epochs=10,
        batch_frames=3000,
        learning_rate=5e-3,
        min_frame_rate=25.0,
    ),
    "paper": ProbeConfig(),
}
PREFIX = "probe_"
"""Prefix of the metrics: a probe's error rates are not comparable with an ASR judge's."""


class Utterances(NamedTuple):
    """Utterances with transcripts."""

    ids: list[str]
    corpus: ProbeCorpus
    num_textless: int
    """Utterances that were left out because they have no transcript."""


class DevList(NamedTuple):
    """A list of utterances to score."""

    name: str
    utterances: Utterances


class DevLists(NamedTuple):
    """The lists to score, and the files of their shards."""

    lists: list[DevList]
    files: list[Path]


def main(argv: Sequence[str]) -> None:
    """Trains one probe and scores it on each dev list."""
    args = _parse(argv)
    shard = TokenShard.open(args.train)
    num_codebooks = args.codebooks or shard.stamp.num_codebooks
    if not 1 <= num_codebooks <= shard.stamp.num_codebooks:
        raise ValueError(f"--codebooks {num_codebooks}: the codec has {shard.stamp.num_codebooks}")
    config = probe_config(args)
    train = load_utterances(args.train, shard, num_codebooks, range(len(shard))[: args.limit])
    lists, dev_files = dev_lists(args, shard.stamp, num_codebooks)
    shared = sorted({one for dev in lists for one in dev.utterances.ids} & set(shard.ids))
    if shared:
        raise ValueError(f"--dev: {shared[0]} is in --train as well ({len(shared)} such)")
    start = time.monotonic()
    probe = train_probe(
        train.corpus,
        codebook_sizes=shard.stamp.codebook_sizes[:num_codebooks],
        frame_rate=shard.stamp.frame_rate,
        config=config,
        dev=lists[0].utterances.corpus,
        device=args.device,
    )
    seconds = time.monotonic() - start
    settings = {**asdict(config), "codebooks": num_codebooks, "limit": args.limit}
    settings["train"] = [sha256_of(file, 16) for file in shard.files]
    settings["dev"] = [sha256_of(file, 16) for file in dev_files]
    origin = Provenance(
        system=args.name or f"{shard.stamp.id} {shard.stamp.digest} codebooks 1-{num_codebooks}",
        seed=config.seed,
        git=git_revision(),
        config=sha256_of(json.dumps(settings, sort_keys=True), 16),
        model=shard.stamp.digest,
    )
    for dev in lists:
        result = probe.score(dev.utterances.corpus)
        if args.out is not None:
            append_rows(args.out, rows(dev, result, origin))
        line = summary(dev, result, probe, train.num_textless, origin)
        print(json.dumps(line | {"seconds": round(seconds, 1)}))


def probe_config(args: argparse.Namespace) -> ProbeConfig:
    """Returns the named setting with the changes of the command line."""
    changes = {key: getattr(args, key) for key in ("epochs", "hidden")}
    changes = {key: value for key, value in changes.items() if value is not None}
    return replace(SETTINGS[args.setting], seed=args.seed, **changes)


def load_utterances(
    where: str | Path, shard: TokenShard, num_codebooks: int, indices: Sequence[int]
) -> Utterances:
    """Returns codes and transcripts of the shard's rows `indices`, without those that lack a
    transcript.

    Args:
        where: the shard's path, for the message.

    Raises:
        ValueError: none of them has a transcript.
    """
    kept = [index for index in indices if shard.texts[index].strip()]
    if not kept:
        raise ValueError(
            f"{where}: has no transcripts; export codes of a list of cuts with transcripts "
            "(recipes/export_tokens.py)"
        )
    chosen = [shard[index] for index in kept]
    corpus = ProbeCorpus(
        [row.codes[:num_codebooks] for row in chosen], [row.text for row in chosen]
    )
    return Utterances([row.id for row in chosen], corpus, len(indices) - len(kept))


def dev_lists(args: argparse.Namespace, stamp: CodecStamp, num_codebooks: int) -> DevLists:
    """Returns each list of --dev, followed by its parts by --group.

    Raises:
        ValueError: a list is empty or of another codec, or two lists have the same name.
    """
    groups = [(name, re.compile(pattern)) for name, pattern in map(_named, args.group)]
    lists: list[DevList] = []
    files: list[Path] = []
    for name, path in map(_named_shard, args.dev):
        shard = TokenShard.open(path, expect=stamp)
        files += shard.files
        name = name or Path(path).name.partition(".")[0]
        parts = [(name, list(range(len(shard))))]
        for group, pattern in groups:
            keys = zip(shard.speakers, shard.ids, strict=True)
            found = [index for index, pair in enumerate(keys) if any(map(pattern.match, pair))]
            if not found:
                raise ValueError(
                    f"--group {group}: no speaker or id in {path} begins with {pattern.pattern}"
                )
            parts.append((f"{name}/{group}", found))
        for part, indices in parts:
            if any(dev.name == part for dev in lists):
                raise ValueError(
                    f"--dev {path}: two lists have the name {part}; write NAME=SHARD (and another "
                    "NAME for each --group)"
                )
            lists.append(DevList(part, load_utterances(path, shard, num_codebooks, indices)))
    return DevLists(lists, files)


def _named(argument: str) -> tuple[str, str]:
    """Splits NAME=VALUE; the name is "" if there is none."""
    name, equals, value = argument.partition("=")
    return (name, value) if equals else ("", argument)


def _named_shard(argument: str) -> tuple[str, str]:
    """As `_named`, unless the argument is an existing path."""
    return ("", argument) if Path(argument).exists() else _named(argument)


def rows(dev: DevList, result: ProbeResult, origin: Provenance) -> list[Row]:
    """Returns rows of each utterance and of the list, and one row of the loss."""
    scored = [
        score_asr(name, text, recognized)
        for name, text, recognized in zip(
            dev.utterances.ids, dev.utterances.corpus.texts, result.texts, strict=True
        )
    ]
    found = rows_of(dev.name, scored, origin, prefix=ASR_PREFIX)
    torch = f"torch {version('torch')}"
    made = [
        replace(
            row,
            metric=PREFIX + row.metric.removeprefix(ASR_PREFIX),
            library=f"{row.library}, {torch}",
        )
        for row in found
    ]
    num_scored = result.n - result.num_unscored
    if num_scored:
        loss = replace(made[-1], metric=f"{PREFIX}loss", value=result.loss, n=num_scored)
        made.append(replace(loss, library=torch))
    return made


def summary(
    dev: DevList, result: ProbeResult, probe: Probe, num_textless: int, origin: Provenance
) -> dict[str, object]:
    """Returns the printed results of a list.

    Args:
        num_textless: number of utterances of --train without transcripts.
    """
    return {
        "system": origin.system,
        "list": dev.name,
        "cer": round(result.cer, 4),
        "wer": round(result.wer, 4),
        "loss": round(result.loss, 4) if result.n > result.num_unscored else None,
        "n": result.n,
        "unscored": result.num_unscored,
        "no_text": dev.utterances.num_textless,
        "trained_on": probe.num_trained,
        "left_out": {
            "no_text": num_textless,
            "unspelled": probe.num_unspelled,
            "too_short": probe.num_too_short,
        },
        "steps": probe.num_steps,
        "dev_cer_by_epoch": [epoch.dev_cer and round(epoch.dev_cer, 4) for epoch in probe.history],
        "seed": origin.seed,
        "git": origin.git,
        "config": origin.config,
        "model": origin.model,
        "libraries": {name: version(name) for name in ("torch", *LIBRARIES)},
        "machine": machine(),
    }


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="token shard to train on")
    parser.add_argument(
        "--dev",
        action="append",
        required=True,
        metavar="[NAME=]SHARD",
        help="token shard to score; repeatable",
    )
    parser.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="also score the utterances whose speaker or id begins with this regular expression",
    )
    parser.add_argument(
        "--codebooks", type=int, default=1, help="use the first N; 0: all (default: 1)"
    )
    parser.add_argument("--setting", choices=SETTINGS, default="small", help="default: small")
    parser.add_argument("--epochs", type=int, help="default: that of --setting")
    parser.add_argument("--hidden", type=int, help="default: that of --setting")
    parser.add_argument("--limit", type=int, help="train on the first N utterances only")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--name", help="name of the system in the rows")
    parser.add_argument("--out", type=Path, help="a rows.jsonl to append to")
    args = parser.parse_args(argv)
    _check_arguments(args)
    return args


def _check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError for invalid arguments, before any file is read."""
    for key, least in (("codebooks", 0), ("epochs", 1), ("hidden", 1), ("limit", 1)):
        value = getattr(args, key)
        if value is not None and value < least:
            raise ValueError(f"--{key} must be at least {least}, got {value}")
    check_seed_of_recipe(args.seed, "--seed")
    check_device(args.device)
    if args.out is not None and args.out.is_dir():
        raise ValueError(f"--out {args.out}: is a folder; name a file in it, such as rows.jsonl")
    for group in args.group:
        try:
            re.compile(_named(group)[1])
        except re.error as error:
            raise ValueError(f"--group {group}: not a regular expression ({error})") from error
        if not _named(group)[0]:
            raise ValueError(f"--group {group}: write NAME=PATTERN")


if __name__ == "__main__":
    from recipes.lib.run import run_recipe

    run_recipe(main)

"""Measures the time of encoding and decoding: `python recipes/benchmark.py speed`."""

import argparse
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from codec import Codec, load_codec
from codec.audio import read_audio
from codec.io import sha256_of
from codec.models.base import SpeechCodec
from codec.models.codec import check_device
from codec.training.loop import Stopwatch
from codec.training.run import git_revision
from eval.benchmark import Row, machine
from recipes.lib.run import load_config
from recipes.scoring.options import named

# Published architectures in transformers. The defaults of EncodecConfig and MimiConfig are those of
# the models named; those of DacConfig match no published model, so they are stated.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "encodec": ("facebook/encodec_24khz", {}),
    "mimi": ("kyutai/mimi", {}),
    "dac": (
        "descript/dac_24khz",
        {"sampling_rate": 24_000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32},
    ),
}
PART = "speed"
DIRECTIONS = ("encode", "decode")


class CodecSource(NamedTuple):
    """A codec to time, as the command line names it."""

    kind: str
    """codec, unfolded, config or random."""
    source: str
    name: str = ""
    """In the rows; empty: of the source and how it is run."""


class TimedCodec(NamedTuple):
    """A codec and its input."""

    name: str
    codec: SpeechCodec
    wave: Float[Tensor, "1 1 S"]
    num_codebooks: int


class Times(NamedTuple):
    """Seconds of each repeat."""

    encode: list[float]
    decode: list[float]


def add_speed_command(kinds: Any) -> None:
    """Adds `speed` to the subparsers of benchmark.py."""
    about = "time of encoding and decoding, codecs in alternation; ratios are to the first codec"
    command = kinds.add_parser(PART, help=about, description=about.capitalize() + ".")
    for kind, metavar, text in (
        ("codec", "[NAME=]DIR", "codec folder or hub id, weight norm folded"),
        ("unfolded", "[NAME=]DIR|FILE", "codec folder or configuration, weight norm not folded"),
        ("config", "[NAME=]FILE", "configuration of recipes/configs/codec, random weights, folded"),
        ("random", "|".join(PUBLISHED), "published architecture with random weights"),
    ):
        command.add_argument(
            f"--{kind}", dest="sources", action="append", metavar=metavar, help=text,
            type=lambda argument, kind=kind: _source_of(kind, argument),
        )  # fmt: skip
    command.add_argument("--wave", type=Path, help="recording (default: a synthetic signal)")
    command.add_argument("--seconds", type=float, default=10.0, help="of input (default: 10)")
    command.add_argument("--codebooks", type=int, help="use at most the first N")
    command.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    command.add_argument("--repeats", type=int, default=5, help="after a warm-up (default: 5)")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl")


def _source_of(kind: str, argument: str) -> CodecSource:
    given = named(argument)
    return CodecSource(kind, given.value, given.name if given.value != argument else "")


def benchmark_speed(args: argparse.Namespace) -> list[Row]:
    """Returns a row per codec, measure and repeat, and one with the median of the repeats.

    Raises:
        ValueError: an option is out of range, or a codec cannot be loaded.
    """
    if not args.sources:
        raise ValueError("name codecs: --codec, --unfolded, --config or --random")
    counts = {"--threads": args.threads, "--repeats": args.repeats, "--codebooks": args.codebooks}
    for option, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds:g}")
    check_device(args.device)
    torch.set_num_threads(args.threads)
    codecs: list[TimedCodec] = []
    for source in args.sources:
        name, codec = build(source)
        same = sum(each.name.partition(" #")[0] == name for each in codecs)
        count = min(args.codebooks or codec.num_codebooks, codec.num_codebooks)
        wave = torch.from_numpy(speech(args, codec.sample_rate))[None, None].to(args.device)
        name += f" #{same + 1}" if same else ""
        codecs.append(TimedCodec(name, codec.to(args.device).eval(), wave, count))
    times = time_all(codecs, args.repeats, torch.device(args.device))
    return [
        row
        for codec, own in zip(codecs, times, strict=True)
        for row in _rows(args, codec, own, times[0])
    ]


def build(source: CodecSource) -> tuple[str, SpeechCodec]:
    """Returns a codec's name in the rows, and the codec.

    Raises:
        ValueError: the codec cannot be loaded, has no weight norm to unfold, or is unknown.
    """
    kind, name = source.kind, source.source
    fold = kind != "unfolded"
    if kind == "random":
        return _random_baseline(name)
    if kind == "config" or (kind == "unfolded" and name.endswith((".yaml", ".yml"))):
        from recipes.lib.codec_training import TrainCodecConfig

        torch.manual_seed(0)
        config = load_config(TrainCodecConfig, ["--config", name])
        codec = Codec(config.codec).eval()
        name = source.name or f"{Path(name).stem}, random weights"
        if fold:
            codec.fold_weight_norm()
    else:
        codec, name = load_codec(name, fold=fold), source.name or name
    if not fold and not isinstance(codec, Codec):
        raise ValueError(f"--unfolded {name}: codecs of transformers are not folded; use --codec")
    if source.name or not isinstance(codec, Codec):
        return name, codec
    return f"{name}, {'folded' if fold else 'unfolded'}", codec


def _random_baseline(kind: str) -> tuple[str, SpeechCodec]:
    from transformers import AutoConfig, AutoModel

    from codec.models.hf import BASELINES

    if kind not in PUBLISHED:
        raise ValueError(f"--random {kind}: must be one of {', '.join(PUBLISHED)}")
    published, settings = PUBLISHED[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    network = AutoModel.from_config(config, trust_remote_code=False)
    codec = BASELINES[kind](network, published)
    return f"{published}, random weights", codec


def speech(args: argparse.Namespace, sample_rate: int) -> Float[np.ndarray, " S"]:
    """Returns the first `args.seconds` of the recording, or harmonics with a varying pitch.

    Raises:
        ValueError: the recording is too short.
    """
    if args.wave is None:
        times = np.arange(round(args.seconds * sample_rate)) / sample_rate
        phase = 2 * np.pi * 130 * times + 12 * np.sin(2 * np.pi * 0.5 * times)
        voice = sum(np.sin(harmonic * phase) / harmonic for harmonic in range(1, 20))
        return (0.2 * (0.6 + 0.4 * np.sin(8 * np.pi * times)) * voice).astype(np.float32)
    wave = read_audio(args.wave, sample_rate, duration=args.seconds)
    if wave.size < int(args.seconds * sample_rate):
        raise ValueError(
            f"{args.wave}: lasts {wave.size / sample_rate:.2f} s; give a longer recording, or "
            "fewer --seconds"
        )
    return wave


def time_all(codecs: Sequence[TimedCodec], repeats: int, device: torch.device) -> list[Times]:
    """Returns the times of each codec. Every repeat runs all codecs, so that changes of the
    machine's load affect all of them."""
    timed, stopwatch = [Times([], []) for _ in codecs], Stopwatch(device)
    for repeat in tqdm(range(repeats + 1), "repeats", unit="repeat"):
        for (_, codec, wave, num_codebooks), times in zip(codecs, timed, strict=True):
            with stopwatch:
                codes = codec.encode(wave, num_codebooks=num_codebooks).codes
            encode = stopwatch.read()
            with stopwatch:
                codec.decode(codes)
            decode = stopwatch.read()
            if repeat:  # The first is the warm-up.
                times.encode.append(encode)
                times.decode.append(decode)
    return timed


def _rows(args: argparse.Namespace, timed: TimedCodec, times: Times, first: Times) -> list[Row]:
    codec, rows = timed.codec, []
    measures: dict[str, list[float]] = {}
    for name, ours, theirs in zip(DIRECTIONS, times, first, strict=True):
        measures[f"{name}_seconds"] = ours
        measures[f"{name}_rtf"] = [each / args.seconds for each in ours]
        # Per repeat, so that the machine's load cancels out.
        measures[f"{name}_ratio"] = [a / b for a, b in zip(ours, theirs, strict=True)]
    wave = "synthetic voice" if args.wave is None else args.wave.name
    threads = f", {args.threads} thread(s)" if args.device == "cpu" else ""
    settings = f"{args.seconds} {args.codebooks} {args.threads} {args.device} "
    settings += "" if args.wave is None else sha256_of(args.wave, 16)
    config, git, digest = sha256_of(settings, 16), git_revision(), codec.stamp.digest

    def row(metric: str, value: float, repeat: int | None = None, n: int = 1) -> Row:
        return Row(
            part=PART, system=timed.name, list=f"{wave}, {args.seconds:g} s",
            utterance=None if repeat is None else f"repeat {repeat}", metric=metric, value=value,
            n=n, seed=0, git=git, config=config, model=digest,
            library=f"torch {torch.__version__}, transformers {version('transformers')}",
            machine=f"{machine()}{threads}",
        )  # fmt: skip

    for metric, values in measures.items():
        rows += [row(metric, value, number) for number, value in enumerate(values, 1)]
    for metric, values in measures.items():
        rows.append(row(metric, statistics.median(values), n=args.repeats))
    rows.append(row("codebooks", float(timed.num_codebooks), n=args.repeats))
    rows.append(row("frame_rate", float(codec.frame_rate), n=args.repeats))
    return rows

"""How long codecs take to encode and decode: `python recipes/benchmark.py speed`."""

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
from codec.training.validate import Stopwatch
from eval.benchmark import Row, digest_of, machine
from recipes.lib.run import git_revision, load_config

# Published architectures by transformers' classes: EncodecConfig's and MimiConfig's defaults are
# those of the models named; DacConfig's are of none (the strides and codebooks of 44.1 kHz at
# 16 kHz), so they are given.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "encodec": ("facebook/encodec_24khz", {}),
    "mimi": ("kyutai/mimi", {}),
    "dac": (
        "descript/dac_24khz",
        {"sampling_rate": 24_000, "downsampling_ratios": [2, 4, 5, 8], "n_codebooks": 32},
    ),
}
DIRECTIONS = ("encode", "decode")


class Candidate(NamedTuple):
    """A codec to be timed, as the command line names it."""

    kind: str
    """codec, unfolded, config or random."""
    source: str


class Contestant(NamedTuple):
    """A codec that is ready to be timed."""

    name: str
    codec: SpeechCodec
    wave: Float[Tensor, "1 1 S"]
    num_codebooks: int


class Times(NamedTuple):
    """Seconds of one codec, by repeat."""

    encode: list[float]
    decode: list[float]


def add_command(kinds: Any) -> None:
    """The arguments of `benchmark.py speed`."""
    about = "time to encode and decode, codecs by turns; ratios are to the first one named"
    command = kinds.add_parser("speed", help=about, description=about.capitalize() + ".")
    for kind, metavar, text in (
        ("codec", "DIR", "codec folder or hub id, folded as load_codec does"),
        ("unfolded", "DIR|FILE", "codec folder or configuration, its weight norm not folded"),
        ("config", "FILE", "architecture of a configs/codec YAML file, random weights, folded"),
        ("random", "|".join(PUBLISHED), "published architecture with random weights"),
    ):
        command.add_argument(
            f"--{kind}", dest="candidates", action="append", metavar=metavar, help=text,
            type=lambda source, kind=kind: Candidate(kind, source),
        )  # fmt: skip
    command.add_argument("--wave", type=Path, help="recording (default: a synthetic voice)")
    command.add_argument("--seconds", type=float, default=10.0, help="of speech (default: 10)")
    command.add_argument("--codebooks", type=int, help="use the first N where there are more")
    command.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    command.add_argument("--repeats", type=int, default=5, help="after one that does not count")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl")


def benchmark_speed(args: argparse.Namespace) -> list[Row]:
    """A row per codec, measure and repeat, and one for the median of the repeats."""
    candidates = args.candidates or []
    if not candidates:
        raise ValueError("name codecs: --codec, --unfolded, --config or --random")
    least = {"--threads": args.threads, "--repeats": args.repeats, "--codebooks": args.codebooks}
    for option, value in least.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    if args.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds:g}")
    check_device(args.device)
    torch.set_num_threads(args.threads)
    contestants: list[Contestant] = []
    for candidate in candidates:
        name, codec = build(candidate)
        taken = sum(each.name.partition(" #")[0] == name for each in contestants)
        count = min(args.codebooks or codec.num_codebooks, codec.num_codebooks)
        wave = torch.from_numpy(speech(args, codec.sample_rate))[None, None].to(args.device)
        name += f" #{taken + 1}" if taken else ""
        contestants.append(Contestant(name, codec.to(args.device).eval(), wave, count))
    timed = time_all(contestants, args.repeats, torch.device(args.device))
    return [
        row
        for contestant, times in zip(contestants, timed, strict=True)
        for row in _rows(args, contestant, times, timed[0])
    ]


def build(candidate: Candidate) -> tuple[str, SpeechCodec]:
    """What the rows call a codec, and the codec."""
    kind, source = candidate
    if kind == "random":
        return _random_baseline(source)
    fold, is_config = kind != "unfolded", source.endswith((".yaml", ".yml"))
    if kind == "config" or (kind == "unfolded" and is_config):
        from recipes.train_codec import TrainCodecConfig

        torch.manual_seed(0)
        config = load_config(TrainCodecConfig, ["--config", source])
        codec, name = Codec(config.codec).eval(), f"{Path(source).stem}, random weights"
        if fold:
            codec.fold_weight_norm()
    else:
        codec, name = load_codec(source, fold=fold), source
    if isinstance(codec, Codec):
        return f"{name}, {'folded' if fold else 'unfolded'}", codec
    if not fold:
        raise ValueError(f"--unfolded {source}: only our codecs are folded; use --codec")
    return name, codec


def _random_baseline(kind: str) -> tuple[str, SpeechCodec]:
    from transformers import AutoConfig, AutoModel

    from codec.models.hf import BASELINES

    if kind not in PUBLISHED:
        raise ValueError(f"--random {kind}: must be one of {', '.join(PUBLISHED)}")
    published, settings = PUBLISHED[kind]
    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
    codec = BASELINES[kind](network, published)
    return f"{published}, random weights", codec


def speech(args: argparse.Namespace, sample_rate: int) -> Float[np.ndarray, " S"]:
    """The first seconds of the recording, or a voice of harmonics with a wandering pitch."""
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


def time_all(contestants: Sequence[Contestant], repeats: int, device: torch.device) -> list[Times]:
    """All codecs in every repeat, so that each meets the machine in the same states."""
    timed, stopwatch = [Times([], []) for _ in contestants], Stopwatch(device)
    for repeat in tqdm(range(repeats + 1), "repeats", unit="repeat"):
        for contestant, times in zip(contestants, timed, strict=True):
            codec, wave = contestant.codec, contestant.wave
            with stopwatch:
                codes = codec.encode(wave, num_codebooks=contestant.num_codebooks).codes
            encode = stopwatch.read()
            with stopwatch:
                codec.decode(codes)
            decode = stopwatch.read()
            if repeat:  # The first warms up.
                times.encode.append(encode)
                times.decode.append(decode)
    return timed


def _rows(
    args: argparse.Namespace, contestant: Contestant, times: Times, first: Times
) -> list[Row]:
    codec, rows = contestant.codec, []
    measures: dict[str, list[float]] = {}
    for name, ours, theirs in zip(DIRECTIONS, times, first, strict=True):
        measures[f"{name}_seconds"] = ours
        measures[f"{name}_rtf"] = [each / args.seconds for each in ours]
        # Repeat by repeat: what slows the machine down slows both.
        measures[f"{name}_ratio"] = [a / b for a, b in zip(ours, theirs, strict=True)]
    wave = "synthetic voice" if args.wave is None else args.wave.name
    threads = f", {args.threads} thread(s)" if args.device == "cpu" else ""
    settings = f"{args.seconds} {args.codebooks} {args.threads} {args.device} "
    settings += "" if args.wave is None else digest_of(args.wave)
    config, git, digest = sha256_of(settings, 16), git_revision(), codec.stamp.digest

    def row(metric: str, value: float, repeat: int | None = None, n: int = 1) -> Row:
        return Row(
            system=contestant.name, list=f"{wave}, {args.seconds:g} s",
            utterance=None if repeat is None else f"repeat {repeat}", metric=metric, value=value,
            n=n, seed=0, git=git, config=config, model=digest,
            library=f"torch {torch.__version__}, transformers {version('transformers')}",
            machine=f"{machine()}{threads}",
        )  # fmt: skip

    for metric, values in measures.items():
        rows += [row(metric, value, number) for number, value in enumerate(values, 1)]
    for metric, values in measures.items():
        rows.append(row(metric, statistics.median(values), n=args.repeats))
    rows.append(row("codebooks", float(contestant.num_codebooks), n=args.repeats))
    rows.append(row("frame_rate", float(codec.frame_rate), n=args.repeats))
    return rows

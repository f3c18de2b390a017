"""Scores recordings and their reconstructions by codecs: `python recipes/benchmark.py
reconstruction`."""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer

from codec import load_codec
from codec.audio import resample_wave, write_audio
from codec.io import atomic_file, sha256_of, sha256_of_tensors
from codec.modules.quantize import codebook_usage, count_codes
from codec.tokenize import text_of
from codec.training.data import load_cut, read_cuts
from eval.benchmark import ScoredUtterance, score_reconstruction, score_tts
from eval.metrics import PAIRED, UNPAIRED
from recipes.scoring.judges import Judges, safe_name, state_of_files
from recipes.scoring.lists import columns_of_cut, recordings_of
from recipes.scoring.options import (
    Columns,
    JudgeOptions,
    ScoredSystem,
    add_measures,
    check_distinct,
    check_options,
    chosen,
    judge_options,
    list_options,
    named,
    origin_of,
    write_scores,
)
from recipes.scoring.rows import ORIGINAL
from recipes.scoring.scores import score_all

PART = "reconstruction"
JUDGE_RATE = 16_000
"""Hz at which recordings are judged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecSystem:
    """A codec with a number of codebooks, or with LM-SPT's auxiliary decoder."""

    name: str
    folder: str
    """Folder or hub id."""
    digest: str
    sample_rate: int
    frame_rate: float
    codebook_sizes: tuple[int, ...]
    """Of the codebooks in use."""
    auxiliary: bool
    device: str

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks in use."""
        return len(self.codebook_sizes)


def add_reconstruction_command(kinds: Any) -> None:
    """Adds `reconstruction` to the subparsers of benchmark.py."""
    about = "recordings and their reconstructions by codecs"
    parents = [list_options(), judge_options()]
    command = kinds.add_parser(PART, parents=parents, help=about, description=about.capitalize())
    add = command.add_argument
    add(
        "--codec", action="append", required=True, metavar="[NAME=]DIR",
        help="codec: folder or hub id; repeatable",
    )  # fmt: skip
    add(
        "--cuts", action="append", required=True, metavar="[NAME=]FILE",
        help="list of cuts; repeatable",
    )  # fmt: skip
    add(
        "--codebooks", type=int, nargs="+", metavar="N",
        help="score with the first N codebooks, for each N (default: all)",
    )  # fmt: skip
    add("--auxiliary", action="store_true", help="LM-SPT's decoder of the semantic codebook alone")
    add("--device", default="cpu", help="cpu or cuda")
    add_measures(add, (*PAIRED, *UNPAIRED))


def benchmark_reconstruction(args: argparse.Namespace) -> None:
    """Scores the codecs of the command line on its lists.

    Raises:
        ValueError: a model, list or option is invalid, or no recording can be scored.
    """
    check_options(args)
    systems = codec_systems(args)
    options = JudgeOptions.of(args)
    judges, columns = options.load(), Columns(args)
    found: list[ScoredSystem] = []
    for listed in map(named, args.cuts):
        cuts = chosen(list(read_cuts(listed.value)), args)
        state = f"{sha256_of(Path(listed.value), 16)} {state_of_files(recordings_of(cuts))}"
        base = f"{state} {judges.judge_name} {args.language} {sorted(args.measures)}"
        keys = {ORIGINAL: base}
        for system in systems:
            keys[system.name] = f"{base} {judges.speaker_name} {system.digest}"
        place = f"{safe_name(listed.name)}-{sha256_of(state, 8)}"
        make = partial(CutScorer, tuple(systems), options, args.out, place, tuple(args.measures))
        scored = score_all(args.out, cuts, keys, make, args.processes)
        entries = {cut.id: columns_of_cut(cut) for cut in cuts}
        originals = {one.id: one.audio for one in scored[ORIGINAL]}
        origin = partial(
            origin_of, args, PART, inputs=[Path(listed.value)], judges=judges,
            codebooks=args.codebooks, auxiliary=args.auxiliary,
        )  # fmt: skip
        found.append(
            ScoredSystem(
                list_name=listed.name, scored=scored[ORIGINAL], origin=origin(ORIGINAL),
                constants={}, columns=columns.of(scored[ORIGINAL], entries, listed.name),
                references={},
            )
        )  # fmt: skip
        for system in systems:
            own = scored[system.name]
            found.append(
                ScoredSystem(
                    list_name=listed.name, scored=own,
                    origin=origin(system.name, model=system.digest),
                    constants=constants(system, cuts, args.out / "codes" / place),
                    columns=columns.of(own, entries, listed.name), references=originals,
                )
            )  # fmt: skip
    write_scores(PART, args, found)


def codec_systems(args: argparse.Namespace) -> list[CodecSystem]:
    """Returns each codec of --codec with each number of codebooks.

    Raises:
        ValueError: an option does not fit a codec, or two systems have one name.
    """
    if args.auxiliary and args.codebooks is not None:
        raise ValueError("--auxiliary decodes one codebook: leave --codebooks out")
    systems: list[CodecSystem] = []
    for name, folder in map(named, args.codec):
        codec: Any = load_codec(folder, device=args.device)
        digest = codec.stamp.digest
        if args.auxiliary:  # The stamp's digest is without that decoder.
            if getattr(codec, "auxiliary", None) is None:
                raise ValueError(f"--auxiliary: {folder} has no auxiliary decoder; leave it out")
            added = sha256_of_tensors(sorted(codec.auxiliary.state_dict().items()))
            digest = sha256_of(f"{digest} {added}", 16)
        counts = [1] if args.auxiliary else args.codebooks or [codec.num_codebooks]
        for count in dict.fromkeys(counts):
            if not 1 <= count <= codec.num_codebooks:
                raise ValueError(
                    f"--codebooks must be 1 to {codec.num_codebooks} for {folder}, got {count}"
                )
            system = CodecSystem(
                name=f"{name}-{'auxiliary' if args.auxiliary else count}", folder=folder,
                digest=digest, sample_rate=codec.sample_rate, frame_rate=codec.frame_rate,
                codebook_sizes=tuple(codec.codebook_sizes[:count]), auxiliary=args.auxiliary,
                device=args.device,
            )  # fmt: skip
            systems.append(system)
    if args.name is not None:
        if len(systems) > 1:
            raise ValueError("--name names one system; write --codec NAME=DIR for several")
        systems = [replace(systems[0], name=args.name)]
    check_distinct((system.name, "--codec") for system in systems)
    return systems


class CutScorer:
    """Scores a cut: the recording itself, and its reconstruction by each system."""

    def __init__(
        self, systems: Sequence[CodecSystem], options: JudgeOptions, out: Path, place: str,
        measures: Sequence[str],
    ):  # fmt: skip
        """
        Args:
            place: folder name of the list, below those of systems and codecs.
        """
        self._systems = {system.name: system for system in systems}
        self._judges: Judges = options.load()
        self._language, self._measures = options.language, measures
        self._out, self._place = out, place
        self._codecs: dict[str, Any] = {}

    def __call__(self, cut: Any, names: Sequence[str]) -> Iterator[tuple[str, ScoredUtterance]]:
        """Yields the scores of each system."""
        text, waves, codes = text_of(cut), {}, {}
        for name in names:
            place = Path("waves") / safe_name(name) / self._place / f"{safe_name(cut.id)}.wav"
            path = self._out / place
            if name == ORIGINAL:
                wave = load_cut(cut, JUDGE_RATE)
                write_audio(path, wave, JUDGE_RATE)
                scored = score_tts(
                    cut.id, text, wave, JUDGE_RATE, self._judges.transcribe,
                    language=self._language,
                    measures=[each for each in self._measures if each in UNPAIRED],
                )  # fmt: skip
                yield name, replace(scored, audio=place.as_posix())
                continue
            system = self._systems[name]
            rate, folder = system.sample_rate, system.folder
            if rate not in waves:
                waves[rate] = load_cut(cut, rate)
            if folder not in codes:
                codes[folder] = self._codes(cut, waves[rate], system)
            coded = decode_codes(
                self._codec(system), codes[folder][: system.num_codebooks], waves[rate].size,
                auxiliary=system.auxiliary,
            )  # fmt: skip
            write_audio(path, np.nan_to_num(coded), rate)
            scored = score_reconstruction(
                cut.id, text, waves[rate], coded, rate, self._judges.transcribe,
                self._judges.embed, self._language, self._measures,
            )  # fmt: skip
            yield name, replace(scored, audio=place.as_posix())

    def _codec(self, system: CodecSystem) -> Any:
        if system.folder not in self._codecs:
            self._codecs[system.folder] = load_codec(system.folder, device=system.device)
        return self._codecs[system.folder]

    def _codes(
        self, cut: Any, wave: Float[np.ndarray, " S"], system: CodecSystem
    ) -> Int[np.ndarray, "Q T"]:
        """The codes of all codebooks that some system uses, which are kept."""
        count = max(
            each.num_codebooks for each in self._systems.values() if each.folder == system.folder
        )
        codes = encode_wave(self._codec(system), wave, count)
        path = code_file(self._out / "codes" / self._place, system, cut)
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            np.save(file, codes.astype(np.uint16))
        return codes


def code_file(folder: Path, system: CodecSystem, cut: Any) -> Path:
    """Returns the file of a cut's codes in the folder of its list."""
    return folder / safe_name(system.digest) / f"{safe_name(cut.id)}.npy"


def encode_wave(
    codec: Any, wave: Float[np.ndarray, " S"], num_codebooks: int
) -> Int[np.ndarray, "Q T"]:
    """Returns the codes (Q, T) of a wave (S,) at the codec's sample rate."""
    with torch.inference_mode():
        batch = torch.from_numpy(wave)[None, None].to(codec.device)
        lengths = torch.tensor([wave.size], device=codec.device)
        codes = codec.encode(batch, lengths, num_codebooks=num_codebooks)
    return codes.codes[0, :, : int(codes.lengths[0])].cpu().numpy()


def decode_codes(
    codec: Any, codes: Integer[np.ndarray, "Q T"], num_samples: int, *, auxiliary: bool = False
) -> Float[np.ndarray, " s"]:
    """Returns the wave of codes (Q, T), of at most `num_samples`, at the codec's sample rate.

    Args:
        auxiliary: decode the semantic codebook alone with LM-SPT's auxiliary decoder
            (arXiv 2506.16738).
    """
    with torch.inference_mode():
        batch = torch.from_numpy(codes.astype(np.int64))[None].to(codec.device)
        lengths = torch.tensor([codes.shape[1]], device=codec.device)
        if not auxiliary:
            wave = codec.decode(batch, lengths)
            return wave[0, 0, :num_samples].float().cpu().numpy()
        wave = codec.resynthesize(batch, lengths)[0, 0].float().cpu().numpy()
    rate = codec.config.lmspt.auxiliary.sample_rate
    return resample_wave(wave, rate, codec.sample_rate)[:num_samples]


def constants(system: CodecSystem, cuts: Sequence[Any], folder: Path) -> Mapping[str, float]:
    """Returns bit rate, number of codebooks and, of the codes of the list, the entropy-coded bit
    rate (first order, each codebook alone) in bit/s, the share of entries in use and their
    perplexity, as means over codebooks."""
    sizes = system.codebook_sizes
    bits = sum(math.log2(size) for size in sizes)
    found = {"bitrate": system.frame_rate * bits, "codebooks": float(len(sizes))}
    counts = torch.zeros(len(sizes), max(sizes), dtype=torch.long)
    for cut in cuts:
        path = code_file(folder, system, cut)
        if path.is_file():
            codes = torch.from_numpy(np.load(path).astype(np.int64))[None, : len(sizes)]
            counts += count_codes(codes, max(sizes))
    if counts.any():
        usage = codebook_usage(counts, sizes)
        entropy = float(usage.perplexity.log2().sum())
        found["entropy_bitrate"] = system.frame_rate * entropy
        found["codebook_use"] = float(usage.share.mean())
        found["codebook_perplexity"] = float(usage.perplexity.mean())
    return found

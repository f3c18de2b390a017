"""Miniature programs that write: trainings, export, benchmark and a list of texts. For tests that
disturb them, and compare the states in which they end."""

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conftest import ROOT
from tiny_slm import save_base, save_shard, save_voice
from tiny_teachers import save_speech_teacher

from codec.io import sha256_of

VOLATILE = ("_per_s", "seconds_per_second", "teacher_share", "git")
"""Ends of keys of metrics that are measurements of time, and of rows: this checkout's revision."""
TEXTS = ["Ann had a plan.", "An apple, a pear", "Dad's pal", "a lad", "Anna", "Nan and Dan"]


@dataclass(frozen=True)
class Program:
    """A program, without its folder to write."""

    name: str
    script: str
    arguments: tuple[str, ...]
    out: str = "out={}"
    judge: bool = False
    """Needs a stand-in for the ASR that scores."""
    statuses: tuple[int, ...] = (0,)

    def command(self, out: Path) -> list[str]:
        words = self.out.format(out).split(" ")
        return [str(ROOT / self.script), *self.arguments, *words]


def write_cuts(root: Path, write_wav: Callable[..., Path], seconds: float = 1.2) -> Path:
    """A list of a cut for each of TEXTS."""
    from lhotse import CutSet, Recording, SupervisionSegment

    cuts = []
    for seed, text in enumerate(TEXTS):
        path = write_wav(root / "audio" / f"{seed}.wav", seconds, seed=seed)
        cut = Recording.from_file(path, recording_id=f"cut-{seed}").to_cut().with_id(f"cut-{seed}")
        cut.supervisions = [
            SupervisionSegment(
                id=cut.id, recording_id=cut.id, start=0, duration=seconds, text=text, speaker="ann"
            )
        ]
        cuts.append(cut)
    CutSet.from_cuts(cuts).to_file(root / "cuts.jsonl.gz")
    return root / "cuts.jsonl.gz"


def programs(root: Path, codec: Path, write_wav: Callable[..., Path]) -> dict[str, Program]:
    """The programs by name, on inputs that are written to `root`."""
    from codec import load_codec
    from slm.config import SamplingConfig
    from slm.export.voice_folder import write_extras
    from slm.voice import Voice

    cuts = write_cuts(root, write_wav)
    networks = (
        "codec.family=lmspt", "codec.lmspt.dimension=8", "codec.spectral.num_mels=20",
        "codec.spectral.encoder_width=16", "codec.spectral.encoder_depths=[1,1,1]",
        "codec.spectral.decoder_width=16", "codec.spectral.decoder_depths=[1,1,1]",
        "codec.quantizer.num_codebooks=2",
    )  # fmt: skip
    lists = (f"train={cuts}", f"dev={cuts}")

    def steps(prefix: str, number: int, every: int) -> tuple[str, ...]:
        keys = f"steps={number}", f"save_every={every}", f"eval_every={every}", "log_every=1"
        return tuple(f"{prefix}.{key}" for key in keys)

    stamp = load_codec(codec).stamp
    save_shard(root / "train.parquet", 16, stamp)
    save_shard(root / "dev.parquet", 6, stamp, seed=1)
    voice_inputs = (
        f"ar.base={save_base(root / 'base')}", f"codec={codec}", f"train={root / 'train.parquet'}",
        f"dev={root / 'dev.parquet'}", "ar.lora.rank=2", "batch.positions=300",
    )  # fmt: skip
    nar = (
        "nar_batch.positions=300", "nar.num_layers=1", "nar.num_heads=2", "nar.width=16",
        "nar.feedforward=16", "tts_eval.num_items=0",
    )  # fmt: skip
    voice = save_voice(root, codec)
    loaded = Voice.from_pretrained(voice)
    brief = replace(
        SamplingConfig(), frames_per_token=(0.2, 0.5), spare_seconds=0.0, max_attempts=1
    )
    write_extras(voice, loaded.lm, loaded.coverage, loaded.prompts, brief)
    lines = [{"id": f"t{i}", "text": "the cat sat", "prompt": "ann"} for i in range(6)]
    (root / "list.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    judge = root / "judge"
    judge.mkdir()
    (judge / "model.bin").touch()
    return {
        each.name: each
        for each in (
            Program(
                "codec", "recipes/train_codec.py",
                (
                    *(*lists, *networks, "codec.lmspt.auxiliary.width=8"),
                    "codec.quantizer.codebook_sizes=[16,8]", "codec.quantizer.dropout=0.5",
                    "losses.weights.adversarial=1", "losses.weights.feature=1",
                    "discriminators.periods=[2]", "discriminators.num_scales=1",
                    "discriminators.stft_windows=[128]", "discriminators.stft_filters=4",
                    "discriminators.band_windows=[128]", "discriminators.width_divisor=64",
                    "data.seconds=0.28", "data.batch_size=2", "data.num_validation=0",
                    *steps("optim", 8, 2),
                ),
            ),
            Program(
                "semantic", "recipes/train_semantic.py",
                (
                    *(*lists, *networks, "codec.quantizer.codebook_size=16"),
                    f"whisper={save_speech_teacher(root / 'whisper', 'whisper')}",
                    "codec.lmspt.auxiliary.kind=none", "codec.lmspt.whisper.adapter_width=8",
                    "codec.lmspt.semantic_subtraction=false", "batch.positions=70",
                    "optim.warmup_steps=1", *steps("optim", 8, 2),
                ),
            ),
            Program(
                "AR", "recipes/asr.py",
                (*voice_inputs, "num_asr_items=0", *steps("optim", 8, 2)),
            ),
            Program(
                "NAR", "recipes/tts.py",
                (*voice_inputs, *nar, *steps("optim", 1, 1), *steps("nar_optim", 8, 2)),
            ),
            Program(
                "export", "recipes/export_tokens.py",
                (f"cuts={cuts}", f"codec={codec}", "part_hours=1e-6"),
            ),
            Program(
                "benchmark", "recipes/benchmark.py",
                (
                    *("reconstruction", "--codec", str(codec), "--cuts", str(cuts)),
                    *("--judge", str(judge), "--name", "tiny"),
                ),
                "--out {}", judge=True,
            ),
            Program(
                "slm tts --list", "slm/__main__.py",
                (
                    *("tts", "--voice", str(voice), "--list", str(root / "list.jsonl")),
                    *("--batch", "1"),
                ),
                "--out {}", statuses=(0, 3),
            ),
        )
    }  # fmt: skip


def end_state(out: Path, written_to: Path | None = None) -> dict[str, Any]:
    """What an undisturbed and a resumed run must have in common: names and digests of all files,
    metrics without times, rows without revisions. TensorBoard's files are left out: their names
    have times.

    Args:
        written_to: the folder that `out` is a copy of.
    """
    state: dict[str, Any] = {}
    for path in sorted(each for each in out.rglob("*") if each.is_file()):
        name = str(path.relative_to(out))
        if "tensorboard" in path.parts or path.name == ".lock":
            continue
        if path.name in ("metrics.jsonl", "rows.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            state[name] = [
                {key: value for key, value in line.items() if not key.endswith(VOLATILE)}
                for line in lines
            ]
        elif path.suffix == ".gz":  # Which has a time, too.
            state[name] = sha256_of(gzip.decompress(path.read_bytes()))
        elif path.name == "run.json":
            state[name] = json.loads(path.read_text())["seed"]
        elif path.name == "config.yaml" or path.suffix == ".md":
            state[name] = path.read_text().replace(str(written_to or out), "OUT")
        else:
            state[name] = sha256_of(path)
    return state


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the files that differ, are missing (-) or are there too many (+)."""
    changed = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
    missing = [f"-{name}" for name in expected.keys() - found.keys()]
    return sorted([*changed, *missing, *(f"+{name}" for name in found.keys() - expected.keys())])


def log_row(file: str, *cells: object) -> None:
    """Prints a row of a table, and adds it to out/soak/FILE."""
    folder = ROOT / "out" / "soak"
    folder.mkdir(parents=True, exist_ok=True)
    line = f"| {' | '.join(map(str, cells))} |"
    sys.stdout.write(f"\n{line}")
    with open(folder / file, "a") as results:
        results.write(f"{line}\n")

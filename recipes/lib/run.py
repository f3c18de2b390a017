"""What every recipe shares: its configuration, its run folder, its exit status.

The run folder holds config.yaml, run.json (git revision, seed, versions, machine of each start),
metrics.jsonl, TensorBoard events and checkpoints/step-00000500. A stage is a subfolder.

What makes a checkpoint whole: its seal, and the files around it.

Where numbers come from: the git revision, package versions and machine of a start.
"""

import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from tqdm import tqdm

from codec import program
from codec.distillation.teachers import has_bf16
from codec.io import FileLock, atomic_file, fsync, is_write_failure
from recipes.lib.config import leaves, load_config, resolved

logger = logging.getLogger(__name__)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Syncs a checkpoint's files and notes their sizes in whole.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    seal = folder / "whole.json"
    seal.write_text(json.dumps({**facts, "sizes": sizes}))
    for path in [*files, seal]:
        fsync(path)


def is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / "whole.json").read_text())["sizes"]
        short = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, KeyError):
        short = ["whole.json"]
    if short:
        logger.warning("%s: not whole (%s), skipped", folder, short[0])
    return not short


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    assert match
    return int(match[1])


def cut_metrics(path: Path, step: int) -> None:
    """Keeps the lines before `step`, but none that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] < step:
            kept.append(line)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept))


REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "accelerate", "transformers", "peft", "deepspeed", "numpy", "lhotse")
"""Packages whose versions a run notes."""


def git_revision() -> str:
    """The revision of this checkout, with `-dirty` when tracked files differ; else `unknown`."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != REPOSITORY:
            return "unknown"  # Installed inside somebody else's repository.
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def note_start(folder: Path, seed: int, precision: str, world: dict[str, Any]) -> None:
    """Adds this start to run.json."""
    path = folder / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() else []
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "git": git_revision(),
            "packages": {name: _version(name) for name in PACKAGES},
            "machine": {
                "python": platform.python_version(),
                "system": platform.platform(),
                "cores": os.cpu_count(),
                "gpu": gpu,
            },
            "precision": precision,
            **world,
        }
    )
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps({"seed": seed, "starts": starts}, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


__all__ = [
    "Run",
    "finished",
    "git_revision",
    "load_config",
    "make_accelerator",
    "run_program",
    "start_run",
]


# DeepSpeed picks its device when it is first imported, which the Accelerator does.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def run_program(main: Callable[[list[str]], None]) -> None:
    """Runs a recipe's `main(argv)` with logs on standard error; ends as codec/program.py states."""
    if not torch.cuda.is_available():
        keep_memory()
    alone = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if alone else logging.WARNING,
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    for name in ("accelerate", "faster_whisper"):  # Ten lines a checkpoint, one a recording.
        logging.getLogger(name).setLevel(logging.WARNING)
    program.run_program(lambda: main(sys.argv[1:]))
    if torch.distributed.is_initialized():
        gc.collect()  # An engine that is still there when its group goes aborts the process.
        torch.distributed.destroy_process_group()
        _leave()


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of malloc.h.


def keep_memory() -> None:
    """From now on the process keeps what its main thread frees, for its own next use.

    Each step on a CPU asks for the same gigabytes; glibc returns pieces of 32 MB and more to the
    kernel at once, and to be handed them again takes time (LOG.md). No other C library is told.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _leave() -> NoReturn:
    """Ends a rank whose work is done, without the interpreter's own end.

    There, one process in some dozens on a busy machine is aborted by a thread that ZeRO-3 or gloo
    has left (LOG.md), and the launcher reports a run that is whole as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def finished(what: str, path: str | Path, next_command: str) -> None:
    """Prints the last lines of a recipe to standard output, on the main process: what was made,
    where it is, and the command to run next.

    Args:
        what: e.g. "codec of 8 codebooks at 25 Hz, trained for 2000 steps".
        next_command: as one types it in the repository; `path` may be a part of it.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"Finished: {what}\n    in {path}\nNext: {next_command}", flush=True)


def make_accelerator(
    folder: Path | None = None,
    *,
    gradient_accumulation_steps: int = 1,
    tracker: str | None = "tensorboard",
    handlers: Sequence[KwargsHandler] = (),
) -> Accelerator:
    """An Accelerator for the launch that we are in, on GPUs or, where there is none, the CPU.

    World size, precision and ZeRO come from accelerate's file. Where the machine lacks bf16 it is
    replaced by float32, so that one file serves both. `folder` gets the tracker's events.
    """
    cpu = not torch.cuda.is_available()
    lacks_bf16 = not has_bf16("cpu" if cpu else "cuda")
    if lacks_bf16 and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        logger.info("no bf16 on this machine: training in float32")
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # DeepSpeed launches set this to 1, and it would win over the argument below.
    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(gradient_accumulation_steps)
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    gloo = cpu and (zero or int(os.environ.get("WORLD_SIZE", "1")) > 1)
    if cpu and zero:
        import deepspeed.ops

        # A kernel for inference alone, which would be compiled now: minutes on a busy machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return Accelerator(
        # With cpu=True accelerate forgets DeepSpeed; without it, it forgets to wrap in DDP.
        cpu=cpu and not zero,
        gradient_accumulation_steps=gradient_accumulation_steps,
        log_with=tracker if folder is not None else None,
        project_config=ProjectConfiguration(str(folder), str(folder)) if folder else None,
        # Without a backend each process of a CPU-only DeepSpeed launch believes that it is alone.
        kwargs_handlers=[*handlers, *([InitProcessGroupKwargs(backend="gloo")] if gloo else [])],
    )


def start_run(
    config: Any,
    folder: str | Path,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    keep: int = 2,
    free: Sequence[str] = (),
) -> "Run":
    """Opens a run folder, new or to go on in, and seeds every generator. All ranks call it.

    Raises ValueError when another process runs in the folder, or when it was begun with another
    configuration (the message names the keys that differ). `keep` is the number of checkpoints
    that stay. Keys that are `free`, or below one that is, may change: config.yaml has the last.
    """
    folder = Path(folder)
    accelerator = accelerator or make_accelerator(folder)
    lock = None
    failure: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            lock = FileLock(folder)
            _claim(folder, resolved(config), free)
            note_start(folder, seed, accelerator.mixed_precision, _world(accelerator))
        except (ValueError, OSError) as error:
            failure = [error]
    _share(failure, accelerator)
    set_seed(seed)
    world = _world(accelerator)
    zero = "" if world["zero_stage"] is None else f", DeepSpeed ZeRO-{world['zero_stage']}"
    place = f"{world['num_processes']} process(es) on {accelerator.device.type}"
    logger.info("%s: %s, precision %s%s", folder, place, accelerator.mixed_precision, zero)
    if accelerator.log_with:
        accelerator.init_trackers("tensorboard")
    return Run(folder, accelerator, seed=seed, keep=keep, lock=lock)


class Run:
    """One stage of a run folder: its metrics and its checkpoints."""

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        *,
        seed: int,
        keep: int = 2,
        prefix: str = "",
        lock: FileLock | None = None,
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.seed = seed
        self._keep = keep
        self._prefix = prefix
        self._lock = lock
        self._checkpoints = folder / "checkpoints"

    def stage(self, name: str) -> "Run":
        """A stage with its own checkpoints and metrics, in the subfolder `name`.

        A checkpoint holds all that the accelerator has prepared: call `accelerator.free_memory()`
        before the next stage prepares its own.
        """
        stage = Run(
            self.folder / name,
            self.accelerator,
            seed=self.seed,
            keep=self._keep,
            prefix=f"{self._prefix}{name}/",
            lock=self._lock,
        )
        stage.folder.mkdir(parents=True, exist_ok=True)
        return stage

    def close(self) -> None:
        """Gives the folder's lock back; the end of the process does so as well."""
        if self._lock is not None:
            self._lock.close()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Notes numbers of a step, on the main process, in metrics.jsonl and for the tracker."""
        if not self.accelerator.is_main_process:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(
            {self._prefix + key: value for key, value in values.items()}, step=step
        )

    def progress(self, total: int, initial: int, label: str) -> tqdm:
        """A progress bar on standard error, shown by the main process only."""
        return tqdm(
            total=total,
            initial=initial,
            desc=label,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )

    def save(self, step: int) -> None:
        """Saves all that the accelerator has prepared, and every generator. All ranks call it.

        The checkpoint is written under a temporary name and renamed, so a kill at any moment
        leaves whole ones only. When the disk is full the temporary files go, earlier checkpoints
        stay, and OSError is raised.
        """
        path = self._checkpoints / f"step-{step:08d}"
        if path.exists():  # The one that this run went on from, or saved at this very step.
            return
        temporary = self._checkpoints / f".{path.name}.tmp"
        main = self.accelerator.is_main_process
        try:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if main:
                seal(temporary, {"step": step, **_world(self.accelerator)})
                temporary.rename(path)
                fsync(self._checkpoints)
        except Exception as error:
            # No collective here: another rank may be waiting in one, and the launcher ends it.
            shutil.rmtree(temporary, ignore_errors=True)
            if is_write_failure(error):
                free = shutil.disk_usage(self.folder).free // 2**20
                reason = str(error).splitlines()[0]
                raise OSError(
                    f"{path}: could not be written ({reason}; {free} MB free on this disk); "
                    "earlier checkpoints are whole: make room and start again to go on from them"
                ) from error
            raise
        if main:
            for old in self._saved()[self._keep :]:
                remove(old)
        self.accelerator.wait_for_everyone()

    def resume(self, *, noted: bool = False) -> int:
        """Loads the newest whole checkpoint and returns its step; 0 when there is none.

        All ranks call it, after `accelerator.prepare`. Checkpoints with a missing or short file
        are skipped with a warning. Lines of metrics.jsonl from that step on go: the run notes that
        step again, unless it had `noted` all of it before it saved.
        """
        newest: list[Any] = [None]
        if self.accelerator.is_main_process:
            for leftover in self._checkpoints.glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            newest = [next((path for path in self._saved() if is_whole(path)), None)]
            first = step_of(newest[0]) + noted if newest[0] else 0
            cut_metrics(self.folder / "metrics.jsonl", first)
        newest = self._broadcast(newest)
        if newest[0] is None:
            # Models are built alike on all ranks; from here on each rank draws for itself.
            set_seed(self.seed, device_specific=True)
            return 0
        written = json.loads((newest[0] / "whole.json").read_text())
        for key, value in _world(self.accelerator).items():
            if written[key] != value:
                raise ValueError(
                    f"{newest[0]}: written with {key} {written[key]}, but this launch has {value}; "
                    "launch as before to go on, or choose another run folder"
                )
        self.accelerator.load_state(str(newest[0]))
        logger.info("going on from %s", newest[0])
        return step_of(newest[0])

    def _saved(self) -> list[Path]:
        """Checkpoints, the newest first."""
        return sorted(self._checkpoints.glob("step-*"), reverse=True)

    def _broadcast(self, values: list[Any]) -> list[Any]:
        return broadcast_object_list(values) if self.accelerator.num_processes > 1 else values


def _claim(folder: Path, config: dict[str, Any], free: Sequence[str] = ()) -> None:
    """Writes config.yaml, or checks that the folder was begun with the same one but for `free`."""
    path = folder / "config.yaml"
    if path.exists():
        before, now = dict(leaves(yaml.safe_load(path.read_text()))), dict(leaves(config))
        differing = sorted(
            key
            for key in before.keys() | now.keys()
            if before.get(key) != now.get(key) and not _is_free(key, free)
        )
        if differing:
            changes = ", ".join(
                f"{key} ({before.get(key)} -> {now.get(key)})" for key in differing[:5]
            )
            raise ValueError(
                f"{folder}: begun with another configuration: {changes}"
                f"{', ...' if len(differing) > 5 else ''}; choose another folder, or remove this "
                "one"
            )
        if before == now:
            return
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _is_free(key: str, free: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in free)


def _world(accelerator: Accelerator) -> dict[str, Any]:
    """What must be the same for a checkpoint to be loaded."""
    plugin = (
        accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    )
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": plugin.zero_stage if plugin else None,
    }


def _share(failure: list[Any], accelerator: Accelerator) -> None:
    """Raises the main process's error on all ranks, before any of them waits for it in vain."""
    shared = [str(failure[0]) if failure[0] else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if failure[0]:
        raise failure[0]
    if shared[0]:
        raise program.ReportedElsewhere(shared[0])

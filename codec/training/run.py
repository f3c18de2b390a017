"""The run folder of a training: configuration, provenance, metrics, checkpoints, resuming.

It holds config.yaml, run.json (git revision, seed, versions and machine of each start),
metrics.jsonl, TensorBoard events and checkpoints/step-00000500. A stage is a subfolder.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import (
    KwargsHandler,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from safetensors import SafetensorError
from tqdm import tqdm

from codec.distillation.teachers import has_bf16
from codec.io import (
    DAMAGE,
    FileLock,
    WriteError,
    apply_umask,
    atomic_file,
    fsync,
    is_write_failure,
    parse_json,
    parse_yaml,
    write_errors,
    write_reason,
)
from codec.json_lines import append_json_lines, read_appended, write_json_lines
from codec.program import ASKED_PROCESSES, ReportedElsewhere, one_line, reason_of
from codec.training.workarounds import (
    accelerator_options,
    default_deepspeed_device,
    is_lost_rank,
    quiet_event_writer,
)

logger = logging.getLogger(__name__)

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "accelerate", "transformers", "peft", "deepspeed", "numpy", "lhotse")
"""Packages whose versions a run notes."""
SEAL = "whole.json"
"""File of a checkpoint with sizes and checksums of its files, and the launch that wrote it."""
PROFILE_SKIPPED = 2
"""Steps before the profiled ones: the first ones build caches."""
PROFILE_ROWS = 40
FREE_KEYS = ("out", "max_skipped_steps")
"""Last parts of keys that may differ when any run is resumed: its folder may move."""

default_deepspeed_device()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys of nested dictionaries and the values at them."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def resolved(config: Any) -> dict[str, Any]:
    """A config dataclass as plain YAML types."""
    return plain(dataclasses.asdict(config))


def plain(value: Any) -> Any:
    """Converts values of a config dataclass to types of YAML: tuples to lists, paths to text."""
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def make_accelerator(
    folder: Path | None = None,
    *,
    gradient_accumulation_steps: int = 1,
    tracker: str | None = "tensorboard",
    handlers: Sequence[KwargsHandler] = (),
) -> Accelerator:
    """An Accelerator for the current launch, on GPUs or, if there are none, on the CPU.

    World size, precision and ZeRO come from accelerate's file. Where the machine lacks bf16 it is
    replaced by float32, so that one file serves both. `folder` gets the tracker's events.

    Raises:
        ValueError: the launch has another number of processes than it was asked for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not has_bf16(device) and os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16":
        logger.info("no bf16 on this machine: training in float32")
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    options = accelerator_options(gradient_accumulation_steps)
    options["kwargs_handlers"] += handlers
    accelerator = Accelerator(
        log_with=tracker if folder is not None else None,
        project_config=ProjectConfiguration(str(folder), str(folder)) if folder else None,
        **options,
    )
    asked = os.environ.get(ASKED_PROCESSES)
    if asked is not None and int(asked) != accelerator.num_processes:
        raise ValueError(
            f"{asked} process(es) were asked for, and this launch has {accelerator.num_processes}: "
            "take ddp.yaml or zero*.yaml of recipes/accelerate for more than one, and on several "
            "machines follow docs/gpus_and_clusters.md"
        )
    return accelerator


def start_run(
    config: Any,
    folder: str | Path,
    *,
    seed: int,
    accelerator: Accelerator | None = None,
    keep: int = 2,
    free: Sequence[str] = (),
    current_keys: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] | None = None,
    profile_steps: int = 0,
) -> "Run":
    """Opens a run folder, new or to resume in, and seeds every generator. All ranks call it.

    Args:
        config: a dataclass.
        keep: the number of checkpoints that stay.
        free: keys that may differ from those of an earlier start, and all below them; FREE_KEYS
            always may.
        current_keys: for folders of earlier versions: given {dotted key: value} of their
            config.yaml and today's keys, returns it under today's keys.
        profile_steps: steps of each stage that torch.profiler records; 0: none.

    Raises:
        ValueError: another process runs in the folder, or it was begun with another configuration
            (the message names the keys that differ).
    """
    folder = Path(folder)
    accelerator = accelerator or make_accelerator(folder)
    lock = None
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            lock = FileLock(folder)
            _claim(folder, config, free, current_keys)
            _note_start(folder, seed, accelerator.mixed_precision, _world(accelerator))
        except (ValueError, OSError) as error:
            failure = error
    share_failure(failure, accelerator)
    set_seed(seed)
    world = _world(accelerator)
    zero = "" if world["zero_stage"] is None else f", DeepSpeed ZeRO-{world['zero_stage']}"
    place = f"{world['num_processes']} process(es) on {accelerator.device.type}"
    logger.info("%s: %s, precision %s%s", folder, place, accelerator.mixed_precision, zero)
    if accelerator.log_with:
        quiet_event_writer()
        accelerator.init_trackers("tensorboard")
    return Run(folder, accelerator, seed=seed, keep=keep, lock=lock, profile_steps=profile_steps)


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
        profile_steps: int = 0,
    ):
        self.folder = folder
        self.accelerator = accelerator
        self.seed = seed
        self._keep = keep
        self._prefix = prefix
        self._lock = lock
        self._profile_steps = profile_steps
        self._signal = 0
        self._group: Any = None
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
            profile_steps=self._profile_steps,
        )
        stage.folder.mkdir(parents=True, exist_ok=True)
        return stage

    def close(self) -> None:
        """Releases the folder's lock; the end of the process does so as well."""
        if self._lock is not None:
            self._lock.close()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes values of a step, on the main process, to metrics.jsonl and to the tracker.

        JSON has no NaN and no infinity: metrics.jsonl has null, and the tracker gets no value.

        Raises:
            WriteError: the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        append_json_lines(self.folder / "metrics.jsonl", [{"step": step, **values}], sync=False)
        prefixed = {self._prefix + key: value for key, value in finite.items()}
        with write_errors(Path(self.accelerator.logging_dir or self.folder) / "tensorboard"):
            self.accelerator.log(prefixed, step=step)

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
        leaves complete ones only.

        Raises:
            WriteError: the disk is full; the temporary files are removed, earlier checkpoints stay.
            ValueError: weights or optimizers hold a value that is not finite; on all ranks.
        """
        path = self._checkpoints / f"step-{step:08d}"
        if path.exists():  # The one that this run resumed from.
            return
        self._check_finite(step)
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
                _seal(temporary, {"step": step, **_world(self.accelerator)})
                temporary.rename(path)
                fsync(self._checkpoints)
        except Exception as error:
            # No collective here: another rank may be waiting in one, and the launcher ends it.
            reason = write_reason(error, temporary) if is_write_failure(error) else ""
            shutil.rmtree(temporary, ignore_errors=True)
            if reason:
                raise WriteError(
                    f"{path}: could not be written ({reason}); earlier checkpoints are complete: "
                    "make room on the disk and start again to resume"
                ) from error
            raise
        if main:
            self._remove_oldest()
        self.accelerator.wait_for_everyone()

    def _remove_oldest(self) -> None:
        for old in self._saved()[self._keep :]:
            _remove(old)

    def _check_finite(self, step: int) -> None:
        """Raises `ValueError` on all ranks before a checkpoint with NaN replaces a good one."""
        bad = torch.zeros((), device=self.accelerator.device)
        for part in _trained_state(self.accelerator):
            if part.numel():  # Minimum and maximum are NaN where a value is: one pass, no copy.
                bad += (~torch.stack(part.aminmax()).isfinite().all()).to(bad)
        # Under ZeRO each rank has a part.
        total: Any = self.accelerator.reduce(bad)
        if total.item():
            raise ValueError(
                f"the training diverged before step {step}: its weights or optimizers hold values "
                f"that are not finite; {self.newest_name()}; start in a new folder with a lower lr"
            )

    def newest_name(self) -> str:
        """Text for messages: the newest checkpoint, if there is one, and how to resume before it,
        since it may have diverged already."""
        saved = self._saved()
        if not saved:
            return "there is no checkpoint"
        newest = f"{saved[0].name} is the newest checkpoint"
        if len(saved) == 1:
            return newest
        return f"{newest} (remove {saved[0]} to resume from {saved[1].name})"

    def resume(self) -> int:
        """Loads the newest complete checkpoint and returns its step; 0 when there is none.

        All ranks call it, after `accelerator.prepare`. Checkpoints with a missing, truncated or
        corrupted file are removed with a warning, if an earlier one is complete. Lines of
        metrics.jsonl after that step are removed: the run writes them again.

        Raises:
            ValueError: no checkpoint is complete, or another number of processes or another ZeRO
                stage wrote it.
        """
        newest: list[Any] = [None]
        failure: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                newest = [self._prepare_resuming()]
            except (ValueError, OSError) as error:
                failure = error
        share_failure(failure, self.accelerator)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(newest)
        if newest[0] is None:
            # Models are built alike on all ranks; from here on each rank has its own generator.
            set_seed(self.seed, device_specific=True)
            return 0
        written = parse_json((newest[0] / SEAL).read_text())
        for key, value in _world(self.accelerator).items():
            before = written.get(key)
            if before != value:
                raise ValueError(
                    f"{newest[0]}: written with {key} {before}, but this launch has {value}; "
                    "launch as before to resume, or choose another run folder"
                )
        try:
            self.accelerator.load_state(str(newest[0]))
        except (*DAMAGE, RuntimeError, SafetensorError, UnpicklingError) as error:
            # Its checksums are right: the disk, the memory or another rank may be at fault.
            is_other = isinstance(error, OSError | torch.OutOfMemoryError)
            if is_other or is_lost_rank(error):
                raise
            raise ValueError(
                f"{newest[0]}: does not fit this run, or is damaged ({reason_of(error)[:300]}); "
                f"{self.newest_name()}"
            ) from error
        logger.info("resuming from %s", newest[0])
        return _step_of(newest[0])

    def _prepare_resuming(self) -> Path | None:
        """Returns the newest complete checkpoint; removes damaged ones and what a kill has left."""
        for leftover in self._checkpoints.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        damaged: dict[Path, str] = {}
        newest = None
        for path in self._saved():
            if damage := _damage(path):
                damaged[path] = damage
            else:
                newest = path
                break
        if damaged and newest is None:
            shown = one_line("; ".join(f"{path.name}: {why}" for path, why in damaged.items()))
            raise ValueError(
                f"{self._checkpoints}: no checkpoint is complete ({shown}); copy one there from "
                "elsewhere, or remove this folder to train from the start"
            )
        for path, damage in damaged.items():
            logger.warning("%s: %s, removed; the newest complete checkpoint is used", path, damage)
            _remove(path)  # Else it would count as kept, and as saved at its step.
        self._remove_oldest()
        _truncate_metrics(self.folder / "metrics.jsonl", _step_of(newest) if newest else -1)
        return newest

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], int]]:
        """SIGINT or SIGTERM inside asks the run to stop; a second SIGINT ends it at once.

        A scheduler may send SIGTERM to all processes, and the launcher passes it on once more.

        Yields a function that returns the signal that any rank got, or 0. All ranks call it once a
        step, and all get the same answer.
        """
        if threading.current_thread() is not threading.main_thread():
            yield lambda: 0
            return

        def ask(number: int, frame: Any) -> None:
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.accelerator.is_main_process and not self._signal:
                again = "; once more: at once" if number == signal.SIGINT else ""
                logger.warning("stopping after this step%s", again)
            self._signal = max(self._signal, number)

        before = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self._signal_of_any_rank
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signal_of_any_rank(self) -> int:
        if self.accelerator.num_processes == 1:
            return self._signal
        if self._group is None:
            # On the CPU, so that no rank waits for its GPU.
            self._group = torch.distributed.new_group(backend="gloo")
        number = torch.tensor([self._signal])
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(number)

    @contextlib.contextmanager
    def profiled(self) -> Iterator[Callable[[], None]]:
        """Records `profile_steps` steps on the main process with torch.profiler.

        Yields a function to call after each step. The folder gets profile/trace.json and
        profile/operators.txt, the operators that take the most time.
        """
        if not self._profile_steps or not self.accelerator.is_main_process:
            yield lambda: None
            return
        from torch import profiler

        folder = self.folder / "profile"

        def write(profile: profiler.profile) -> None:
            with atomic_file(folder / "trace.json") as temporary:
                profile.export_chrome_trace(str(temporary))
            by = "cuda" if self.accelerator.device.type == "cuda" else "cpu"
            averages = profile.key_averages()
            table = averages.table(sort_by=f"self_{by}_time_total", row_limit=PROFILE_ROWS)
            with atomic_file(folder / "operators.txt") as temporary:
                temporary.write_text(table)
            logger.info("%s: trace.json and operators.txt of %d steps", folder, self._profile_steps)

        schedule = profiler.schedule(
            wait=PROFILE_SKIPPED, warmup=1, active=self._profile_steps, repeat=1
        )
        with profiler.profile(schedule=schedule, on_trace_ready=write, acc_events=True) as profile:
            yield profile.step

    def _saved(self) -> list[Path]:
        """Checkpoints, the newest first."""
        return sorted(self._checkpoints.glob("step-*"), reverse=True)


def share_failure(failure: Exception | None, accelerator: Accelerator) -> None:
    """Raises an error of the main process on all ranks, so that none waits for it in a collective.

    All ranks call it; `failure` is None on the others.
    """
    shared = [str(failure) if failure else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(shared)
    if failure:
        raise failure
    if shared[0]:
        raise ReportedElsewhere(shared[0])


def lock_folder(folder: Path, accelerator: Accelerator) -> FileLock | None:
    """Locks the folder on the main process, which gets the lock; the others get None.

    Raises:
        ValueError: another process runs in the folder; on all ranks.
    """
    lock, failure = None, None
    if accelerator.is_main_process:
        try:
            lock = FileLock(folder)
        except (ValueError, OSError) as error:
            failure = error
    share_failure(failure, accelerator)
    return lock


def shared_numbers(accelerator: Accelerator) -> Iterator[int]:
    """Yields 0, 1, 2 and so on without end, each number on one rank: the first one that asks.

    All ranks call it, once: another call continues with the numbers.
    """
    if accelerator.num_processes == 1:
        yield from itertools.count()
    store = torch.distributed.distributed_c10d._get_default_store()
    while True:
        yield store.add("shared_numbers", 1) - 1


def _claim(
    folder: Path,
    config: Any,
    free: Sequence[str],
    current_keys: Callable[[Mapping[str, Any], Collection[str]], dict[str, Any]] | None,
) -> None:
    """Writes config.yaml, or checks that the folder was begun with the same one but for `free`."""
    path, content = folder / "config.yaml", resolved(config)
    if path.exists():
        try:
            before, now = dict(leaves(parse_yaml(path.read_text()))), dict(leaves(content))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{path}: damaged ({reason_of(error)}); choose another folder"
            ) from error
        if current_keys is not None:
            before = current_keys(before, now)
        # An earlier version behaved as the defaults of the keys that it lacked.
        defaults = _defaults(type(config))
        for key in now.keys() - before.keys():
            related = [k for k in before if k.startswith(f"{key}.") or key.startswith(f"{k}.")]
            before[key] = None if related else defaults.get(key)
            if related and now[key] is None:
                before[key] = "set"
        differing = sorted(
            key for key, value in now.items() if before[key] != value and not _is_free(key, free)
        )
        if differing:
            changes = one_line(
                ", ".join(f"{key} ({before[key]} -> {now[key]})" for key in differing[:5])
            )
            raise ValueError(
                f"{folder}: begun with another configuration: {changes}"
                f"{', ...' if len(differing) > 5 else ''}; choose another folder, or remove this "
                "one"
            )
        if before == now:
            return
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _defaults(cls: type) -> dict[str, Any]:
    try:
        return dict(leaves(resolved(cls())))
    except TypeError:  # Some keys have no default.
        return {}


def _is_free(key: str, free: Sequence[str]) -> bool:
    named = any(key == name or key.startswith(f"{name}.") for name in free)
    return named or key.rpartition(".")[2] in FREE_KEYS


def _world(accelerator: Accelerator) -> dict[str, Any]:
    """Facts of the launch that must be equal for a checkpoint to be loaded."""
    plugin = (
        accelerator.state.deepspeed_plugin if accelerator.distributed_type == "DEEPSPEED" else None
    )
    return {
        "num_processes": accelerator.num_processes,
        "zero_stage": plugin.zero_stage if plugin else None,
    }


def _seal(folder: Path, facts: dict[str, Any]) -> None:
    """Syncs a checkpoint's files and writes their sizes and checksums to its seal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    sizes = [path.stat().st_size for path in files]
    content = {"sizes": sizes, "crc32": _checksums(files)}
    listed = {key: dict(zip(names, values, strict=True)) for key, values in content.items()}
    (folder / SEAL).write_text(json.dumps({**facts, **listed}))
    for path in [*files, folder / SEAL]:
        apply_umask(path)
        fsync(path)


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint, for messages; "" if it is complete."""
    try:
        seal = parse_json((folder / SEAL).read_text())
        stored = seal.get("crc32", {})  # Earlier versions have none.
        if not all(_is_inside(name) for name in (*seal["sizes"], *stored)):
            return f"corrupted ({SEAL})"
        for name, size in seal["sizes"].items():
            if (folder / name).stat().st_size != size:
                return f"incomplete ({name})"
        found = _checksums([folder / name for name in stored])
        for (name, checksum), other in zip(stored.items(), found, strict=True):
            if checksum != other:
                return f"corrupted ({name})"
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"incomplete ({Path(error.filename).name})"
    except OSError:  # Not its content: it may be readable later.
        raise
    except DAMAGE:
        return f"incomplete ({SEAL})"
    return ""


def _is_inside(name: str) -> bool:
    """Whether a relative name stays in its folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _checksums(files: Sequence[Path]) -> list[int]:
    """CRC-32 of each file: against damage, not against intent. About 1 GB/s on one core."""

    def checksum(path: Path) -> int:
        value = 0
        with open(path, "rb") as file:
            while block := file.read(2**20):
                value = zlib.crc32(block, value)
        return value

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(checksum, files))


def _trained_state(accelerator: Accelerator) -> Iterator[torch.Tensor]:
    """What training changes and a checkpoint saves: on ZeRO-3, this rank's part."""
    for model in accelerator._models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                yield getattr(parameter, "ds_tensor", parameter).detach()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                    yield buffer
    for optimizer in accelerator._optimizers:
        for state in optimizer.state.values():
            yield from (each for each in state.values() if isinstance(each, torch.Tensor))


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that a kill half-way leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    assert match
    return int(match[1])


def _truncate_metrics(path: Path, last: int) -> None:
    """Keeps the lines up to the step `last`, but none that a kill truncated."""
    if not path.exists():
        return
    # Earlier versions wrote NaN.
    values = [line.value for line in read_appended(path, strict=False)]
    steps = [each.get("step") if isinstance(each, dict) else None for each in values]
    kept = [type(step) is int and step <= last for step in steps]
    write_json_lines(path, compress(values, kept))


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


def _note_start(folder: Path, seed: int, precision: str, world: dict[str, Any]) -> None:
    """Adds this start to run.json."""
    path = folder / "run.json"
    try:
        starts = list(parse_json(path.read_text())["starts"]) if path.exists() else []
    except DAMAGE as error:
        raise ValueError(f"{path}: damaged ({reason_of(error)}); remove it") from error
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

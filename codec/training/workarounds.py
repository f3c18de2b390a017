"""Workarounds for defects of other projects, each with its upstream thread.

Remove one when its thread is closed and the versions of pyproject.toml have the fix. Two more are
in other files: `DiscriminatorConfig` (codec/training/config.py) refuses
windows at which bfloat16 convolutions on CPUs return wrong weight gradients (related:
https://github.com/pytorch/pytorch/issues/169688 and
https://github.com/uxlfoundation/oneDNN/issues/6035), and recipes/lib/voice_training.py adds peft's
adapters before the Accelerator exists (under ZeRO-3 on a CPU, `trainable_token_indices` asks for
CUDA afterwards).
"""

import ctypes
import gc
import logging
import os
import sys
import threading
from datetime import timedelta
from typing import Any

import torch

COLLECTIVE_TIMEOUT = timedelta(hours=6)
"""How long a rank waits for another one, which may read a list, export or score alone meanwhile. A
rank that has ended ends the others at once."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of malloc.h.


def default_deepspeed_device() -> None:
    """DeepSpeed chooses its device when it is first imported, which accelerate does, and without
    CUDA looks for other accelerators (https://github.com/deepspeedai/DeepSpeed/pull/5206)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def accelerator_options(gradient_accumulation_steps: int) -> dict[str, Any]:
    """Arguments of `Accelerator` for this launch, and the environment variables that they need.

    - DeepSpeed launches set ACCELERATE_GRADIENT_ACCUMULATION_STEPS to 1, which wins over the
      argument (https://github.com/huggingface/accelerate/issues/3369).
    - `cpu=True` ignores a DeepSpeed launch, and without it a CPU launch is not wrapped in DDP.
    - A DeepSpeed launch on CPUs needs the gloo backend by name: without it, each process has a
      separate process group.
    - DeepSpeed on CPUs compiles a communication kernel for inference at the first collective:
      minutes of a compiler, or an error where there is none
      (https://github.com/deepspeedai/DeepSpeed/issues/7108).
    - Groups besides the first one, such as DeepSpeed's, have the default time-out, 10 minutes on
      GPUs, whatever the first one has (https://github.com/pytorch/pytorch/issues/135352).
    """
    from accelerate.utils import InitProcessGroupKwargs

    groups: Any = torch.distributed.distributed_c10d
    groups.default_pg_timeout = groups.default_pg_nccl_timeout = COLLECTIVE_TIMEOUT

    os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(gradient_accumulation_steps)
    cpu = not torch.cuda.is_available()
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if cpu and zero:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gloo = cpu and (zero or int(os.environ.get("WORLD_SIZE", "1")) > 1)
    return {
        "cpu": cpu and not zero,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "kwargs_handlers": [
            InitProcessGroupKwargs(backend="gloo" if gloo else "nccl", timeout=COLLECTIVE_TIMEOUT)
        ],
    }


def keep_freed_memory() -> None:
    """Keeps freed memory in the process, where the C library is glibc.

    glibc returns freed blocks of 32 MB and more to the kernel at once, and each training step on a
    CPU pays for the page faults of the same gigabytes again (LOG.md). torch's CPU allocator has no
    cache (https://github.com/pytorch/pytorch/pull/55675).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def quiet_event_writer() -> None:
    """TensorBoard's writer is a thread that prints a traceback on a full disk, for an error that
    the next call raises (tensorboard/summary/writer/event_file_writer.py)."""
    before = threading.excepthook

    def without_event_writer(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__name__ != "_AsyncWriterThread":
            before(arguments)

    if getattr(before, "__name__", None) != without_event_writer.__name__:
        threading.excepthook = without_event_writer


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another process has ended. gloo has no class of errors
    for it (https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d)."""
    if not torch.distributed.is_initialized():
        return False
    parts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote peer")
    return isinstance(error, RuntimeError) and any(part in str(error) for part in parts)


def end_rank() -> None:
    """Ends a rank of a launch whose work is done; returns where there is no process group.

    A thread of gloo or ZeRO-3 that outlives its process group aborts one process in some dozens
    while the interpreter is finalized, and the launcher reports a finished run as failed
    (https://github.com/pytorch/pytorch/pull/179291, https://github.com/pytorch/pytorch/pull/157193).
    """
    if not torch.distributed.is_initialized():
        return
    gc.collect()  # A DeepSpeed engine that still exists when its group is destroyed aborts, too.
    torch.distributed.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

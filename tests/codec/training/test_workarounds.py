"""Workarounds that a machine without a GPU can check."""

import functools
import platform
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from codec.training.workarounds import is_lost_rank, quiet_event_writer


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    """Page faults of allocations of 48 MB, each made after the last was freed."""
    code = """
import resource, torch
from codec.training.workarounds import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.zeros(12_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_freed_memory()
for _ in range(3):
    faults()
print(plain, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 50


def test_only_tensorboards_thread_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class _AsyncWriterThread(threading.Thread):
        pass

    printed = []
    monkeypatch.setattr(threading, "excepthook", functools.partial(printed.append))
    quiet_event_writer()
    hook = threading.excepthook
    quiet_event_writer()
    assert threading.excepthook is hook
    for thread in (_AsyncWriterThread(), threading.Thread()):
        hook(threading.ExceptHookArgs((OSError, OSError(28, "full"), None, thread)))
    assert [type(each.thread) for each in printed] == [threading.Thread]


@pytest.mark.parametrize("is_launch", [True, False])
def test_errors_of_a_collective_are_a_lost_rank(
    is_launch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: is_launch)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [::1]:4242")
    assert is_lost_rank(lost) == is_launch
    assert not is_lost_rank(RuntimeError("shapes do not fit"))

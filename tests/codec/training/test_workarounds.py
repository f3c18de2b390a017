"""Workarounds that a machine without a GPU can check."""

import platform
import subprocess
import sys

import pytest
from conftest import ROOT


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

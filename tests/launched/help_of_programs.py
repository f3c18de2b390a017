"""Runs `PROGRAM --help` with a closed standard output; test_program.py starts it.

usage: help_of_programs.py PROGRAM.py...    prints a JSON object: status and errors of each

Each one runs in a fork, which ends as an interpreter ends; what they import is loaded before.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path


def run(program: str) -> tuple[int, str] | None:
    """Status and errors of the fork; None in the fork itself, where `program` is to run."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        os.close(reader)
        if not child:
            os.dup2(writer, 1)
            os.dup2(errors.fileno(), 2)
            return None
        os.close(writer)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return status, errors.read().decode()


if __name__ == "__main__":
    for given in sys.argv[1:]:
        if Path(given).stem != "__main__":
            importlib.import_module(".".join(Path(given).with_suffix("").parts))
    done = {}
    for given in sys.argv[1:]:
        if (result := run(given)) is None:
            sys.argv = [given, "--help"]
            sys.path[0] = str(Path(given).parent)
            runpy.run_path(given, run_name="__main__")
            sys.exit(0)
        done[given] = result
    sys.stdout.write(json.dumps(done))

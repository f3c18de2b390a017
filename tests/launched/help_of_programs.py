"""Runs `PROGRAM --help` with a closed standard output; test_program.py starts it.

usage: help_of_programs.py PROGRAM.py...    prints a JSON object: status and errors of each

What the programs import is loaded once; each one runs in a fork.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path


def run(program: str) -> tuple[int, str]:
    """Status and errors of one program."""
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as errors:
        child = os.fork()
        os.close(reader)
        if not child:
            os.dup2(writer, 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = [program, "--help"]
            try:
                runpy.run_path(program, run_name="__main__")
            except SystemExit as end:
                sys.stdout.flush()  # As the interpreter does when it ends, which takes longer.
                os._exit(int(end.code or 0))
            finally:
                os._exit(1)
        os.close(writer)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return status, errors.read().decode()


if __name__ == "__main__":
    for given in sys.argv[1:]:
        if Path(given).stem != "__main__":
            importlib.import_module(".".join(Path(given).with_suffix("").parts))
    sys.stdout.write(json.dumps({given: run(given) for given in sys.argv[1:]}))

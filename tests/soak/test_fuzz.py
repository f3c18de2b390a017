"""Readers of untrusted files, with files that hypothesis has changed (tests/fuzz.py).

FUZZ_SECONDS of processor time for each reader (default 120), FUZZ_SEED (default 0), FUZZ_SEEDS: a
folder of further recordings. The table and the files of findings are in out/soak/fuzz/.
"""

import json
import os
import subprocess
import sys

from conftest import ROOT
from fuzz_targets import TARGETS

COLUMNS = ("target", "inputs", "refused", "seconds", "slowest_seconds", "largest_mebibytes")


def test_no_untrusted_file_crashes_runs_code_or_leaves_its_folder() -> None:
    seconds, seed = os.environ.get("FUZZ_SECONDS", "120"), os.environ.get("FUZZ_SEED", "0")
    folder = ROOT / "out" / "soak" / "fuzz"
    # No pytest there: readers run as users have them, without checks of types.
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "all", seconds, seed, str(folder)]
    subprocess.run(command, check=True)
    rows = [json.loads((folder / f"{name}.json").read_text()) for name in TARGETS]
    lines = ["| reader | inputs | refused | seconds | slowest | MiB | crashes |", f"|{'---|' * 7}"]
    for row in rows:
        values = [row.get(column, "-") for column in COLUMNS] + [len(row["findings"])]
        lines.append(f"| {' | '.join(map(str, values))} |")
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(["", *lines, ""]))
    assert not any(row["findings"] for row in rows), f"see {folder}"

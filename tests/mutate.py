"""Mutation tests: changes a file in one place at a time, and runs the tests that mirror it.

usage: mutate.py [--mutants N] [--seed N] [--at LINE] [--every-test] FILE...

The operators are mutmut's: comparisons, signs, constants, and/or, not, in, True/False, break and
continue; conditions that are a plain name or call are negated. mutmut's own runner does not work
here: it runs pytest twice in one process, which jaxtyping's import hook refuses; with a fork
server it imports this tree anew for each mutant and reports that as a timeout; and it skips
decorated functions and what lies outside of functions. Here each mutant runs in a fork of a
process that has loaded the libraries, in a copy of the tree, so that programs that tests start
see it as well.

A mutant's tests run in this order: the one that killed it last time, those that execute its line,
then, if it survives, the others. Results are kept in out/mutants/; a second run takes up what
neither changed in the file nor in its tests. tests/equivalent_mutants.jsonl lists mutants that no
test can kill, and why.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.jsonl"
RESULTS = ROOT / "out" / "mutants"
OURS = ("codec", "slm", "eval", "recipes")
LIBRARIES = (
    *("torch", "torchaudio", "numpy", "scipy", "sklearn", "pyarrow", "soundfile", "soxr", "lhotse"),
    *("transformers", "tokenizers", "accelerate", "peft", "safetensors", "huggingface_hub"),
    *("omegaconf", "einops", "sentencepiece", "tensorboard", "wetext", "jiwer", "pandas"),
    *("_pytest", "pytest", "pluggy", "jaxtyping", "beartype", "hypothesis", "pytest_timeout"),
)
"""Loaded before the fork, as far as the tests load them."""
MESSAGES = ("logger", "logging", "warnings", "print")
LEAST_KILLED = 0.9


class Mutant(NamedTuple):
    """One change of one file."""

    line: int
    old: str
    """The changed lines before."""
    new: str
    source: str
    """The whole file with the change."""


def negated(node: cst.If | cst.While | cst.IfExp) -> Iterator[cst.CSTNode]:
    """`if x:` to `if not (x):`; comparisons, and/or, not and constants have operators of theirs."""
    own = (cst.Comparison, cst.BooleanOperation, cst.UnaryOperation)
    if not isinstance(node.test, own) and getattr(node.test, "value", "") not in ("True", "False"):
        inner = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
        yield node.with_changes(
            test=cst.UnaryOperation(cst.Not(whitespace_after=cst.SimpleWhitespace(" ")), inner)
        )


OPERATORS: tuple[tuple[Any, Callable], ...] = (
    (cst.BaseNumber, mutators.operator_number),
    (cst.Name, mutators.operator_name),
    (cst.UnaryOperation, mutators.operator_remove_unary_ops),
    (cst.CSTNode, mutators.operator_keywords),
    (cst.CSTNode, mutators.operator_swap_op),
    (cst.If | cst.While | cst.IfExp, negated),
)


class Finder(cst.CSTVisitor):
    """Collects (place, node, changed node); not in types, messages, errors and assertions."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []
        self._inside: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Raise | cst.Assert | cst.Import | cst.ImportFrom):
            return False
        if isinstance(node, cst.If) and cst.Module([]).code_for_node(node.test) == "TYPE_CHECKING":
            return False
        if isinstance(node, cst.Call):
            function = node.func
            while isinstance(function, cst.Attribute):
                function = function.value
            if isinstance(function, cst.Name) and function.value in MESSAGES:
                return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._inside.append(node.name.value)
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                self.found += [(".".join(self._inside), node, new) for new in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._inside.pop()


def mutants_of(source: str, count: int | None = None, seed: int = 0) -> list[Mutant]:
    """All mutants of a file, or a sample: changes elsewhere in the file hardly change it."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    finder = Finder()
    wrapper.visit(finder)
    code = wrapper.module.code_for_node
    parents = wrapper.resolve(ParentNodeProvider)
    ranked, seen = [], {}
    for place, node, changed in finder.found:
        # Operators such as `<` are nodes of their own, and their new forms only tokens.
        around = code(parents[node])
        key = (seed, place, around, code(node), code(changed))
        seen[key] = seen.get(key, 0) + 1
        digest = hashlib.sha256(repr((*key, seen[key])).encode()).hexdigest()
        ranked.append((digest, node, changed))
    lines = source.splitlines()
    made = []
    for _, node, changed in sorted(ranked, key=lambda each: each[0])[:count]:
        mutated = wrapper.module.deep_replace(node, changed).code
        after = mutated.splitlines()
        first = next(i for i, pair in enumerate(zip(lines, after, strict=True)) if len({*pair}) > 1)
        made.append(Mutant(first + 1, lines[first].strip(), after[first].strip(), mutated))
    return sorted(made)


def mirrored_tests(file: Path, root: Path = ROOT) -> list[Path]:
    """tests/<folder>/test_<file>.py and test_<file>_<part>.py, relative to the root."""
    stems = {each.stem.strip("_") for each in (root / file.parent).glob("*.py")}

    def owner(test: Path) -> str:
        name = f"{test.stem.removeprefix('test_')}_"
        return max((stem for stem in stems if name.startswith(f"{stem}_")), key=len, default="")

    tests = sorted((root / "tests" / file.parent).glob("test_*.py"))
    return [test.relative_to(root) for test in tests if owner(test) == file.stem.strip("_")]


class Recorder:
    """A pytest plugin: outcomes, seconds, covered lines, and whether tests start processes."""

    def __init__(self, covered: Path | None) -> None:
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.starts = False
        self.coverage = None
        if covered is not None:
            import coverage

            self.coverage = coverage.Coverage(data_file=None, include=[str(covered)])
            self.coverage.start()
            sys.addaudithook(self._note)

    def _note(self, event: str, _: tuple) -> None:
        self.starts |= event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def lines(self, file: Path) -> dict[str, list[int]]:
        """Executed lines of the file by test; "" while it is imported."""
        assert self.coverage is not None
        self.coverage.stop()
        data = self.coverage.get_data()
        by_line = data.contexts_by_lineno(str(file))
        tests: dict[str, list[int]] = {}
        for line, names in by_line.items():
            for name in names:
                tests.setdefault(name, []).append(line)
        return tests


def forked(work: Callable[[], Any], seconds: float, printed: Path) -> Any:
    """Runs `work` in a fork, in a session of its own; its result, or None after `seconds`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.close(reader)
        output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            result = json.dumps(work()).encode()
            os.set_inheritable(writer, False)
            with os.fdopen(writer, "wb") as file:
                file.write(result)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    try:
        os.set_blocking(reader, False)
        received, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, _ = os.waitpid(pid, os.WNOHANG)
            with contextlib.suppress(BlockingIOError):
                while part := os.read(reader, 1 << 20):
                    received += part
            if done:
                return json.loads(received) if received else {"failed": ["(died)"]}
            time.sleep(0.02)
        return None
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def run_pytest(tree: Path, tests: list[str], covered: Path | None, first: bool) -> dict[str, Any]:
    """Runs tests in this process: {"failed": ids, "seconds": by id, ...}."""
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.dont_write_bytecode = covered is None
    recorder = Recorder(covered)
    options = ["-q", "--tb=line", "--assert=plain", f"--basetemp={tree.parent / 'files'}"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist", *(["-x"] * first)]
    status = int(pytest.main([*options, *tests], plugins=[recorder]))
    if status and not recorder.failed:
        recorder.failed.append("(collection)")
    result = {"failed": recorder.failed, "seconds": recorder.seconds}
    if covered is not None:
        result |= {"lines": recorder.lines(covered), "starts": recorder.starts}
        # Only the libraries: what is ours is imported anew with each mutant.
        result["modules"] = [name for name in sys.modules if name.split(".")[0] in LIBRARIES]
    return result


def copy_tree(tree: Path) -> None:
    """A copy of the tracked and new files; what git ignores of models/ and .venv as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for link in (ROOT / ".venv", *(ROOT / "models").iterdir()):
        if not (tree / link.relative_to(ROOT)).exists():
            (tree / link.relative_to(ROOT)).symlink_to(link.resolve())


def digest_of(*parts: str) -> str:
    """A short digest of texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def equivalent(file: Path) -> dict[tuple[str, str], str]:
    """Reasons why mutants of a file cannot be killed, by line before and after."""
    rows = [json.loads(line) for line in EQUIVALENT.read_text().splitlines()]
    return {(row["old"], row["new"]): row["why"] for row in rows if row["file"] == str(file)}


class Tested(NamedTuple):
    """The mutants of one file and what became of them."""

    file: Path
    outcomes: list[tuple[Mutant, dict[str, Any]]]
    """`killed`: the first test that failed, "timeout", or None; `covered`."""

    def count(self, kind: str) -> int:
        """Mutants that are killed, timeout, equivalent or survived."""
        return sum(self.kind(*each) == kind for each in self.outcomes)

    def kind(self, mutant: Mutant, outcome: dict[str, Any]) -> str:
        """What became of one mutant."""
        if outcome["killed"]:
            return "timeout" if outcome["killed"] == "timeout" else "killed"
        known = (mutant.old, mutant.new) in equivalent(self.file)
        return "equivalent" if known else "survived"

    @property
    def share(self) -> float:
        """Killed mutants of those that are not equivalent."""
        killed = self.count("killed") + self.count("timeout")
        return killed / max(killed + self.count("survived"), 1)


def test_file(file: Path, tree: Path, options: argparse.Namespace) -> Tested:
    """Runs the mutants of one file."""
    # Of the copy: the tree may change while this runs.
    source = (tree / file).read_text()
    tests = mirrored_tests(file, tree)
    mutants = mutants_of(source, None if options.at else options.mutants, options.seed)
    if options.at:
        mutants = [each for each in mutants if each.line in options.at]
    texts = [(tree / test).read_text() for test in tests]
    kept = RESULTS / f"{str(file).replace('/', '-')}.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    keys = [digest_of(mutant.source, *texts, str(options.every_test)) for mutant in mutants]
    places = [digest_of(mutant.old, mutant.new) for mutant in mutants]
    printed = RESULTS / "printed.txt"
    target = tree / file
    base: dict[str, Any] = {}
    if tests and any(key not in known for key in keys):
        names = [str(test) for test in tests]
        base = forked(lambda: run_pytest(tree, names, target, False), 900, printed)
        if base is None or base["failed"]:
            why = base["failed"] if base else "timeout"
            print(f"{file}: its tests fail without a mutant: {why}", file=sys.stderr)
            return Tested(file, [])
        for module in base["modules"]:
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        for cache in target.parent.glob(f"__pycache__/{target.stem}.*"):
            cache.unlink()
    outcomes = []
    for mutant, key, place in zip(mutants, keys, places, strict=True):
        if not tests:
            known[key] = {"killed": None, "covered": False}
        if key not in known:
            covering = [
                name for name, lines in base["lines"].items() if name and mutant.line in lines
            ]
            imported = mutant.line in base["lines"].get("", [])
            covered = bool(covering) or imported
            order = sorted(covering, key=lambda name: base["seconds"][name])
            last = known.get(place, {}).get("killed")
            others = [name for name in base["seconds"] if name not in covering]
            if options.every_test:
                order += others if imported else []
            elif covered or base["starts"]:
                order += others
            if last in order:
                order.remove(last)
                order.insert(0, last)
            outcome: dict[str, Any] = {"killed": None, "covered": covered}
            if order:
                limit = 20 + 5 * sum(base["seconds"][name] for name in order)
                target.write_text(mutant.source)
                begun = time.monotonic()
                result = forked(
                    lambda order=order: run_pytest(tree, order, None, not options.every_test),
                    limit, printed,
                )  # fmt: skip
                target.write_text(source)
                outcome["seconds"] = round(time.monotonic() - begun, 1)
                failed = ["timeout"] if result is None else result["failed"]
                outcome["killed"] = failed[0] if failed else None
                outcome["all"] = failed
            known[key] = known[place] = outcome
            kept.write_text(json.dumps(known))
            mark = outcome["killed"] or "SURVIVED"
            print(f"{file}:{mutant.line} {outcome.get('seconds', 0)} s {mark}", file=sys.stderr)
        outcomes.append((mutant, known[key]))
    if options.every_test and base:
        killers = [set(outcome.get("all", [])) for _, outcome in outcomes]
        for name, seconds in base["seconds"].items():
            alone = sum(each == {name} for each in killers)
            count = sum(name in each for each in killers)
            print(f"{name}: {seconds:.2f} s, kills {count}, {alone} of them alone")
    return Tested(file, outcomes)


def report(tested: list[Tested]) -> str:
    """A table in Markdown, then the survivors."""
    kinds = ("killed", "timeout", "equivalent", "survived")
    lines = ["| file | mutants | killed | timeouts | equivalent | survived | share |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for each in tested:
        counts = " | ".join(str(each.count(kind)) for kind in kinds)
        lines.append(f"| {each.file} | {len(each.outcomes)} | {counts} | {each.share:.0%} |")
    for each in tested:
        for mutant, outcome in each.outcomes:
            if each.kind(mutant, outcome) == "survived":
                note = "" if outcome["covered"] else "  (no test executes it)"
                lines += ["", f"{each.file}:{mutant.line}{note}"]
                lines += [f"- {mutant.old}", f"+ {mutant.new}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--mutants", type=int, default=25, help="at most per file (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--at", type=int, action="append", help="all mutants of this line instead")
    parser.add_argument(
        "--every-test", action="store_true",
        help="do not stop at the first failure; then print how many mutants each test kills",
    )  # fmt: skip
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # Of the programs that tests start.
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        tested = [test_file(file, tree, options) for file in options.files]
    print(report(tested))
    return int(any(each.share < LEAST_KILLED for each in tested))


if __name__ == "__main__":
    sys.exit(main())

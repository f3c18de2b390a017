"""Mutation tests: changes a file in one place at a time, and runs the tests that mirror it.

usage: mutate.py [--mutants N] [--seed N] [--at LINE] [--every-test] FILE...

The operators are mutmut's: comparisons, signs, constants, and/or, not, in, True/False, break and
continue; conditions that are a plain name or call are negated. mutmut's own runner does not work
here: it runs pytest twice in one process, which jaxtyping's import hook refuses; with a fork
server it imports this tree anew for each mutant and reports that as a timeout; and it skips
decorated functions and what lies outside of functions. Here each mutant runs in a fork: a change in
a function's body in one of the process that has collected the tests, where the function's code is
exchanged; any other in one that has loaded the libraries and imports this tree anew. The file is
changed as well, in a copy of the tree, so that programs that tests start see it.

A mutant's tests run in this order: the one that killed it last time, those that execute its line,
then, if it survives, the others. Results are kept in out/mutants/; a second run repeats those of a
changed file, and, where its tests changed, the survivors and those whose killing test changed.
tests/equivalent_mutants.jsonl lists mutants that no test can kill, and why.
"""

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
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
SKIPPED = (cst.Annotation, cst.Raise, cst.Assert, cst.Import, cst.ImportFrom, cst.Decorator)
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
    """Collects (place, node, changed node), but not in SKIPPED and MESSAGES."""

    METADATA_DEPENDENCIES = (PositionProvider, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []
        self._inside: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, SKIPPED):
            return False
        # zip(..., strict=True) is an assertion.
        if isinstance(node, cst.Arg) and node.keyword and node.keyword.value == "strict":
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
    """A pytest plugin: the outcomes of tests and their seconds."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)


def forked(work: Callable[[], Any], seconds: float, printed: Path) -> Any:
    """Runs `work` in a fork, in a session of its own; its result, or None after `seconds`."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.setsid()
            os.close(reader)
            output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                os.dup2(file, descriptor)
            result = json.dumps(work()).encode()
            with os.fdopen(writer, "wb") as file:
                file.write(result)
            status = 0
        except BaseException:
            traceback.print_exc()
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
            time.sleep(0.01)
        return None
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def import_all(modules: list[str]) -> None:
    """Imports what can be imported; forks then need not."""
    for module in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(module)


def run_pytest(tree: Path, tests: list[str], plugin: Any, *options: str) -> int:
    """Runs pytest in this process, which must be a fork; its exit status."""
    import pytest

    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    fixed = ["-q", "--tb=line", "--assert=plain", f"--basetemp={tree.parent / 'files'}"]
    fixed += ["-p", "no:cacheprovider", "-p", "no:xdist", *options]
    return int(pytest.main([*fixed, *tests], plugins=[plugin]))


def functions_of(code: CodeType) -> Iterator[CodeType]:
    """The code of a module's functions and its classes' methods, not of what lies in them."""
    for each in code.co_consts:
        if isinstance(each, CodeType):
            if each.co_flags & inspect.CO_OPTIMIZED:
                yield each
            else:
                yield from functions_of(each)


def shell_of(code: CodeType) -> tuple:
    """What a module and its classes execute when they are imported."""
    parts = []
    for each in code.co_consts:
        if not isinstance(each, CodeType):
            parts.append(repr(each))
        elif not each.co_flags & inspect.CO_OPTIMIZED:
            parts.append(shell_of(each))
    return (code.co_code, code.co_names, tuple(parts))


class FileRun(Recorder):
    """A pytest plugin that runs the tests of one file without a mutant, for coverage, and then with
    each mutant of a function's body: in forks of the process that has collected the tests, in
    which the function's code is exchanged."""

    def __init__(self, tree: Path, file: Path, test: Callable[..., None]) -> None:
        super().__init__()
        self._target, self._test = tree / file, test
        self._name = ".".join(file.with_suffix("").parts)
        self._coverage: Any = None
        self._starts = False
        self.base: dict[str, Any] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._coverage is not None:
            self._coverage.switch_context(nodeid)

    def pytest_runtestloop(self, session: Any) -> bool:
        module = importlib.import_module(self._name)
        for cache in self._target.parent.glob(f"__pycache__/{self._target.stem}.*"):
            cache.unlink()
        sys.dont_write_bytecode = True
        self._items = {item.nodeid: item for item in session.items}
        gc.unfreeze()
        live: list[FunctionType] = [
            each
            for each in gc.get_objects()
            if type(each) is FunctionType and each.__code__.co_filename == str(self._target)
        ]
        gc.freeze()
        self.base = forked(self._covered, 900, RESULTS / "printed.txt") or {"failed": ["timeout"]}
        import_all(self.base.get("modules", []))
        source = self._target.read_text()
        compiled = module.__loader__.source_to_code
        old = compiled(source.encode(), str(self._target))

        def swap(mutant: Mutant) -> list[tuple[FunctionType, CodeType]] | None:
            new = compiled(mutant.source.encode(), str(self._target))
            pairs = [
                pair
                for pair in zip(functions_of(old), functions_of(new), strict=True)
                if pair[0] != pair[1]
            ]
            found = [(each, new) for old, new in pairs for each in live if each.__code__ == old]
            return found if found and shell_of(old) == shell_of(new) else None

        if not self.base["failed"]:
            self._test(self, swap)
        return True

    def _covered(self) -> dict[str, Any]:
        import coverage

        self._coverage = coverage.Coverage(data_file=None, include=[str(self._target)])
        sys.addaudithook(self._note)
        self._coverage.start()
        self._run(list(self._items), first=False)
        self._coverage.stop()
        by_line = self._coverage.get_data().contexts_by_lineno(str(self._target))
        lines: dict[str, list[int]] = {}
        for line, names in by_line.items():
            for name in names:
                lines.setdefault(name, []).append(line)
        # Only the libraries, also those that tests load: what is ours may be imported anew.
        modules = [name for name in sys.modules if name.split(".")[0] in LIBRARIES]
        return {**self._result(), "lines": lines, "starts": self._starts, "modules": modules}

    def _note(self, event: str, _: tuple) -> None:
        self._starts |= event in ("subprocess.Popen", "os.fork", "os.posix_spawn")

    def _run(self, names: list[str], first: bool) -> None:
        items = [self._items[name] for name in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed and first:
                return

    def _result(self) -> dict[str, Any]:
        return {"failed": self.failed, "seconds": self.seconds}

    def with_code(
        self, swapped: list[tuple[FunctionType, CodeType]], names: list[str], first: bool
    ) -> dict[str, Any]:
        """Runs tests with other code, in a fork."""
        for function, code in swapped:
            function.__code__ = code
        self._run(names, first)
        return self._result()


def with_import(tree: Path, names: list[str], first: bool) -> dict[str, Any]:
    """Runs tests in a fork that imports this tree anew."""
    sys.dont_write_bytecode = True
    recorder = Recorder()
    status = run_pytest(tree, names, recorder, *(["-x"] * first))
    if status and not recorder.failed:
        recorder.failed.append("(collection)")
    return {"failed": recorder.failed, "seconds": recorder.seconds}


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


def statement_lines(source: str) -> dict[int, range]:
    """Lines of the statement that each line belongs to; of a compound one, those of its head."""
    lines: dict[int, range] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno if isinstance(body, list) and body else (node.end_lineno or 0) + 1
            own = range(node.lineno, max(end, node.lineno + 1))
            for line in own:
                if line not in lines or len(own) <= len(lines[line]):
                    lines[line] = own
    return lines


def test_file(file: Path, tree: Path, options: argparse.Namespace) -> Tested:
    """Runs the mutants of one file."""
    # Of the copy: the tree may change while this runs.
    source, target, first = (tree / file).read_text(), tree / file, not options.every_test
    tests = mirrored_tests(file, tree)
    mutants = mutants_of(source, None if options.at else options.mutants, options.seed)
    if options.at:
        mutants = [each for each in mutants if each.line in options.at]
    texts = [(tree / test).read_text() for test in tests]
    kept = RESULTS / f"{str(file).replace('/', '-')}.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    current = digest_of(*texts)
    functions = {
        f"{test}::{node.name}": ast.dump(node)
        for test, text in zip(tests, texts, strict=True)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }

    def killer(outcome: dict[str, Any]) -> str | None:
        """The test that killed a mutant, as it is now."""
        text = functions.get((outcome["killed"] or "").partition("[")[0])
        return text and digest_of(text)

    keys = [digest_of(mutant.source, str(options.every_test)) for mutant in mutants]
    # What a test killed that has not changed is not run again.
    for key in {*keys} & known.keys():
        outcome, same = known[key], killer(known[key])
        if outcome["tests"] != current and (not same or same != outcome["killer"] or not first):
            del known[key]
    printed = RESULTS / "printed.txt"
    statements = statement_lines(source)
    progress = os.dup(2)

    def say(text: str) -> None:
        os.write(progress, f"{text}\n".encode())

    def test(mutant: Mutant, key: str, base: dict[str, Any], run: Callable, always: bool) -> None:
        """`always`: the line is executed while the file is imported."""
        own = set(statements.get(mutant.line, (mutant.line,)))
        covering = [name for name, lines in base["lines"].items() if name and own & {*lines}]
        order = sorted(covering, key=lambda name: base["seconds"][name])
        if always or (first and (covering or base["starts"])):
            order += [name for name in base["seconds"] if name not in covering]
        place = digest_of(mutant.old, mutant.new)
        last = known.get(place, {}).get("killed")
        if last in order:
            order.insert(0, order.pop(order.index(last)))
        outcome: dict[str, Any] = {"killed": None, "covered": always or bool(covering)}
        begun = time.monotonic()
        if order:
            limit = 20 + 5 * sum(base["seconds"][name] for name in order)
            target.write_text(mutant.source)
            result = forked(lambda: run(order, first), limit, printed)
            target.write_text(source)
            shutil.rmtree(tree.parent / "files", ignore_errors=True)
            failed = ["timeout"] if result is None else result["failed"]
            outcome |= {"killed": failed[0] if failed else None, "all": failed}
        known[key] = known[place] = {**outcome, "tests": current, "killer": killer(outcome)}
        kept.write_text(json.dumps(known))
        mark = outcome["killed"] or f"survived: {mutant.new}"
        say(f"{file}:{mutant.line} {time.monotonic() - begun:.1f} s {mark}")

    def in_one_process(running: FileRun, swap: Callable) -> None:
        for mutant, key in zip(mutants, keys, strict=True):
            swapped = swap(mutant) if key not in known else None
            if swapped is not None:
                run = functools.partial(running.with_code, swapped)
                test(mutant, key, running.base, run, False)

    def collected() -> dict[str, Any]:
        running = FileRun(tree, file, in_one_process)
        status = run_pytest(tree, list(map(str, tests)), running)
        return {"known": known, **(running.base or {"failed": [f"pytest ended with {status}"]})}

    base: dict[str, Any] = {"seconds": {}}
    if not tests:
        unseen = {"killed": None, "covered": False, "tests": current, "killer": None}
        known |= dict.fromkeys(keys, unseen)
    elif any(key not in known for key in keys):
        base = forked(collected, 3600, printed.with_name("collected.txt"))
        if base["failed"]:
            say(f"{file}: its tests fail without a mutant: {base['failed']}")
            return Tested(file, [])
        import_all(base["modules"])
        known = base["known"]
        if any(key not in known for key in keys):
            names = [min(base["seconds"], key=base["seconds"].get)]
            again = forked(lambda: with_import(tree, names, True), 900, printed)
            if again is None or again["failed"]:
                say(f"{file}: its tests fail when they are imported anew: {again}")
                return Tested(file, [])
    for mutant, key in zip(mutants, keys, strict=True):
        if key not in known:
            test(mutant, key, base, functools.partial(with_import, tree), True)
    outcomes = [(mutant, known[key]) for mutant, key in zip(mutants, keys, strict=True)]
    os.close(progress)
    if options.every_test:
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

"""The rules of the house that a machine can check; each says what to do when it is broken."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from recipes.lib.run import load_config

ROOT = Path(__file__).resolve().parent.parent
OURS = ("codec", "slm", "eval", "recipes")
SOURCES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("*.py", "*.md", "*.toml", "*.txt", "*.yaml", "*.json", "Makefile", ".ci/run")
    for path in ROOT.rglob(pattern)
    if not {".venv", ".git", "out", "data", "models"} & set(path.relative_to(ROOT).parts)
    and ".egg-info" not in str(path)
)
# What `slm` may know of `codec`, and what only a voice, made of both, may.
SHARED = (
    *("codec.tokens", "codec.io", "codec.json_lines", "codec.program", "codec.training"),
    *("codec.transcripts", "codec.weights"),
)
VOICE = "slm/voice.py"
# Imports that cost seconds or need more than codec's own five libraries.
HEAVY = (
    *("transformers", "peft", "accelerate", "deepspeed", "lhotse", "soundfile", "soxr"),
    *("torchaudio", "pyarrow", "tensorboard", "matplotlib", "gradio", "scipy", "pandas"),
    *("jiwer", "faster_whisper", "pesq", "pystoi", "omegaconf", "tqdm.notebook"),
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Our own modules that a file imports anywhere, also for types only and inside functions."""
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in OURS)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module
            if module and module.split(".")[0] in OURS:
                yield module
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_follow_the_data(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        target = module.split(".")[0]
        if target == package or package == "recipes":
            continue
        assert package == "slm", f"{name(path)} imports {module}: {package} imports none of ours"
        shared = any(f"{module}.".startswith(f"{allowed}.") for allowed in SHARED)
        assert target == "codec", f"{name(path)} imports {module}: slm imports only {SHARED}"
        assert shared or name(path) == VOICE, f"{name(path)} imports {module}, not of {SHARED}"


def test_imports_have_no_circles() -> None:
    graph = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[module] = {
            other for other in imports(path) if (ROOT / f"{other.replace('.', '/')}.py").exists()
        }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_programs_are_not_imported(path: Path) -> None:
    """Files on top of recipes/ and in recipes/tools/ run; what they share lies in the folders."""
    for module in imports(path):
        source = ROOT / f"{module.replace('.', '/')}.py"
        program = source.parent in (ROOT / "recipes", ROOT / "recipes" / "tools")
        shared = "move what both need to recipes/lib, recipes/scoring or recipes/offline"
        assert not (program and source.is_file()), f"{name(path)} imports {module}: {shared}"


def test_every_room_has_a_noun() -> None:
    nameless = {"utils", "util", "helpers", "helper", "misc", "common"}
    named = [name(path) for path in SOURCES if nameless & {*path.parts[:-1], path.stem}]
    assert not named


def test_no_recipe_shadows_a_package() -> None:
    # `accelerate launch recipes/x.py` puts recipes/ first on sys.path.
    shadowing = {"codec", "slm", "eval", "tests", "launched", *sys.stdlib_module_names}
    tops = [path for path in (ROOT / "recipes").iterdir() if path.suffix == ".py" or path.is_dir()]
    assert not {path.stem for path in tops} & shadowing


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_text_is_ascii_and_names_no_machine(path: Path) -> None:
    text = path.read_text()
    assert text.isascii(), f"{name(path)}: {[c for c in text if not c.isascii()][:3]}"
    # Spelt apart, or this file would find itself.
    hosts = "|".join(["pypi" + r"\.org", "python" + "hosted", "registry" + r"\.npmjs"])
    found = re.findall(rf"(?:/wor[k]/|/roo[t]/|/hom[e]/\w|file:/[/]/|{hosts})", text)
    assert not found, f"{name(path)} names {found}"


WORDS = (
    r"told|tells?|hears?|heard|spoken|speaks?|mend(?:s|ed|ing)?|foretells?|likeliest|so many|"
    r"gone on with|go on with|by heart|made again|says?|said|listens?|listening|beside|spelt|drawn|"
    r"likeness|in vain|complains?|whole(?! numbers?\b| frames\b)"
)
"""Words with a plainer counterpart in the style guide: report, transcribe, synthesize, repair,
predict, most probable, up to N, resume, retry."""
FILE_FORMATS = {
    "codec/distillation/asr_supervision.py": {"tell"},
    "codec/distillation/feature_cache.py": {"spoken"},
    "codec/training/run.py": {"whole"},
    "recipes/lib/config.py": {"speak"},
    "recipes/lib/voice_training.py": {"speak"},
    "recipes/offline/debian_prompts.py": {"spoken"},
    "recipes/offline/kokoro.py": {"drawn"},
    "recipes/scoring/ratings.py": {"listening"},
    "recipes/scoring/report.py": {"listening"},
    "recipes/scoring/synthesis.py": {"heard", "speak"},
    "recipes/scoring/voice.py": {"speak"},
    "slm/config.py": {"spoken", "heard"},
}
"""Keys, tensors and names of files that older versions have written, a credit, and listening
tests."""


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_names_and_texts_use_plain_terms(path: Path) -> None:
    """Comments, texts and names; a name's parts are words."""
    kinds = (tokenize.COMMENT, tokenize.STRING, tokenize.NAME)
    with open(path, "rb") as file:
        words = [each.string for each in tokenize.tokenize(file.readline) if each.type in kinds]
    text = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", "\n".join(words))
    found = {word.lower() for word in re.findall(rf"\b(?:{WORDS})\b", text, re.IGNORECASE)}
    assert not found - FILE_FORMATS.get(name(path), set()), f"{name(path)}: {sorted(found)}"


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Functions and classes without an underscore, and the methods of such classes."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield inside + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_public_names_have_docstrings(path: Path) -> None:
    """But `main`, which the module's text describes, and `forward`, which the class's does."""
    bare = [
        full
        for full, node in public(tree(path).body)
        if node.name not in ("main", "forward") and not ast.get_docstring(node)
    ]
    assert not bare, f"{name(path)}: {bare}"


def test_a_public_name_has_one_meaning() -> None:
    defined: dict[str, list[str]] = {}
    for path in SOURCES:
        for full, _ in public(tree(path).body):
            if "." not in full and full != "main":
                defined.setdefault(full, []).append(name(path))
    assert not {full: files for full, files in defined.items() if len(files) > 1}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_shapes_are_checked_where_they_are_written(path: Path) -> None:
    source = path.read_text()
    if "jaxtyping" in source:
        later = "from __future__ import " + "annotations"
        assert later not in source, f"{name(path)}: defeats jaxtyping's checks"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_configurations_are_frozen_and_explained(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        made = [ast.unparse(decorator) for decorator in node.decorator_list]
        assert made == ["dataclass(frozen=True, kw_only=True, slots=True)"], f"{node.name}: {made}"
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                explained = isinstance(following, ast.Expr)
                explained = explained and isinstance(following.value, ast.Constant)
                assert explained, f"{node.name}.{ast.unparse(field.target)} has no docstring"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_code_of_a_file_is_run(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("pickle.load", "pickle.loads", "joblib.load"), name(path)
            if called == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{name(path)}:{node.lineno}"
            if re.search(r"\bAuto[A-Z]\w*\.from_(pretrained|config)$", called):
                # Without it transformers asks on the terminal whether to run a model's own code.
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code") == "False", f"{name(path)}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=name)
def test_tests_mirror_the_tree(path: Path) -> None:
    """tests/<folder>/test_<file>.py, or test_<file>_<part>.py, of <folder>/<file>.py. The long
    tests of tests/soak are about several files."""
    if path.parent.name == "soak":
        return
    folder = ROOT / path.parent.relative_to(ROOT / "tests")
    stem = path.stem.removeprefix("test_")
    sources = [source.stem.strip("_") for source in folder.glob("*.py")]
    mirrored = any(f"{stem}_".startswith(f"{source}_") for source in sources)
    # What lies on top tests the repository: its rules, its documents and its tests.
    on_top = path.name in ("test_architecture.py", "test_docs.py", "test_mutate.py")
    assert mirrored or on_top, f"{name(path)} mirrors no file of {folder.name}/"


SETTINGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))


def config_class(path: Path) -> type:
    """The dataclass that the recipe of recipes/configs/<recipe>/x.yaml loads."""
    import importlib

    folder = path.relative_to(ROOT / "recipes" / "configs").parts[0]
    stems = {"codec": "train_codec", "export": "export_tokens", "semantic": "train_semantic"}
    stems["ablations"] = "ablate"
    module = importlib.import_module(f"recipes.{stems.get(folder, folder)}")
    source = (ROOT / "recipes" / f"{stems.get(folder, folder)}.py").read_text()
    (loaded,) = set(re.findall(r"load_(?:voice_)?config\(\s*(\w+)", source))
    return getattr(module, loaded)


@pytest.mark.parametrize("path", SETTINGS, ids=name)
def test_every_shipped_yaml_parses(path: Path) -> None:
    load_config(config_class(path), ["--config", str(path)])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=name)
def test_every_launch_file_parses(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(path))
    if path.stem.startswith("zero"):
        assert launch.distributed_type == "DEEPSPEED"
        assert launch.deepspeed_config["zero_stage"] == int(path.stem[-1])
    # Without it, ZeRO-3 saves models of empty tensors.
    assert path.stem != "zero3" or launch.deepspeed_config["zero3_save_16bit_model"] is True


def test_the_architecture_guide_shows_the_tree() -> None:
    """Every folder and file of docs/architecture.md exists, and every module is shown."""
    guide = (ROOT / "docs" / "architecture.md").read_text()
    shown = guide.partition("## The tree\n\n")[2].partition("\n\n")[0]
    folder, found, missing = ROOT, set[Path](), []
    for line in shown.splitlines():
        entry = re.split(r"\s{3,}", line.strip())[0]
        if not line.startswith("      "):
            folder = ROOT / entry.split()[0]
            missing += [] if folder.is_dir() else [entry]
            continue
        files = {folder / part for part in re.findall(r"\w+\.py", entry)}
        found |= files
        missing += [name(path) for path in files if not path.is_file()]
    assert not missing, f"docs/architecture.md shows {missing}"
    untold = {path for path in SOURCES if "__init__" not in path.name} - found
    untold -= set((ROOT / "recipes" / "tools").glob("*.py"))
    assert not untold, f"docs/architecture.md does not show {sorted(map(name, untold))}"


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for lines in optional for line in lines)]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in lines}
    # The extra `phonemes` is not installed with the tests.
    providers = {"phonemizer": ["phonemizer-fork"], **packages_distributions()}
    for path in SOURCES:
        for node in ast.walk(tree(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for module in {full.split(".")[0] for full in names}:
                if module in OURS or module in sys.stdlib_module_names:
                    continue
                found = {
                    given.lower().replace("_", "-") for given in providers.get(module, [module])
                }
                assert found & declared, f"{name(path)} imports {module}: not in pyproject.toml"


def test_recordings_have_one_list_of_suffixes() -> None:
    lists = [name(path) for path in SOURCES if re.search(r'"\.flac",.*"\.mp3"', path.read_text())]
    assert lists == ["codec/audio.py"]


def set_up(folder: Path, make_environment: str, **variables: str) -> tuple[int, list[str]]:
    """`make setup` where `python3 -m venv` runs a shell line; status and lines of errors."""
    for given in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / given, folder)
    python = folder / "python3"
    # Without site-packages: nothing is installed yet.
    alone = f'exec "{sys.executable}" -S "$@"'
    venv = f'if [ "$1" = -m ]; then mkdir -p .venv/bin; {make_environment}; exit; fi'
    python.write_text(f"#!/bin/sh\n{venv}\n{alone}\n")
    python.chmod(0o755)
    command = ["make", "setup", f"PYTHON={python}"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True
    )
    return done.returncode, [line for line in done.stderr.splitlines() if "make" not in line[:6]]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_set_up_names_a_missing_venv_package_and_recovers(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    # Debian's python3 without python3-venv leaves an environment without pip, and fails.
    for _ in range(2):
        status, lines = set_up(tmp_path, "cp python3 .venv/bin/python; false")
        assert status == 2
        assert lines == [f"error: {python} cannot make .venv; install python3-venv"]
        assert not (tmp_path / ".venv").exists()
    # What an earlier attempt left is replaced.
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(python, tmp_path / ".venv" / "bin" / "python")
    whole = "touch new .venv/bin/pip; chmod +x .venv/bin/pip; cp python3 .venv/bin/python"
    set_up(tmp_path, whole, CC="no-compiler")
    assert (tmp_path / "new").exists()


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_set_up_names_a_missing_compiler(tmp_path: Path) -> None:
    whole = "touch .venv/bin/pip; chmod +x .venv/bin/pip; cp python3 .venv/bin/python"
    status, lines = set_up(tmp_path, whole, CC="no-compiler")
    assert status == 2
    assert lines == ["error: pesq and pyworld are built from source: install g++ and python3-dev"]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("target", ["test", "soak", "mutate"])
def test_tests_see_no_gpu(target: str, tmp_path: Path) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "GPUs: [${CUDA_VISIBLE_DEVICES-all}]"\n')
    (tmp_path / "python").chmod(0o755)
    command = ["make", "-s", "-o", "setup", target, f"BIN={tmp_path}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "GPUs: []\n"


def test_every_version_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.+!-]+", line), f"constraints.txt: {line}"


@pytest.mark.parametrize("package", ["codec", "slm"])
def test_importing_a_package_stays_light(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(HEAVY), f"import {package} loads {sorted(loaded & set(HEAVY))}"


@pytest.mark.parametrize("module", ["codec.tokens", "codec.io", "codec.json_lines"])
def test_the_contract_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

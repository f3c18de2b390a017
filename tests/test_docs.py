"""README.md, CONTRIBUTING.md, docs/ and the model cards agree with the program: `make docs-check`.

Every shell command is parsed by the program it names, with its configuration files and keys; Python
examples compile, and their names and arguments exist; keys, flags, paths and links in the text
resolve. Nothing is trained and no model but models/small/codec is loaded.
"""

import argparse
import ast
import importlib
import inspect
import re
import shlex
import sys
import tomllib
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import recipes.lib.config as config_library
from codec import write_audio

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "models" / "small" / name for name in ("README.md", "codec/README.md")),
]
OTHER_PROGRAMS = {
    *("git", "cd", "aplay", "ffplay", "tensorboard", "apt-get", "docker", "duckdb", "nvidia-smi"),
    *("export", "ffprobe", "ruff", "pyright"),
}
"""Programs that are not ours; their arguments are not checked."""
PACKAGES = ("codec", "slm", "eval")
OURS = "codec|slm|eval|recipes|docs|tests|pictures"
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("recipes", "recipes/tools")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)

PARSES = re.compile(r"\bload_\w*config\(|ArgumentParser\(")
"""What a program calls that takes arguments."""


class Parsed(BaseException):
    """Raised in place of running a program: its command line was accepted."""


class Mismatch(Exception):
    """What a page shows is not what the program has."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise Mismatch(message)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def braces(text: str) -> list[str]:
    """`a.{b,c}` as `a.b` and `a.c`."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each simple command: loops are unrolled, redirections and variables left out."""
    lines = script.replace("\\\n", " ").splitlines()
    words: list[str] = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        words += [*lexer, ";"]
    simple: list[list[str]] = [[]]
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in (";", "|", "&&", "||", "&"):
            simple.append([])
        elif word in ("<", ">", ">>"):
            skip = True
        else:
            simple[-1].append(word)
    loop: tuple[str, list[str]] | None = None
    for command in simple:
        if command and command[0] == "for":
            require(command[2] == "in", f"{command}")
            loop, command = (command[1], command[3:]), []
        elif command == ["done"]:
            loop, command = None, []
        elif command and command[0] == "do":
            command = command[1:]
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            command = command[1:]
        if command and loop:
            variable, values = loop
            for value in values:
                yield [word.replace(f"${variable}", value) for word in command]
        elif command:
            yield command


def check_command(words: Sequence[str]) -> None:
    """Raises for a command that the program it names would not accept."""
    for word in words:
        check_models(word)
    program, *arguments = words
    if program in ("codec", "slm"):
        run_until_parsed(importlib.import_module(f"{program}.__main__"), arguments)
    elif program == "python" and arguments[0].endswith(".py"):
        check_recipe(arguments[0], arguments[1:])
    elif program == "python":
        require(arguments[0] in ("-m", "-c"), f"unknown form: {shlex.join(words)}")
        if arguments[0] == "-m":
            check_command(arguments[1:])
    elif program == "accelerate":
        check_launch(arguments)
    elif program == "sbatch":
        script = arguments.index("recipes/accelerate/slurm.sh")
        config, *launched = arguments[script + 1 :]
        check_launch(["launch", "--config_file", f"recipes/accelerate/{config}.yaml", *launched])
    elif program == "make":
        check_make(arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "pytest":
        for argument in arguments:
            if not argument.startswith("-"):
                require((ROOT / argument).exists(), f"no {argument}")
    else:
        require(program in OTHER_PROGRAMS, f"{program}: no program of ours, nor of OTHER_PROGRAMS")


def check_models(text: str) -> None:
    """Raises where a text names a folder of models/ that nothing makes."""
    from recipes.offline.packaged_models import MODELS

    for folder in re.findall(r"\bmodels/([\w.-]+)", text):
        made = {model.name for model in MODELS} | {"small"}
        require(folder in made, f"nothing makes models/{folder}")


def check_recipe(script: str, arguments: Sequence[str]) -> None:
    require(script in PROGRAMS, f"no program {script}")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if PARSES.search((ROOT / script).read_text()):
        run_until_parsed(module, arguments)
    else:
        require(not arguments, f"{script} takes no arguments")


def run_until_parsed(module: ModuleType, arguments: Sequence[str]) -> Any:
    """Calls the module's main up to the point where its command line is parsed; what came of it.

    Abbreviated and hidden flags, and keys of older versions, are refused.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        require(not re.match("--[a-z]", flag) or flag in known()[1], f"no flag {flag}")
    parse_args, load_config = argparse.ArgumentParser.parse_args, config_library.load_config

    def parse(self: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        raise Parsed(parse_args(self, *given, **more))

    def load(*given: Any, **more: Any) -> None:
        raise Parsed(load_config(*given, **more))

    with intercepted(parse, load):
        try:
            module.main(list(arguments))
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stopped:
            if stopped.code == 0:  # --help
                return None
            raise Mismatch(f"{module.__name__}: {shlex.join(arguments)}") from stopped
    raise Mismatch(f"{module.__name__} was run without parsing {shlex.join(arguments)}")


def refuse(message: str, *values: object) -> None:
    """In place of a warning about a key of an older version."""
    raise Mismatch(message % values)


class intercepted:
    """Replaces argparse's and our own parsing, the latter in every module that has imported it."""

    def __init__(self, parse: Callable[..., Any], load: Callable[..., Any]):
        self.patches = [
            patch.object(argparse.ArgumentParser, "parse_args", parse),
            patch.object(config_library.logger, "warning", refuse),
        ]
        for module in list(sys.modules.values()):
            if getattr(module, "load_config", None) is config_library.load_config:
                self.patches.append(patch.object(module, "load_config", load))

    def __enter__(self) -> None:
        for each in self.patches:
            each.start()

    def __exit__(self, *error: object) -> None:
        for each in self.patches:
            each.stop()


@cache
def launcher() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def check_launch(arguments: Sequence[str]) -> None:
    require(arguments[0] == "launch", f"accelerate {arguments[0]} is not used here")
    try:
        given = launcher().parse_args(arguments[1:])
    except SystemExit as stopped:
        raise Mismatch(shlex.join(arguments)) from stopped
    if given.config_file is not None:
        require((ROOT / given.config_file).is_file(), f"no {given.config_file}")
    check_recipe(given.training_script, given.training_script_args)


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for argument in arguments:
        variable, equals, _ = argument.partition("=")
        if equals:
            used = re.search(rf"\$\({variable}\)|value {variable}\b", makefile)
            require(used, f"Makefile has no variable {variable}")
        else:
            require(argument in targets, f"Makefile has no target {argument}")


def check_pip(arguments: Sequence[str]) -> None:
    require(arguments[0] == "install", f"{arguments}")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments[1:]:
        for extras in re.findall(r"^(?:\.|parlance.*)\[(.*)\]", argument):
            for extra in extras.split(","):
                require(extra in project["optional-dependencies"], f"no extra {extra}")


@cache
def known() -> tuple[set[str], set[str]]:
    """Every key of every recipe's configuration, and every flag of every program."""
    from recipes.lib.run import PROFILE_HELP

    keys, flags = set[str](), {"--config", "--help", *re.findall(r"--[a-z-]+", PROFILE_HELP)}

    def parse(self: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        raise Parsed(self)

    def load(cls: type, *given: Any, **more: Any) -> None:
        raise Parsed(cls)

    parsers = [launcher()]
    programs = [script.removesuffix(".py").replace("/", ".") for script in PROGRAMS]
    for module in map(importlib.import_module, ["codec.__main__", "slm.__main__", *programs]):
        if not PARSES.search(Path(inspect.getfile(module)).read_text()):
            continue
        with intercepted(parse, load):
            try:
                module.main([])
            except Parsed as parsed:
                found = parsed.args[0]
        if isinstance(found, argparse.ArgumentParser):
            parsers.append(found)
        else:
            text = config_library.help_text(found, "")
            keys.update(re.findall(r"^  ([a-z_0-9.]+):", text, re.MULTILINE))
    while parsers:
        parser = parsers.pop()
        actions = parser._option_string_actions.items()
        flags.update(flag for flag, action in actions if action.help != argparse.SUPPRESS)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
    prefixes = {key.rsplit(".", count)[0] for key in keys for count in range(4)}
    return keys | prefixes, flags


def check_inline(code: str, folder: Path = ROOT) -> None:
    """Raises for an inline code span that names a key, a flag or a path that does not exist.

    Paths start at the repository's top, or in `folder`.
    """
    keys, flags = known()
    for text in braces(code) if " " not in code else [code]:
        if not re.match(OURS, text):
            check_models(text)
        flag = re.match(r"--[a-z][\w-]*", text)
        if flag:
            require(flag[0] in flags, f"no flag {flag[0]}")
        path = re.fullmatch(rf"(?:{OURS}|models/small)/[\w./*-]*", text)
        if path:
            pattern = text.rstrip("/")
            require([*ROOT.glob(pattern), *folder.glob(pattern)], f"no file {text}")
        if re.fullmatch(r"[\w.-]+\.yaml", text) and text != "config.yaml":
            require(list((ROOT / "recipes").rglob(text)), f"no configuration {text}")
        key = re.fullmatch(r"([a-z_]+)((?:\.[a-z_0-9]+)+)(?:=.*)?", text)
        if (
            key
            and not text.endswith((".json", ".yaml"))
            and key[1] in {one.partition(".")[0] for one in keys if "." in one}
        ):
            dotted = key[1] + key[2]
            require(dotted in keys or resolves(dotted), f"no key {dotted}")


def resolves(dotted: str) -> bool:
    """Whether it names an object of ours (`codec.io`), or what a codec has (`codec.encode`)."""
    from codec import Codec

    if dotted.startswith("codec.config."):
        return dotted.replace("codec.config.", "codec.", 1) in known()[0]
    first, *rest = dotted.split(".")
    if first == "codec" and len(rest) == 1 and hasattr(Codec, rest[0]):
        return True
    try:
        found: Any = importlib.import_module(first)
        for index, part in enumerate(rest, 1):
            if not hasattr(found, part):
                importlib.import_module(".".join([first, *rest[:index]]))
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def slug(heading: str) -> str:
    """The anchor that code hosting pages give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def check_link(page: Path, target: str) -> None:
    if re.match(r"(https?|mailto):", target):
        return
    file, _, anchor = target.partition("#")
    linked = (page.parent / file).resolve() if file else page
    require(linked.exists(), f"no {target}")
    if anchor:
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
        require(anchor in map(slug, headings), f"no heading for {target}")


class Example:
    """A Python example whose names, attributes and arguments are looked up, not executed."""

    def __init__(self) -> None:
        self.scope: dict[str, Any] = {}

    def check(self, source: str) -> None:
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                # What cannot be imported is an error of the example.
                exec(compile(ast.Module([node], []), "example", "exec"), self.scope)
                continue
            for each in ast.walk(node):
                if isinstance(each, ast.Call | ast.Attribute):
                    self.type_of(each)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.scope[node.targets[0].id] = Instance(self.type_of(node.value))

    def type_of(self, node: ast.expr) -> Any:
        """The class of an expression's value, None where it is not known."""
        found = self.value_of(node)
        return found.cls if isinstance(found, Instance) else None

    def value_of(self, node: ast.expr) -> Any:
        """An object, an Instance of a class, or None where neither is known."""
        if isinstance(node, ast.Name):
            return self.scope.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value_of(node.value)
            if isinstance(owner, Instance):
                return member(owner.cls, node.attr) if owner.cls is not None else None
            if owner is None:
                return None
            return getattr(owner, node.attr)
        if isinstance(node, ast.Call):
            called = self.value_of(node.func)
            if called is None or isinstance(called, Instance):
                return None
            given = [None] * len(node.args)
            keywords = dict.fromkeys([each.arg for each in node.keywords if each.arg])
            if getattr(called, "__module__", "").split(".")[0] in PACKAGES:
                owner = (
                    self.type_of(node.func.value) if isinstance(node.func, ast.Attribute) else None
                )
                plain = owner and inspect.isfunction(inspect.getattr_static(owner, called.__name__))
                inspect.signature(called).bind(*([None] if plain else []), *given, **keywords)
            return Instance(returned(called))
        return None


class Instance:
    """Some value of a class."""

    def __init__(self, cls: type | None):
        self.cls = cls


def member(cls: type, attribute: str) -> Any:
    """A method as a function, a field as an Instance. Raises AttributeError where there is none."""
    annotated = {key for base in cls.__mro__ for key in getattr(base, "__annotations__", {})}
    if isinstance(getattr(cls, attribute, None), property):
        return None
    if attribute in annotated:
        return None
    if hasattr(cls, attribute):
        return getattr(cls, attribute)
    source = "".join(inspect.getsource(base) for base in cls.__mro__ if "__init__" in vars(base)
                     and base.__module__.split(".")[0] in PACKAGES)  # fmt: skip
    if re.search(rf"self\.{attribute}\b.*=", source):
        return None
    raise AttributeError(f"{cls.__name__} has no {attribute}")


def returned(called: Any) -> type | None:
    if inspect.isclass(called):
        return called
    owner = getattr(called, "__self__", None)
    try:
        hint = typing.get_type_hints(called).get("return")
    except NameError:
        hint = None
    if hint is typing.Self:
        return owner
    if isinstance(hint, type) and hint.__module__.split(".")[0] in PACKAGES:
        return hint
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_parses(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for script in blocks(page, "sh", "bash", "console"):
        for words in commands(script):
            try:
                check_command(words)
            except Exception as error:
                wrong.append(f"{shlex.join(words)}: {error} {capsys.readouterr().err[-300:]}")
    if wrong:
        pytest.fail("\n".join([f"{name(page)}:", *wrong]), pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_flags_paths_and_links_exist(page: Path) -> None:
    text, wrong = prose(page), []
    for code in re.findall(r"`([^`]+)`", text):
        try:
            check_inline(" ".join(code.split()), page.parent)
        except Mismatch as error:
            wrong.append(f"`{code}`: {error}")
    for target in re.findall(
        r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", re.sub(r"`[^`]+`", "", text)
    ):
        try:
            check_link(page, target[0] or target[1])
        except Mismatch as error:
            wrong.append(str(error))
    if wrong:
        pytest.fail("\n".join([f"{name(page)}:", *wrong]), pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_python_example_is_possible(page: Path) -> None:
    example = Example()
    for source in blocks(page, "python"):
        example.check(source)


def test_the_readmes_codec_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [one for one in blocks(ROOT / "README.md", "python") if "load_codec" in one]
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    write_audio("a.wav", 0.1 * np.sin(np.arange(16_000) / 10).astype(np.float32), 16_000)
    scope: dict[str, Any] = {}
    exec(compile(source, "README.md", "exec"), scope)
    assert scope["wave"].shape[:2] == (1, 1)


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"(docs/{page.name})" in readme, f"README.md does not link {name(page)}"


@pytest.mark.parametrize(
    "command",
    [
        "slm tts --voice DIR --texts Hello --prompt me.wav --out a.wav",
        "codec inform DIR",
        "python recipes/tts.py optim.learning=1",
        "python recipes/tts.py --config recipes/configs/tts/none.yaml",
        "python recipes/none.py",
        "python recipes/train_small.py out=x",
        "python recipes/prepare_data.py folder my-speech/ --outs x",
        "accelerate launch --config_files x recipes/tts.py",
        "accelerate launch --config_file recipes/accelerate/none.yaml recipes/tts.py",
        "for split in a b; do python recipes/export_tokens.py cut=$split; done",
        "make demoo",
        "make demo TXT=x",
        "pip install -e .[evil]",
        "pytest tests/test_none.py",
        "slmm tts",
        "slm tts --voice DIR --tries 3",
        "slm tts --voi DIR",
        "python recipes/tts.py edges=[]",
        "slm asr --voice models/smal a.wav",
    ],
)
def test_a_misspelt_command_is_found(command: str) -> None:
    (words, *_) = commands(command)
    with pytest.raises((Mismatch, ValueError)):
        check_command(words)


@pytest.mark.parametrize(
    "code",
    [
        "--candidate",
        "ar.tasks.tss",
        "optim.learning",
        "recipes/none.py",
        "ar.{lora,lara}",
        "none.yaml",
    ],
)
def test_a_misspelt_name_is_found(code: str) -> None:
    with pytest.raises(Mismatch):
        check_inline(code)


@pytest.mark.parametrize(
    "source",
    [
        "from codec import load_codex",
        "from slm import Voice\nvoice = Voice.from_pretraine('x')",
        "from slm import Voice\nvoice = Voice.from_pretrained('x')\nvoice.ttts('a', 'b')",
        "from slm import Voice\nvoice = Voice.from_pretrained('x')\nvoice.tts('a', 'b', sed=1)",
        "from slm import Voice\nvoice = Voice.from_pretrained('x')\ns = voice.tts('a', 'b')\ns.wav",
    ],
)
def test_a_wrong_example_is_found(source: str) -> None:
    with pytest.raises((ImportError, AttributeError, TypeError)):
        Example().check(source)


def test_a_dead_link_is_found() -> None:
    for target in ("docs/none.md", "README.md#no-such-heading"):
        with pytest.raises(Mismatch):
            check_link(ROOT / "README.md", target)

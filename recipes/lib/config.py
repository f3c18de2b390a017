"""Frozen dataclasses from YAML files and `key=value`, through OmegaConf; and their --help."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from codec.io import fits_type, parse_yaml
from codec.program import did_you_mean
from codec.training.run import leaves, plain
from slm.config import REMOVED_FIELDS, RENAMED_FIELDS

logger = logging.getLogger(__name__)
C = TypeVar("C")
NONE = type(None)
CONFIGS = Path(__file__).resolve().parents[1] / "configs"

RENAMED_KEYS = {
    **{f"text.{old}": f"text.{new}" for old, new in RENAMED_FIELDS["TextConfig"].items()},
    **{f"units.{old}": f"speech.{new}" for old, new in RENAMED_FIELDS["SpeechFormConfig"].items()},
    **{f"nar.{old}": f"nar.{new}" for old, new in RENAMED_FIELDS["NARConfig"].items()},
    **{
        f"sampling.{old}": f"sampling.{new}"
        for old, new in RENAMED_FIELDS["SamplingConfig"].items()
    },
    "ar.letters": "ar.letter_init",
    "distill.half": "distill.bfloat16",
    "resynthesis.half": "resynthesis.bfloat16",
    "edges": "word_boundaries",
    "lines": "list",
    "num_items": "num_asr_items",
    "speak": "tts_eval",
}
"""Parts of keys of older versions, and the current ones."""

REMOVED_KEYS = {
    **{f"nar.{key}": values for key, values in REMOVED_FIELDS["NARConfig"].items()},
    **{f"sampling.{key}": values for key, values in REMOVED_FIELDS["SamplingConfig"].items()},
}
"""Parts of keys of older versions, and the values with which they are ignored."""

RECIPES = {
    "ablations": "ablate.py",
    "asr": "asr.py",
    "codec": "train_codec.py",
    "export": "export_tokens.py",
    "semantic": "train_semantic.py",
    "tts": "tts.py",
}
"""Folders of recipes/configs and the recipes that read them."""


def load_config(cls: type[C], argv: Sequence[str], description: str = "") -> C:
    """Returns the dataclass `cls`: its defaults, then each `--config FILE`, then each `key=value`.

    A file's key `extends` names files, relative to it, that it is based on.
    `--help` prints every key with its type, default and docstring, and exits. Keys of older
    versions are read, with a warning.

    Raises:
        ValueError: a file is missing or is another recipe's, a key is unknown, or a value has the
            wrong type; the message suggests a key or names the recipe.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, description))
        sys.exit(0)
    kinds = {key: kind for key, kind, _, _ in _keys(cls)}
    files, overrides = _split(argv, kinds)
    config = OmegaConf.structured(cls)
    for file in files:
        settings = dict(leaves(_read_yaml(file)))
        try:
            config = _merged(config, current_keys(settings, kinds, f"{file}: "), kinds)
        except ValueError as error:
            raise ValueError(f"{file}: {error}{_looks_like(settings, kinds)}") from None
    given: dict[str, Any] = {}
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except yaml.YAMLError:
            raise ValueError(f"{override}: the value is not valid YAML; quote it") from None
        settings = dict(leaves(parsed["value"], key))
        for name, value in current_keys(settings, kinds).items():
            given.pop(name, None)  # The last of equal keys wins, in its own place.
            given[name] = value
    config = _merged(config, given, kinds)
    try:
        built = _built(cls, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} has no default: give {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ValueError(_first_line(error)) from None
    check_seed_of_recipe(getattr(built, "seed", 0), "seed")
    return built


def check_seed_of_recipe(seed: int, name: str) -> None:
    """Raises ValueError for a seed that NumPy's or scikit-learn's generators do not take.

    Args:
        name: of its key or flag, for the message.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name}={seed}: expected a whole number from 0 to 2**32 - 1")


@contextlib.contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Begins the messages of ValueErrors with the key whose value caused them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def current_keys(
    settings: Mapping[str, Any], known: Collection[str], where: str = ""
) -> dict[str, Any]:
    """Returns `settings` (dotted key: value) with the keys of older versions renamed or left out.

    A key is renamed only if its new name is one of `known` and the old one is not. A warning names
    both.

    Args:
        where: beginning of each warning.

    Raises:
        ValueError: for a removed key whose value has no counterpart.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        for old, ignored in REMOVED_KEYS.items():
            if not f".{key}".endswith(f".{old}") or _is_known(key, known):
                continue
            if value not in ignored:
                raise ValueError(f"{key}={_shown(value)}: this feature was removed; remove the key")
            logger.warning("%s%s was removed, and is ignored", where, key)
            break
        else:
            new = _renamed(key, known)
            if new != key:
                logger.warning("%s%s is called %s now", where, key, new)
            found[new] = value
    return found


def _renamed(key: str, known: Collection[str]) -> str:
    if _is_known(key, known):
        return key
    new = f".{key}."
    for old, current in RENAMED_KEYS.items():
        if "." in old or new.startswith(f".{old}."):
            new = new.replace(f".{old}.", f".{current}.", 1)
    return new.strip(".") if _is_known(new.strip("."), known) else key


def _is_known(key: str, known: Collection[str]) -> bool:
    """Whether `key` is one of `known`, holds some of them, or is below a dictionary of them."""
    holds = any(f"{each}.".startswith(f"{key}.") for each in known)
    parts = key.split(".")
    above = {".".join(parts[:depth]) for depth in range(1, len(parts))} & set(known)
    return holds or any(
        not any(each.startswith(f"{parent}.") for each in known) for parent in above
    )


def _looks_like(settings: Mapping[str, Any], kinds: Collection[str]) -> str:
    """'; this looks like ...' where a file has the keys of another recipe's configurations."""
    best, most = "", sum(key in kinds for key in settings)
    for folder, recipe in RECIPES.items():
        names: set[str] = set()
        for shipped in sorted((CONFIGS / folder).glob("*.yaml")):
            names.update(key for key, _ in leaves(_read_yaml(shipped)))
        if (shared := len(names & settings.keys())) > most:
            best, most = recipe, shared
    return f"; this looks like a configuration of recipes/{best}" if best else ""


def _built(hint: Any, value: Any, place: str = "") -> Any:
    """Plain containers as the dataclasses and tuples that `hint` names; `place` is their key.

    OmegaConf's own conversion leaves the dataclasses inside a tuple as unchecked dictionaries.
    """
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints, prefix = typing.get_type_hints(hint), f"{place}." if place else ""
        fields = {key: _built(hints[key], child, prefix + key) for key, child in value.items()}
        return typing.cast(type, hint)(**fields)
    if isinstance(value, list | tuple) and typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        places = [f"{place}[{index}]" for index in range(len(value))]
        return tuple(_element(*each) for each in zip(kinds, value, places, strict=True))
    options = [option for option in _union(hint) if option is not NONE]
    if value is not None and len(options) == 1 and options[0] is not hint:
        return _built(options[0], value, place)
    return value


def _element(hint: Any, value: Any, place: str) -> Any:
    """An element of a list; `place` is e.g. losses.mel_scales[0]."""
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        kinds = {key: kind for key, kind, _, _ in _keys(hint)}
        config = OmegaConf.structured(hint)
        try:
            config = _merged(config, dict(leaves(value)) if value else {}, kinds)
        except ValueError as error:
            raise ValueError(f"{place}.{error}") from None
        try:
            value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise ValueError(f"{place} lacks the key {error.full_key}") from None
    if hint in (bool, int, float, str) and not fits_type(value, hint):
        raise ValueError(f"{place}={_shown(value)}: expected {_type_name(hint)}")
    return _built(hint, value, place)


def help_text(cls: type, description: str) -> str:
    """Returns the text of --help: usage, then every key with its type, default and docstring."""
    lines = [
        *([description.strip(), ""] if description else []),
        "usage: [--config FILE.yaml]... [key=value]...",
        "Later files and then key=value win over earlier ones. `extends: [FILE, ...]` in a file",
        "names files that it is based on. Keys, types and defaults:",
        "",
    ]
    for key, kind, default, text in _keys(cls):
        lines.append(f"  {key}: {kind} = {default}" if default is not None else f"  {key}: {kind}")
        lines.extend(textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _split(argv: Sequence[str], known: Collection[str]) -> tuple[list[Path], list[str]]:
    files, overrides = [], []
    rest = iter(argv)
    for argument in rest:
        if argument == "--config":
            if (file := next(rest, None)) is None:
                raise ValueError("--config needs a file name after it")
            files.append(Path(file))
        elif argument.startswith("--config="):
            files.append(Path(argument.removeprefix("--config=")))
        elif argument.startswith("-") or "=" not in argument:
            meant = did_you_mean(argument.partition("=")[0], known) or "; --help lists the keys"
            raise ValueError(f"{argument}: settings are key=value or --config FILE{meant}")
        else:
            overrides.append(argument)
    return files, overrides


EXTENDS = "extends"
"""Key of a configuration file: files, relative to it, whose keys it has where it sets no others."""


def _read_yaml(file: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Returns a file's keys on top of those of the files that it extends."""
    if not file.is_file():
        raise ValueError(f"{file}: no such configuration file")
    try:
        parse_yaml(file.read_text(encoding="utf-8"))  # Limits aliases, which OmegaConf copies.
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (
        ValueError,
        yaml.YAMLError,
        OmegaConfBaseException,
        UnicodeDecodeError,
        OSError,
    ) as error:
        raise ValueError(f"{file}: not valid YAML: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a configuration file holds `key: value` lines, not a list")
    own = typing.cast(dict[str, Any], content)
    if EXTENDS not in own:
        return own
    names = own.pop(EXTENDS)
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: {EXTENDS} names a file, or a list of files")
    above = (*extending, file.resolve())
    bases = [(file.parent / name).resolve() for name in names]
    if circular := [base for base in bases if base in above]:
        raise ValueError(f"{file}: extends {circular[0].name}, which extends it")
    layers = [_read_yaml(file.parent / name, above) for name in names]
    return functools.reduce(_on_top, [*layers, own])


def _on_top(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of both; those of `above` win, except that keys below a key are merged."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _on_top(below[key], value) if both else value
    return merged


def _merged(
    config: DictConfig, settings: Mapping[str, Any], kinds: Mapping[str, str]
) -> DictConfig:
    """Returns `config` with `settings` (dotted key: value), of which later ones win.

    `kinds` maps all keys to descriptions of their types. ValueError names the first invalid key.
    """
    layers = [_nested(key, value) for key, value in settings.items()]
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, *layers))
    except (OmegaConfBaseException, TypeError):  # TypeError: a list for keys.
        for (key, value), layer in zip(settings.items(), layers, strict=True):
            try:
                config = typing.cast(DictConfig, OmegaConf.merge(config, layer))
            except (OmegaConfBaseException, TypeError) as error:
                raise ValueError(_refusal(key, value, error, kinds)) from None
        raise


def _nested(key: str, value: Any) -> Any:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _refusal(key: str, value: Any, error: Exception, kinds: Mapping[str, str]) -> str:
    """The message for a key or value that OmegaConf has refused."""
    if key in kinds:
        # OmegaConf names a key inside an element of a list.
        unknown = f": {_first_line(error)}" if isinstance(error, ConfigKeyError) else ""
        return f"{key}={_shown(value)}: expected {kinds[key]}{unknown}"
    below = [each for each in kinds if each.startswith(f"{key}.")]
    if below:
        return f"{key}={_shown(value)}: expected keys below it, such as {below[0]}"
    parts = key.split(".")
    for stem in (".".join(parts[:depth]) for depth in range(1, len(parts))):
        kind = kinds.get(stem, "")
        if kind.startswith("names with "):
            return f"{key}={_shown(value)}: {stem} takes {kind}"
        if kind.startswith("a list of "):
            return f"{key}: {stem} is {kind}; write {stem}=[...]"
        if kind and not any(each.startswith(f"{stem}.") for each in kinds):
            return f"{key}: {stem} takes one value ({kind}), no keys below it"
    return f"{key}: no such key{did_you_mean(key, kinds) or '; --help lists the keys'}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(
        line.strip() for line in lines if "_type=" not in line and "full_key" not in line
    )


def _keys(cls: Any, prefix: str = "") -> Iterator[tuple[str, str, str | None, str]]:
    """(key, type, default, docstring) of every leaf."""
    docs = _field_docs(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = prefix + field.name, hints[field.name]
        kinds = [kind for kind in _union(hint) if dataclasses.is_dataclass(kind)]
        nested: type | None = typing.cast(type, kinds[0]) if kinds else None
        default: str | None = None
        if field.default is not dataclasses.MISSING:
            default = _shown(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = _shown(field.default_factory())
        if nested is None:
            yield key, _type_name(hint), default, docs.get(field.name, "")
            continue
        if NONE in _union(hint):
            # The defaults of the keys below are listed with them.
            shown = "null" if default == "null" else None
            yield key, "keys below it, or null", shown, docs.get(field.name, "")
        yield from _keys(nested, key + ".")


def _union(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _plain(value: Any) -> Any:
    """A value as mappings, lists and scalars of YAML."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return plain(value)


def _shown(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": math.inf}
    text = yaml.safe_dump(_plain(value), **options).removesuffix("\n...\n").strip()
    if "\n" in text:  # Between double quotes line ends are escaped.
        text = yaml.safe_dump(_plain(value), **options, default_style='"').strip()
    return text


KINDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "values true or false"),
    Path: ("a path", "paths"),
}
"""Descriptions of a type for users: of one value, and of the elements of a list."""
COUNTS = {2: "two", 3: "three", 4: "four"}


def _type_name(hint: Any) -> str:
    """Describes a type in YAML's terms: "a whole number or null"."""
    kinds = [kind for kind in _union(hint) if kind is not NONE]
    names = [_kind_name(kind, one=True) for kind in kinds]
    optional = len(kinds) < len(_union(hint))
    separator = ", " if names[-1].startswith("one of: ") else " or "
    return " or ".join(names) + (f"{separator}null" if optional else "")


def _kind_name(kind: Any, *, one: bool) -> str:
    if kind in KINDS:
        return KINDS[kind][0 if one else 1]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ("one of: " if one else "values out of ") + ", ".join(map(_shown, arguments))
    if origin in (tuple, list):
        same = [each for each in arguments if each is not Ellipsis]
        elements = _kind_name(same[0], one=False)
        count = f"{COUNTS.get(len(same), len(same))} " if len(same) > 1 else ""
        if len(set(same)) > 1:
            count, elements = "", ", ".join(_kind_name(each, one=True) for each in same)
        return f"{'a list' if one else 'lists'} of {count}{elements}"
    if origin is dict:
        return f"names with {_kind_name(arguments[1], one=False)}"
    if dataclasses.is_dataclass(kind):
        keys = ", ".join(field.name for field in dataclasses.fields(kind))
        return f"{'' if one else 'items with '}the keys {keys}"
    return "a value" if one else "values"


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """The string that stands under each field, of the class and of those that it extends."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        definition = ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(following.value.value).split())
    return docs

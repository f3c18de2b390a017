"""Frozen dataclasses from YAML files and `key=value`, through OmegaConf; and their --help."""

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from codec.training.run import leaves, plain

C = TypeVar("C")


def load_config(cls: type[C], argv: Sequence[str], description: str = "") -> C:
    """The dataclass `cls` with its defaults, then each `--config FILE`, then each `key=value`.

    `--help` prints every key with its type, default and docstring, and exits. Raises ValueError
    for a missing file, an unknown key (with the nearest right one) and an ill-typed value.
    """
    if "--help" in argv or "-h" in argv:
        print(describe(cls, description))
        sys.exit(0)
    files, overrides = _split(argv)
    config = OmegaConf.structured(cls)
    for file in files:
        for key, value in leaves(_read_yaml(file)):
            config = _merged(config, key, value, where=f"{file}: ")
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        except yaml.YAMLError:
            raise ValueError(f"{override}: the value is not valid YAML; quote it") from None
        for tail, leaf in leaves(parsed["value"]):
            config = _merged(config, f"{key}.{tail}" if tail else key, leaf, where="")
    try:
        return _built(cls, OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} has no default: give {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ValueError(_first_line(error)) from None


def _built(hint: Any, value: Any) -> Any:
    """Plain containers as the dataclasses and tuples that `hint` names.

    OmegaConf's own conversion leaves the dataclasses inside a tuple as unchecked dictionaries.
    """
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        fields = {key: _built(hints[key], child) for key, child in value.items()}
        return typing.cast(type, hint)(**fields)
    if isinstance(value, list | tuple) and typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            kinds = (kinds[0],) * len(value)
        return tuple(_element(kind, child) for kind, child in zip(kinds, value, strict=True))
    options = [option for option in _union(hint) if option is not type(None)]
    if value is not None and len(options) == 1 and options[0] is not hint:
        return _built(options[0], value)
    return value


def _element(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        checked = OmegaConf.merge(OmegaConf.structured(kind), value)
        value = OmegaConf.to_container(checked, resolve=True, throw_on_missing=True)
    return _built(kind, value)


def describe(cls: type, description: str) -> str:
    """The text of --help."""
    lines = [
        *([description.strip(), ""] if description else []),
        "usage: [--config FILE.yaml]... [key=value]...",
        "Later files and then key=value win over earlier ones. Keys, types and defaults:",
        "",
    ]
    for key, kind, default, text in _keys(cls):
        lines.append(f"  {key}: {kind} = {default}" if default is not None else f"  {key}: {kind}")
        lines.extend(textwrap.wrap(text, 96, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines)


def _split(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
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
            raise ValueError(
                f"{argument}: settings are key=value or --config FILE; --help lists the keys"
            )
        else:
            overrides.append(argument)
    return files, overrides


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such configuration file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{file}: not valid YAML: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: a configuration file holds `key: value` lines, not a list")
    return typing.cast(dict[str, Any], content)


def _merged(config: DictConfig, key: str, value: Any, where: str) -> DictConfig:
    layer: Any = value
    for part in reversed(key.split(".")):
        layer = {part: layer}
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, layer))
    except ConfigKeyError as error:
        raise ValueError(f"{where}{key}: {_first_line(error)}") from None
    except OmegaConfBaseException as error:
        reason = _first_line(error)
        if "$VALUE" in reason:  # OmegaConf leaves its own placeholder in for a list's element.
            reason = "a value of the wrong type"
        raise ValueError(f"{where}{key}={value}: {reason}") from None


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
            default = str(plain(field.default))
        elif field.default_factory is not dataclasses.MISSING:
            default = str(plain(field.default_factory()))
        if nested is None:
            yield key, _type_name(hint), default, docs.get(field.name, "")
            continue
        if type(None) in _union(hint):
            yield key, f"{nested.__name__} or null", default, docs.get(field.name, "")
        yield from _keys(nested, key + ".")


def _union(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("pathlib.", "")


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

"""Recipes: TOML files -> frozen config dataclasses, with every unknown key refused."""

from __future__ import annotations

import datetime
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from d2f.errors import ConfigError, unknown_name
from d2f.shipped.recipes import find_recipe, shipped_recipes

T = TypeVar("T")


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the table of a TOML file, with some settings replaced.

    Args:
        path: A TOML file or, if no such file exists, the name of a shipped recipe.
        overrides: Replacements `key=value`, as `apply_override` takes them.

    Raises:
        ConfigError: The file is missing or not TOML, or an override is malformed.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w", suffix=".toml") as file:
        ...     _ = file.write("steps = 5"); file.flush()
        ...     read_recipe(file.name, ["steps=6", "model.init=folder"])
        {'steps': 6, 'model': {'init': 'folder'}}
    """
    file = Path(path)
    if not file.exists() and (shipped := find_recipe(path)) is not None:
        file = shipped.path
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        known = "" if file.exists() else f"; {_near(path)}`d2f recipes` lists those of d2f"
        raise ConfigError(f"cannot read recipe {path}: {reason}{known}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        apply_override(table, override)
    return table


def _near(path: str | Path) -> str:
    near = difflib.get_close_matches(str(path), [recipe.name for recipe in shipped_recipes()], n=1)
    return f"did you mean {near[0]}? " if near else ""


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a table; tables in it become nested dataclasses.

    Error messages begin with `where`, such as the name of the file.

    Raises:
        ConfigError: A key is unknown (the message names the nearest known one), or a value is
            missing, has the wrong type or is out of range.
    """
    assert is_dataclass(cls)
    known = {field.name: field for field in fields(cls)}
    for name in table:
        if name not in known:
            raise ConfigError(f"{where}: {unknown_name('key', name, known)}")
    for name, field in known.items():
        if name not in table and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{where}: '{name}' is missing")
    hints = typing.get_type_hints(cls)
    values = {name: _convert(value, hints[name], where, name) for name, value in table.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _convert(value: Any, hint: Any, where: str, name: str) -> Any:
    """Check a TOML value against a field's type; lists become tuples, tables dataclasses."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _convert_to_one_of(value, typing.get_args(hint), where, name)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: '{name}' is {value!r}; it must be a table")
        return from_table(typing.cast(type, hint), value, f"{where}: [{name}]")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        if len(inner) == len(value):
            numbered = enumerate(zip(value, inner, strict=True), 1)
            return tuple(
                _convert(item, kind, where, f"{name} {i}" if is_dataclass(kind) else name)
                for i, (item, kind) in numbered
            )
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    elif origin is not None and origin is not tuple and isinstance(value, Mapping):
        if is_dataclass(inner[-1]):
            return {k: _convert(v, inner[-1], where, f"{name}.{k}") for k, v in value.items()}
        _refuse_dates(value, where, name)
        return dict(value)
    raise ConfigError(f"{where}: '{name}' is {value!r}; it must be of type {_named(hint)}")


def _refuse_dates(value: Any, where: str, name: str) -> None:
    """Refuse a date or time in a table with free keys: result files, in JSON, have none."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_dates(item, where, f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_dates(item, where, name)
    elif isinstance(value, datetime.date | datetime.time):
        raise ConfigError(f"{where}: '{name}' is the date or time {value}; write it in quotes")


def _convert_to_one_of(value: Any, hints: Sequence[Any], where: str, name: str) -> Any:
    options = [option for option in hints if option is not types.NoneType]
    if value is None and len(options) < len(hints):
        return None
    if len(options) == 1:
        return _convert(value, options[0], where, name)
    for option in options:
        try:
            return _convert(value, option, where, name)
        except ConfigError:
            continue
    kinds = " or ".join(_named(option) for option in options)
    raise ConfigError(f"{where}: '{name}' is {value!r}; it must be of type {kinds}")


def _named(hint: Any) -> str:
    if typing.get_origin(hint) is Mapping:
        return "table"
    name = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else None
    return name or str(hint)


def apply_override(table: dict[str, Any], text: str) -> None:
    """Replace one setting of a table by `key=value` or `table.key=value`.

    In a list of tables with names, the name leads to a table: `rows.serial.temperature=1`.

    Raises:
        ConfigError: The text has another form, or a part of the path is not a table.
    """
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as key=value or table.key=value")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text.strip()
    *parents, last = key.strip().split(".")
    inner: Any = table
    for parent in parents:
        if isinstance(inner, list):
            named = (item for item in inner if isinstance(item, dict))
            inner = next((item for item in named if item.get("name") == parent), None)
        else:
            inner = inner.setdefault(parent, {})
        if not isinstance(inner, dict | list):
            raise ConfigError(f"--set {text!r}: '{parent}' is no table")
    if isinstance(inner, list):
        raise ConfigError(f"--set {text!r}: '{parents[-1]}' is a list; name the table meant in it")
    inner[last] = value


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `ConfigError` for a value that is not among the known ones."""
    if value not in known:
        raise ConfigError(unknown_name(name, value, known))


def at_least(name: str, value: float | None, least: float) -> None:
    """Raise `ConfigError` for a number below `least`; None passes, nan does not."""
    if value is not None and not value >= least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")

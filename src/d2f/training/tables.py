"""TOML tables -> frozen config dataclasses, with every unknown key refused."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from d2f.errors import ConfigError, unknown_name

T = TypeVar("T")


def from_table(cls: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a table; `where` starts the message of every error.

    Raises:
        ConfigError: An unknown key (the message names the nearest known one); a missing, wrongly
            typed or impossible value.
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
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        return _convert(value, options[0], where, name)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: '{name}' is {value!r}; it must be a table")
        return from_table(typing.cast(type, hint), value, f"{where}: [{name}]")
    origin = typing.get_origin(hint)
    if origin is tuple and isinstance(value, list | tuple):
        inner = typing.get_args(hint)
        inner = inner[:1] * len(value) if inner[-1:] == (...,) else inner
        if len(inner) == len(value):
            pairs = zip(value, inner, strict=True)
            return tuple(_convert(item, kind, where, name) for item, kind in pairs)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is bool or isinstance(value, bool):
        if hint is bool and isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    elif origin is not None and origin is not tuple and isinstance(value, Mapping):
        return dict(value)
    wanted = getattr(hint, "__name__", None) if origin is None else str(hint)
    raise ConfigError(f"{where}: '{name}' is {value!r}; it must be of type {wanted or hint}")


def apply_override(table: dict[str, Any], text: str) -> None:
    """Replace one setting of a table by `key=value` or `table.key=value`.

    Raises:
        ConfigError: The text is not of that form, or leads through something that is no table.
    """
    key, equals, value_text = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as key=value or table.key=value")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text.strip()
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text!r}: '{parent}' is no table")
    table[last] = value

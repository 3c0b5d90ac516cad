"""Exceptions that d2f raises on purpose.

    D2FError
    ├── ConfigError       a setting, option or recipe is wrong
    ├── RequestError      a prompt or a generation request cannot be served
    ├── CheckpointError   a model, adapter or tokenizer folder is wrong
    └── TrainingError     a run cannot start, resume or go on

Every message names the offending value and what to do about it. The command line prints it as one
line; nothing else in the package catches it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class D2FError(Exception):
    """Base of all errors that d2f raises on purpose."""


class ConfigError(D2FError, ValueError):
    """A setting, option or recipe is wrong."""


class RequestError(D2FError, ValueError):
    """A prompt or a generation request cannot be served."""


class CheckpointError(D2FError):
    """A model, adapter or tokenizer folder is missing, broken or of another kind."""


class D2FWarning(UserWarning):
    """A setting works, but perhaps not as intended; the command line prints one line."""


class TrainingError(D2FError):
    """A training run cannot start, resume or go on."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message that refuses an unknown name and suggests the nearest known one.

    Example:
        >>> unknown_name("strategy", "pipelind", ["pipelined", "serial"])
        "unknown strategy 'pipelind'; did you mean 'pipelined'? Known: pipelined, serial"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return f"unknown {kind} '{name}'{hint} Known: {', '.join(names) or 'none'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's kind where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def counted(number: float, thing: str, form: str = "") -> str:
    """Return a number with its noun, which is in the plural unless the number is 1.

    Args:
        number: The number.
        thing: The noun in the singular.
        form: Format specification of the number, as `format` takes it.

    Example:
        >>> counted(1, "forward"), counted(1200, "token", ","), counted(2, "process")
        ('1 forward', '1,200 tokens', '2 processes')
    """
    written, ending = format(number, form), "es" if thing.endswith("s") else "s"
    return f"{written} {thing if written == '1' else thing + ending}"

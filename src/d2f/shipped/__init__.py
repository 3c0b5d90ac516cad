"""Shipped models (an autoregressive one, a teacher, a student: checkpoint folders) and recipes."""

from __future__ import annotations

from pathlib import Path

from d2f.errors import CheckpointError, unknown_name

MODELS = ("autoregressive", "teacher", "student")
PREFIX = "shipped:"
"""Beginning of a shipped model's name wherever a model is named, as in `shipped:student`."""


def shipped_model(name: str = "student") -> Path:
    """Return the folder of a shipped model.

    Example:
        >>> shipped_model("student").name
        'student'
    """
    assert name in MODELS, name
    return Path(__file__).parent / name


def named_folder(name: str) -> Path | None:
    """Return the folder that a name such as `shipped:student` means; None for other names.

    Raises:
        CheckpointError: The name begins with `shipped:`, and no shipped model has the rest of it.

    Example:
        >>> named_folder("shipped:teacher").name, named_folder("org/model")
        ('teacher', None)
    """
    if not name.startswith(PREFIX):
        return None
    known = name.removeprefix(PREFIX)
    if known not in MODELS:
        raise CheckpointError(unknown_name("shipped model", known, MODELS))
    return shipped_model(known)

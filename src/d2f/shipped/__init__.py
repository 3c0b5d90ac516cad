"""What comes with the package: base, teacher and student, each a checkpoint folder, and recipes."""

from __future__ import annotations

from pathlib import Path

from d2f.errors import CheckpointError, unknown_name

MODELS = ("autoregressive", "teacher", "student")
PREFIX = "shipped:"
"""Of the name of a shipped model, wherever a model is named: `shipped:student`."""


def shipped_model(name: str = "student") -> Path:
    """Folder of a shipped model.

    Example:
        >>> shipped_model("student").name
        'student'
    """
    assert name in MODELS, name
    return Path(__file__).parent / name


def named_folder(name: str) -> Path | None:
    """Folder of the shipped model that a name such as `shipped:student` means; None for others.

    Raises:
        CheckpointError: The name begins like that of a shipped model, and there is no such.

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

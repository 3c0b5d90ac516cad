"""The models that come with the package: base, teacher and student, each a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

MODELS = ("autoregressive", "teacher", "student")


def shipped_model(name: str = "student") -> Path:
    """Folder of a shipped model.

    Example:
        >>> shipped_model("student").name
        'student'
    """
    assert name in MODELS, name
    return Path(__file__).parent / name

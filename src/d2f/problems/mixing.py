"""Random streams: derive an independent one for each problem from seed, index and split."""

from __future__ import annotations

from random import Random

from d2f.problems.problem import SPLITS

_MASK = (1 << 64) - 1


def mix(seed: int, index: int, part: int) -> int:
    """Hash three numbers to 64 bits, so that neighbouring numbers give unrelated streams.

    Example:
        >>> mix(0, 0, 1) == mix(0, 1, 0)
        False
    """
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + part + 1) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)


def problem_stream(seed: int, index: int, split: str) -> Random:
    """Return the random stream of one problem, which depends on the three arguments alone.

    Raises:
        ValueError: The split is unknown or the index negative.

    Example:
        >>> problem_stream(0, 5, "test").random() == problem_stream(0, 5, "test").random()
        True
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    return Random(mix(seed, index, SPLITS.index(split)))

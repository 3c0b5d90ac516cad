"""Seeds of random streams."""

from __future__ import annotations

__all__ = ["mix"]

_MASK = (1 << 64) - 1


def mix(seed: int, index: int, part: int) -> int:
    """Spread three numbers over 64 bits, so that neighbours share no random stream.

    Example:
        >>> mix(0, 0, 1) == mix(0, 1, 0)
        False
    """
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + part + 1) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 31)

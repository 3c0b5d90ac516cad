"""Numbers in a text: find them with place, value and notation, and write others like them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

_NUMBER = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)|(?<!\d)\.\d+|\d+")


Value = int | Fraction
"""An exact value; whole ones are of type int, whose arithmetic is faster."""


def exact(value: Value) -> Value:
    """Return the same value, as an int if it is whole."""
    return value.numerator if value.denominator == 1 else value


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number in a text, its sign not counted."""

    start: int
    end: int
    text: str

    @cached_property
    def value(self) -> Value:
        """The number's value."""
        return exact(Fraction(self.text.replace(",", "")))

    @property
    def decimals(self) -> int:
        """Count of digits behind the point."""
        return len(self.text.partition(".")[2])


def find_numbers(text: str, start: int = 0, end: int | None = None) -> list[Number]:
    """Return all numbers of a text, or of the part from `start` to `end`.

    Example:
        >>> [str(n.value) for n in find_numbers("$1,250.50 for 3/4 of it, 1,2 and .5.")]
        ['2501/2', '3', '4', '1', '2', '1/2']
    """
    found = _NUMBER.finditer(text, start, len(text) if end is None else end)
    return [Number(start=m.start(), end=m.end(), text=m[0]) for m in found]


def write_number(value: Value, like: str, *, money: bool = False) -> str | None:
    """Return a value in the notation of another number; None if that has too few decimals.

    Args:
        value: The value to write.
        like: The number whose commas, decimals and leading zero are imitated.
        money: Keep two decimals, even if the last is 0.

    Example:
        >>> write_number(Fraction(1250), "3,400"), write_number(Fraction(1, 2), "0.25")
        ('1,250', '0.5')
        >>> write_number(Fraction(1, 2), "0.25", money=True), write_number(Fraction(1, 2), "3")
        ('0.50', None)
    """
    decimals = len(like.partition(".")[2])
    scaled = value * 10**decimals
    if value < 0 or scaled.denominator != 1:
        return None
    whole, rest = divmod(scaled.numerator, 10**decimals)
    text = f"{whole:,}" if "," in like else str(whole)
    if like.startswith(".") and whole == 0:
        text = ""
    digits = f"{rest:0{decimals}}" if decimals else ""
    if not (like.endswith("0") or (money and decimals == 2)):
        digits = digits.rstrip("0")
    return (f"{text}.{digits}" if digits else text) or "0"

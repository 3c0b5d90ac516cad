"""Numbers in a text, which others like them may replace, and formulas of such numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

_NUMBER = re.compile(r"(?<![\d.,])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\d)|(?<!\d)\.\d+|\d+")
_FORMULA = re.compile(r"[\d+\-*/(.)][\d+\-*/(). ]*")

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


_SIGNS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda one, other: exact(Fraction(one) / other),
}


@dataclass(frozen=True, kw_only=True)
class Formula:
    """An expression and its operands from left to right.

    Example:
        >>> formula = read_formula("(20-5)*3")
        >>> [n.text for n in formula.operands], formula.work_out([20, 6, 3])
        (['20', '5', '3'], 42)
    """

    operands: tuple[Number, ...]
    apply: Callable[[Sequence[Value]], Value]
    """The value for other operands; it raises ZeroDivisionError."""
    multiplies: bool
    """Whether the expression has `*` or `/`."""

    def work_out(self, values: Sequence[Value]) -> Value | None:
        """Return the value for other operands; None for a division by zero."""
        try:
            return exact(self.apply(values))
        except ZeroDivisionError:
            return None


def read_formula(text: str) -> Formula | None:
    """Parse an expression of numbers, `+ - * /` and brackets; None for any other text.

    Example:
        >>> read_formula("2x+1") is None
        True
    """
    text = text.rstrip()
    if not _FORMULA.fullmatch(text):
        return None
    operands = tuple(find_numbers(text))
    places = {number.start: index for index, number in enumerate(operands)}
    try:
        apply = _compiled(ast.parse(text, mode="eval").body, places)
    except (SyntaxError, KeyError):
        return None
    return Formula(operands=operands, apply=apply, multiplies="*" in text or "/" in text)


def _compiled(found: ast.expr, places: dict[int, int]) -> Callable[[Sequence[Value]], Value]:
    """Return an expression as a function of its operands; raise KeyError for unknown parts."""
    match found:
        case ast.Constant():
            return operator.itemgetter(places[found.col_offset])
        case ast.UnaryOp(op=ast.USub()):
            inner = _compiled(found.operand, places)
            return lambda values: -inner(values)
        case ast.BinOp():
            sign = _SIGNS[type(found.op)]
            left, right = _compiled(found.left, places), _compiled(found.right, places)
            return lambda values: sign(left(values), right(values))
    raise KeyError(type(found))

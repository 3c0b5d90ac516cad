"""Formulas of annotations: parse and evaluate the expression between `<<` and `=`."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from d2f.problems.number_variants.numbers import Number, Value, exact, find_numbers

_ALLOWED = re.compile(r"[\d+\-*/(). ]+")
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
Tree = int | tuple["str | Tree", ...]
"""The index of an operand, or a sign and the trees that it joins."""


@dataclass(frozen=True, kw_only=True)
class Formula:
    """An expression and its operands from left to right.

    Example:
        >>> formula = read_formula("(20-5)*3")
        >>> [n.text for n in formula.operands], formula.work_out([20, 6, 3])
        (['20', '5', '3'], 42)
    """

    operands: tuple[Number, ...]
    tree: Tree

    multiplies: bool
    """Whether the expression has `*` or `/`."""

    def work_out(self, values: Sequence[Value]) -> Value | None:
        """Return the value for other operands; None for a division by zero."""
        try:
            return exact(_work_out(self.tree, values))
        except ZeroDivisionError:
            return None


def read_formula(text: str) -> Formula | None:
    """Parse an expression of numbers, `+ - * /` and brackets; None for any other text.

    Example:
        >>> read_formula("2x+1") is None
        True
    """
    text = text.rstrip()
    if not _ALLOWED.fullmatch(text) or text.startswith(" "):
        return None
    numbers = find_numbers(text)
    places = {number.start: index for index, number in enumerate(numbers)}
    try:
        tree = _tree(ast.parse(text, mode="eval").body, places)
    except (SyntaxError, KeyError, TypeError):
        return None
    multiplies = "*" in text or "/" in text
    return Formula(operands=tuple(numbers), tree=tree, multiplies=multiplies)


def _tree(found: ast.expr, places: dict[int, int]) -> Tree:
    if isinstance(found, ast.Constant):
        return places[found.col_offset]
    if isinstance(found, ast.UnaryOp) and isinstance(found.op, ast.USub):
        return ("neg", _tree(found.operand, places))
    if isinstance(found, ast.BinOp):
        sign = _SIGNS[type(found.op)]
        return (sign, _tree(found.left, places), _tree(found.right, places))
    raise TypeError(type(found).__name__)


def _work_out(node: Tree | str, values: Sequence[Value]) -> Value:
    if isinstance(node, int):
        return values[node]
    assert isinstance(node, tuple)
    first = _work_out(node[1], values)
    if node[0] == "neg":
        return -first
    second = _work_out(node[2], values)
    if node[0] == "+":
        return first + second
    if node[0] == "-":
        return first - second
    if node[0] == "*":
        return first * second
    return exact(Fraction(first) / second)

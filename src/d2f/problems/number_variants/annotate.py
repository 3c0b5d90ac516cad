"""Add annotations `<<a*b=c>>` to sums that an answer writes out without one."""

from __future__ import annotations

import re

from d2f.problems.number_variants.formula import read_formula
from d2f.problems.number_variants.numbers import find_numbers

_TRIVIAL = re.compile(r"<<([\d.]+)=\1>>")
_RESULT = re.compile(r"= ?\$?(?=[\d.])")
_PIECE = re.compile(
    r"(?P<number>(?:\d[\d,]*)?\.?\d+)|(?P<sign>[-+*\u00d7\u00f7\u2013\u2212]|\bx\b|/(?![A-Za-z]))"
    r"|(?P<unit>/?[A-Za-z'\u2019]+(?:/[A-Za-z'\u2019]+)*|[$%])|\s+|(?P<other>.)"
)
_SIGNS = str.maketrans("x\u00d7\u00f7\u2013\u2212", "**/--")
"""Signs that people use (cross, division sign, dash, minus sign) -> operators."""
_FARTHEST = 150
"""Number of characters before a result in which its sum is looked for."""


def annotate(answer: str) -> str:
    """Return the answer with `<<a*b=c>>` also before results that follow a sum in the text.

    A sum is annotated if it has no brackets and equals the result. Trivial annotations such as
    `<<5=5>>` are removed.

    Example:
        >>> annotate("He has 3 bags * 4 pies = 12 pies, 12-2=<<12-2=10>>10.")
        'He has 3 bags * 4 pies = <<3*4=12>>12 pies, 12-2=<<12-2=10>>10.'
    """
    answer = _TRIVIAL.sub("", answer)
    parts, at = [], 0
    for found in _RESULT.finditer(answer):
        start = max(answer.rfind(stop, 0, found.start()) for stop in ("\n", "=", ">>"))
        start = max(start + 1, found.start() - _FARTHEST)
        inside = answer.rfind("<<", 0, found.start()) > answer.rfind(">>", 0, found.start())
        result = find_numbers(answer, found.end(), (answer + "\n").find("\n", found.end()))
        if inside or not result or result[0].start != found.end():
            continue
        text = _sum_at_end(answer[start : found.start()])
        formula = read_formula(text) if text else None
        if formula is None or len(formula.operands) < 2:
            continue
        if formula.work_out([number.value for number in formula.operands]) == result[0].value:
            parts += [answer[at : found.end()], f"<<{text}={result[0].text.replace(',', '')}>>"]
            at = found.end()
    return "".join([*parts, answer[at:]])


def _sum_at_end(text: str) -> str:
    """Return the sum at the end of a text, without units; an empty text if there is none."""
    pieces = [(m.lastgroup, m[0]) for m in _PIECE.finditer(text) if m.lastgroup]
    taken: list[str] = []
    wants_number = True
    for kind, piece in reversed(pieces):
        if kind == "unit":
            continue
        if kind != ("number" if wants_number else "sign"):
            break
        taken.append(piece.replace(",", "").translate(_SIGNS))
        wants_number = not wants_number
    return "" if wants_number else "".join(reversed(taken))

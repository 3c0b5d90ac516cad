"""Relation: one way of computing a new quantity from earlier ones, with its sentences."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Relation", "parse_ops"]

Op = tuple[str, str | int, str | int]


def parse_ops(text: str) -> tuple[Op, ...]:
    """Read a little program such as `a/3;t*2`: one binary operation a step.

    `a` and `b` are the inputs, `c` and `k` the constants of the sentence, `t` the previous
    step's result; digits stand for themselves.

    Example:
        >>> parse_ops("a/3;t*2")
        (('/', 'a', 3), ('*', 't', 2))
    """
    ops: list[Op] = []
    for step in text.split(";"):
        sign = next(char for char in "+-*/" if char in step)
        left, right = (int(part) if part.isdigit() else part for part in step.split(sign))
        ops.append((sign, left, right))
    return tuple(ops)


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """A relation between quantities, or (with `ask` set) a question that computes.

    Templates are `str.format` texts over `a`, `b` (inputs), `w` (output), each a `Wording`,
    and the constants `c`, `k`.

    Example:
        >>> from d2f.problems import RELATIONS
        >>> RELATIONS["half"].ops
        (('/', 'a', 2),)
    """

    id: str
    takes: str
    """The tag the first input's frame must carry."""
    ops: tuple[Op, ...]
    text: tuple[str, ...]
    """The wordings of the sentence (of the question, for a question)."""
    out: str = "peer"
    """The frame of the result; `peer` follows the input's frame."""
    who: str = "new"
    """The result's subject: `same`, `new` (of the frame's class), `both` (the two inputs')."""
    other: str = ""
    """For two inputs: `same` frame as the first, or the tag of the second."""
    item: str = "same"
    """`new` where the result counts another thing than its input."""
    consts: tuple[tuple[str, str], ...] = ()
    """The constants and how each is drawn."""
    mid: str = ""
    """The sentence of the first step, where there are two."""
    answer: str = ""
    """The sentence of the last step; empty: the plain statement of the result."""
    commutes: bool = False
    """Whether swapping the two inputs is the same relation."""
    ask: bool = False
    peers_only: bool = False
    """Needs an input whose comparisons keep its own frame (the sentence names it first)."""
    divisor: int = 1
    """What the first input must be divisible by (fixed divisors only)."""
    drawn_divisor: bool = field(init=False)
    """Whether `c` is a divisor, so that it is drawn before the values."""
    halves_sum: bool = field(init=False)
    """Whether the sum of the inputs is halved, so that both had better be even."""

    def __post_init__(self) -> None:
        """Derive what the drawing of numbers asks for often."""
        object.__setattr__(self, "drawn_divisor", self.consts[:1] == (("c", "div"),))
        halves = self.ops == (("+", "a", "b"), ("/", "t", 2))
        object.__setattr__(self, "halves_sum", halves)

"""Relations: ways of computing a new quantity from earlier ones, with their sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Op = tuple[str, str | int, str | int]


def parse_ops(text: str) -> tuple[Op, ...]:
    """Parse the operations of a relation, such as `a/3;t*2`: one binary operation per step.

    `a` and `b` are the inputs, `c` and `k` the constants of the sentence, and `t` is the result of
    the previous step; digits are literal numbers.

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
    """The tag that the first input's frame must have."""
    ops: tuple[Op, ...]
    text: tuple[str, ...]
    """Alternative wordings of the sentence or, for a question, of the question."""
    out: str = "peer"
    """Id of the result's frame; `peer`: the peer of the input's frame."""
    who: str = "new"
    """The result's subject: the `same`, a `new` one of the frame's class, or `both` inputs'."""
    other: str = ""
    """The second input's frame: `same` as the first's, or a tag that it must have."""
    item: str = "same"
    """`new` if the result counts another thing than its input."""
    consts: tuple[tuple[str, str], ...] = ()
    """The name of each constant and the way it is drawn."""
    mid: str = ""
    """The sentence of the first step, if there are two steps."""
    answer: str = ""
    """The sentence of the last step; empty: a statement of the result."""
    commutes: bool = False
    """Whether swapping the two inputs changes nothing."""
    ask: bool = False
    peers_only: bool = False
    """Whether the input's frame must be its own peer, since the sentence names it first."""
    divisor: int = 1
    """A fixed number by which the first input must be divisible."""
    drawn_divisor: bool = field(init=False)
    """Whether `c` is a divisor; divisors are drawn before the values."""
    halves_sum: bool = field(init=False)
    """Whether the sum of the inputs is halved; then both are drawn as even numbers."""

    def __post_init__(self) -> None:
        """Compute the facts that the drawing of numbers reads often."""
        object.__setattr__(self, "drawn_divisor", self.consts[:1] == (("c", "div"),))
        halves = self.ops == (("+", "a", "b"), ("/", "t", 2))
        object.__setattr__(self, "halves_sum", halves)


def relation(
    id: str, takes: str, ops: str, *text: str, c: str = "", k: str = "", **rest: Any
) -> Relation:
    """Build a relation from the written form of its operations and the kinds of its constants.

    Example:
        >>> relation("more", "cmp", "a+c", "{w.does} {c}{w.more} than {a.ref}.", c="add").consts
        (('c', 'add'),)
    """
    consts = tuple((name, kind) for name, kind in (("c", c), ("k", k)) if kind)
    return Relation(id=id, takes=takes, ops=parse_ops(ops), text=text, consts=consts, **rest)

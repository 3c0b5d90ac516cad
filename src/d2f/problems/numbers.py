"""Numbers of a plan: choose given values and constants so that every calculation is exact."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import lcm
from random import Random

from d2f.problems.plan import Node, Plan
from d2f.problems.relation import Relation

# Largest divisor that later steps may demand of a value.
_MOST_DIVISIBILITY = 48
_MOST_FACTOR = 12
_MOST_ADDED = 30

_RANGES = {
    "mul": (3, 9), "per": (2, 6), "price": (2, 9), "pay": (5, 12), "speed": (5, 12),
    "small": (2, 10), "goal": (2, 41), "multiple": (2, 9), "note": (0, 2),
}  # fmt: skip
_FACTORS = ("mul", "per", "price", "pay", "speed")
_SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
_NOTES = (20, 50, 100)

Calculation = tuple[int, str, int, int]


@dataclass(slots=True)
class Filled:
    """The value of a node, its constants and the calculations that give the value."""

    value: int
    c: int = 0
    k: int = 0
    calculations: tuple[Calculation, ...] = ()


def _needs(rng: Random, nodes: list[Node]) -> tuple[list[int], dict[int, int]] | None:
    """Walk back through the plan and find the number by which each value must be divisible."""
    needs = [1] * len(nodes)
    chosen: dict[int, int] = {}
    for i in range(len(nodes) - 1, -1, -1):
        rel = nodes[i].relation
        if rel is None:
            continue
        need = rel.divisor
        if rel.drawn_divisor:
            need = chosen[i] = 2 + int(rng.random() * 7)
        # Without a constant to adjust, the result is divisible only if the inputs are.
        if rel.drawn_divisor or not rel.consts:
            need *= needs[i]
        if rel.halves_sum:
            need *= 2
        if need == 1:
            continue
        for j in (nodes[i].a, nodes[i].b if rel.other == "same" else -1):
            if j >= 0:
                needs[j] = lcm(needs[j], need)
                if needs[j] > _MOST_DIVISIBILITY:
                    return None
    return needs, chosen


def _draw(rng: Random, kind: str, a: int, most: int) -> int:
    """Draw one constant; `_step` rejects constants with which the calculation is not exact."""
    low, high = _RANGES.get(kind, (2, _MOST_ADDED))
    if kind in _FACTORS:
        high = min(high, max(low, most // a))
    elif kind == "sub":
        high = 1 + max(1, min(a - 3, _MOST_ADDED))
    drawn = low + int(rng.random() * (high - low + 1))
    if kind == "goal":
        return a + drawn
    if kind == "multiple":
        return a * drawn
    return _NOTES[drawn] if kind == "note" else drawn


def _compute(rel: Relation, a: int, b: int, c: int, k: int, most: int) -> Filled | None:
    """Carry out the relation's operations; return None if a result is not allowed."""
    env = {"a": a, "b": b, "c": c, "k": k}
    done: list[Calculation] = []
    result = 0
    for sign, left, right in rel.ops:
        # A digit in the relation's operations is a literal number.
        x = left if isinstance(left, int) else env[left]
        y = right if isinstance(right, int) else env[right]
        if sign == "*" and min(x, y) > _MOST_FACTOR:
            return None
        if sign == "/" and (y > _MOST_FACTOR or x % y):
            return None
        result = _SIGNS[sign](x, y)
        # Values start at 2, so that no sentence says "1 apples".
        if not 2 <= result <= most:
            return None
        env["t"] = result
        done.append((x, sign, y, result))
    return Filled(result, c, k, tuple(done))


def _given(rng: Random, node: Node, need: int, most: int) -> Filled | None:
    assert node.frame is not None and node.frame.base is not None
    low, high = node.frame.base
    first, last = -(-low // need), high // need
    if last < first:
        # The range holds no multiple of `need`, so a small multiple is taken.
        first, last = 1, 2
    value = need * (first + int(rng.random() * (last - first + 1)))
    return Filled(value) if 2 <= value <= most else None


def _step(
    rng: Random, rel: Relation, a: int, b: int, need: int, fixed: int, most: int
) -> Filled | None:
    """Find constants for one relation so that its result suits the steps after it."""
    if not rel.consts:
        filled = _compute(rel, a, b, 0, 0, most)
        return filled if filled is not None and filled.value % need == 0 else None
    single = rel.ops[0][1:] == ("a", "c")
    for _ in range(4 if need == 1 else 8):
        c = k = 0
        for name, kind in rel.consts:
            value = fixed if kind == "div" and name == "c" else _draw(rng, kind, a, most)
            # Shift an added or subtracted constant so that `need` divides the result.
            if need > 1 and single and kind == "add":
                value += -(a + value) % need
            elif need > 1 and single and kind == "sub":
                value += (a - value) % need
            if name == "c":
                c = value
            else:
                k = value
        if c > most:
            continue
        filled = _compute(rel, a, b, c, k, most)
        if filled is not None and filled.value % need == 0:
            return filled
    return None


def fill_numbers(rng: Random, plan: Plan, most: int, tries: int = 8) -> list[Filled] | None:
    """Choose all given values and constants; return None if `tries` attempts find none that fit.

    Example:
        >>> from d2f.problems.plan import sample_plan
        >>> rng = Random(3)
        >>> plan = sample_plan(rng, 2)
        >>> plan is None or fill_numbers(rng, plan, 400) is not None
        True
    """
    nodes = plan.nodes
    for _ in range(tries):
        back = _needs(rng, nodes)
        if back is None:
            continue
        needs, chosen = back
        filled: list[Filled] = []
        for i, node in enumerate(nodes):
            rel = node.relation
            if rel is None:
                new = _given(rng, node, needs[i], most)
            else:
                b = filled[node.b].value if node.b >= 0 else 0
                new = _step(rng, rel, filled[node.a].value, b, needs[i], chosen.get(i, 0), most)
            if new is None or (node.frame is not None and new.value > node.frame.most):
                break
            filled.append(new)
        else:
            return filled
    return None

"""Relations that compare any two quantities of a kind: more, fewer, times, shares."""

from __future__ import annotations

from typing import Any

from d2f.problems.relation import Relation, relation


def _compare(id: str, ops: str, *text: str, takes: str = "cmp", **rest: Any) -> Relation:
    return relation(id, takes, ops, *text, **rest)


_HALF = "Half {w.as_} {a.ref} is {calc} {w.u}."
_TWICE = "Twice {w.as_} {a.ref} is {calc} {w.u}."

COMPARISONS: tuple[Relation, ...] = (
    _compare("more", "a+c", "{w.does} {c}{w.more} than {a.ref}.", c="add"),
    _compare("fewer", "a-c", "{w.does} {c}{w.less} than {a.ref}.", c="sub"),
    _compare("inverse_fewer", "a+c", "{a.does} {c}{a.less} than {w.ref}.", c="add",
             peers_only=True),
    _compare("inverse_more", "a-c", "{a.does} {c}{a.more} than {w.ref}.", c="sub",
             peers_only=True),
    _compare("double", "a*2", "{w.does} twice {w.as_} {a.ref}.",
             "{w.does} two times {w.as_} {a.ref}."),
    _compare("triple", "a*3", "{w.does} three times {w.as_} {a.ref}.",
             "{w.does} 3 times {w.as_} {a.ref}."),
    _compare("times", "a*c", "{w.does} {c} times {w.as_} {a.ref}.", c="mul"),
    _compare("half", "a/2", "{w.does} half {w.as_} {a.ref}.",
             "{w.does} only half {w.as_} {a.ref}.", divisor=2),
    _compare("third", "a/3", "{w.does} a third {w.as_} {a.ref}.",
             "{w.does} one third {w.as_} {a.ref}.", divisor=3),
    _compare("quarter", "a/4", "{w.does} a quarter {w.as_} {a.ref}.",
             "{w.does} one fourth {w.as_} {a.ref}.", divisor=4),
    _compare("inverse_double", "a/2", "{a.does} twice {a.as_} {w.ref}.", divisor=2,
             peers_only=True),
    _compare("inverse_times", "a/c", "{a.does} {c} times {a.as_} {w.ref}.", c="div",
             peers_only=True),
    _compare("inverse_half", "a*2", "{a.does} half {a.as_} {w.ref}.", peers_only=True),
    _compare("percent_50", "a/2", "{w.does} 50% {w.as_} {a.ref}.", divisor=2),
    _compare("percent_25", "a/4", "{w.does} 25% {w.as_} {a.ref}.", divisor=4),
    _compare("percent_20", "a/5", "{w.does} 20% {w.as_} {a.ref}.", divisor=5),
    _compare("percent_10", "a/10", "{w.does} 10% {w.as_} {a.ref}.", divisor=10),
    _compare("two_thirds", "a/3;t*2", "{w.does} 2/3 {w.as_} {a.ref}.",
             "{w.does} two thirds {w.as_} {a.ref}.", divisor=3,
             mid="One third {w.as_} {a.ref} is {calc} {w.u}."),
    _compare("three_quarters", "a/4;t*3", "{w.does} 3/4 {w.as_} {a.ref}.",
             "{w.does} three fourths {w.as_} {a.ref}.", divisor=4,
             mid="A quarter {w.as_} {a.ref} is {calc} {w.u}."),
    _compare("half_more", "a/2;a+t", "{w.does} 50%{w.pct_more} than {a.ref}.", divisor=2,
             mid="Half {w.as_} {a.ref} is {calc} {w.u}."),
    _compare("quarter_less", "a/4;a-t", "{w.does} 25%{w.pct_less} than {a.ref}.", divisor=4,
             mid="A quarter {w.as_} {a.ref} is {calc} {w.u}."),
    _compare("more_than_twice", "a*2;t+c", "{w.does} {c}{w.more} than twice {w.as_short} {a.ref}.",
             c="add", mid=_TWICE),
    _compare("less_than_twice", "a*2;t-c", "{w.does} {c}{w.less} than twice {w.as_short} {a.ref}.",
             c="sub", mid=_TWICE),
    _compare("more_than_half", "a/2;t+c", "{w.does} {c}{w.more} than half {w.as_short} {a.ref}.",
             c="add", divisor=2, mid=_HALF),
    _compare("sum", "a+b", "{w.does} {w.as_} {a.ref} and {b.ref} together.", other="same",
             commutes=True),
    _compare("sum_and_more", "a+b;t+c",
             "{w.does} {c}{w.more} than {a.ref} and {b.ref} together.", c="add",
             other="same", commutes=True, mid="{a.ref_up} and {b.ref} together: {calc} {w.u}."),
    _compare("average", "a+b;t/2", "{w.does} {w.as_} the average of {a.ref} and {b.ref}.",
             other="same", commutes=True, mid="{a.ref_up} and {b.ref} together: {calc} {w.u}."),
    _compare("difference", "a-b",
             "{w.does} {w.as_} the difference between {a.ref} and {b.ref}.", other="same"),
    _compare("older", "a+c", "{w.name} is {c} years older than {a.name}.", c="add", takes="age"),
    _compare("younger", "a-c", "{w.name} is {c} years younger than {a.name}.",
             "{a.name} is {c} years older than {w.name}.", c="sub", takes="age"),
    _compare("twice_as_old", "a*2", "{w.name} is twice as old as {a.name}.", takes="age"),
    _compare("half_as_old", "a/2", "{w.name} is half as old as {a.name}.",
             "{a.name} is twice as old as {w.name}.", takes="age", divisor=2),
    _compare("three_times_as_old", "a*3", "{w.name} is three times as old as {a.name}.",
             takes="age"),
    _compare("third_as_old", "a/3", "{a.name} is three times as old as {w.name}.",
             takes="age", divisor=3),
    _compare("age_sum", "a+b", "{w.name} is as old as {a.name} and {b.name} together.",
             takes="age", other="same", commutes=True),
)  # fmt: skip

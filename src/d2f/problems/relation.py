"""Relations: ways of computing a new quantity from earlier ones, with their sentences.

Comparisons relate any two quantities of a kind, questions ask for one more calculation; the events
of stories are in `stories`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Op = tuple[str, str | int, str | int]
"""A sign and two operands: `a`, `b` are the inputs, `c`, `k` constants, `t` is the last result."""


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


def _operations(text: str) -> tuple[Op, ...]:
    """Parse operations such as `a/3;t*2`; digits are literal numbers."""
    ops: list[Op] = []
    for step in text.split(";"):
        sign = next(char for char in "+-*/" if char in step)
        left, right = (int(part) if part.isdigit() else part for part in step.split(sign))
        ops.append((sign, left, right))
    return tuple(ops)


def relation(
    id: str, takes: str, ops: str, *text: str, c: str = "", k: str = "", **rest: Any
) -> Relation:
    """Build a relation from the written form of its operations and the kinds of its constants.

    Example:
        >>> relation("third", "cmp", "a/3;t*2", "{w.does} 2/3 {w.as_} {a.ref}.", divisor=3).ops
        (('/', 'a', 3), ('*', 't', 2))
    """
    consts = tuple((name, kind) for name, kind in (("c", c), ("k", k)) if kind)
    return Relation(id=id, takes=takes, ops=_operations(ops), text=text, consts=consts, **rest)


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


DIRECT = "direct"
"""Id of the question that asks for the last quantity itself."""


def _ask(id: str, takes: str, ops: str, *text: str, **rest: Any) -> Relation:
    return relation(id, takes, ops, *text, ask=True, out="", **rest)


_TOGETHER = "{a.ref_up} and {b.ref} together: {calc} {a.u}."

QUESTIONS: tuple[Relation, ...] = (
    _ask("total", "cmp", "a+b", "{total}", other="same", commutes=True, answer=_TOGETHER),
    _ask("how_many_more", "cmp", "a-b", "{diff}", other="same",
         answer="The difference is {calc} {a.u}."),
    _ask("mean", "cmp", "a+b;t/2", "{mean}", other="same", commutes=True, mid=_TOGETHER,
         answer="The average is {calc} {a.u}."),
    _ask("share_pool", "item", "a+b;t/2",
         "If {a.name} and {b.name} share {a.pool} equally, how many {a.u} does each get?",
         other="same", commutes=True, mid=_TOGETHER, answer="Each gets {calc} {a.u}."),
    _ask("pack_pool", "item", "a+b;t/c",
         "{a.name} and {b.name} put {a.pool} in bags of {c}. How many bags do they fill?",
         other="same", commutes=True, c="div", mid=_TOGETHER, answer="They fill {calc} bags."),
    _ask("sell_pool", "item", "a+b;t*c",
         "{a.name} and {b.name} sell {a.pool} for {c} dollars each. How many dollars do they"
         " earn together?", other="same", commutes=True, c="price", mid=_TOGETHER,
         answer="Together they earn {calc} dollars."),
    _ask("bags_of", "goods", "a/c",
         "How many bags of {c} can {a.name} fill with {a.np}?", c="div",
         answer="{a.name} can fill {calc} bags."),
    _ask("worth", "goods", "a*c",
         "If each {a.one} is worth {c} dollars, how many dollars are {a.np_of} worth?",
         c="price", answer="They are worth {calc} dollars."),
    _ask("target", "goods", "c-a",
         "{a.name} want{a.s} {c} {a.u}. "
         "Besides {a.np}, how many more {a.do} {a.they} need?", c="goal",
         answer="{a.name} need{a.s} {calc} more {a.u}."),
    _ask("rows_of", "goods", "a/c",
         "If {a.name} lay{a.s} {a.np} in {c} equal rows, how many are in each row?", c="div",
         answer="Each row has {calc} {a.u}."),
    _ask("left_after_gifts", "goods", "c*k;a-t",
         "If {a.name} give{a.s} {k} of {a.np} to each of {c} children, how many are left?",
         c="per", k="per", mid="The children get {calc} {a.u}.",
         answer="In the end {a.name} {a.has} {calc} {a.u}."),
    _ask("weekly_total", "pick_rate", "a*7", "How many {a.u} does {a.name} pick in one week?",
         answer="In one week {a.name} picks {calc} {a.u}."),
    _ask("days_total", "make_rate", "a*c", "How many {a.u} does {a.name} make in {c} days?",
         c="mul", answer="In {c} days {a.name} makes {calc} {a.u}."),
    _ask("run_weeks", "run_rate", "a*c", "How many miles does {a.name} run in {c} days?",
         c="mul", answer="In {c} days {a.name} runs {calc} miles."),
    _ask("weeks_to_goal", "week_rate", "c/a",
         "In how many weeks does {a.name} save {c} dollars?", c="multiple",
         answer="{a.name} needs {calc} weeks."),
    _ask("book_nights", "book", "a/c",
         "If {a.name} reads {c} pages each night, how many nights does {a.name} need for"
         " {a.np}?", c="div", answer="{a.name} needs {calc} nights."),
    _ask("months_saved", "month_rate", "a*c",
         "How many dollars does {a.name} save in {c} months?", c="mul",
         answer="In {c} months {a.name} saves {calc} dollars."),
    _ask("days_of_practice", "minutes", "a*c",
         "If {a.name} does this practice on {c} days, how many minutes is that in all?",
         c="per", answer="In {c} days {a.name} practices {calc} minutes."),
    _ask("in_minutes", "hours", "a*60", "How many minutes does {a.name} work?",
         answer="{a.name} works {calc} minutes."),
    _ask("free_time", "hours", "24-a",
         "How many hours of a day of 24 hours does {a.name} not work?",
         answer="{a.name} does not work for {calc} hours."),
    _ask("split_income", "income", "a/c",
         "If {a.name} share{a.s} {a.np} equally among {c} people, how many dollars does each get?",
         c="div", answer="Each gets {calc} dollars."),
    _ask("after_buying", "cash", "c*k;a-t",
         "If {a.name} buy{a.s} {c} caps for {k} dollars each with {a.np}, how many dollars are"
         " left?",
         c="per", k="price", mid="The caps cost {calc} dollars.",
         answer="In the end {a.name} {a.has} {calc} dollars."),
    _ask("change_from", "bill", "c-a",
         "If {a.name} pays {a.their} bill with {c} dollars, how many dollars does {a.they}"
         " get back?",
         c="note", answer="{a.name} gets {calc} dollars back."),
    _ask("several", "price", "a*c", "How many dollars do {c} of the {a.bare}s cost?", c="per",
         answer="Together they cost {calc} dollars."),
    _ask("how_many_can_buy", "price", "c/a",
         "How many of the {a.bare}s can one buy with {c} dollars?", c="multiple",
         answer="One can buy {calc} of the {a.bare}s."),
    _ask("fill_buses", "guests", "a/c",
         "How many vans with {c} seats do the children {a.name} invites fill?", c="div",
         answer="They fill {calc} vans."),
    _ask("free_places", "bus", "c-a",
         "{a.lead} has {c} seats for children. How many of these seats stay free?", c="goal",
         answer="The free seats are {calc} seats."),
    _ask("age_in_years", "age", "a+c", "How old will {a.name} be in {c} years?", c="small",
         answer="{a.name} will be {calc} years old."),
    _ask("age_ago", "age", "a-c", "How old was {a.name} {c} years ago?", c="small",
         answer="{a.name} was {calc} years old."),
    _ask("ages_together", "age", "a+b", "{total}", other="same", commutes=True,
         answer="The sum of the ages is {calc} years."),
    _ask("years_apart", "age", "a-b", "{diff}", other="same",
         answer="{a.name} is {calc} years older."),
)  # fmt: skip

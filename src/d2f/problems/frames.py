"""Frames: the kinds of quantity in a problem, and the wording of each.

A frame is one way of attaching a number to a subject ("Mia picks 12 apples", "the red bus
carries 20 children"). Every quantity of a problem is a frame, a subject and an item, and no two
quantities share all three, so every reference is unambiguous, even when the sentences are
shuffled.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

from d2f.problems.words import SINGULAR


@dataclass(frozen=True, slots=True)
class Subject:
    """A person or thing to which a quantity belongs.

    Example:
        >>> Subject("Mia", "she", "her").name
        'Mia'
    """

    name: str
    they: str = "it"
    their: str = "its"
    plural: bool = False


_ASK = "How many {u} {do} {r} {v}{p}?"


@dataclass(frozen=True, slots=True)
class Frame:
    """One kind of quantity.

    Example:
        >>> FRAMES["pick"].verb
        'picks/pick'
    """

    id: str
    tags: frozenset[str]
    """Tags by which relations choose frames; `cmp` admits comparisons, each other tag its own."""
    verb: str
    """The verb in third person and bare form, separated by a slash."""
    unit: str
    """The plural counted noun; `@` stands for the item of the quantity."""
    base: tuple[int, int] | None = None
    """The range of given values; None for frames whose values are always computed."""
    _: KW_ONLY
    items: str = ""
    """The word group from which the item is drawn if this frame opens a story."""
    post: str = ""
    """Words behind the noun (" left", " each day")."""
    style: str = "count"
    """Wording of comparisons: `count` (as many), `much`, `long` or `far`."""
    who: str = "person"
    """The class of subject: `person`, `day`, `color` or `priced`."""
    lead: str = "{n}"
    """The subject at the start of a sentence; `{n}` is its name, `{x}` its item."""
    ref: str = ""
    """The quantity's subject inside a sentence; none: `lead`. It stands behind "than", too."""
    ask: str = _ASK
    total: str = "How many {u} do {a} and {b} {v}{p} together?"
    mean: str = ""
    """None: `total` with "on average"."""
    diff: str = "How many more {u} does {a} {v}{p} than {b}?"
    peer: str = ""
    """Id of the frame that a comparison with this one creates; none: its own."""
    most: int = 999
    """Largest value of this frame under any settings."""

    def __post_init__(self) -> None:
        """Fill in what follows from other fields."""
        object.__setattr__(self, "ref", self.ref or self.lead)
        object.__setattr__(self, "mean", self.mean or self.total.replace("together", "on average"))
        object.__setattr__(self, "peer", self.peer or self.id)


FRAMES: dict[str, Frame] = {}


def _frame(id: str, tags: str, *rest: Any, **options: Any) -> None:
    FRAMES[id] = Frame(id, frozenset(tags.split()), *rest, **options)


# Things that people own. The tag "item" admits changes of a stock, "goods" uses of one.
_frame("pick", "cmp item goods food", "picks/pick", "@", (6, 40), items="fruit")
_frame("bake", "cmp item goods food crafted", "bakes/bake", "@", (6, 40), items="baked")
_frame("make", "cmp item goods crafted", "makes/make", "@", (6, 40), items="made")
_frame("collect", "cmp item goods", "collects/collect", "@", (6, 40), items="kept")
_frame("buy", "cmp item goods bought", "buys/buy", "@", (4, 30), items="shop")
_frame("buys", "cmp item goods", "buys/buy", "@")
_frame("has", "cmp goods", "has/have", "@", (6, 40), items="kept")
_frame("left", "cmp goods", "has/have", "@", post=" left")
_frame("now", "cmp goods", "has/have", "@", post=" now")
_frame("pool", "cmp goods", "has/have", "@", peer="has")
_frame("each_gets", "cmp", "gets/get", "@", lead="Each friend of {n}", ref="each friend of {n}",
       peer="has")  # fmt: skip
_frame("box", "cmp box", "fills/fill", "boxes", (3, 20))
_frame("shelves", "cmp", "fills/fill", "shelves")
_frame("labels", "cmp", "uses/use", "labels")
_frame("weigh", "cmp", "weigh/weigh", "ounces", style="much", lead="{n}'s {x}",
       ask="How many ounces do {r} weigh?",
       mean="How many ounces is the average of the weights of {a} and {b}?",
       diff="How many more ounces do {a} weigh than {b}?")  # fmt: skip
_frame("days_long", "cmp", "needs/need", "days", style="count")

# Daily, weekly and monthly rates and what they add up to.
_frame("pick_day", "cmp pick_rate", "picks/pick", "@", (3, 20), items="fruit", post=" each day")
_frame("make_day", "cmp make_rate", "makes/make", "@", (3, 20), items="made", post=" each day")
_frame("read_day", "cmp read_rate", "reads/read", "pages", (4, 30), post=" each day")
_frame("run_day", "cmp run_rate", "runs/run", "miles", (2, 9), post=" each day", style="measure")
_frame("save_week", "cmp week_rate", "saves/save", "dollars", (4, 20), post=" each week",
       style="much")  # fmt: skip
_frame("save_month", "cmp month_rate", "saves/save", "dollars", (4, 20), post=" each month",
       style="much")  # fmt: skip
_frame("pick_all", "cmp", "picks/pick", "@", post=" in all")
_frame("make_all", "cmp", "makes/make", "@", post=" in all")
_frame("read_all", "cmp read", "reads/read", "pages", post=" in all")
_frame("run_all", "cmp", "runs/run", "miles", post=" in all", style="measure")
_frame("save_all", "cmp cash", "saves/save", "dollars", post=" in all", style="much")

# Reading, practice, travel.
_frame("read", "cmp read book", "reads/read", "pages", (8, 60))
_frame("pages_left", "cmp pages", "has/have", "pages", post=" left to read")
_frame("practice", "cmp minutes", "practices/practice", "minutes", (10, 60), style="long")
_frame("minutes_all", "cmp minutes_end", "needs/need", "minutes", post=" in all", style="long")
_frame("songs", "cmp songs", "plays/play", "songs", (3, 15))
_frame("work", "cmp hours", "works/work", "hours", (3, 12), style="long")
_frame("cycle", "cmp cycle", "cycles/cycle", "hours", (2, 9), style="long")
_frame("cycled", "cmp", "cycles/cycle", "miles", style="far")
_frame("ride", "cmp ride", "rides/ride", "miles", (5, 40), style="far")
_frame("trip", "cmp gas", "travels/travel", "miles", (10, 60), style="far")
_frame("miles_left", "cmp", "has/have", "miles", post=" left to go", style="measure")
_frame("ride_hours", "cmp", "is/be", "hours", style="long", post=" on the road",
       ask="How many hours {is} {r} on the road?",
       total="How many hours are {a} and {b} on the road together?",
       diff="How many more hours is {a} on the road than {b}?")  # fmt: skip
_frame("gas", "cmp gallons", "uses/use", "gallons of gas", (2, 12))
_frame("laps", "cmp laps", "swims/swim", "laps", (4, 20))
_frame("yards", "cmp", "swims/swim", "yards", style="far")
_frame("weeks", "cmp weeks", "trains/train", "weeks", (2, 8), style="long")
_frame("train_days", "cmp train", "trains/train", "days", (4, 20), style="long")
_frame("run_total", "cmp", "runs/run", "miles", style="far")

# Money.
_frame("earn", "cmp income", "earns/earn", "dollars", (10, 60), style="much")
_frame("bill", "cmp bill", "is/be", "dollars", (10, 60), style="much", lead="{n}'s bill",
       ask="How many dollars is {r}?", total="How many dollars are {a} and {b} together?",
       diff="By how many dollars is {a} higher than {b}?")  # fmt: skip
_frame("pay", "cmp pay", "pays/pay", "dollars", style="much")
_frame("person_pays", "cmp", "pays/pay", "dollars", style="much", lead="Each guest of {n}",
       ref="each guest of {n}", peer="pay")  # fmt: skip
_frame("back", "cmp", "gets/get", "dollars", post=" back", style="much")
_frame("cash_has", "cmp cash", "has/have", "dollars", (10, 60), style="money")
_frame("cash_left", "cmp cash", "has/have", "dollars", post=" left", style="money")
_frame("cash_now", "cmp cash", "has/have", "dollars", post=" now", style="money")
_frame("needs", "", "still needs/still need", "dollars", style="much")
_frame("price", "cmp price", "costs/cost", "dollars", (2, 15), style="much", who="priced",
       lead="{N}", ref="{n}")  # fmt: skip

# Households, recipes, parties, farms.
_frame("cakes", "cmp cakes", "bakes/bake", "cakes", (3, 15))
_frame("flour", "cmp flour", "uses/use", "cups of flour", (6, 40))
_frame("flour_bags", "cmp", "uses/use", "bags of flour")
_frame("guests", "cmp guests", "invites/invite", "children", (6, 30))
_frame("teams", "cmp", "forms/form", "teams")
_frame("party_bags", "cmp", "needs/need", "balloons")
_frame("tables", "cmp tables", "sets/set", "tables", (3, 12))
_frame("chairs", "cmp", "needs/need", "chairs")
_frame("dogs", "cmp four", "counts/count", "@", (3, 20), items="four")
_frame("birds", "cmp two", "counts/count", "@", (3, 20), items="two")
_frame("legs", "cmp", "counts/count", "legs")
_frame("bikes", "cmp bikes", "fixes/fix", "bikes", (3, 20))
_frame("wheels", "cmp", "cleans/clean", "wheels")
_frame("dozens", "cmp dozens", "orders/order", "dozen eggs", (2, 8))
_frame("eggs", "cmp eggs", "has/have", "eggs", (12, 60))
_frame("plant_rows", "cmp plant", "plants/plant", "rows", (3, 15))
_frame("plants", "cmp", "plants/plant", "@")
_frame("age", "age", "is/be", "years", (6, 40), post=" old", style="old", most=99,
       ask="How many years old is {r}?", total="What is the sum of the ages of {a} and {b}?",
       diff="By how many years is {a} older than {b}?")  # fmt: skip

# Subjects other than people.
_frame("bus", "cmp bus", "carries/carry", "children", (8, 40), who="color",
       lead="The {n} bus", ref="the {n} bus")  # fmt: skip
_frame("bus_now", "cmp", "carries/carry", "children", post=" now", who="color",
       lead="The {n} bus", ref="the {n} bus")  # fmt: skip
_frame("bus_snacks", "cmp", "needs/need", "snacks", who="color", lead="The {n} bus",
       ref="the {n} bus")  # fmt: skip
_frame("bus_fares", "cmp", "takes in/take in", "dollars", who="color", lead="The {n} bus",
       ref="the {n} bus", style="much")  # fmt: skip
_frame("hall", "cmp hall", "has/have", "rows of seats", (3, 15), who="color",
       lead="The {n} hall", ref="the {n} hall")  # fmt: skip
_frame("seats", "cmp seats", "has/have", "seats", (20, 60), who="color", lead="The {n} hall",
       ref="the {n} hall")  # fmt: skip
_frame("people", "cmp people", "hosts/host", "people", (10, 60), who="color",
       lead="The {n} hall", ref="the {n} hall")  # fmt: skip
_frame("tickets", "cmp", "earns/earn", "dollars", who="color", lead="The {n} hall",
       ref="the {n} hall", style="much")  # fmt: skip
_frame("goals", "cmp goals", "makes/make", "goals", (3, 15), who="color", lead="The {n} team",
       ref="the {n} team")  # fmt: skip
_frame("score", "cmp score", "scores/score", "points", (8, 40), who="color",
       lead="The {n} team", ref="the {n} team")  # fmt: skip
_frame("score_end", "cmp", "ends with/end with", "points", who="color", lead="The {n} team",
       ref="the {n} team")  # fmt: skip
_frame("day_sales", "cmp day_sales", "sells/sell", "cakes", (6, 40), who="day",
       lead="On {n} the shop", ref="on {n}",
       ask="How many cakes does the shop sell {r}?",
       total="How many cakes does the shop sell {a} and {b} together?",
       diff="How many more cakes does the shop sell {a} than {b}?")  # fmt: skip
_frame("day_money", "cmp", "takes in/take in", "dollars", who="day", style="much",
       lead="On {n} the shop", ref="on {n}",
       ask="How many dollars does the shop take in {r}?",
       total="How many dollars does the shop take in {a} and {b} together?",
       diff="How many more dollars does the shop take in {a} than {b}?")  # fmt: skip


# Frames with these tags open a story so many times as often as others.
_OFTEN = {
    "item": 3,
    "goods": 2,
    "bill": 2,
    "income": 2,
    "guests": 2,
    "bus": 2,
    "cash": 2,
    "price": 4,
    "hours": 3,
    "pick_rate": 2,
    "make_rate": 2,
    "run_rate": 2,
    "week_rate": 2,
    "month_rate": 2,
}

BASE_FRAMES: tuple[Frame, ...] = tuple(
    frame
    for frame in FRAMES.values()
    if frame.base
    for _ in range(max(_OFTEN.get(tag, 1) for tag in frame.tags))
)
"""Frames that may open a story, each as often as its weight in `_OFTEN` says."""

_AS = {
    "count": "as many {u}{p} as",
    "measure": "as many {u}{p} as",
    "much": "as much{p} as",
    "money": "as much money{p} as",
    "long": "as long{p} as",
    "far": "as far{p} as",
    "old": "as old as",
}


@dataclass(frozen=True, slots=True)
class Wording:
    """The phrases of one quantity, which the sentence templates are filled with.

    Example:
        >>> word_quantity(FRAMES["pick"], Subject("Mia", "she", "her"), "apples").does
        'Mia picks'
    """

    name: str
    lead: str
    does: str
    ref: str
    u: str
    p: str
    one: str
    as_: str
    as_short: str
    more: str
    less: str
    pct_more: str
    pct_less: str
    pool: str
    ref_up: str
    bare: str
    np: str
    np_of: str
    do: str
    s: str
    es: str
    has: str
    they: str
    their: str
    v3: str
    ask: str
    find: str
    total: str
    mean: str
    diff: str


@lru_cache(maxsize=65536)
def word_quantity(frame: Frame, subject: Subject, item: str) -> Wording:
    """Return the phrases for one quantity of `subject`.

    Example:
        >>> mia = Subject("Mia", "she", "her")
        >>> word_quantity(FRAMES["left"], mia, "apples").np
        'the apples she has left'
    """
    third, bare = frame.verb.split("/")
    verb = bare if subject.plural else third
    unit = item if frame.unit == "@" else frame.unit
    name = subject.name
    slots = {"n": name, "N": name[0].upper() + name[1:], "x": item}
    lead, ref = frame.lead.format(**slots), frame.ref.format(**slots)
    if subject.plural:
        lead, ref = f"Together {name}", f"{name} together"
    post = frame.post
    ask = frame.ask.format(
        u=unit, do="do" if subject.plural else "does", r=ref, v=bare, p=post,
        **{"is": "are" if subject.plural else "is"},
    )  # fmt: skip
    spread = {"u": unit, "v": bare, "p": post, "a": "{a.ref}", "b": "{b.ref}"}
    counted = frame.style == "count"
    # "all the miles she runs" rather than "the miles she runs in all".
    the, kept = ("all the", "") if post == " in all" else ("the", post)
    return Wording(
        name=name,
        lead=lead,
        does=f"{lead} {verb}",
        ref=ref,
        u=unit,
        p=post,
        one=SINGULAR.get(unit) or unit.removesuffix("s"),
        as_=_AS[frame.style].format(u=unit, p=post),
        as_short="as many as" if counted else _AS[frame.style].format(u=unit, p=""),
        more=f" more {unit}{post}" if counted else f" {unit} more{post}",
        less=f" fewer {unit}{post}" if counted else f" {unit} less{post}",
        pct_more=f" more {unit}{post}",
        pct_less=f" fewer {unit}{post}",
        pool=f"the {unit} they {bare}{post}",
        ref_up=ref[0].upper() + ref[1:],
        bare=name.removeprefix("a "),
        np_of=f"{the} {unit} {name} {verb}{kept}",
        do="do" if subject.plural else "does",
        np=f"{the} {unit} {subject.they} {verb}{kept}",
        s="" if subject.plural else "s",
        es="" if subject.plural else "es",
        has="have" if subject.plural else "has",
        they=subject.they,
        their=subject.their,
        v3=verb,
        ask=ask,
        # Frames that would read badly in the common form have a question of their own.
        find=f"Find how many {unit} {ref} {verb}{post}." if frame.ask == _ASK else ask,
        total=frame.total.format(**spread),
        mean=frame.mean.format(**spread),
        diff=frame.diff.format(**spread),
    )

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
    """Question for the mean; empty: `total` with "on average"."""
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


def _colored(thing: str) -> dict[str, str]:
    """Return the options of a frame whose subject is a thing told by its colour."""
    return {"who": "color", "lead": f"The {{n}} {thing}", "ref": f"the {{n}} {thing}"}


# Subjects other than people.
_BUS, _HALL, _TEAM = map(_colored, ("bus", "hall", "team"))
_frame("bus", "cmp bus", "carries/carry", "children", (8, 40), **_BUS)
_frame("bus_now", "cmp", "carries/carry", "children", post=" now", **_BUS)
_frame("bus_snacks", "cmp", "needs/need", "snacks", **_BUS)
_frame("bus_fares", "cmp", "takes in/take in", "dollars", style="much", **_BUS)
_frame("hall", "cmp hall", "has/have", "rows of seats", (3, 15), **_HALL)
_frame("seats", "cmp seats", "has/have", "seats", (20, 60), **_HALL)
_frame("people", "cmp people", "hosts/host", "people", (10, 60), **_HALL)
_frame("tickets", "cmp", "earns/earn", "dollars", style="much", **_HALL)
_frame("goals", "cmp goals", "makes/make", "goals", (3, 15), **_TEAM)
_frame("score", "cmp score", "scores/score", "points", (8, 40), **_TEAM)
_frame("score_end", "cmp", "ends with/end with", "points", **_TEAM)
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
_OFTEN = {"price": 4, "item": 3, "hours": 3} | dict.fromkeys(
    "goods bill income guests bus cash pick_rate make_rate run_rate week_rate month_rate".split(), 2
)

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


class Wording:
    """The phrases of one quantity, which the sentence templates are filled with.

    Example:
        >>> mia = Subject("Mia", "she", "her")
        >>> Wording(FRAMES["left"], mia, "apples").np
        'the apples she has left'
    """

    def __init__(self, frame: Frame, subject: Subject, item: str) -> None:
        third, bare = frame.verb.split("/")
        many, post, name = subject.plural, frame.post, subject.name
        self.name, self.they, self.their = name, subject.they, subject.their
        self.do, self.s, self.es, self.has = (
            ("do", "", "", "have") if many else ("does", "s", "es", "has")
        )
        self.v3 = verb = bare if many else third
        self.u = unit = item if frame.unit == "@" else frame.unit
        self.p = post
        slots = {"n": name, "N": name[0].upper() + name[1:], "x": item}
        lead, ref = frame.lead.format(**slots), frame.ref.format(**slots)
        if many:
            lead, ref = f"Together {name}", f"{name} together"
        self.lead, self.does = lead, f"{lead} {verb}"
        self.ref, self.ref_up = ref, ref[0].upper() + ref[1:]
        self.bare = name.removeprefix("a ")
        self.one = SINGULAR.get(unit) or unit.removesuffix("s")
        counted, as_ = frame.style == "count", _AS[frame.style]
        self.as_ = as_.format(u=unit, p=post)
        self.as_short = "as many as" if counted else as_.format(u=unit, p="")
        self.pct_more, self.pct_less = f" more {unit}{post}", f" fewer {unit}{post}"
        self.more = self.pct_more if counted else f" {unit} more{post}"
        self.less = self.pct_less if counted else f" {unit} less{post}"
        # "all the miles she runs" rather than "the miles she runs in all".
        the, kept = ("all the", "") if post == " in all" else ("the", post)
        self.np = f"{the} {unit} {subject.they} {verb}{kept}"
        self.np_of = f"{the} {unit} {name} {verb}{kept}"
        self.pool = f"the {unit} they {bare}{post}"
        spread = {"u": unit, "v": bare, "p": post, "a": "{a.ref}", "b": "{b.ref}"}
        being = {"do": self.do, "is": "are" if many else "is"}
        self.ask = frame.ask.format(r=ref, **spread, **being)
        # Frames that would read badly in the common form have a question of their own.
        common = frame.ask == _ASK
        self.find = f"Find how many {unit} {ref} {verb}{post}." if common else self.ask
        self.total = frame.total.format(**spread)
        self.mean = frame.mean.format(**spread)
        self.diff = frame.diff.format(**spread)


word_quantity = lru_cache(maxsize=65536)(Wording)
"""`Wording`, made once for the same arguments."""

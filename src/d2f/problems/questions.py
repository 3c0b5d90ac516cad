"""Questions: the direct one, for the last quantity, and those that need one more calculation."""

from __future__ import annotations

from typing import Any

from d2f.problems.relation import Relation, relation

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

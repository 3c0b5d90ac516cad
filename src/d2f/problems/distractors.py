"""Distractors: true sentences that a problem contains and its answer does not need."""

from __future__ import annotations

from random import Random

from d2f.problems.frames import Wording

# Each fact: its unit, the range of its number, its sentence. A fact is not used in a story that
# counts in the same unit.
FACTS: tuple[tuple[str, tuple[int, int], str], ...] = (
    ("years", (6, 60), "{n} is {c} years old."),
    ("miles", (2, 20), "{n} lives {c} miles from school."),
    ("minutes", (5, 30), "The walk home takes {n} {c} minutes."),
    ("days", (3, 20), "{n} goes on a trip in {c} days."),
    ("cousins", (2, 12), "{n} has {c} cousins."),
    ("dollars", (10, 60), "{n} has a coat that cost {c} dollars."),
    ("hours", (7, 10), "{n} sleeps {c} hours a night."),
    ("pages", (20, 90), "{n} has a diary of {c} pages."),
    ("songs", (4, 30), "{n} knows {c} songs."),
    ("toys", (3, 30), "{n} has {c} old toys at home."),
    ("hats", (2, 9), "{n} has {c} hats at home."),
    ("windows", (4, 20), "The house of {n} has {c} windows."),
)


def draw_fact(rng: Random, name: str, units: set[str]) -> str:
    """Return a fact about `name` that shares no unit with the story.

    Example:
        >>> draw_fact(Random(0), "Mia", set()).endswith(".")
        True
    """
    start = int(rng.random() * len(FACTS))
    for i in range(len(FACTS)):
        unit, (low, high), text = FACTS[(start + i) % len(FACTS)]
        if unit not in units:
            return text.format(n=name, c=low + int(rng.random() * (high - low + 1)))
    raise AssertionError("a story uses fewer units than there are facts")


def distract(rng: Random, stranger: Wording, known: Wording | None) -> str:
    """Return a sentence in the story's wording about a person who plays no part in it."""
    number = 2 + int(rng.random() * 28)
    if known is not None and rng.random() < 0.4:
        return f"{stranger.does} {number}{stranger.more} than {known.ref}."
    return f"{stranger.does} {number} {stranger.u}{stranger.p}."

"""The closed vocabulary of the problems: names, days, colours and countable things.

Everything is written by hand and kept small, so that a byte-pair vocabulary of about a
thousand entries covers it in one or two tokens a word.
"""

from __future__ import annotations

__all__ = ["COLORS", "DAYS", "ITEMS", "PEOPLE", "PRICED", "SINGULAR"]

# First names with the pronoun and the possessive that go with them.
PEOPLE: tuple[tuple[str, str, str], ...] = tuple(
    (name, "she", "her")
    for name in (
        "Mia Ann Zoe Lily Ella Nora Ruth Jane Rosa Kate Lena Eva Sara Amy Maya Tina Nina Lucy Ivy"
        " June"
    ).split()
) + tuple(
    (name, "he", "his")
    for name in (
        "Tom Ben Sam Max Leo Jack Paul Omar Luis Adam Eric Noah Hugo Carl Dan Ivan Finn Theo Ray"
        " Joe"
    ).split()
)

DAYS: tuple[str, ...] = (
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
)

COLORS: tuple[str, ...] = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "brown",
    "gray",
    "pink",
    "purple",
)

# Plural nouns by the verb they go with; a frame names the group it draws from.
ITEMS: dict[str, tuple[str, ...]] = {
    "fruit": ("apples", "pears", "plums", "lemons", "peaches"),
    "baked": ("muffins", "cookies", "pies", "rolls"),
    "made": ("cards", "kites", "masks", "bracelets", "candles"),
    "kept": ("stamps", "shells", "marbles", "stickers", "buttons"),
    "shop": ("pens", "notebooks", "balloons", "books", "brushes", "beads"),
    "goods": ("pens", "notebooks", "balloons", "books", "brushes", "beads", "toys", "hats"),
    "four": ("dogs", "horses", "cows", "sheep"),
    "two": ("ducks", "hens", "birds"),
    "crops": ("carrots", "onions", "beans", "tulips"),
}

# Things with a price of their own, with the article that stands before them.
PRICED: tuple[str, ...] = (
    "a pen",
    "a notebook",
    "a book",
    "a bag",
    "a toy",
    "a hat",
    "a ball",
    "a cup",
    "a lamp",
    "a kite",
)

SINGULAR: dict[str, str] = {
    "peaches": "peach",
    "berries": "berry",
    "brushes": "brush",
    "boxes": "box",
    "children": "child",
    "cookies": "cookie",
    "sheep": "sheep",
    "people": "person",
}

"""The closed vocabulary of the problems: names, days, colours and countable things.

The lists are short, so that a byte-pair vocabulary of about a thousand entries encodes each word in
one or two tokens.
"""

from __future__ import annotations

# First names, each with its pronoun and its possessive.
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

DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

COLORS = tuple("red blue green yellow white black brown gray pink purple".split())

# Plural nouns by word group; a frame names the group from which its item is drawn.
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

# Things that have a price, with their articles.
PRICED = tuple(f"a {thing}" for thing in "pen notebook book bag toy hat ball cup lamp kite".split())

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

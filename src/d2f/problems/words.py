"""The closed vocabulary of the problems: names, days, colours and countable things.

The lists are short, so that a byte-pair vocabulary of about a thousand entries encodes each word in
one or two tokens.
"""

from __future__ import annotations

# First names, each with its pronoun and its possessive.
PEOPLE: tuple[tuple[str, str, str], ...] = tuple(
    (name, they, their)
    for names, they, their in (
        ("Mia Ann Zoe Lily Ella Nora Ruth Jane Rosa Kate Lena Eva Sara Amy Maya Tina Nina Lucy Ivy"
         " June", "she", "her"),
        ("Tom Ben Sam Max Leo Jack Paul Omar Luis Adam Eric Noah Hugo Carl Dan Ivan Finn Theo Ray"
         " Joe", "he", "his"),
    )
    for name in names.split()
)  # fmt: skip

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

SINGULAR = {
    "peaches": "peach", "brushes": "brush", "boxes": "box", "children": "child",
    "cookies": "cookie", "sheep": "sheep", "people": "person",
}  # fmt: skip

# Facts beside a story: the unit, the range of the number, the sentence. A fact is not told in a
# story that counts in the same unit.
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

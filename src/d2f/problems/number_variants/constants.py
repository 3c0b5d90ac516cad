"""Numbers that words name or imply: two, half, a dozen, the days of a week."""

from __future__ import annotations

import re
from fractions import Fraction

_HALF, _THIRD, _FOURTH = Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)
_CARDINALS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_PARTS = "third fourth fifth sixth seventh eighth ninth tenth".split()
_WORDS: dict[str, tuple[int | Fraction, ...]] = {
    **{word: (number,) for number, word in enumerate(_CARDINALS, 2)},
    **{word: (10 * number,) for number, word in enumerate(_TENS, 2)},
    **{f"{word}s?": (n, Fraction(1, n), n - 1) for n, word in enumerate(_PARTS, 3)},
    "hundreds?": (100,), "thousands?": (1000,), "millions?": (10**6,), "dozens?": (12, 6),
    "half|halves|halfway|halved": (2, _HALF, 50),
    "twice|doubles?|doubled|doubling|couple|pairs?|both|twins?|either|neither|other": (2,),
    "second|two-\\w+|again|another|back|trip|return\\w*": (2,),
    "husband|wife|married|boyfriend|girlfriend|spouse|together|parents|siblings?": (2,),
    "thrice|triples?|tripled|tripling|triplets?|trio": (3,),
    "quadruples?|quadrupled|quadruplets|quartet": (4,),
    "quarters?": (4, _FOURTH, 25, 3, 15), "quintuple\\w*": (5,), "fortnight": (14,),
    "weeks?|weekly": (7, 52, 4), "weekends?": (2, 5), "weekdays?|workdays?|school": (5,),
    "days?|daily|everyday|today|tomorrow|yesterday": (24, 7, 30, 365, 31),
    "hours?|hourly": (60, 24, 3600), "minutes?|mins?": (60,), "seconds?": (60, 3600),
    "months?|monthly": (12, 30, 4, 31, 28), "years?|yearly|annual\\w*|birthday": (12, 52, 365),
    "mornings?|evenings?|noon|midnight|night": (12, 24, 2), "decades?": (10,),
    "century|centuries": (100,), "percent\\w*|cents?|discount": (100, Fraction(1, 100)),
    "dimes?": (10, Fraction(1, 10)), "nickels?": (5, Fraction(1, 20)),
    "feet|foot|ft": (12, 3), "yards?": (3, 36),
    "inch\\w*": (12,), "miles?": (5280, 1760), "pounds?|ounces?|oz|lbs?": (16,),
    "tons?": (2000, 1000), "gallons?|quarts?|pints?|cups?": (2, 4, 8, 16, 32, 128),
    "liters?|litres?|kilo\\w*|km|kg|grams?|ml": (1000,), "meters?|metres?": (100, 1000),
    "centimet\\w+|millimet\\w+|cm|mm": (10, 100), "squares?|squared": (4, 2),
    "rectang\\w+|perimeter": (2, 4), "triang\\w+": (3, 2), "cubes?|dice|die": (6, 3),
    "pentagon\\w*": (5,), "hexagon\\w*": (6,), "octagon\\w*|octopus\\w*|spiders?": (8,),
    "legs?|dogs?|cats?|cows?|horses?|pigs?|sheep|goats?|cars?|wheels?|tires?": (4, 2),
    "chickens?|birds?|ducks?|hands?|feet|eyes?|ears?|shoes?|socks?|bi\\w*cycles?|bikes?": (2,),
    "tricycles?": (3,), "deck": (52,), "seasons?": (4,), "alphabet": (26,), "degrees?": (180, 360),
}  # fmt: skip
_PATTERNS = [
    (re.compile(rf"\b(?:{words})\b", re.IGNORECASE), frozenset(map(Fraction, values)))
    for words, values in _WORDS.items()
]


def named_values(text: str) -> frozenset[Fraction]:
    """Return all values that words of a text name or imply; `%` implies 100 and 1/100.

    Example:
        >>> sorted(map(str, named_values("Half of the eggs of one dozen.")))
        ['0', '1', '1/2', '12', '2', '50', '6']
    """
    values = {Fraction(0), Fraction(1)} | (
        {Fraction(100), Fraction(1, 100)} if "%" in text else set()
    )
    for pattern, named in _PATTERNS:
        if pattern.search(text):
            values |= named
    return frozenset(values)

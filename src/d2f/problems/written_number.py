"""Numbers as people write them, and the one that ends the response to a word problem."""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal

MARK = "####"
"""Mark that stands before a response's final answer."""
MAX_DIGITS = 1000
"""Most digits of a number. Python's int() parses up to 4,300; no answer needs many."""

_MINUS = "\\-\N{MINUS SIGN}"  # both minus signs, for a character class of a pattern
# A comma belongs to a number only if all its commas separate groups of three digits: 1,234 is one
# number, and 1,2,3 are three.
_GROUPED = r"(?<!\d,)[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)"
# A dash behind a word, a number or a bracket is no sign, it joins or subtracts: 5-6, GPT-4, (x)-2.
_SIGN = rf"(?:(?<![\w)\]}}%.{_MINUS}])(?P<sign>[{_MINUS}]))?"
_NUMBER = re.compile(
    rf"{_SIGN}[$€£]?(?P<digits>(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    rf"(?:[eE](?P<power>[+{_MINUS}]?\d{{1,4}})(?!\d))?"
)
_WHOLE = re.compile(
    rf"\$?(?P<sign>[{_MINUS}]?)[ ]*\$?[ ]*"
    r"(?P<digits>[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+|\d+)[ ]*\.?",
    re.ASCII,
)


def last_number(text: str) -> Decimal | None:
    r"""Return the last number in a text; None if there is none or it has over 1,000 digits.

    A minus sign (`-` or U+2212) belongs to the number unless it joins or subtracts, a comma if it
    separates groups of three digits. A power of ten may follow behind `e`, and a leading zero may
    be missing.

    Example:
        >>> last_number("3 boxes of 40: 3 * 40 = 1,200.0\n#### 1,200.")
        Decimal('1200')
        >>> [int(last_number(text)) for text in ("pages 5-6", "-7", "1, 2, 3", "1.2e3")]
        [6, -7, 3, 1200]
        >>> last_number("none") is None
        True
    """
    found = next(iter(deque(_NUMBER.finditer(text), maxlen=1)), None)
    if found is None or len(found["digits"]) > MAX_DIGITS:
        return None
    sign = "-" if found["sign"] else ""
    power = (found["power"] or "0").replace("\N{MINUS SIGN}", "-")
    return Decimal(f"{sign}{found['digits'].replace(',', '')}e{power}")


def whole_number(text: str) -> int | None:
    """Return the whole number that a text consists of; None for any other text.

    Commas or spaces between groups of three digits, a dollar sign and a closing full stop are
    accepted, more than 1,000 digits are not.

    Example:
        >>> whole_number("-$1,200."), whole_number("1 200"), whole_number("1, 2")
        (-1200, 1200, None)
    """
    found = _WHOLE.fullmatch(text.strip())
    if found is None:
        return None
    digits = re.sub("[, ]", "", found["digits"])
    if len(digits) > MAX_DIGITS:
        return None
    return -int(digits) if found["sign"] else int(digits)


def extract_answer(text: str) -> int | None:
    r"""Return the whole number after the last `####`; None if there is none or it is malformed.

    Commas or spaces between groups of three digits, a minus, a dollar sign and a closing full stop
    are accepted. Any other text after the mark on its line, or more than 1,000 digits, makes the
    answer malformed.

    Example:
        >>> extract_answer("She has 40 * 30 = 1200 cards.\n#### 1,200")
        1200
        >>> extract_answer("no answer") is None
        True
    """
    _, mark, rest = text.rpartition(MARK)
    if not mark:
        return None
    lines = rest.strip().splitlines()
    return whole_number(lines[0]) if lines else None

"""Reading the final answer out of a response."""

from __future__ import annotations

__all__ = ["MARK", "extract_answer"]

MARK = "####"
MAX_DIGITS = 1000
"""Python reads 4,300, unless told otherwise; no problem asks for a number of more than a few."""


def extract_answer(text: str) -> int | None:
    r"""Return the whole number after the last `####`, or None where there is none.

    Thousands commas, spaces, a dollar sign and a closing full stop are accepted; anything else
    after the mark on its line, or more than 1,000 digits, makes the answer malformed.

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
    digits = lines[0].replace(",", "").replace(" ", "") if lines else ""
    digits = digits.removesuffix(".").removeprefix("$")
    sign = -1 if digits.startswith("-") else 1
    digits = digits.removeprefix("-").removeprefix("$")
    # int() would also take underscores and other scripts' digits.
    if not (digits.isascii() and digits.isdigit()) or len(digits) > MAX_DIGITS:
        return None
    return sign * int(digits)

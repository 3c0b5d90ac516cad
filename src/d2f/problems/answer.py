"""Extract the final answer from the response to a word problem."""

from __future__ import annotations

from d2f.problems.written_number import whole_number

__all__ = ["MARK", "extract_answer"]

MARK = "####"


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

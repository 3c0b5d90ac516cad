"""Check a variant independently of the code that makes variants."""

from __future__ import annotations

import re
from fractions import Fraction

from d2f.problems.number_variants.numbers import Value, find_numbers, read_formula
from d2f.problems.number_variants.variants import Variant

_NUMBER = re.compile(r"\d[\d,.]*\d|\d|\.\d+")
_STEP = re.compile(r"<<([^<>=]*)=([^<>=]*)>>")


def find_faults(original: Variant, variant: Variant) -> list[str]:
    r"""Return the faults of a variant as texts.

    A variant has no fault if it has the words of the original and another question; each annotation
    is a true equation; each result is positive or whole if the original's is; the last line is the
    last result; and each other number of the answer is in the question, a result, or unchanged.

    Args:
        original: The problem of which `make_variants` made the variant, with the annotations that
            its variants have.
        variant: The variant.

    Example:
        >>> one = Variant(question="2 and 3?", answer="2+3=<<2+3=5>>5\n#### 5")
        >>> find_faults(one, Variant(question="4 and 3?", answer="4+3=<<4+3=7>>8\n#### 7"))
        ["the answer's 8 is neither in the question nor a result"]
    """
    faults = []
    for name in ("question", "answer"):
        before, after = (
            _NUMBER.sub("0", _STEP.sub("", getattr(one, name))) for one in (original, variant)
        )
        if before != after:
            faults.append(f"the words of the {name} differ")
    if original.question == variant.question:
        faults.append("the question is the same")
    steps = [m.groups() for m in _STEP.finditer(variant.answer)]
    was = [find_numbers(m[2])[0].value for m in _STEP.finditer(original.answer)]
    results: list[Value] = []
    for formula_text, stated_text in steps:
        formula, stated = read_formula(formula_text), find_numbers(stated_text)[0].value
        results.append(stated)
        if formula is None or formula.work_out([n.value for n in formula.operands]) != stated:
            faults.append(f"{formula_text} is not {stated_text}")
    if len(was) != len(results):
        return [*faults, "it has other steps"]
    for old, new in zip(was, results, strict=True):
        if (old > 0) != (new > 0) or (old.denominator == 1) != (new.denominator == 1):
            faults.append(f"{old} has become {new}")
    return faults + _unexplained(original, variant, results)


def _unexplained(original: Variant, variant: Variant, results: list[Value]) -> list[str]:
    known = {Fraction(n.value) for n in find_numbers(variant.question)} | set(results)
    # Numbers that people derive from a percentage without writing it down.
    for value in list(known):
        share = Fraction(value) / 100
        known |= {share, 1 - share, 1 + share, 100 - value, 100 + value}
    before, after = (find_numbers(_STEP.sub("", one.answer)) for one in (original, variant))
    faults = []
    for old, new in zip(before, after, strict=False):
        if new.value != old.value and new.value not in known:
            faults.append(f"the answer's {new.text} is neither in the question nor a result")
    if not after or not results or after[-1].value != results[-1]:
        faults.append("the last line is not the last result")
    return faults

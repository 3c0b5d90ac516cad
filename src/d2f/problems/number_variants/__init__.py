r"""Variants of worked problems with other numbers, as further training data.

A problem is parsed (`worked_problem`): each number of its answer must come from the question, an
earlier step, or a word that names it. Numbers of the question whose uses are all unambiguous may
change (`redraw`), and the text is written again with new numbers (`variants`). Problems need the
annotations of GSM8K; those that are missing behind written-out sums are added.

Example:
    >>> from d2f.problems.number_variants import make_variants
    >>> answer = "He has 14*2=<<14*2=28>>28.\n#### 28"
    >>> make_variants("Bo halves 14 pies. How many halves?", answer, most=1)[0].question
    'Bo halves 13 pies. How many halves?'
"""

from d2f.problems.number_variants.variants import (
    Collection,
    Variant,
    make_variants,
    strip_annotations,
)

__all__ = [
    "Collection",
    "Variant",
    "make_variants",
    "strip_annotations",
]

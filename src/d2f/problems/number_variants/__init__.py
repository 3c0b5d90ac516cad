r"""Variants of worked problems with other numbers, for training on more than people wrote.

A problem is taken apart (`worked_problem`): each number of its answer must come from the question,
an earlier step, or a word that names it. What can only be one of these may change (`redraw`), and
the text is written again with new numbers (`variants`). Annotated problems such as GSM8K's are
needed; sums that are written out without annotation are found, too (`annotate`).

Example:
    >>> from d2f.problems.number_variants import make_variants
    >>> answer = "He has 14*2=<<14*2=28>>28.\n#### 28"
    >>> make_variants("Bo halves 14 pies. How many halves?", answer, most=1)[0].question
    'Bo halves 13 pies. How many halves?'
"""

from d2f.problems.number_variants.collection import Collection, Made
from d2f.problems.number_variants.variants import Variant, make_variants, strip_annotations

__all__ = [
    "Collection",
    "Made",
    "Variant",
    "make_variants",
    "strip_annotations",
]

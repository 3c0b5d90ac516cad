"""Generator of grade-school word problems with worked answers; it needs no data files.

A problem is drawn in four stages, one file each: a plan of relations (`plan`), numbers with which
every calculation is exact (`numbers`), names and things (`words`), and sentences (`frames`,
`relation`, `stories`).

Example:
    >>> from d2f.problems import extract_answer, generate_problem
    >>> problem = generate_problem(seed=0, index=0, split="test")
    >>> extract_answer(problem.response) == problem.answer
    True
"""

from d2f.problems.generator import generate_problem, generate_problems
from d2f.problems.plan import QUESTION_CATALOGUE as QUESTIONS
from d2f.problems.plan import RELATIONS
from d2f.problems.problem import SPLITS, Problem, ProblemConfig
from d2f.problems.relation import Relation
from d2f.problems.written_number import extract_answer

__all__ = [
    "QUESTIONS",
    "RELATIONS",
    "SPLITS",
    "Problem",
    "ProblemConfig",
    "Relation",
    "extract_answer",
    "generate_problem",
    "generate_problems",
]

"""Generator of programming problems: short Python functions to write, with hidden tests.

A function is a pipeline of one to four operations on numbers, strings and lists. It is drawn in
stages, one file each: operations and their arguments (`pipeline`), a sentence (`wording`), calls
whose results tell the function from similar ones (`inputs`, `cases`). Answers are judged by running
them.

Example:
    >>> from d2f.problems.functions import generate_function_problem, program
    >>> problem = generate_function_problem(seed=0, index=0, split="test")
    >>> exec(program(problem, problem.response))
"""

from d2f.problems.functions.generator import (
    generate_function_problem,
    generate_function_problems,
    split_of_operations,
)
from d2f.problems.functions.operation import OPERATIONS
from d2f.problems.functions.problem import FunctionConfig, FunctionProblem, program

__all__ = [
    "OPERATIONS",
    "FunctionConfig",
    "FunctionProblem",
    "generate_function_problem",
    "generate_function_problems",
    "program",
    "split_of_operations",
]

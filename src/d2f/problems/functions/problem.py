"""A function problem, and the settings of its difficulty."""

from __future__ import annotations

from dataclasses import dataclass

from d2f.problems.problem import check_range, check_steps

MOST_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionProblem:
    r"""A function to write, with an answer and the tests that judge answers.

    Example:
        >>> FunctionProblem(
        ...     prompt="Write a function f(n) that doubles n.\n>>> f(2)\n4",
        ...     response="def f(n):\n    n = n * 2\n    return n",
        ...     examples=("assert repr(f(2)) == '4'",), tests=("assert repr(f(5)) == '10'",),
        ...     entry_point="f", structure="int>times(#)", num_steps=1,
        ... ).entry_point
        'f'
    """

    prompt: str
    """Description of the function, and calls with results as in an interactive session."""
    response: str
    """One right answer: plain Python, a line or a short loop for each step."""
    examples: tuple[str, ...]
    """Assertions on the calls that the prompt shows."""
    tests: tuple[str, ...]
    """Assertions on the hidden calls."""
    entry_point: str
    """The name of the function."""
    structure: str
    """The type of the first parameter and the operations in order, each with the kind of its
    argument (`#` for a constant, a type for a parameter), without names and numbers."""
    num_steps: int
    """The number of operations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FunctionConfig:
    """Settings of the generator of function problems.

    Raises `ConfigError` for settings out of range.

    Example:
        >>> FunctionConfig(max_steps=2).min_steps
        1
    """

    min_steps: int = 1
    """The fewest operations; step counts are uniform up to `max_steps`."""
    max_steps: int = 4
    """The most operations, at most 4."""
    num_examples: int = 2
    """Calls shown in the prompt, 1 to 3."""
    num_tests: int = 8
    """Hidden tests, 6 to 10. Up to two more are added if a function that lacks a step or has
    another constant would pass."""
    parameter_rate: float = 0.35
    """The probability that a step's number or letter is a parameter instead of a constant."""
    max_chars: int = 300
    """Most characters of a prompt, 200 or more; problems with longer ones are drawn again."""

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_steps(self.min_steps, self.max_steps, MOST_STEPS)
        check_range("num_examples", self.num_examples, 1, 3)
        check_range("num_tests", self.num_tests, 6, 10)
        check_range("parameter_rate", self.parameter_rate, 0, 1)
        check_range("max_chars", self.max_chars, 200)


def program(problem: FunctionProblem, text: str) -> str:
    r"""Return a program that runs an answer and its hidden tests, and raises if one fails.

    The answer runs in a namespace of its own, so that it can neither swallow the tests (by an open
    quote, say) nor end the program early by `exit()`. Results are compared by their `repr`, so `1`
    equals neither `True` nor `1.0`. Nothing here protects the machine; run it in a sandbox.

    Args:
        problem: The problem.
        text: The answer as Python source, without fences or explanations around it.

    Example:
        >>> problem = FunctionProblem(
        ...     prompt="", response="def f(n):\n    return n + 1", examples=(),
        ...     tests=("assert repr(f(1)) == '2'",),
        ...     entry_point="f", structure="int>plus(#)", num_steps=1,
        ... )
        >>> exec(program(problem, problem.response))
        >>> exec(program(problem, "def f(n):\n    return n + 1.0"))
        Traceback (most recent call last):
        AssertionError
    """
    lines = [
        f"answer = {text!r}",
        'space = {"__name__": "answer"}',
        "try:",
        '    exec(compile(answer, "answer", "exec"), space)',
        f"    {problem.entry_point} = space[{problem.entry_point!r}]",
        *(f"    {test}" for test in problem.tests),
        "except SystemExit:",
        '    raise AssertionError("the answer ended the program") from None',
    ]
    return "\n".join(lines) + "\n"

"""A word problem, the settings of its difficulty, its random stream, and the split it is in."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from random import Random

from d2f.errors import ConfigError

SPLITS: tuple[str, ...] = ("train", "validation", "test")

MOST_STEPS = 7
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    r"""A word problem with its worked answer.

    Example:
        >>> Problem(prompt="?", response="1 + 1 = 2\n#### 2", answer=2, num_steps=1,
        ...         structure="direct(more(given))").answer
        2
    """

    prompt: str
    """The story and the question, on one line."""
    response: str
    """A sentence with a calculation for each step, then a line `#### N`."""
    answer: int
    num_steps: int
    """The number of calculations in the response."""
    structure: str
    """The relations and their inputs as a text, without names, numbers and things."""
    distractors: tuple[str, ...] = ()
    """The sentences of the prompt that the answer does not need."""
    shuffled: bool = False
    """Whether some quantity is used before the sentence that determines it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemConfig:
    """Settings of the generator of word problems.

    Example:
        >>> ProblemConfig(min_steps=2, max_steps=3).max_steps
        3
    """

    min_steps: int = 2
    """The fewest calculations; step counts are uniform up to `max_steps`."""
    max_steps: int = 7
    """The most calculations, at most 7."""
    distractor_rate: float = 0.25
    """The probability of a distractor, and, after a first one, of a second."""
    shuffle_rate: float = 0.1
    """The probability that the sentences before the question are shuffled."""
    max_value: int = 200
    """The largest number that is given or computed, 100 to 999."""
    max_words: int = 85
    """Most words of a prompt, 60 or more; longer stories are drawn again."""

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        check_steps(self.min_steps, self.max_steps, MOST_STEPS)
        for name in ("distractor_rate", "shuffle_rate"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("max_value", self.max_value, 100, 999)
        check_range("max_words", self.max_words, 60)


def check_steps(least: int, most: int, limit: int) -> None:
    """Refuse counts of steps from `least` to `most` that are not in 1 to `limit`."""
    if not 1 <= least <= most <= limit:
        raise ConfigError(f"need 1 <= min_steps <= max_steps <= {limit}, got {least} and {most}")


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuse a setting that is not in `low` to `high`."""
    if not low <= value <= high:
        allowed = f"at least {low}" if high == math.inf else f"in {low} … {high}"
        raise ConfigError(f"{name} must be {allowed}, got {value}")


def problem_stream(seed: int, index: int, split: str) -> Random:
    """Return the random stream of one problem, which depends on the three arguments alone.

    The arguments are hashed, so that neighbouring numbers give unrelated streams.

    Raises:
        ValueError: The split is unknown or the index negative.

    Example:
        >>> problem_stream(0, 5, "test").random() == problem_stream(0, 5, "test").random()
        True
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    part = SPLITS.index(split)
    x = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + part + 1) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return Random(x ^ (x >> 31))


def split_of(structure: str) -> str:
    """Return the split of a structure: of 10, 8 are for training and 1 for each other split.

    Example:
        >>> split_of("direct(more(half(given)))") in ("train", "validation", "test")
        True
    """
    digest = hashlib.blake2b(structure.encode(), digest_size=4).digest()
    bucket = int.from_bytes(digest, "big") % 10
    return "train" if bucket < 8 else ("validation" if bucket == 8 else "test")

"""A collection of worked problems: what is kept aside, what is trained on, what tests it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from d2f.problems.number_variants.variants import MOST_VARIANTS, Variant, make_variants

NUM_KEPT_ASIDE = 500
NUM_KNOWN = 1000


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was made of one problem."""

    original: Variant
    training: tuple[Variant, ...]
    """Variants to train on."""
    new_numbers: Variant | None
    """One more, to test on: a known problem with new numbers."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    r"""Worked problems in three parts, decided by the seed and the questions alone.

    Args:
        problems: Questions with annotated answers.
        seed: Another seed keeps other problems aside and draws other numbers.

    Example:
        >>> problems = [Variant(question=f"{'q' * n}-9?", answer="#### 9") for n in range(40)]
        >>> collection = Collection(problems=problems)
        >>> len(collection.kept_aside()), len(collection.to_train_on())
        (4, 36)
    """

    problems: Sequence[Variant]
    seed: int = 0

    def kept_aside(self) -> list[Variant]:
        """Problems to choose settings on; neither they nor variants of them are trained on.

        There are 500 of them, or a tenth where there are fewer than 5,000 in all.
        """
        return self._ordered()[: self._num_aside()]

    def to_train_on(self) -> list[Variant]:
        """All others, in the order in which they are asked for new numbers.

        Problems that differ from one that is kept aside in their numbers only are left out.
        """
        aside = {_words(problem) for problem in self.kept_aside()}
        rest = self._ordered()[self._num_aside() :]
        return [problem for problem in rest if _words(problem) not in aside]

    def make(self, problem: Variant) -> Made:
        """A problem's variants; the first one drawn is kept from training."""
        made = make_variants(
            problem.question, problem.answer, seed=self.seed, most=MOST_VARIANTS + 1
        )
        return Made(
            original=problem,
            training=tuple(made[1:]),
            new_numbers=made[0] if made else None,
        )

    def known_with_new_numbers(self, count: int = NUM_KNOWN) -> list[Variant]:
        """The test set of known problems with new numbers: of the first so many that have one.

        No question among them is one that people wrote. Training rows that come to the same by
        chance, as variants of other problems with the same words, must be left out by who writes
        them.
        """
        found: dict[str, Variant] = {}
        written = {problem.question for problem in self.problems}
        for problem in self.to_train_on():
            if len(found) == count:
                break
            # What `make` draws first.
            for new in make_variants(problem.question, problem.answer, seed=self.seed, most=1):
                if new.question not in written:
                    found.setdefault(new.question, new)
        return list(found.values())

    def _num_aside(self) -> int:
        return min(NUM_KEPT_ASIDE, len(self.problems) // 10)

    def _ordered(self) -> list[Variant]:
        """By a hash of the question, so that the order of the file does not matter."""

        def key(problem: Variant) -> bytes:
            return hashlib.sha256(f"part {self.seed}\n{problem.question}".encode()).digest()

        return sorted(self.problems, key=key)


def _words(problem: Variant) -> str:
    """A question without its numbers."""
    return re.sub(r"\d[\d,.]*", "0", problem.question)

"""Split a collection of worked problems: kept aside, trained on, test set with new numbers."""

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
    """A problem and its variants."""

    original: Variant
    training: tuple[Variant, ...]
    """Variants to train on."""
    new_numbers: Variant | None
    """A further variant, for the test set of known problems with new numbers."""


@dataclass(frozen=True, kw_only=True)
class Collection:
    r"""Worked problems in three parts, which depend on the seed and the questions alone.

    Args:
        problems: Questions with annotated answers.
        seed: Decides which problems are kept aside and which numbers are drawn.

    Example:
        >>> problems = [Variant(question=f"{'q' * n}-9?", answer="#### 9") for n in range(40)]
        >>> collection = Collection(problems=problems)
        >>> len(collection.kept_aside()), len(collection.to_train_on())
        (4, 36)
    """

    problems: Sequence[Variant]
    seed: int = 0

    def kept_aside(self) -> list[Variant]:
        """Return the problems to choose settings on; no training row is a variant of them.

        Their number is 500, or a tenth of all problems if that is less.
        """
        return self._ordered()[: self._num_aside()]

    def to_train_on(self) -> list[Variant]:
        """Return the problems to train on, in the order in which new numbers are drawn.

        A problem that differs from one kept aside only in its numbers is left out.
        """
        aside = {_words(problem) for problem in self.kept_aside()}
        rest = self._ordered()[self._num_aside() :]
        return [problem for problem in rest if _words(problem) not in aside]

    def make(self, problem: Variant) -> Made:
        """Draw a problem's variants; the first one is not for training."""
        made = make_variants(
            problem.question, problem.answer, seed=self.seed, most=MOST_VARIANTS + 1
        )
        return Made(
            original=problem,
            training=tuple(made[1:]),
            new_numbers=made[0] if made else None,
        )

    def known_with_new_numbers(self, count: int = NUM_KNOWN) -> list[Variant]:
        """Return the test set: a variant of each of the first `count` problems that have one.

        No question of an original problem is among them. Training rows may equal one of them by
        chance, as variants of another problem with the same words; whoever writes training rows
        must leave those out.
        """
        found: dict[str, Variant] = {}
        written = {problem.question for problem in self.problems}
        for problem in self.to_train_on():
            if len(found) == count:
                break
            # The same variant that `make` draws first.
            for new in make_variants(problem.question, problem.answer, seed=self.seed, most=1):
                if new.question not in written:
                    found.setdefault(new.question, new)
        return list(found.values())

    def _num_aside(self) -> int:
        return min(NUM_KEPT_ASIDE, len(self.problems) // 10)

    def _ordered(self) -> list[Variant]:
        """Return the problems ordered by a hash of the question, not as in the file."""

        def key(problem: Variant) -> bytes:
            return hashlib.sha256(f"part {self.seed}\n{problem.question}".encode()).digest()

        return sorted(self.problems, key=key)


def _words(problem: Variant) -> str:
    """Return the question with each number replaced by 0."""
    return re.sub(r"\d[\d,.]*", "0", problem.question)

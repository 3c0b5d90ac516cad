"""Samples of a user's own data as a task: right is who gives their answer."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from d2f.evaluation.task import Example, Verdict
from d2f.problems.written_number import last_number


class OwnRows:
    """Prompts and responses that were kept out of training.

    Args:
        pairs: Prompts and right responses in full.
        answer: "number", the last number of the text decides; "exact", the whole text but for
            white space. A response without any number is compared whole.

    Example:
        >>> task = OwnRows([("2*3=", "2*3 is 6.")])
        >>> [verdict.correct for verdict in task.judge(task.examples(), ["It is 6.0"])]
        [True]
    """

    name = "held-out samples"
    stop: tuple[str, ...] = ()

    def __init__(self, pairs: Sequence[tuple[str, str]], answer: str = "number") -> None:
        self._numbers = answer == "number"
        self._examples = tuple(
            Example(id=str(number), prompt=prompt, response=response)
            for number, (prompt, response) in enumerate(pairs)
        )

    def examples(self) -> Sequence[Example]:
        """The samples, in the order in which they were chosen."""
        return self._examples

    def judge(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        """Compare answers with the samples' own."""
        return [
            self._compare(example.response or "", text)
            for example, text in zip(examples, texts, strict=True)
        ]

    def _compare(self, wanted: str, text: str) -> Verdict:
        number = last_number(wanted) if self._numbers else None
        found: Decimal | str | None = " ".join(text.split())
        correct = found == " ".join(wanted.split())
        if number is not None:
            found = last_number(text)
            correct = found == number
        return Verdict(
            correct=correct,
            answer=None if found is None else str(found),
            metrics={"accuracy": float(correct)},
        )

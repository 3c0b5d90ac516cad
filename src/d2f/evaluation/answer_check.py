"""Whether a server's answers are those of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2f.evaluation.served_answer import ServedAnswer

VERDICTS = ("right", "lost", "doubled", "mixed", "wrong", "refused", "failed")
"""What an answer can be. `refused` is a 429, `failed` another error that was said; an answer that
never came to its end, or came with a part missing, is `lost`."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A prompt and what the engine itself makes of it."""

    prompt: str
    text: str
    num_tokens: int
    finish_reason: str
    """In the words of the protocol: `stop` or `length`."""


def judge(answer: ServedAnswer, pool: Sequence[Expected]) -> str:
    """One of `VERDICTS`.

    Args:
        answer: To one of the pool's prompts.
        pool: All prompts that the server was asked in the run, so that an answer with a part of
            another one is told from an answer that is wrong by itself.

    Example:
        >>> ends = {"num_tokens": 2, "finish_reason": "stop"}
        >>> pool = [Expected(prompt="1+1", text="= 2", **ends)]
        >>> judge(ServedAnswer(prompt=0, began=0.0, seconds=0.1, status=429), pool)
        'refused'
    """
    if answer.status == 429:
        return "refused"
    if answer.status is None:
        return "lost"
    if answer.status != 200:
        return "failed"
    if len(answer.finish_reasons) > 1 or len(answer.choices) > 1 or answer.num_done > 1:
        return "doubled"
    if len(answer.ids) > 1:
        return "mixed"
    if answer.fault is not None or not answer.finish_reasons or answer.num_done == 0:
        return "lost"
    expected = pool[answer.prompt]
    if answer.text != expected.text:
        others = [other.text for number, other in enumerate(pool) if number != answer.prompt]
        return _difference(answer.text, expected.text, others)
    same_end = answer.finish_reasons == [expected.finish_reason]
    same_count = answer.usage.get("completion_tokens") == expected.num_tokens
    return "right" if same_end and same_count else "wrong"


def _difference(text: str, expected: str, others: Sequence[str]) -> str:
    """What happened to a text that is not the expected one."""
    head = _num_alike(text, expected)
    tail = _num_alike(text[head:][::-1], expected[head:][::-1])
    added = text[head : len(text) - tail]
    missing = expected[head : len(expected) - tail]
    if not added:
        return "lost"
    if not missing and added in expected:
        return "doubled"
    # Answers are alike in places, so a foreign part of a few characters proves nothing.
    foreign = text in others or (len(added) > 8 and any(added in other for other in others))
    return "mixed" if foreign else "wrong"


def _num_alike(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

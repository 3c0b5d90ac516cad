"""The interface of a benchmark: problems with prompts, and a judge of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f.text import Tokenizer

CLEAN_UPS = ("ours", "paper")
"""Ways to find a program in an answer; "paper" is the way of the authors of D2F."""
CLEANED_TASKS = ("humaneval", "mbpp")
"""The tasks of lm-eval whose answers are programs, which are found in one of these ways."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One problem of a task.

    Example:
        >>> Example(id="7", prompt="1+1=").messages is None
        True
    """

    id: str
    """The task's own name of the problem, or its number."""
    prompt: str
    """The text that is put to the model, with the examples of a few-shot prompt."""
    messages: tuple[Mapping[str, str], ...] | None = None
    """The same as a conversation, where the task has a form of its own for chat models."""
    response: str | None = None
    """A right answer in full, where there is one."""
    source: Any = None
    """Data that the task's own judge needs."""

    def encode(self, tokenizer: Tokenizer, chat: bool | None = None) -> list[int]:
        """Put the problem into tokens; `chat` None: with the chat template if there is one.

        Raises:
            RequestError: The chat template refuses it.
        """
        templated = chat is not False and tokenizer.chat_template is not None
        if templated and self.messages is not None:
            return tokenizer.encode_chat(self.messages)
        return tokenizer.encode_prompt(self.prompt, chat=chat)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judge's verdict on one answer."""

    correct: bool
    answer: str | None = None
    """The part that was taken out of the text: a number, or the program that was run."""
    reason: str | None = None
    """Reason why the answer is wrong, where it is known."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All scores of the task's own scorer; `correct` follows the first."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Example:
        >>> exact = one_by_one(lambda example, text: Verdict(correct=text == example.response))
        >>> task = Task(
        ...     name="sums", problems=(Example(id="0", prompt="1+1=", response="2"),), mark=exact)
        >>> [verdict.correct for verdict in task.judge(task.examples(), ["2"])]
        [True]
    """

    name: str
    """Name of the task in recipes."""
    problems: Sequence[Example]
    mark: Callable[[Sequence[Example], Sequence[str]], list[Verdict]]
    """Marks answers, one text per problem; whatever an answer does, it gets a verdict."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    num_fewshot: int | None = None
    """Examples in each prompt, where the task has a number of its own."""

    def examples(self) -> Sequence[Example]:
        """Give all problems, always in the same order."""
        return self.problems

    def judge(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        """Mark answers, one text per problem."""
        return self.mark(examples, texts)


def one_by_one(
    verdict: Callable[[Example, str], Verdict],
) -> Callable[[Sequence[Example], Sequence[str]], list[Verdict]]:
    """Mark each answer for itself."""
    return lambda examples, texts: [
        verdict(example, text) for example, text in zip(examples, texts, strict=True)
    ]

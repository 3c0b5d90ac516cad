"""Score a model in memory while it is trained, on a benchmark or on a user's own samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from d2f.engine.engine import EngineConfig
from d2f.engine.request import Request
from d2f.engine.stops import StopStrings
from d2f.errors import D2FError
from d2f.evaluation.answering import Answer, Answering, fitted_engine
from d2f.evaluation.metrics import ratio, standard_error
from d2f.evaluation.task import Example, Task, Verdict, one_by_one
from d2f.models.transformer import Transformer
from d2f.problems.written_number import last_number
from d2f.text import Tokenizer

_MEMORY_SHARE = 0.8
"""Largest share of the free memory that keys and values take."""


@dataclass(frozen=True, kw_only=True)
class QuickScore:
    """Problems, and the settings by which a model answers them.

    Example:
        >>> from d2f.shipped import shipped_model
        >>> from d2f.evaluation.native import load_native_task
        >>> tokenizer = Tokenizer.load(shipped_model("student"))
        >>> problems = QuickScore(
        ...     task=load_native_task("word-problems", num_examples=3), tokenizer=tokenizer)
        >>> len(problems.prompts())
        3
    """

    task: Task
    tokenizer: Tokenizer
    chat: bool | None = None
    """Whether prompts go through the chat template; None: if there is one."""
    prompt_ids: Sequence[Sequence[int]] | None = None
    """The prompts in tokens, where they are known already."""
    strategy: str = "pipelined"
    policy: Any = None
    """The decoding policy; None: the model's own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 256
    batch_size: int = 16

    def prompts(self) -> list[list[int]]:
        """Encode the prompts.

        Raises:
            RequestError: The chat template refuses one.
        """
        if self.prompt_ids is not None:
            return [list(ids) for ids in self.prompt_ids]
        return [example.encode(self.tokenizer, self.chat) for example in self.task.examples()]

    def of(self, model: Transformer, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Answer all problems and judge the answers.

        Returns:
            `score` with its `standard_error`, `num_problems`, `num_errors`, `tokens_per_forward`
            (None without an answer), `mean_tokens` and `seconds`.

        Raises:
            D2FError: No problem could be answered, or the answers cannot be judged.
        """
        start = time.perf_counter()
        longest = max(len(prompt) for prompt in prompts) + self.max_new_tokens
        engine = fitted_engine(
            model,
            EngineConfig(max_batch_size=self.batch_size),
            self.tokenizer,
            longest=min(longest, model.spec.max_positions),
            memory_share=_MEMORY_SHARE,
        )
        answered: list[Answer] = []
        try:
            indices = range(len(prompts))
            for finished, _ in Answering(engine, indices, lambda i: self._ask(prompts[i])):
                answered += finished
        finally:
            # An error's traceback keeps the engine, which must not keep the cache.
            engine.close()
        good = [answer for answer in answered if answer.error is None]
        if not good:
            raise D2FError(f"no problem could be answered: {answered[0].error}")
        return self._judge(good, len(prompts)) | {"seconds": round(time.perf_counter() - start, 3)}

    def _ask(self, prompt: Sequence[int]) -> Request:
        return Request(
            prompt_ids=prompt,
            max_new_tokens=self.max_new_tokens,
            policy=self.policy,
            strategy=self.strategy,
            stop=tuple(self.task.stop),
            options=self.options,
        )

    def _judge(self, good: Sequence[Answer], count: int) -> dict[str, Any]:
        examples, stops = self.task.examples(), StopStrings(self.task.stop, self.tokenizer)
        texts = [stops.cut_text(answer.token_ids) for answer in good]
        verdicts = self.task.judge([examples[answer.index] for answer in good], texts)
        share = sum(verdict.correct for verdict in verdicts) / count
        tokens = sum(len(answer.token_ids) for answer in good)
        forwards = sum(answer.num_forwards for answer in good)
        return {
            "score": share,
            "standard_error": round(standard_error(share, count), 6),
            "num_problems": count,
            "num_errors": count - len(good),
            "tokens_per_forward": round(ratio(tokens, forwards), 4) if forwards else None,
            "mean_tokens": round(tokens / len(good), 2),
        }


def own_rows(pairs: Sequence[tuple[str, str]], answer: str = "number") -> Task:
    """Make a task of samples of a user's own data that were kept out of training.

    Args:
        pairs: Prompts and right responses in full.
        answer: "number", the last number of the text decides; "exact", the whole text but for
            white space. A response without any number is compared whole.

    Example:
        >>> task = own_rows([("2*3=", "2*3 is 6.")])
        >>> [verdict.correct for verdict in task.judge(task.examples(), ["It is 6.0"])]
        [True]
    """

    def compare(example: Example, text: str) -> Verdict:
        wanted = example.response or ""
        number = last_number(wanted) if answer == "number" else None
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

    problems = [
        Example(id=str(number), prompt=prompt, response=response)
        for number, (prompt, response) in enumerate(pairs)
    ]
    return Task(name="held-out samples", problems=problems, mark=one_by_one(compare))

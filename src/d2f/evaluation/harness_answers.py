"""Marking answers with lm-eval's filters and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from d2f.evaluation.task import Verdict


def stop_strings(task: Any) -> tuple[str, ...]:
    """Where lm-eval cuts the answers to a task."""
    return tuple(task.config.generation_kwargs["until"])


def cut(text: str, stops: Sequence[str]) -> str:
    r"""What stands before the first of the stop strings.

    Example:
        >>> cut("    return 1\ndef g():", ["\ndef", "\nclass"])
        '    return 1'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def filtered_answers(task: Any, doc: Any, text: str) -> dict[str, Any]:
    """What each of the task's filters takes out of a text, by the filter's name."""
    from lm_eval.api.instance import Instance

    instance = Instance(
        request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text]
    )
    for ensemble in task._filters:
        ensemble.apply([instance])
    return dict(instance.filtered_resps)


def official_scores(task: Any, doc: Any, text: str) -> dict[str, float]:
    """The task's metrics of one text, named `metric,filter` as lm-eval prints them.

    Example:
        `{"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}`
    """
    return {
        f"{metric},{name}": float(value)
        for name, answer in filtered_answers(task, doc, text).items()
        for metric, value in task.process_results(doc, [answer]).items()
    }


def first_metric(metrics: Mapping[str, float]) -> float:
    """The metric that decides whether an answer is correct."""
    return next(iter(metrics.values()))


class TextScorer:
    """Marks answers by what the task's filters find in them; one filter decides."""

    def __init__(self, deciding: str) -> None:
        self._deciding = deciding

    def __call__(self, task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """Mark one text per problem."""
        return [self._verdict(task, doc, text) for doc, text in zip(docs, texts, strict=True)]

    def _verdict(self, task: Any, doc: Any, text: str) -> Verdict:
        scores = official_scores(task, doc, text)
        first = f"exact_match,{self._deciding}"
        answer = str(filtered_answers(task, doc, text)[self._deciding])
        correct = scores[first] == 1
        return Verdict(
            correct=correct,
            answer=answer,
            reason=None if correct else "another answer",
            metrics={first: scores[first], **scores},
        )

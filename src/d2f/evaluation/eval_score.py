"""Score a row: answer its problems in batches, and judge and write each when it is done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from d2f.engine.engine import Engine
from d2f.errors import ConfigError
from d2f.evaluation.answering import Answer, Answering
from d2f.evaluation.eval_progress import Reporter
from d2f.evaluation.eval_row import EvalRow
from d2f.evaluation.metrics import (
    DECODED,
    OF_TOKENS,
    answer_metrics,
    ratio,
    standard_error,
)
from d2f.evaluation.results import FRESH, Record, RowFolder

_MOST_PENDING = 64
_PENDING_SECONDS = 5.0
"""Answers wait for others to be judged with, so many or so long at most."""


def counts_tails(records: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether all records count all decoded tokens; those of an older version do not."""
    return all(record.get(DECODED) is not None for record in records)


def known_problems(row: EvalRow, folder: RowFolder) -> dict[int, Record]:
    """Read what an earlier run has scored of this row's problems.

    Raises:
        ConfigError: It put another prompt, or judged by another right answer.
    """
    known = folder.mend_problems()
    for index, record in known.items():
        if not 0 <= index < len(row.examples):
            continue
        problem = f"problem {index} ({record.get('id')})"
        if record["prompt_sha256"] != row.prompt_sha256(index):
            raise ConfigError(
                f"{folder.path} has an answer to another prompt of {problem}: the task's files, "
                f"its examples or the tokenizer have changed; {FRESH}"
            )
        if record["gold_sha256"] != row.gold_sha256(index):
            raise ConfigError(
                f"{folder.path} has a verdict by another right answer to {problem}: the task's "
                f"files have changed; {FRESH}"
            )
    return {index: record for index, record in known.items() if index < len(row.examples)}


def score_row(
    row: EvalRow,
    engine: Engine,
    folder: RowFolder,
    *,
    count: int,
    batch_size: int,
    reporter: Reporter,
) -> bool:
    """Answer and judge those of the first `count` problems that an earlier run has not.

    What was answered is written before this returns, also when it is interrupted. The result is
    whether there were any.
    """
    known = known_problems(row, folder)
    todo = [index for index in range(count) if index not in known]
    totals: Counter[str] = Counter()
    _add(totals, [record for index, record in known.items() if index < count])
    _report(row, totals, count, reporter)
    if not todo:
        return False
    # What an engine does once is nobody's: compiling, capturing the first graphs.
    list(Answering(engine, todo[:1], row.request, most=1))
    # Nor is a prompt that this, or another row before, has put to the same engine.
    engine.forget_prompts()
    pending: list[Answer] = []
    spent, last = 0.0, time.monotonic()

    def write() -> None:
        nonlocal spent, last
        if pending:
            written = make_records(row, pending, spent / len(pending))
            folder.add_problems(written)
            pending.clear()
            _add(totals, written)
            _report(row, totals, count, reporter)
        spent, last = 0.0, time.monotonic()

    try:
        for finished, seconds in Answering(engine, todo, row.request):
            pending += finished
            spent += seconds
            waited = time.monotonic() - last >= _PENDING_SECONDS
            if waited or len(pending) >= min(batch_size, _MOST_PENDING):
                write()
    finally:
        write()
    return True


def make_records(row: EvalRow, answered: Sequence[Answer], seconds: float) -> list[Record]:
    """Judge answers and make their lines; each took `seconds`."""
    good = [answer for answer in answered if answer.error is None]
    texts = {answer.index: row.text(answer.token_ids) for answer in good}
    verdicts = dict(zip(texts, row.judge(list(texts), list(texts.values())), strict=True))
    records = []
    for answer in answered:
        verdict = verdicts.get(answer.index)
        records.append(
            {
                "index": answer.index,
                "id": row.examples[answer.index].id,
                "prompt_sha256": row.prompt_sha256(answer.index),
                "gold_sha256": row.gold_sha256(answer.index),
                "num_prompt_tokens": row.num_prompt_tokens(answer.index),
                "token_ids": list(answer.token_ids),
                "text": texts.get(answer.index, ""),
                "answer": verdict.answer if verdict else None,
                "correct": bool(verdict and verdict.correct),
                "reason": verdict.reason if verdict else None,
                "metrics": dict(verdict.metrics) if verdict else {},
                "num_tokens": len(answer.token_ids),
                "num_decoded_tokens": answer.num_decoded_tokens,
                "num_forwards": answer.num_forwards,
                "num_prefill_forwards": answer.num_prefill_forwards,
                "num_query_tokens": answer.num_query_tokens,
                "seconds": seconds,
                "finish_reason": answer.finish_reason,
                "error": answer.error,
            }
        )
    return records


def summarise_score(records: Sequence[Record], *, batch_size: int) -> Record:
    """Summarise the score of a row from its records in the order of the problems.

    Problems without an answer count as wrong, and not for speed.
    """
    count, right = len(records), sum(record["correct"] for record in records)
    good = [record for record in records if record["error"] is None]
    metrics = answer_metrics(good)
    tails: Record = {}
    if good and counts_tails(good):
        counted = answer_metrics(good, DECODED)
        tails = {"with_tail": {name: counted[name] for name in OF_TOKENS}}
    names = dict.fromkeys(name for record in records for name in record["metrics"])
    return {
        "num_problems": count,
        "num_correct": right,
        "score": ratio(right, count),
        "standard_error": standard_error(ratio(right, count), count),
        "batch_size": batch_size,
        "num_errors": count - len(good),
        "num_forwards": sum(record["num_forwards"] for record in good),
        **metrics,
        **tails,
        "correct": "".join(str(int(record["correct"])) for record in records),
        "metrics": {
            name: sum(record["metrics"].get(name, 0.0) for record in records) / count
            for name in names
        },
    }


def _add(totals: Counter[str], records: Sequence[Record]) -> None:
    """Add records to the totals that the running result needs."""
    for record in records:
        totals["answers"] += 1
        for name in ("correct", "num_tokens", "num_forwards", "seconds"):
            totals[name] += record[name]


def _report(row: EvalRow, totals: Counter[str], count: int, reporter: Reporter) -> None:
    """Report the running result of a row."""
    answers = totals["answers"]
    if not answers:
        return
    reporter.progress(
        row.name,
        answers,
        count,
        f"score {totals['correct'] / answers:.1%}  "
        f"{ratio(totals['num_tokens'], totals['num_forwards']):.2f} tokens/forward  "
        f"{ratio(totals['num_tokens'], totals['seconds']):.0f} tokens/s",
    )

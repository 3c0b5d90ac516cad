"""Mark answers with lm-eval's filters and metrics, as texts, as formulas, or as programs that run.

The scorer of MATH runs in worker processes with hard limits. For programs the official functions
ask a metric `code_eval`; `CodeEval` stands in for it, and runs them all in the sandbox, many at a
time.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d2f.errors import D2FError
from d2f.evaluation import math_worker
from d2f.evaluation.code_answer import humaneval_program, mbpp_solution
from d2f.evaluation.code_paper import paper_solution
from d2f.evaluation.sandbox import run_programs
from d2f.evaluation.task import Verdict

_FLEXIBLE = "flexible-extract"
_EXACT_MATCH = f"exact_match,{_FLEXIBLE}"


def stop_strings(task: Any) -> tuple[str, ...]:
    """Give the strings at which lm-eval cuts the answers to a task."""
    return tuple(task.config.generation_kwargs["until"])


def cut(text: str, stops: Sequence[str]) -> str:
    r"""Cut a text at the first of the stop strings.

    Example:
        >>> cut("    return 1\ndef g():", ["\ndef", "\nclass"])
        '    return 1'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def filtered_answers(task: Any, doc: Any, text: str) -> dict[str, Any]:
    """Apply each of the task's filters to a text; the findings by the filter's name."""
    from lm_eval.api.instance import Instance

    instance = Instance(
        request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text]
    )
    for ensemble in task._filters:
        ensemble.apply([instance])
    return dict(instance.filtered_resps)


def official_scores(task: Any, doc: Any, text: str) -> dict[str, float]:
    """Compute the task's metrics of one text, named `metric,filter` as lm-eval prints them.

    Example:
        `{"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 1.0}`
    """
    return {
        f"{metric},{name}": float(value)
        for name, answer in filtered_answers(task, doc, text).items()
        for metric, value in task.process_results(doc, [answer]).items()
    }


def first_metric(metrics: Mapping[str, float]) -> float:
    """Give the metric that decides whether an answer is correct."""
    return next(iter(metrics.values()))


def score_texts(task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
    """Mark one text per problem of GSM8K by what the task's filters find in it.

    lm-eval's filter `flexible-extract` decides.
    """
    verdicts = []
    for doc, text in zip(docs, texts, strict=True):
        scores = official_scores(task, doc, text)
        correct = scores[_EXACT_MATCH] == 1
        verdicts.append(
            Verdict(
                correct=correct,
                answer=str(filtered_answers(task, doc, text)[_FLEXIBLE]),
                reason=None if correct else "another answer",
                metrics={_EXACT_MATCH: scores[_EXACT_MATCH], **scores},
            )
        )
    return verdicts


_START_SECONDS = 120.0
_ANSWERS_PER_WORKER = 16
"""Fewer take less time than the start of a worker."""
_FIRST = "math_verify"


class MathScorer:
    """Marks the answers of the minerva_math tasks; `math_verify` decides.

    lm-eval's scorer stops itself after 5 seconds a step, 20 in all; a worker that is not done by
    `seconds` is ended, and the answer is wrong.

    Args:
        scorer: The Python file beside the task's definition.
        seconds: For one answer.
        num_workers: Processes; None: one a core, at most 4.
    """

    def __init__(
        self, scorer: Path, *, seconds: float = 40.0, num_workers: int | None = None
    ) -> None:
        self._seconds = seconds
        self._num_workers = num_workers or min(4, os.cpu_count() or 1)
        self._workers: queue.LifoQueue[_Worker] = queue.LifoQueue()
        workers = [_Worker(scorer) for _ in range(self._num_workers)]
        for worker in workers:
            self._workers.put(worker)
        weakref.finalize(self, _stop, workers)

    def __call__(self, task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """Mark one text per problem."""
        useful = min(self._num_workers, 1 + len(docs) // _ANSWERS_PER_WORKER)
        with ThreadPoolExecutor(useful) as pool:
            return list(pool.map(self._verdict, docs, texts))

    def _verdict(self, doc: Any, text: str) -> Verdict:
        worker = self._workers.get()
        try:
            doc = {name: doc[name] for name in ("solution", "answer")}
            reply = worker.ask({"doc": doc, "text": text}, self._seconds)
        finally:
            self._workers.put(worker)
        if "error" in reply:
            # Both metrics, so that means over problems have equal numbers of terms.
            zeros = {f"{_FIRST},none": 0.0, "exact_match,none": 0.0}
            return Verdict(correct=False, reason=reply["error"], metrics=zeros)
        scores = {f"{name},none": float(value) for name, value in reply["scores"].items()}
        metrics = {f"{_FIRST},none": scores[f"{_FIRST},none"], **scores}
        correct = first_metric(metrics) == 1
        return Verdict(
            correct=correct,
            answer=reply["answer"],
            reason=None if correct else "another answer, or none that can be parsed",
            metrics=metrics,
        )


class _Worker:
    """A process that is started when needed and again after it was ended."""

    def __init__(self, scorer: Path) -> None:
        self._scorer = scorer
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask for a reply; `{"error": …}` where there is none in time."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no reply either
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        reply = self._read(seconds)
        if reply is not None:
            return reply
        dead = process.poll() is not None
        self.stop()
        return {"error": "the scorer " + ("died" if dead else f"took more than {seconds:g} s")}

    def _start(self) -> None:
        # -P: the worker's own folder must not hide modules of Python's library. A session of its
        # own: an interrupt at the terminal is for the one that asks.
        self._process = subprocess.Popen(
            [sys.executable, "-P", math_worker.__file__, str(self._scorer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if self._read(_START_SECONDS) is None:
            self.stop()
            raise D2FError(
                f"the process that marks MATH answers does not start; {sys.executable} must be "
                f"able to run {self._scorer}"
            )

    def _read(self, seconds: float) -> dict[str, Any] | None:
        process = self._process
        assert process is not None and process.stdout is not None
        line, until = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(until - time.monotonic(), 0))
            part = os.read(process.stdout.fileno(), 2**16) if ready else b""
            if not part:  # out of time, or the process has ended
                if ready:
                    process.wait()
                return None
            line += part
        reply: dict[str, Any] = json.loads(line)
        return reply

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


Execute = Callable[[Sequence[str]], Sequence[Any]]
"""Runs programs; a result has `passed` and `reason`."""


class CodeEval:
    """Takes the place of the hub's metric `code_eval`, for one sample a problem.

    A program is a candidate, a newline and its tests.

    Example:
        >>> from types import SimpleNamespace
        >>> metric = CodeEval(lambda programs: [SimpleNamespace(passed=True, reason="")])
        >>> ask = dict(references=["assert f()"], predictions=[["f = lambda: 1"]], k=[1])
        >>> before = metric.compute(**ask)[0]
        >>> metric.run()
        >>> before, metric.compute(**ask)[0]
        ({'pass@1': 0.0}, {'pass@1': 1.0})
    """

    def __init__(self, execute: Execute = run_programs) -> None:
        self._execute = execute
        self._results: dict[str, Any] = {}
        self._waiting: dict[str, None] = {}

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Give the share of candidates that pass; those that have not run yet count 0."""
        programs = [
            f"{candidate}\n{tests}"
            for tests, candidates in zip(references, predictions, strict=True)
            for candidate in candidates
        ]
        self._waiting.update((p, None) for p in programs if p not in self._results)
        passed = [p in self._results and bool(self._results[p].passed) for p in programs]
        return {f"pass@{k[0]}": sum(passed) / len(passed)}, {}

    def run(self) -> None:
        """Run all programs that were asked for."""
        programs = list(self._waiting)
        self._waiting.clear()
        if programs:
            self._results.update(zip(programs, self._execute(programs), strict=True))

    def reason(self, candidate: str, tests: str) -> str | None:
        """Why a candidate failed."""
        result = self._results[f"{candidate}\n{tests}"]
        return None if result.passed else str(result.reason)

    def forget(self) -> None:
        """Drop all programs and results."""
        self._waiting.clear()
        self._results.clear()


class CodeScorer:
    """Marks the answers of `humaneval` and `mbpp`.

    `pass@1` decides: it marks the program that the clean-up finds in an answer (`code_answer`).
    Beside it stands lm-eval's own number, always of the text cut at lm-eval's stop strings:
    `pass@1,create_test` or `pass_at_1,none`. With the clean-up "paper" a program is found as the
    authors of D2F do: by `code_paper` for HumanEval, and on MBPP lm-eval's own number decides.
    """

    def __init__(self, code_eval: CodeEval, *, clean_up: str = "ours") -> None:
        self._code_eval = code_eval
        self._clean_up = clean_up

    def __call__(self, task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """Mark one text per problem."""
        pairs = list(zip(docs, texts, strict=True))
        programs = [self._program(task, doc, text) for doc, text in pairs]
        for pair, program in zip(pairs, programs, strict=True):
            self._mark(task, *pair, program)
        self._code_eval.run()
        verdicts = [
            self._verdict(task, *pair, program)
            for pair, program in zip(pairs, programs, strict=True)
        ]
        self._code_eval.forget()
        return verdicts

    def _program(self, task: Any, doc: Mapping[str, Any], text: str) -> str:
        """The program that decides, without the tests."""
        tests = task.doc_to_target(doc)
        if "entry_point" not in doc:
            setup = doc.get("test_setup_code") or ""
            return text if self._clean_up == "paper" else mbpp_solution(text, tests, setup)
        prompt, entry_point = doc["prompt"], doc["entry_point"]
        if self._clean_up == "paper":
            return paper_solution(prompt, text, entry_point)
        return humaneval_program(prompt, text, doc["test"], entry_point).removesuffix(f"\n{tests}")

    def _mark(self, task: Any, doc: Any, text: str, program: str) -> dict[str, float]:
        """The metrics, the first deciding."""
        official = official_scores(task, doc, cut(text, stop_strings(task)))
        if self._clean_up == "paper" and "entry_point" not in doc:
            return official
        tests = [task.doc_to_target(doc)]
        passed, _ = self._code_eval.compute(references=tests, predictions=[[program]], k=[1])
        return {**passed, **official}

    def _verdict(self, task: Any, doc: Any, text: str, program: str) -> Verdict:
        metrics = self._mark(task, doc, text, program)
        return Verdict(
            correct=first_metric(metrics) == 1,
            answer=program,
            reason=self._code_eval.reason(program, task.doc_to_target(doc)),
            metrics=metrics,
        )

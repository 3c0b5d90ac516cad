"""Mark answers with lm-eval's filters and metrics, as texts, as formulas, or as programs that run.

The scorer of MATH runs in worker processes with hard limits. For programs the official functions
ask a metric `code_eval`; `CodeScorer` stands in for it, and runs them all in the sandbox, many at a
time.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d2f.errors import D2FError
from d2f.evaluation import math_worker
from d2f.evaluation.code_answer import humaneval_program, mbpp_solution
from d2f.evaluation.code_paper import paper_solution
from d2f.evaluation.sandbox import Execution, run_programs
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


def _filtered(task: Any, doc: Any, text: str) -> dict[str, Any]:
    """Apply each of the task's filters to a text; the findings by the filter's name."""
    from lm_eval.api.instance import Instance

    instance = Instance(
        request_type="generate_until", doc=doc, arguments=("", {}), idx=0, resps=[text]
    )
    for ensemble in task._filters:
        ensemble.apply([instance])
    return dict(instance.filtered_resps)


def _scores(task: Any, doc: Any, filtered: Mapping[str, Any]) -> dict[str, float]:
    """Compute the task's metrics, named `metric,filter` as lm-eval prints them."""
    return {
        f"{metric},{name}": float(value)
        for name, answer in filtered.items()
        for metric, value in task.process_results(doc, [answer]).items()
    }


def score_texts(task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
    """Mark one text per problem of GSM8K by what the task's filters find in it.

    lm-eval's filter `flexible-extract` decides.
    """
    verdicts = []
    for doc, text in zip(docs, texts, strict=True):
        filtered = _filtered(task, doc, text)
        scores = _scores(task, doc, filtered)
        correct = scores[_EXACT_MATCH] == 1
        verdicts.append(
            Verdict(
                correct=correct,
                answer=str(filtered[_FLEXIBLE]),
                reason=None if correct else "another answer",
                metrics={_EXACT_MATCH: scores[_EXACT_MATCH], **scores},
            )
        )
    return verdicts


_START_SECONDS = 120.0
_ANSWERS_PER_WORKER = 16
"""Fewer take less time than the start of a worker."""
_MATH_VERIFY = "math_verify,none"


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
        for _ in range(self._num_workers):
            worker = _Worker(scorer)
            self._workers.put(worker)
            weakref.finalize(self, worker.stop)

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
            zeros = {_MATH_VERIFY: 0.0, "exact_match,none": 0.0}
            return Verdict(correct=False, reason=reply["error"], metrics=zeros)
        scores = {f"{name},none": float(value) for name, value in reply["scores"].items()}
        correct = scores[_MATH_VERIFY] == 1
        return Verdict(
            correct=correct,
            answer=reply["answer"],
            reason=None if correct else "another answer, or none that can be parsed",
            metrics={_MATH_VERIFY: scores[_MATH_VERIFY], **scores},
        )


class _Worker:
    """A process that is started when needed and again after it was ended."""

    def __init__(self, scorer: Path) -> None:
        self._scorer = scorer
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Ask for a reply; `{"error": …}` where there is none in time."""
        process = self._process or self._start()
        with contextlib.suppress(OSError):  # it has ended: there is no reply either
            self._pipe.send_bytes(json.dumps(request).encode())
        reply = self._read(seconds)
        if reply is not None:
            return reply
        dead = process.poll() is not None
        self.stop()
        return {"error": "the scorer " + ("died" if dead else f"took more than {seconds:g} s")}

    def _start(self) -> subprocess.Popen[bytes]:
        self._pipe, theirs = multiprocessing.Pipe()
        # -P: the worker's own folder must not hide modules of Python's library. A session of its
        # own: an interrupt at the terminal is for the one that asks.
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", math_worker.__file__, str(self._scorer)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        if self._read(_START_SECONDS) is None:
            self.stop()
            raise D2FError(
                f"the process that marks MATH answers does not start; {sys.executable} must be "
                f"able to run {self._scorer}"
            )
        return self._process

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next reply; None if there is none in time, or the process has ended."""
        assert self._process is not None
        try:
            return json.loads(self._pipe.recv_bytes()) if self._pipe.poll(seconds) else None
        except (EOFError, OSError):
            self._process.wait()
            return None

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            self._pipe.close()


class CodeScorer:
    """Marks the answers of `humaneval` and `mbpp`, and is the metric `code_eval` for lm-eval.

    `pass@1` decides: it marks the program that the clean-up finds in an answer (`code_answer`).
    Beside it stands lm-eval's own number, always of the text cut at lm-eval's stop strings:
    `pass@1,create_test` or `pass_at_1,none`. With the clean-up "paper" a program is found as the
    authors of D2F do: by `code_paper` for HumanEval, and on MBPP lm-eval's own number decides.
    """

    def __init__(self, clean_up: str = "ours") -> None:
        self._clean_up = clean_up
        self._results: dict[str, Execution | None] = {}
        """Results by the program, a candidate with its tests; None: the program has not run yet."""

    def __call__(self, task: Any, docs: Sequence[Any], texts: Sequence[str]) -> list[Verdict]:
        """Mark one text per problem."""
        found = [
            (doc, text, self._program(task, doc, text))
            for doc, text in zip(docs, texts, strict=True)
        ]
        for one in found:
            self._mark(task, *one)  # asks for programs
        programs = list(self._results)
        self._results.update(zip(programs, run_programs(programs), strict=True))
        verdicts = [self._verdict(task, *one) for one in found]
        self._results.clear()
        return verdicts

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Give the share of candidates that pass, as lm-eval asks for it.

        Those that have not run yet count 0, and are noted.
        """
        passed = []
        for tests, candidates in zip(references, predictions, strict=True):
            for candidate in candidates:
                result = self._results.setdefault(f"{candidate}\n{tests}", None)
                passed.append(result is not None and result.passed)
        return {f"pass@{k[0]}": sum(passed) / len(passed)}, {}

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
        official = _scores(task, doc, _filtered(task, doc, cut(text, stop_strings(task))))
        if self._clean_up == "paper" and "entry_point" not in doc:
            return official
        tests = [task.doc_to_target(doc)]
        passed, _ = self.compute(references=tests, predictions=[[program]], k=[1])
        return {**passed, **official}

    def _verdict(self, task: Any, doc: Any, text: str, program: str) -> Verdict:
        metrics = self._mark(task, doc, text, program)
        result = self._results[f"{program}\n{task.doc_to_target(doc)}"]
        assert result is not None
        return Verdict(
            correct=next(iter(metrics.values())) == 1,
            answer=program,
            reason=None if result.passed else result.reason,
            metrics=metrics,
        )

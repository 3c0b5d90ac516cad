"""Marking answers to MATH problems in worker processes with hard limits."""

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d2f.errors import D2FError
from d2f.evaluation import math_worker
from d2f.evaluation.harness_answers import first_metric
from d2f.evaluation.task import Verdict

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
        """The reply, or `{"error": …}` where there is none in time."""
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

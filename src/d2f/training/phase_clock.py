"""Where the time of a training step goes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import StepInputs
from d2f.training.trainer import Trainer

PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")
"""In the order of a step; `data`: batch, noise and, on several processes, what else comes first."""


class PhaseClock:
    """Marks the ends of a step's phases while its trainer runs as always.

    On a GPU the marks are events in the stream of operations, so nobody waits for them; a phase
    then includes the time in which the device waited for the host. On a CPU, where operations are
    done when they return, the clock is read.

    Example:
        `clock = PhaseClock(trainer)`, then steps within `with clock.watching():`, then
        `clock.milliseconds()["teacher"]`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._on_gpu = trainer.device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the trainer's steps are measured; after it, it is as it was."""
        trainer, loss, apply = self._trainer, self._trainer.loss, self._trainer.update.apply
        inner = {name: getattr(loss, name) for name in ("_states", "_logits", "_student_loss")}

        def update(*arguments: Any) -> Tensor:
            self._mark("backward")
            norm = apply(*arguments)
            self._mark("optimizer")
            return norm

        self._mark("start")
        trainer.update.apply = update  # type: ignore[method-assign, assignment]
        trainer.loss = _WatchedLoss(loss, self._mark)  # type: ignore[assignment]
        for name, function in inner.items():
            setattr(loss, name, self._ended(function))
        try:
            yield
        finally:
            trainer.loss = loss
            del trainer.update.__dict__["apply"]
            for name, function in inner.items():
                setattr(loss, name, function)

    def milliseconds(self) -> dict[str, float]:
        """Time of each phase per step, summed over the step's micro-batches; waits for the device.

        A loss that is compiled together with the student is in the student's time.
        """
        if self._on_gpu:
            torch.cuda.synchronize(self._trainer.device)
        sums = dict.fromkeys(PHASES, 0.0)
        for (_, begin), (phase, end) in itertools.pairwise(self._marks):
            sums[phase] += begin.elapsed_time(end) if self._on_gpu else 1000 * (end - begin)
        steps = sum(phase == "optimizer" for phase, _ in self._marks)
        return {phase: total / steps for phase, total in sums.items()}

    def _ended(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, after which the models' phase ends: the teacher's has no gradients."""

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self._mark("student" if torch.is_grad_enabled() else "teacher")
            return result

        return call

    def _mark(self, phase: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))


class _WatchedLoss:
    """Stands in for a trainer's loss."""

    def __init__(self, loss: StageLoss, mark: Callable[[str], None]) -> None:
        self._loss = loss
        self._mark = mark

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        self._mark("data")
        result = self._loss(inputs)
        self._mark("loss")
        return result

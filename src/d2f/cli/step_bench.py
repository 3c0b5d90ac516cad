"""Measurements of training steps: time, phases, memory, and the loss on one repeated batch."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f.errors import TrainingError
from d2f.evaluation.rates import laps, mark
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.training.chunked_loss import TeacherStates, chunked_loss
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset, generator
from d2f.training.flops import StepFlops, describe_work, step_flops
from d2f.training.optimizer import learning_rate
from d2f.training.processes import Processes
from d2f.training.step_inputs import StepInputs, make_inputs
from d2f.training.token_cache import Encoded
from d2f.training.trainer import PHASES, Trainer

NUM_BATCHES = 4
"""Batches of random tokens that the steps go through again and again."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of some steps."""

    mean: float
    """All steps together, from a waiting device to a waiting device, / their number."""
    fastest: float
    slowest: float
    """Times of the fastest and the slowest step: on a GPU between events at their ends."""
    num_steps: int


class StepBench:
    """A trainer of stage d2f on random tokens, whose single steps can be measured.

    The teacher is None where it is the student with its adapter off.
    Sequences are filled to their end, a quarter of each is the prompt. All else is what `d2f train`
    runs: batches, noise, models, loss, gradients, clipping, AdamW.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Transformer,
        teacher: Transformer | None = None,
        *,
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self._models = student, teacher
        self.device = student.device
        self._on_phase: Callable[[str], None] = lambda phase: None
        self._dataset = random_dataset(config, student.spec)
        self.trainer = Trainer(
            config,
            student,
            self._dataset,
            teacher=teacher,
            processes=processes,
            observer=lambda phase: self._on_phase(phase),
        )
        self.trainer.student.train()

    def time(self, num_steps: int, *, num_warm_up: int = 3) -> StepTimes:
        """Run steps as training does, with no wait between them."""
        for _ in range(num_warm_up):
            self.trainer._train_step()
        _wait(self.device)
        marks = [mark(self.device)]
        start = time.perf_counter()
        for _ in range(num_steps):
            self.trainer._train_step()
            marks.append(mark(self.device))
        _wait(self.device)
        seconds = time.perf_counter() - start
        self._check()
        single = laps(marks)
        return StepTimes(
            mean=seconds / num_steps,
            fastest=min(single),
            slowest=max(single),
            num_steps=num_steps,
        )

    def phases(self, num_steps: int) -> dict[str, float]:
        """Milliseconds of each phase per step, in steps of their own.

        On a GPU events in the stream mark the ends of phases, so a phase includes the time in which
        the device waits for the host. A loss that is compiled together with the student is in the
        student's time.
        """
        _wait(self.device)
        names, marks = list[str](), [mark(self.device)]

        def note(phase: str) -> None:
            names.append(phase)
            marks.append(mark(self.device))

        before, self._on_phase = self._on_phase, note
        for _ in range(num_steps):
            self.trainer._train_step()
        self._on_phase = before
        sums = dict.fromkeys(PHASES, 0.0)
        for phase, seconds in zip(names, laps(marks), strict=True):
            sums[phase] += 1000 * seconds / num_steps
        return sums

    def peak_memory(self) -> int | None:
        """Most bytes of tensors on the GPU at once since it was last asked; None on a CPU."""
        if self.device.type != "cuda":
            return None
        _wait(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def flops(self, *, only_visible: bool = True) -> StepFlops:
        """Operations of one micro-batch; see `d2f.training.flops` for `only_visible`."""
        return step_flops(*self._models, describe_work(self._part(), only_visible=only_visible))

    @property
    def num_counted(self) -> int:
        """Positions of the first micro-batch that count in the loss."""
        return int((self._part().weight_BL > 0).sum())

    def loss_memory(self) -> int | None:
        """Most bytes that the loss of a micro-batch takes over its inputs, backward included.

        The inputs are the hidden states of both models at the counted positions and the heads. None
        on a CPU, with several processes, and where the loss is compiled together with the student.
        """
        alone = self.trainer.processes.world_size == 1
        if self.device.type != "cuda" or not alone or not self.trainer.loss.selects:
            return None
        part, states = self._states(self._part())
        states[""][0].requires_grad_()
        _wait(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._chunked(part, states[""], states["teacher_"]).backward()
        _wait(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    @torch.no_grad()
    def _states(self, part: StepInputs) -> tuple[StepInputs, dict[str, tuple[Tensor, Tensor]]]:
        """A micro-batch on the device, and both models' hidden states and heads."""
        part = part.to(self.device)
        assert part.selected_M is not None
        return part, self.trainer.loss.hidden_states(part, part.selected_M)

    def _chunked(
        self, part: StepInputs, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The loss of a micro-batch, of which both hidden states and heads are known."""
        bf16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return chunked_loss(
                *student,
                TeacherStates(hidden_ME=teacher[0], head_VE=teacher[1]),
                part.weight_BL.flatten()[part.selected_M],
                self.config.distillation.objective,
                memory_bytes=self.config.loss_memory_mib * 2**20,
            )[0]

    def repeat(self, num_steps: int) -> list[float]:
        """Train on one batch with the same noise all the time: the loss before each update.

        In one process; what several do to a batch is the same.
        """
        trainer, losses = self.trainer, []
        size, _ = self.config.micro_batches()
        parts = list(self._inputs().parts(size, select=trainer.loss.selects))
        for step in range(num_steps):
            total = torch.zeros((), device=self.device)
            for part in parts:
                loss, _ = trainer.loss(part.to(self.device))
                loss.backward()
                total += loss.detach()
            lr = learning_rate(self.config.optimizer, step, 0.0)
            trainer.update.apply(step + 1, lr, total)
            losses.append(total)
        self._check()
        return torch.stack(losses).tolist()

    @torch.no_grad()
    def floor(self) -> float:
        """Give the repeated batch's loss of a student that predicts what its teacher predicts.

        0 for the divergences; of soft_cross_entropy the teacher's entropy.
        """
        size, _ = self.config.micro_batches()
        total = 0.0
        for part in self._inputs().parts(size, select=True):
            moved, states = self._states(part)
            total += float(self._chunked(moved, states["teacher_"], states["teacher_"]))
        return total

    def _inputs(self) -> StepInputs:
        """The first batch with its noise."""
        return make_inputs(
            self._dataset.batch(torch.arange(self.config.batch_size)),
            self.config,
            mask_token_id=self.trainer.student.spec.mask_token_id,
            generator=generator(self.config.seed, "noise"),
        )

    def _part(self) -> StepInputs:
        size, _ = self.config.micro_batches()
        return next(self._inputs().parts(size, select=True))

    def _check(self) -> None:
        bad = self.trainer.update.first_bad_step()
        if bad is not None:
            raise TrainingError(
                f"loss or gradient is not finite at step {bad} of the measured ones; lower the "
                "learning rate (--lr), or measure in float32"
            )


def random_dataset(config: TrainConfig, spec: ModelSpec) -> TokenDataset:
    """Sequences of random tokens, a quarter of each being the prompt, with EOS at the end.

    Neither EOS nor mask token is among the others.
    """
    length = config.data.sequence_length
    num_rows = NUM_BATCHES * config.batch_size
    special = {*spec.eos_token_ids, spec.mask_token_id}
    draw = generator(config.seed, "random tokens")
    ids_T = torch.randint(spec.vocab_size, (num_rows * (length - 1),), generator=draw)
    plain = next(token for token in range(spec.vocab_size) if token not in special)
    for token in special - {None}:
        ids_T[ids_T == token] = plain
    prompt = length // 4
    encoded = Encoded(
        tokens=array("i", ids_T.tolist()),
        prompt_lengths=array("i", [prompt] * num_rows),
        response_lengths=array("i", [length - 1 - prompt] * num_rows),
    )
    return TokenDataset(encoded, config.data, eos_token_id=spec.eos_token_ids[0])


def largest(fits: Callable[[int], bool], *, first: int = 1, most: int = 4096) -> int:
    """Largest number up to `most` that fits, by doubling and bisection; 0 if not even 1 does.

    Example:
        >>> tried = []
        >>> largest(lambda n: tried.append(n) or n <= 11, first=4), tried
        (11, [4, 8, 16, 12, 10, 11])
    """
    good, bad = 0, first
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def survives(work: Callable[[], Any]) -> bool:
    """Whether a GPU's memory is enough for some work; what it left is freed either way."""
    try:
        work()
        return True
    except RuntimeError as error:
        lacking = any(words in str(error) for words in ("out of memory", "ALLOC_FAILED"))
        if not isinstance(error, torch.OutOfMemoryError) and not lacking:
            raise
    finally:
        free_memory()
    return False


def free_memory() -> None:
    """Give back what no object holds any more, compiled graphs and cached memory included."""
    if torch.cuda.is_available():
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

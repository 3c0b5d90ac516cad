"""What a training step costs: time, phases, memory, and what it reaches on one repeated batch."""

from __future__ import annotations

import gc
import itertools
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f.errors import TrainingError
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.training.chunked_loss import TeacherStates, chunked_loss
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset
from d2f.training.encoded import Encoded
from d2f.training.flops import StepFlops, describe_work, step_flops
from d2f.training.optimizer import learning_rate
from d2f.training.phase_clock import PhaseClock
from d2f.training.processes import Processes
from d2f.training.seeds import generator
from d2f.training.step_inputs import StepInputs, make_inputs
from d2f.training.trainer import Trainer

NUM_BATCHES = 4
"""Batches of random tokens that the steps go through again and again."""


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of some steps."""

    mean: float
    """All steps together, from a waiting device to a waiting device, / their number."""
    fastest: float
    slowest: float
    """Of single steps: on a GPU between events at their ends."""
    num_steps: int


class StepBench:
    """A trainer of stage d2f on random tokens, whose single steps can be measured.

    Sequences are filled to their end, a quarter of each is the prompt. All else is what `d2f train`
    runs: batches, noise, models, loss, gradients, clipping, AdamW.

    Args:
        config: The recipe; its output folder gets the trainer's (empty) logs.
        student: The model on its device, whose trained parameters require gradients.
        teacher: A frozen model; None: the student with its adapter off.
        processes: Those that train together; None: this one alone.
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
        self._dataset = random_dataset(config, student.spec)
        self.trainer = Trainer(config, student, self._dataset, teacher=teacher, processes=processes)
        self.device = self.trainer.device
        self.trainer.student.train()

    def time(self, num_steps: int, *, num_warm_up: int = 3) -> StepTimes:
        """Run steps as training does, with no wait between them.

        Raises:
            TrainingError: A loss or gradient was not finite.
        """
        for _ in range(num_warm_up):
            self.trainer._train_step()
        self._wait()
        marks = [self._mark()]
        start = time.perf_counter()
        for _ in range(num_steps):
            self.trainer._train_step()
            marks.append(self._mark())
        self._wait()
        seconds = time.perf_counter() - start
        self._check()
        single = [_between(a, b) for a, b in itertools.pairwise(marks)]
        return StepTimes(
            mean=seconds / num_steps,
            fastest=min(single),
            slowest=max(single),
            num_steps=num_steps,
        )

    def phases(self, num_steps: int) -> dict[str, float]:
        """Milliseconds of each phase per step, in steps of their own."""
        clock = PhaseClock(self.trainer)
        self._wait()
        with clock.watching():
            for _ in range(num_steps):
                self.trainer._train_step()
        return clock.milliseconds()

    def peak_memory(self) -> int | None:
        """Most bytes of tensors on the GPU at once since it was last asked; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self._wait()
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
        hidden_MD, head_VD, target, weight_M = self._loss_inputs()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._chunked(hidden_MD, head_VD, target, weight_M).backward()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _loss_inputs(self) -> tuple[Tensor, Tensor, TeacherStates, Tensor]:
        student, teacher = self.trainer.student, self.trainer.loss.teacher or self.trainer.student
        part = self._part().to(self.device)
        assert part.selected_M is not None
        size, draw = len(part.selected_M), torch.Generator(self.device).manual_seed(0)

        def states(model: Transformer) -> Tensor:
            width, dtype = model.spec.hidden_size, model.dtype
            return torch.randn(
                size, width, generator=draw, device=self.device, dtype=torch.float32
            ).to(dtype)

        head_VD = student.head_weight_VD
        return (
            states(student).requires_grad_(),
            head_VD.detach().requires_grad_(head_VD.requires_grad),
            TeacherStates(hidden_ME=states(teacher), head_VE=teacher.head_weight_VD.detach()),
            part.weight_BL.flatten()[part.selected_M],
        )

    def _chunked(
        self, hidden_MD: Tensor, head_VD: Tensor, target: TeacherStates, weight_M: Tensor
    ) -> Tensor:
        objective = self.config.objective
        bf16 = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return chunked_loss(
                hidden_MD,
                head_VD,
                target,
                weight_M,
                objective.objective if objective else "forward_kl",
                memory_bytes=self.config.loss_memory_mib * 2**20,
            )[0]

    def repeat(self, num_steps: int) -> list[float]:
        """Train on one batch with the same noise all the time: the loss before each update.

        In one process; what several do to a batch is the same.

        Raises:
            TrainingError: A loss or gradient was not finite.
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
        """What the repeated batch's loss would be if the student said what its teacher says.

        0 for the divergences; of soft_cross_entropy the teacher's entropy.
        """
        loss, total = self.trainer.loss, 0.0
        size, _ = self.config.micro_batches()
        for part in self._inputs().parts(size, select=True):
            moved = part.to(self.device)
            teacher = loss.teacher or loss.student
            with loss._teacher_view():
                states_TD = loss._states(teacher, moved.ids_BL, {})
            assert moved.selected_M is not None
            states_MD = states_TD[moved.selected_M]
            head_VD = teacher.head_weight_VD
            target = TeacherStates(hidden_ME=states_MD, head_VE=head_VD)
            weight_M = moved.weight_BL.flatten()[moved.selected_M]
            total += float(self._chunked(states_MD, head_VD, target, weight_M))
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

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


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

    Args:
        fits: Whether a number does.
        first: The number to begin with, at most `most`.
        most: Larger ones are not tried.

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
        if not isinstance(error, torch.OutOfMemoryError) and not _lacks_memory(str(error)):
            raise
    finally:
        free_memory()
    return False


def _lacks_memory(message: str) -> bool:
    return "out of memory" in message or "ALLOC_FAILED" in message


def free_memory() -> None:
    """Give back what no object holds any more, compiled graphs and cached memory included."""
    if torch.cuda.is_available():
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

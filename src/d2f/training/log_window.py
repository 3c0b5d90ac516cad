"""What a line of the log is made of: sums over the steps since the last line."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from d2f.training.confidence import mean_confidence
from d2f.training.objective import block_sums
from d2f.training.processes import Processes
from d2f.training.step_inputs import StepInputs


class LogWindow:
    """Sums since the last line of the log; they stay on the device until the line is written."""

    def __init__(self, step: int, seconds: float) -> None:
        self.timed_from = (step, seconds)
        """Where the clock of the window started."""
        self._losses: list[Tensor] = []
        self._norm: Tensor | None = None
        self._lr = 0.0
        self._blocks: list[tuple[Tensor, Tensor]] = []
        self.confidence: dict[str, Any] | None = None
        """What `measure_confidence` gave."""

    def add(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        """Take a step: its loss, the norm of its gradient, its learning rate."""
        self._losses.append(loss)
        self._norm, self._lr = norm, lr

    def add_blocks(self, inputs: StepInputs, loss_BL: Tensor, num_blocks: int) -> None:
        """Take the losses of a micro-batch's positions, for the mean of each block."""
        if num_blocks:
            counted_BL = inputs.weight_BL > 0
            block_BL = inputs.block_in_sample_BL
            self._blocks.append(block_sums(loss_BL, counted_BL, block_BL, num_blocks))

    def record(
        self, step: int, tokens_per_step: int, seconds: float, processes: Processes
    ) -> dict[str, Any]:
        """The line: mean loss over the window; block losses, norm and rate of its last step."""
        assert self._norm is not None
        steps, elapsed = step - self.timed_from[0], seconds - self.timed_from[1]
        record: dict[str, Any] = {
            "step": step,
            "loss": torch.stack(self._losses).mean().item(),
            "lr": self._lr,
            "grad_norm": self._norm.item(),
            "tokens_per_second": round(steps * tokens_per_step / elapsed) if elapsed > 0 else 0,
            "seconds": round(seconds, 3),
            **mean_confidence(processes.share(self.confidence or {})),
        }
        if self._blocks:
            sums_N = processes.sum(torch.stack([sums for sums, _ in self._blocks]).sum(0))
            counts_N = processes.sum(torch.stack([counts for _, counts in self._blocks]).sum(0))
            means = (sums_N / counts_N.clamp_min(1)).tolist()
            record["loss_per_block"] = [
                round(mean, 6) if count else None
                for mean, count in zip(means, counts_N.tolist(), strict=True)
            ]
        return record

"""LLaDA's and Dream's own samplers, without a cache.

Shapes: B sequences, K positions of a block, S steps.

Each step computes the whole sequences with full attention, predicts every mask of the current block
and keeps some of the predictions, as the step's plan says; the others stay masked. LLaDA's sampler
(`low_confidence`) goes block by block; Dream's have one block, the response.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from d2f.decoding.batch import RowRequest
from d2f.decoding.canvas import Canvas, CanvasBatch, Kept
from d2f.decoding.strategies import BLOCK_LENGTH, VanillaOptions
from d2f.decoding.transfer import keep_best
from d2f.decoding.workspace import Workspace
from d2f.models.transformer import Transformer
from d2f.ops.sampling import MARGIN, NEG_ENTROPY, uniform_noise

_RANKED_BY = {"topk_margin": MARGIN, "entropy": NEG_ENTROPY}
EPS = 1e-3
Step = tuple[int, int, float]
"""First position of the block, its end, and how many tokens are kept (`origin`: with which
probability each is)."""


def vanilla_plan(max_new_tokens: int, options: VanillaOptions) -> list[Step]:
    """Plan for each step the span of the response in which it keeps tokens, and how many.

    Args:
        max_new_tokens: Length of the response.
        options: Of `low_confidence` a block length of None is 32; of the others an eps of None is
            0.001. The eps is the time at which their last step ends.

    Example:
        >>> vanilla_plan(5, VanillaOptions(num_steps=3, block_length=4))
        [(0, 4, 2), (0, 4, 2), (4, 5, 1)]
        >>> vanilla_plan(5, VanillaOptions(num_steps=2, algorithm="entropy"))
        [(0, 5, 2), (0, 5, 3)]
    """
    num_steps, algorithm = options.num_steps, options.sampler
    if algorithm == "low_confidence":
        block_length = options.block_length
        return list(transfer_plan(max_new_tokens, num_steps=num_steps, block_length=block_length))
    eps = EPS if options.eps is None else options.eps
    steps = max_new_tokens if num_steps is None else num_steps
    return [
        (0, max_new_tokens, keep) for keep in _dream_plan(max_new_tokens, steps, eps, algorithm)
    ]


def transfer_plan(
    max_new_tokens: int, *, num_steps: int | None = None, block_length: int | None = None
) -> list[tuple[int, int, int]]:
    """List each step of LLaDA's sampler: the block's first position, its end, and the number kept.

    Steps are shared out evenly over the blocks, and a block's tokens over its steps, the first
    ones taking the remainder. `num_steps` None: one token a step. There must be no fewer steps
    than blocks.

    Example:
        >>> transfer_plan(5, num_steps=3, block_length=4)
        [(0, 4, 2), (0, 4, 2), (4, 5, 1)]
    """
    block_length = BLOCK_LENGTH if block_length is None else block_length
    spans = [
        (start, min(start + block_length, max_new_tokens))
        for start in range(0, max_new_tokens, block_length)
    ]
    plan = []
    for index, (start, end) in enumerate(spans):
        size = end - start
        steps = size
        if num_steps is not None:
            steps = num_steps // len(spans) + (index < num_steps % len(spans))
        plan += [(start, end, size // steps + (step < size % steps)) for step in range(steps)]
    return plan


@functools.lru_cache(maxsize=256)
def _dream_plan(max_new_tokens: int, num_steps: int, eps: float, algorithm: str) -> list[float]:
    """Return how many tokens each step of Dream's samplers keeps, or with which probability.

    Time falls evenly from 1 to eps; a step from t to s keeps the share 1 - s / t of the masks, the
    last one all. In fp32, as published, since the share of one mask may be just below a whole.
    """
    time_S = torch.linspace(1, eps, num_steps + 1)
    share_S = (1 - time_S[1:] / time_S[:-1]).numpy()
    if algorithm == "origin":
        return [float(share) for share in share_S[:-1]] + [1.0]
    plan, masked = [], max_new_tokens
    for share in share_S[:-1]:
        keep = int(np.float32(masked) * share)
        plan.append(keep)
        masked -= keep
    return [*plan, masked]


class VanillaBatch(CanvasBatch):
    """A batch decoded by one of the models' own samplers."""

    def __init__(
        self,
        model: Transformer,
        asked: Sequence[RowRequest],
        workspace: Workspace,
        options: VanillaOptions,
    ) -> None:
        super().__init__(asked)
        self.model, self.workspace, self.algorithm = model, workspace, options.sampler
        self.plans = [vanilla_plan(one.max_new_tokens, options) for one in asked]
        self._lay_out()

    @torch.inference_mode()
    def _lay_out(self, kept: Sequence[Kept] | None = None) -> None:
        """Lay the sequences out, with what was kept of their responses."""
        self.canvas = Canvas(self.model, self.asked, self.workspace, kept=kept)
        self.canvas.buffers.step_1.fill_(max(self.num_forwards))
        longest = max(len(plan) for plan in self.plans)
        self.block_length = max(end - start for plan in self.plans for start, end, _ in plan)
        # After the last step nothing is kept.
        room = 1 << longest.bit_length()
        self._key = (
            "vanilla", room, self.block_length, self.algorithm, *self.settings.filters,
        )  # fmt: skip
        plan_SB3 = torch.zeros(room, len(self.plans), 3, dtype=torch.double)
        for row, plan in enumerate(self.plans):
            plan_SB3[: len(plan), row] = torch.tensor(plan, dtype=torch.double)
        self.plan_SB3 = self.workspace.buffers(
            ("plan", room, len(self.plans)),
            lambda: torch.empty_like(plan_SB3, device=self.model.device),
        )
        self.plan_SB3.copy_(plan_SB3)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward over the whole sequences, then keep this step's tokens."""
        self.canvas.run(self._key, self._compute)
        stopped = [False] * len(self.done)
        # Without an EOS to wait for, how many steps there are is known, and the host runs ahead.
        if self.settings.early_stop and self.settings.eos_token_ids:
            gaps, ends, _ = self.canvas.report()
            stopped = [end < gap for gap, end in zip(gaps, ends, strict=True)]
        for row, done in enumerate(self.done):
            if not done:
                self.num_forwards[row] += 1
                self.num_query_tokens[row] += self.canvas.counts[row]
                self.done[row] = stopped[row] or self.num_forwards[row] >= len(self.plans[row])

    def _compute(self) -> None:
        canvas = self.canvas
        plan_B3 = self.plan_SB3.index_select(0, canvas.buffers.step_1)[0]
        start_B, end_B = plan_B3[:, 0].long(), plan_B3[:, 1].long()
        block = canvas.block(start_B, end_B, self.block_length)
        aligned_MD = canvas.aligned(canvas.forward(), block)
        choice, alternatives_MA = canvas.choose(aligned_MD, block, _RANKED_BY.get(self.algorithm))
        rank_BK = choice.rank_M.view_as(block.candidate_BK)
        if self.algorithm == "origin":
            kept_BK = block.candidate_BK & (self._noise(block.response_BK) < plan_B3[:, 2:])
        else:
            kept_BK = keep_best(block.candidate_BK, rank_BK, plan_B3[:, 2])
        canvas.take(block, choice, alternatives_MA, kept_BK)

    def _noise(self, response_BK: Tensor) -> Tensor:
        buffers = self.canvas.buffers
        seed_BK = buffers.facts_5B[4][:, None].expand_as(response_BK)
        return uniform_noise(seed_BK, buffers.facts_5B[1][:, None] + response_BK, buffers.step_1)

    def select(self, rows: list[int]) -> None:
        """Go on with these sequences only, in this order."""
        kept = self.canvas.keep(rows)
        super().select(rows)
        self.plans = [self.plans[row] for row in rows]
        self._lay_out(kept)

"""LLaDA's own sampler: low-confidence remasking in blocks, without a cache.

Shapes: B sequences, L positions of prompt and response, M masked positions.

Each step computes the whole sequence with full attention, predicts every mask of the current block
and keeps the most confident predictions, as many as the step's share; the others stay masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.decoding.batch import (
    BlockState,
    BlockView,
    GenerationResult,
    Sequences,
    check_finite,
    cut_at_eos,
    pad_prompts,
)
from d2f.diffusion.layout import PADDING_BLOCK
from d2f.errors import ConfigError
from d2f.models.transformer import Transformer
from d2f.ops.sampling import choose_tokens


def transfer_plan(
    max_new_tokens: int, *, num_steps: int | None = None, block_length: int | None = None
) -> list[tuple[int, int, int]]:
    """Per step: the block's first position, its end, and how many tokens are kept.

    Steps are shared out evenly over the blocks, and a block's tokens over its steps, the first
    ones taking the remainder. `num_steps` None: one token a step. `block_length` None: 32.

    Raises:
        ConfigError: Fewer steps than blocks, or a value below 1.

    Example:
        >>> transfer_plan(5, num_steps=3, block_length=4)
        [(0, 4, 2), (0, 4, 2), (4, 5, 1)]
    """
    block_length = 32 if block_length is None else block_length
    if block_length < 1:
        raise ConfigError(f"block_length is {block_length}; it must be at least 1")
    spans = [
        (start, min(start + block_length, max_new_tokens))
        for start in range(0, max_new_tokens, block_length)
    ]
    if num_steps is not None and num_steps < len(spans):
        raise ConfigError(
            f"num_steps is {num_steps}; {max_new_tokens} tokens in blocks of {block_length} "
            f"need at least {len(spans)}"
        )
    plan = []
    for index, (start, end) in enumerate(spans):
        size = end - start
        steps = size
        if num_steps is not None:
            steps = num_steps // len(spans) + (index < num_steps % len(spans))
        plan += [(start, end, size // steps + (step < size % steps)) for step in range(steps)]
    return plan


class VanillaBatch:
    """A batch decoded by low-confidence remasking."""

    def __init__(
        self,
        model: Transformer,
        sequences: Sequences,
        **options: int | None,
    ) -> None:
        spec, device = model.spec, model.device
        assert spec.mask_token_id is not None
        self.model, self.sequences = model, sequences
        self.mask_token_id = spec.mask_token_id
        prompt_BL, self.prompt_length_B = pad_prompts(sequences.prompts, device)
        self.limits = list(sequences.max_new_tokens)
        self.length_B = self.prompt_length_B + torch.tensor(self.limits, device=device)
        self.position_1L = torch.arange(int(self.length_B.max()), device=device)[None]
        in_prompt_BL = self.position_1L < self.prompt_length_B[:, None]
        self.ids_BL = torch.full_like(in_prompt_BL, spec.mask_token_id, dtype=torch.long)
        if prompt_BL.shape[1] > 0:
            index_BL = self.position_1L.clamp_max(prompt_BL.shape[1] - 1).expand_as(self.ids_BL)
            self.ids_BL = torch.where(in_prompt_BL, prompt_BL.gather(1, index_BL), self.ids_BL)
        self.seed_B = torch.tensor(sequences.seeds, device=device)
        self.plans = [transfer_plan(limit, **options) for limit in self.limits]
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.steps = [0] * len(sequences)
        self.done = [False] * len(sequences)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward over the whole sequences, then keep this step's tokens."""
        device = self.ids_BL.device
        plan = [
            (0, 0, 0) if done else steps[count]
            for steps, count, done in zip(self.plans, self.steps, self.done, strict=True)
        ]
        start_B, end_B, keep_B = torch.tensor(plan, device=device).unbind(1)
        response_BL = self.position_1L - self.prompt_length_B[:, None]
        inside_BL = self.position_1L < self.length_B[:, None]
        # Equal lengths need no padding, hence no mask, which lets faster attention run.
        ragged = len(set(self.length_B.tolist())) > 1
        block_BL = torch.where(inside_BL, 0, PADDING_BLOCK).to(torch.int32) if ragged else None
        aligned_BLD = self.model.align(self.model(self.ids_BL, self.position_1L, block_BL))

        candidate_BL = (
            (self.ids_BL == self.mask_token_id)
            & (response_BL >= start_B[:, None])
            & (response_BL < end_B[:, None])
        )
        row_M, position_M = candidate_BL.nonzero(as_tuple=True)
        step_B = torch.tensor(self.steps, device=device)
        token_M, confidence_M, _ = choose_tokens(
            self.model.head(aligned_BLD[row_M, position_M]),
            mask_token_id=self.mask_token_id,
            sampling=self.sequences.sampling(self.seed_B[row_M], position_M, step_B[row_M]),
        )
        self.finite = self.finite & confidence_M.isfinite().all()
        confidence_BL = torch.full_like(candidate_BL, -torch.inf, dtype=torch.float32)
        confidence_BL[row_M, position_M] = confidence_M
        order_BL = confidence_BL.sort(dim=1, descending=True, stable=True).indices
        rank_BL = torch.empty_like(order_BL).scatter_(
            1, order_BL, self.position_1L.expand_as(order_BL)
        )
        kept_BL = candidate_BL & (rank_BL < keep_B[:, None])
        proposed_BL = self.ids_BL.index_put((row_M, position_M), token_M)
        self.ids_BL = torch.where(kept_BL, proposed_BL, self.ids_BL)
        self._finish(response_BL)

    def _finish(self, response_BL: Tensor) -> None:
        stopped = [False] * len(self.done)
        if self.sequences.early_stop and self.sequences.eos_token_ids:
            # An EOS with no mask of the response before it.
            eos_E = torch.tensor(self.sequences.eos_token_ids, device=self.ids_BL.device)
            known_BL = (response_BL < 0) | (self.ids_BL != self.mask_token_id)
            is_eos_BL = (response_BL >= 0) & torch.isin(self.ids_BL, eos_E)
            inside_BL = self.position_1L < self.length_B[:, None]
            prefix_BL = known_BL.long().cumprod(-1).bool()
            stopped = (prefix_BL & is_eos_BL & inside_BL).any(-1).tolist()
        for row, done in enumerate(self.done):
            if not done:
                self.steps[row] += 1
                self.done[row] = stopped[row] or self.steps[row] >= len(self.plans[row])

    def _response(self, row: int) -> list[int]:
        start = int(self.prompt_length_B[row])
        return self.ids_BL[row, start : start + self.limits[row]].tolist()

    def finished(self) -> list[bool]:
        """Which sequences are done."""
        return list(self.done)

    def results(self, rows: list[int]) -> list[GenerationResult]:
        """The responses of finished sequences."""
        if rows:
            check_finite(self.finite)
        return [self._result(row) for row in rows]

    def _result(self, row: int) -> GenerationResult:
        token_ids, reason = cut_at_eos(self._response(row), self.sequences.eos_token_ids)
        return GenerationResult(
            token_ids=token_ids,
            num_forwards=self.steps[row],
            num_prefill_forwards=0,
            num_query_tokens=self.steps[row] * int(self.length_B[row]),
            finish_reason=reason,
        )

    def view(self, row: int) -> list[BlockView]:
        """The whole response as one block that stays active to the end."""
        tokens = tuple(None if t == self.mask_token_id else t for t in self._response(row))
        return [BlockView(state=BlockState.FULLY_ACTIVE, token_ids=tokens)]

    def select(self, rows: list[int]) -> None:
        """Go on with these sequences only."""
        index_M = torch.tensor(rows, device=self.ids_BL.device)
        for name in ("prompt_length_B", "length_B", "ids_BL", "seed_B"):
            setattr(self, name, getattr(self, name)[index_M])
        for name in ("limits", "plans", "steps", "done"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

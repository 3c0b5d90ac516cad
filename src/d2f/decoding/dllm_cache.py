"""dLLM-Cache (arXiv 2506.06295): low-confidence remasking over cached features of every layer.

Shapes: L slots, R positions of the response, W of them in one block, S steps, E end-of-sequence
ids, D hidden size, A alternatives.

Each step chooses tokens as `vanilla` does with LLaDA's sampler; what differs is the forward, in
which most tokens keep the features (keys, values, outputs of attention and of the feed-forward
network) that earlier steps computed. Every K_p-th step computes the prompt whole, every K_r-th the
response whole, the first one both. Where the response is not due, each layer computes the values of
all response tokens from its input, compares them with those of the step before by cosine
similarity, and computes the least similar share anew.

What the paper leaves open is done as its published code does it: the values that were computed for
the comparison are all kept, also of tokens not chosen; a step in which only the prompt is due still
computes that share of the response; steps are counted through all blocks, not anew in each; a share
of 0 compares and computes nothing. Two things differ: a share above 0 is at least one token, and
equally similar tokens go by position, which there is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.decoding.alternatives import find_alternatives
from d2f.decoding.batch import Decoded, DecodingBatch, RowRequest
from d2f.decoding.strategies import RefreshOptions
from d2f.decoding.transfer import keep_best
from d2f.decoding.vanilla import transfer_plan
from d2f.decoding.workspace import Workspace
from d2f.models.feature_cache import FeatureCache, Refresh
from d2f.models.transformer import Transformer

LEAST_SLOTS = 256
"""Slots of the smallest feature cache; larger ones double, so that few serve all lengths."""


def refresh_at(
    options: RefreshOptions, step: int, prompt_length: int, response_length: int
) -> Refresh:
    """Say what a step (0, 1, …) computes anew.

    Example:
        >>> options = RefreshOptions(prompt_interval=4, response_interval=2)
        >>> [(r.prompt, r.response) for r in (refresh_at(options, s, 5, 8) for s in range(3))]
        [(True, True), (False, False), (False, True)]
    """
    response = step % options.response_interval == 0
    return Refresh(
        response_length=response_length,
        prompt=prompt_length > 0 and step % options.prompt_interval == 0,
        response=response,
        num_tokens=0 if response else options.num_tokens(response_length),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """The tensors that a step reads and writes, at fixed addresses."""

    ids_L: Tensor
    """Token ids of response, prompt and padding."""
    probability_R: Tensor
    """Probability with which each token of the response was accepted, fp32; 0 where none was."""
    alternatives_RA: Tensor
    """Most probable tokens at each position of the response as numbers; 0 at masks."""
    positions_L: Tensor
    count_1: Tensor
    """Slots that are no padding."""
    plan_4: Tensor
    """Plan of this step: the block's start and end, how many tokens are kept, the step's number."""
    seed_1: Tensor
    eos_E: Tensor
    finite: Tensor
    """Whether all logits used were finite."""
    stopped: Tensor
    """An EOS has no mask before it."""

    @staticmethod
    def maker(
        num_slots: int, limit: int, num_eos: int, num_alternatives: int, device: torch.device
    ) -> Callable[[], _State]:
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return lambda: _State(
            ids_L=zeros(num_slots),
            probability_R=zeros(limit, dtype=torch.float32),
            alternatives_RA=zeros(limit, num_alternatives),
            positions_L=zeros(num_slots),
            count_1=zeros(1),
            plan_4=zeros(4),
            seed_1=zeros(1),
            eos_E=zeros(num_eos),
            finite=zeros(dtype=torch.bool),
            stopped=zeros(dtype=torch.bool),
        )


class DLLMCacheBatch(DecodingBatch):
    """One sequence decoded by low-confidence remasking over cached features.

    `num_query_tokens` counts the tokens that go through a layer's projections and feed-forward
    network: prompt and response where they are due, else the share; the values computed for the
    comparison do not count.

    Args:
        model: The model; packed.
        asked: Of one sequence.
        workspace: Buffers and captured steps; one batch uses them at a time.
        options: How many steps there are, and when which features are computed anew.
    """

    def __init__(
        self,
        model: Transformer,
        asked: Sequence[RowRequest],
        workspace: Workspace,
        options: RefreshOptions,
    ) -> None:
        assert len(asked) == 1, "dllm-cache decodes one sequence at a time"
        assert model.spec.mask_token_id is not None
        super().__init__(asked)
        self.model, self.mask_token_id = model, model.spec.mask_token_id
        prompt, self.limit = self.settings.prompt, self.settings.max_new_tokens
        self.options = options
        self.plan = transfer_plan(
            self.limit, num_steps=options.num_steps, block_length=options.block_length
        )
        self.width = max(end - start for start, end, _ in self.plan)
        self.prompt_length = len(prompt)
        self.length = self.limit + workspace.padded(len(prompt))
        self.workspace, self.backend = workspace, workspace.backend
        self._take_buffers()
        self._fill_buffers(prompt)

    @torch.inference_mode()
    def _take_buffers(self) -> None:
        model, device = self.model, self.model.device
        settings = self.settings
        num_eos = len(settings.eos_token_ids)
        self.num_alternatives = min(settings.num_alternatives, model.spec.vocab_size)
        num_slots = max(LEAST_SLOTS, 2 ** (self.length - 1).bit_length())
        self.cache = self.workspace.buffers(
            ("dllm-cache", "features", num_slots),
            lambda: FeatureCache(model.spec, num_slots=num_slots, device=device, dtype=model.dtype),
        )
        shape = ("dllm-cache", self.limit, self.length, num_eos, self.num_alternatives)
        self.state = self.workspace.buffers(
            shape,
            _State.maker(self.length, self.limit, num_eos, self.num_alternatives, device),
        )
        self._key = (*shape, self.width, *settings.filters)

    @torch.inference_mode()
    def _fill_buffers(self, prompt: Sequence[int]) -> None:
        device, state, eos = self.model.device, self.state, self.settings.eos_token_ids
        padding = self.length - self.limit - len(prompt)
        ids = [self.mask_token_id] * self.limit + list(prompt) + [0] * padding
        response = range(len(prompt), len(prompt) + self.limit)
        positions = [*response, *range(len(prompt)), *[0] * padding]
        state.ids_L.copy_(torch.tensor(ids, device=device))
        state.probability_R.zero_()
        state.alternatives_RA.zero_()
        state.positions_L.copy_(torch.tensor(positions, device=device))
        state.count_1.fill_(self.limit + len(prompt))
        state.seed_1.copy_(torch.tensor([self.settings.seed], device=device))
        state.eos_E.copy_(torch.tensor(eos, dtype=torch.long, device=device))
        state.finite.fill_(True)
        state.stopped.fill_(False)
        rows = [(*kept, step) for step, kept in enumerate(self.plan)]
        self.plan_S4 = torch.tensor(rows, device=device)

    @torch.inference_mode()
    def step(self) -> None:
        """One forward over the tokens that are due, then keep this step's tokens."""
        [step], settings = self.num_forwards, self.settings
        refresh = refresh_at(self.options, step, self.prompt_length, self.limit)
        self.state.plan_4.copy_(self.plan_S4[step])
        self.workspace.run((*self._key, refresh), lambda: self._forward(refresh))
        self.num_query_tokens[0] += self.limit if refresh.response else refresh.num_tokens
        self.num_query_tokens[0] += self.prompt_length if refresh.prompt else 0
        self.num_forwards[0] += 1
        stops = settings.early_stop and len(settings.eos_token_ids) > 0
        self.done[0] = step + 1 >= len(self.plan) or (stops and bool(self.state.stopped))

    def _forward(self, refresh: Refresh) -> None:
        """A step over the buffers; it waits for no host."""
        state, mask = self.state, self.mask_token_id
        hidden_LD = self.model.forward_refresh(
            state.ids_L, state.positions_L, state.count_1, self.cache, refresh, self.backend
        )
        ids_R = state.ids_L[: self.limit]
        start, end, keep, step = state.plan_4.unbind()
        # As wide as the longest block; where the last one is shorter, it begins before it.
        offset_W = torch.arange(self.width, device=ids_R.device)
        offset_W = offset_W + start.clamp_max(self.limit - self.width)
        old_W = ids_R[offset_W]
        candidate_W = (old_W == mask) & (offset_W >= start) & (offset_W < end)
        logits_WV = self.model.head(self._aligned(hidden_LD, offset_W), self.backend)
        sampling = self.settings.sampling(
            state.seed_1.expand_as(offset_W).contiguous(),
            state.positions_L[offset_W],
            step.repeat(self.width),
        )
        choice = self.backend.choose_tokens(
            logits_WV, mask_token_id=mask, sampling=sampling, needed_M=candidate_W
        )
        state.finite.logical_and_(choice.probability_M.isfinite().all())
        kept_W = keep_best(candidate_W[None], choice.probability_M[None], keep[None])[0]
        ids_R[offset_W] = choice.token_M.where(kept_W, old_W)
        old_W = state.probability_R[offset_W]
        state.probability_R[offset_W] = choice.probability_M.where(kept_W, old_W)
        if self.num_alternatives:
            found_WA = find_alternatives(logits_WV, self.num_alternatives, mask, sampling)
            old_WA = state.alternatives_RA[offset_W]
            state.alternatives_RA[offset_W] = found_WA.where(kept_W[:, None], old_WA)
        is_eos_R = (ids_R[:, None] == state.eos_E).any(-1)
        state.stopped.copy_(((ids_R != mask).long().cumprod(0).bool() & is_eos_R).any())

    def _aligned(self, hidden_LD: Tensor, offset_W: Tensor) -> Tensor:
        """The hidden states that predict positions of the response: (W, D)."""
        if self.model.spec.architecture.shifted:
            # The prompt's end comes before the response; without a prompt the first uses its own.
            count_1 = self.state.count_1
            last_1 = count_1 - 1 if self.prompt_length > 0 else torch.zeros_like(count_1)
            offset_W = torch.where(offset_W > 0, offset_W - 1, last_1)
        return hidden_LD[offset_W]

    def decoded(self, row: int) -> Decoded:
        """The response as far as it is decoded."""
        state, ids_R = self.state, self.state.ids_L[: self.limit]
        return Decoded.read(ids_R, state.probability_R, state.alternatives_RA, self.mask_token_id)

    def finite(self) -> list[bool]:
        """Whether all logits so far were finite."""
        return [bool(self.state.finite)]

"""The inputs of a training step: noise and weights per position of a clean batch, by stage.

Shapes: B sequences, L positions, N blocks, M selected positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from d2f.diffusion.corruption import NoisedBatch, corrupt
from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout
from d2f.training.config import TrainConfig
from d2f.training.data import Batch
from d2f.training.objective import diffusion_weights, distillation_weights, mean_weights
from d2f.training.sections import NoiseConfig, ObjectiveConfig

NUM_LENGTHS = 8
"""Lengths that micro-batches may have with `data.padding = "longest"`; each is compiled for."""

FRONTIER_BLOCKS = 3
"""Blocks that count in the loss of `Noiser.frontier`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepInputs:
    """The tensors that the forward passes and the loss of a batch, or of a micro-batch, read."""

    ids_BL: Tensor
    """Tokens that the models read: the noisy sequence, or the clean one in autoregression."""
    target_BL: Tensor
    """Clean tokens."""
    weight_BL: Tensor
    """Weight of each position's loss. Those of a whole batch already hold the denominator, so the
    losses of its parts add up."""
    block_BL: Tensor
    """Block numbers (int32): 0 for the prompt, then 1 … N; `PADDING_BLOCK` past the end."""
    length_multiple: int | None = None
    """Micro-batches are cut behind their longest sequence, at a multiple of this; None: never."""
    selected_M: Tensor | None = None
    """Positions of the flattened batch with a weight; None: the loss is computed at all of them,
    which keeps shapes the same from step to step."""
    position_BL: Tensor | None = None
    """Place of each token in its sample, where a row may hold several; None: 0, 1, …."""
    first_BL: Tensor | None = None
    """Block number (int32) of the first block of each token's sample, where a row may hold several:
    block numbers then grow from sample to sample."""

    def parts(self, size: int, *, select: bool) -> Iterator[StepInputs]:
        """Cut the batch into micro-batches; `select` leaves out positions without a weight."""
        columns = self._columns()
        for part in zip(*(c.split(size) for c in columns.values()), strict=True):
            named = dict(zip(columns, part, strict=True))
            length = self._cut(named["block_BL"])
            named = {name: column[:, :length].contiguous() for name, column in named.items()}
            selected_M = named["weight_BL"].flatten().nonzero()[:, 0] if select else None
            yield StepInputs(**named, selected_M=selected_M)

    def sorted(self, multiple: int) -> StepInputs:
        """The longest sequences first, to be cut at multiples of a length."""
        length_B = (self.block_BL != PADDING_BLOCK).sum(dim=1)
        order_B = length_B.argsort(descending=True, stable=True)
        ordered = {name: column[order_B] for name, column in self._columns().items()}
        return StepInputs(**ordered, length_multiple=multiple)

    @property
    def block_in_sample_BL(self) -> Tensor:
        """Block numbers that start at 0 in each sample (that of padding is then any)."""
        return self.block_BL if self.first_BL is None else self.block_BL - self.first_BL

    def _columns(self) -> dict[str, Tensor]:
        """The tensors that have a value per position, by name."""
        return {
            name: value
            for name, value in vars(self).items()
            if name.endswith("_BL") and value is not None
        }

    def _cut(self, block_BL: Tensor) -> int:
        """The length to which these sequences may be cut."""
        if self.length_multiple is None:
            return block_BL.shape[1]
        longest = int((block_BL != PADDING_BLOCK).sum(dim=1).max())
        return min(-(-longest // self.length_multiple) * self.length_multiple, block_BL.shape[1])

    def to(self, device: torch.device) -> StepInputs:
        """Copy to a device, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def make_inputs(
    batch: Batch, config: TrainConfig, *, mask_token_id: int | None, generator: torch.Generator
) -> StepInputs:
    """Corrupt a clean batch as the stage asks; the same generator state gives the same noise.

    The noise of a sample does not depend on `data.padding`, by which the batch is sorted last, or
    put into rows of several samples by whoever drew it (`RowPlaces.pack`).
    """
    padding = config.data.padding
    if padding != "full" and not (config.noise is not None and config.noise.random_end):
        ends_B = sample_ends(batch.prompt_length_B, batch.end_B, batch.length_B, config.noise)
        batch = replace(batch, length_B=ends_B)
    noise = config.noise
    if noise is None:
        inputs = autoregressive_inputs(batch)
    else:
        assert mask_token_id is not None
        noiser = Noiser(noise=noise, mask_token_id=mask_token_id, generator=generator)
        if config.stage == "masked-diffusion":
            inputs = noiser.masked_diffusion(batch)
        else:
            inputs = noiser.d2f(batch, config.distillation)
    if padding == "longest":
        return inputs.sorted(length_multiple(batch.ids_BL.shape[1]))
    return inputs


def length_multiple(sequence_length: int) -> int:
    """Give the number whose multiples the micro-batches' lengths are, for padding "longest".

    A multiple of 64, for the sake of matrix products, and so large that there are at most
    `NUM_LENGTHS` of them up to `sequence_length`, which is one itself.

    Example:
        >>> length_multiple(1024), length_multiple(200)
        (128, 64)
    """
    return 64 * -(-sequence_length // (64 * NUM_LENGTHS))


def autoregressive_inputs(batch: Batch) -> StepInputs:
    """Make inputs in which the response and its first EOS count, and the padding does not."""
    position_L = torch.arange(batch.ids_BL.shape[1])
    # Nothing precedes position 0, so without a prompt its token cannot be predicted.
    first_B1 = batch.prompt_length_B.clamp_min(1)[:, None]
    counted_BL = (position_L >= first_B1) & (position_L < batch.end_B[:, None])
    return StepInputs(
        ids_BL=batch.ids_BL,
        target_BL=batch.ids_BL,
        weight_BL=mean_weights(counted_BL),
        block_BL=_hidden_past_end(batch, counted_BL.to(torch.int32)),
    )


@dataclass(frozen=True, kw_only=True)
class Noiser:
    """Masks responses of clean batches up to where their noise ends, as a stage asks."""

    noise: NoiseConfig
    mask_token_id: int
    generator: torch.Generator

    def masked_diffusion(self, batch: Batch) -> StepInputs:
        """Draw one mask rate t per sequence, uniform in [low, high] and stratified over the batch.

        The rates lie one in each of as many equal strata, which leaves the distribution of each as
        it is and takes most of the variance out of the batch's loss. With `noise.frontier_share`,
        the first sequences of the batch, whose order is random, are noised by `frontier` instead;
        with `noise.random_end`, each sequence ends anywhere behind its answer.
        """
        noise, size = self.noise, batch.ids_BL.shape[0]
        if noise.random_end:
            room_B = batch.length_B - batch.end_B + 1
            extra_B = (torch.rand(size, generator=self.generator) * room_B).long()
            batch = replace(batch, length_B=batch.end_B + extra_B)
        num_frontier = round(noise.frontier_share * size)
        t_B1 = noise.low + (noise.high - noise.low) * self._strata(size - num_frontier)
        scattered = self._scattered(batch.part(num_frontier, size), t_B1)
        if num_frontier == 0:
            return scattered
        frontier = self.frontier(batch.part(0, num_frontier))
        share = num_frontier / size
        return StepInputs(
            ids_BL=torch.cat([frontier.ids_BL, scattered.ids_BL]),
            target_BL=batch.ids_BL,
            weight_BL=torch.cat([frontier.weight_BL * share, scattered.weight_BL * (1 - share)]),
            block_BL=torch.cat([frontier.block_BL, scattered.block_BL]),
        )

    def frontier(self, batch: Batch) -> StepInputs:
        """Mask sequences as a sampler that decodes block by block meets them.

        Blocks before a random one are visible, that one is masked at a uniform rate, all behind it
        are masked whole. Scattered noise all but never shows such a sequence. The loss is the mean
        over the masks of the first `FRONTIER_BLOCKS` masked blocks; what lies further ahead cannot
        be known yet and would drown the rest.
        """
        size, length = batch.ids_BL.shape
        layout, block_size = self._blocks(batch), self.noise.block_size
        answer_B = -(-(batch.end_B - batch.prompt_length_B) // block_size)
        first_B1 = (torch.rand(size, generator=self.generator) * answer_B).long()[:, None]
        block_N = torch.arange(-(-length // block_size))
        ratio_BN = torch.where(block_N < first_B1, 0.0, 1.0)
        ratio_BN = torch.where(block_N == first_B1, self._strata(size), ratio_BN)
        noised = self._corrupted(batch, layout, ratio_BN)
        near_BL = layout.block_numbers(length) <= first_B1 + FRONTIER_BLOCKS
        counted_BL = noised.masked_BL & near_BL
        weight_BL = counted_BL / counted_BL.sum(-1, keepdim=True).clamp_min(1) / size
        return self._inputs(batch, noised, weight_BL)

    def d2f(self, batch: Batch, objective: ObjectiveConfig) -> StepInputs:
        """Mask each block at a ratio of its own (paper, section 3.2), alike for both models."""
        num_blocks_B = -(-(self._end(batch) - batch.prompt_length_B) // self.noise.block_size)
        ratio_BN = self.noise.schedule().sample(num_blocks_B, self.generator)
        noised = self._corrupted(batch, self._blocks(batch), ratio_BN)
        weight_BL = distillation_weights(
            noised.masked_BL, noised.ratio_BL, objective.weighting, objective.normalization
        )
        return self._inputs(batch, noised, weight_BL)

    def _scattered(self, batch: Batch, t_B1: Tensor) -> StepInputs:
        length = batch.ids_BL.shape[1]
        whole = BlockLayout(prompt_length=batch.prompt_length_B, block_size=length)
        noised = self._corrupted(batch, whole, t_B1)
        position_L, start_B1 = torch.arange(length), batch.prompt_length_B[:, None]
        response_BL = (position_L >= start_B1) & (position_L < self._end(batch)[:, None])
        weight_BL = diffusion_weights(noised.masked_BL, noised.ratio_BL, response_BL)
        return self._inputs(batch, noised, weight_BL)

    def _strata(self, size: int) -> Tensor:
        """One number (size, 1) in each of `size` equal parts of [0, 1), in a random rotation."""
        offset = torch.rand((), generator=self.generator)
        return ((offset + torch.arange(size) / size) % 1)[:, None]

    def _corrupted(self, batch: Batch, layout: BlockLayout, ratio_BN: Tensor) -> NoisedBatch:
        return corrupt(
            batch.ids_BL,
            layout,
            ratio_BN,
            mask_token_id=self.mask_token_id,
            generator=self.generator,
            lengths_B=self._end(batch),
        )

    def _inputs(self, batch: Batch, noised: NoisedBatch, weight_BL: Tensor) -> StepInputs:
        block_BL = self._blocks(batch).block_numbers(batch.ids_BL.shape[1])
        return StepInputs(
            ids_BL=noised.ids_BL,
            target_BL=batch.ids_BL,
            weight_BL=weight_BL,
            block_BL=_hidden_past_end(batch, block_BL),
        )

    def _blocks(self, batch: Batch) -> BlockLayout:
        return BlockLayout(prompt_length=batch.prompt_length_B, block_size=self.noise.block_size)

    def _end(self, batch: Batch) -> Tensor:
        return sample_ends(batch.prompt_length_B, batch.end_B, batch.length_B, self.noise)


def _hidden_past_end(batch: Batch, block_BL: Tensor) -> Tensor:
    inside_BL = torch.arange(batch.ids_BL.shape[1]) < batch.length_B[:, None]
    return torch.where(inside_BL, block_BL, PADDING_BLOCK)


def sample_ends(
    prompt_B: Tensor, end_B: Tensor, length_B: Tensor, noise: NoiseConfig | None
) -> Tensor:
    """Give the ends of noise (B,): the sequence's, the block's with the first EOS, or that EOS.

    Prompts have `prompt_B` tokens, answers end at `end_B`, their first EOS included, and sequences
    at `length_B`. Without noise (stage autoregressive) a sample ends with its first EOS.

    Example:
        >>> noise = NoiseConfig(kind="uniform", low=0.1, high=1, block_size=4,
        ...                     train_on_eos_blocks=False)
        >>> sample_ends(torch.tensor([3]), torch.tensor([9]), torch.tensor([20]), noise)
        tensor([11])
    """
    if noise is not None and noise.train_on_eos_blocks:
        return length_B
    if noise is None or not noise.train_past_eos:
        return end_B
    blocks_B = -(-(end_B - prompt_B) // noise.block_size)
    return (prompt_B + blocks_B * noise.block_size).minimum(length_B)

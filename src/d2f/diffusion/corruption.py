"""The forward process: replace tokens of the response by the mask token.

Shapes: B sequences, L positions, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.diffusion.layout import BlockLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisedBatch:
    """A batch of sequences in which some tokens are masked."""

    ids_BL: Tensor
    """Token ids with the mask token where `masked_BL` is true."""
    masked_BL: Tensor
    """True at the masked positions."""
    ratio_BL: Tensor
    """Mask ratio of each position's block; 0 in the prompt."""


def corrupt(
    ids_BL: Tensor,
    layout: BlockLayout,
    ratio_BN: Tensor,
    *,
    mask_token_id: int,
    generator: torch.Generator,
    lengths_B: Tensor | None = None,
) -> NoisedBatch:
    """Mask each token of block i independently with probability t_i (paper, equation 2).

    The prompt and everything at or past `lengths_B` stay as they are. The same generator state
    gives the same noise. `generator` must live on the device of `ids_BL`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> layout = BlockLayout(prompt_length=1, block_size=2)
        >>> corrupt(torch.tensor([[5, 6, 7]]), layout, torch.ones(1, 1),
        ...         mask_token_id=0, generator=g).ids_BL
        tensor([[5, 0, 0]])
    """
    length = ids_BL.shape[1]
    block_BL = layout.block_numbers(length, ids_BL.device).expand_as(ids_BL).long()
    padded_BN = torch.cat([torch.zeros_like(ratio_BN[:, :1]), ratio_BN], dim=1)
    ratio_BL = padded_BN.gather(1, block_BL.clamp_max(ratio_BN.shape[1]))
    if lengths_B is not None:
        inside_BL = torch.arange(length, device=ids_BL.device)[None] < lengths_B[:, None]
        ratio_BL = torch.where(inside_BL, ratio_BL, 0.0)
    u_BL = torch.rand(ids_BL.shape, generator=generator, device=ids_BL.device)
    masked_BL = u_BL < ratio_BL
    return NoisedBatch(
        ids_BL=torch.where(masked_BL, mask_token_id, ids_BL), masked_BL=masked_BL, ratio_BL=ratio_BL
    )

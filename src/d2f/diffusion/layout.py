"""Block layout of a sequence, and the rule that decides which keys a query sees.

Shapes: B sequences, L positions of a batch, S keys.

One rule on integers decides attention everywhere: each position carries a block number, and a query
sees a key iff the key's number is not larger than the query's. Under full attention every position
has number 0, under causal attention position p has number p, and under block-causal attention the
prompt has 0 and the blocks behind it have 1, 2, …. Padding has `PADDING_BLOCK`, which is larger
than the number of any real query.

Where several samples stand in one row, the numbers grow from sample to sample. A query then also
carries the smallest number of its own sample, and sees no key with a smaller number than that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.errors import ConfigError

PADDING_BLOCK = 2**30
"""Block number of padding and of empty cache slots: larger than that of any query."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockLayout:
    """A prompt (block 0, bidirectional) followed by blocks of `block_size` positions.

    The grid starts at the end of each prompt, so every sequence of a batch has its own.

    Example:
        >>> BlockLayout(prompt_length=2, block_size=3).block_numbers(7)
        tensor([[0, 0, 1, 1, 1, 2, 2]], dtype=torch.int32)
    """

    prompt_length: int | Tensor
    """Tokens of the prompt: one number for all sequences, or a tensor (B,)."""
    block_size: int
    """Positions of a block; the last one of a sequence may be shorter."""

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size}; it must be at least 1")
        lengths_B = torch.as_tensor(self.prompt_length)
        if lengths_B.ndim > 1 or lengths_B.is_floating_point() or bool((lengths_B < 0).any()):
            raise ConfigError(
                f"prompt_length is {self.prompt_length}; it must be a whole number >= 0, "
                "or a tensor (B,) of such"
            )

    def block_numbers(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Return the block number of each of `length` positions: (1 or B, length), int32."""
        prompt_B1 = torch.as_tensor(self.prompt_length, device=device).reshape(-1, 1)
        offset_BL = torch.arange(length, device=device)[None] - prompt_B1
        block_BL = offset_BL.div(self.block_size, rounding_mode="floor") + 1
        return block_BL.clamp_min(0).to(torch.int32)


def causal_blocks(length: int, device: torch.device | str | None = None) -> Tensor:
    """Return block numbers (1, length) of causal attention: each position is its own block."""
    return torch.arange(length, device=device, dtype=torch.int32)[None]


def visible(
    query_blocks_BL: Tensor, key_blocks_BS: Tensor, first_BL: Tensor | None = None
) -> Tensor:
    """Return which keys each query may attend to: (B, L, S), bool.

    Args:
        query_blocks_BL: Block numbers of the queries.
        key_blocks_BS: Block numbers of the keys.
        first_BL: The number of the first block of each query's sample, the smallest that the query
            sees; None: each row holds one sample.

    Example:
        >>> visible(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
        tensor([[[ True, False],
                 [ True,  True]]])
        >>> visible(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
        tensor([[[ True, False],
                 [False,  True]]])
    """
    seen_BLS = key_blocks_BS[:, None, :] <= query_blocks_BL[:, :, None]
    if first_BL is None:
        return seen_BLS
    return seen_BLS & (key_blocks_BS[:, None, :] >= first_BL[:, :, None])

"""The dense key/value cache: one slot per position, with the block number of what lies in it.

Shapes: B sequences, L new tokens, S slots, K key/value heads, H head dimension, D hidden size.

A forward writes the keys and values of its tokens into the slots it is given and then attends over
all slots by the visibility rule. So a cache is exact or not by what its user writes: the pipeline
writes live blocks again at each step and a finished one for the last time from its final tokens;
other methods overwrite or refresh the slots they choose. Empty slots carry `PADDING_BLOCK`, which
no query sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.diffusion.layout import PADDING_BLOCK
from d2f.models.spec import ModelSpec


class KVCache:
    """Keys and values of `num_sequences` sequences with room for `num_slots` tokens each.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> KVCache(tiny_spec("llada"), num_sequences=2, num_slots=8).num_slots
        8
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_sequences: int,
        num_slots: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_slots = num_slots
        # The slot after the last takes what padding writes; its block number hides it.
        size = (num_sequences, num_slots + 1)
        shape = (*size, spec.num_kv_heads, spec.head_dim)
        # Zeros, not empty: a hidden NaN would still poison the weighted sum.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(spec.num_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.blocks_BS = torch.full(size, PADDING_BLOCK, device=device, dtype=torch.int32)
        self.boundary_BD = (
            torch.zeros(num_sequences, spec.hidden_size, device=device, dtype=dtype)
            if spec.architecture.shifted
            else None
        )
        """Final hidden state of the position before the next forward's first one, where the
        architecture predicts a token from the position before it."""

    def place(self, slots_BL: Tensor, blocks_BL: Tensor) -> Tensor:
        """Note the block numbers of the tokens about to be written; return their flat slots.

        A slot of -1 writes nothing.
        """
        slots_BL = torch.where(slots_BL < 0, self.num_slots, slots_BL)
        row_B1 = torch.arange(slots_BL.shape[0], device=slots_BL.device)[:, None]
        flat_T = (row_B1 * (self.num_slots + 1) + slots_BL).flatten()
        self.blocks_BS.view(-1).index_copy_(0, flat_T, blocks_BL.flatten())
        self.blocks_BS[:, self.num_slots] = PADDING_BLOCK
        return flat_T

    def write(self, layer: int, flat_T: Tensor, k_BLKH: Tensor, v_BLKH: Tensor) -> None:
        """Store a layer's keys and values in the slots that `place` returned."""
        for store, new in ((self.keys[layer], k_BLKH), (self.values[layer], v_BLKH)):
            store.view(-1, *store.shape[2:]).index_copy_(0, flat_T, new.flatten(0, 1))

    def keep_boundary(self, hidden_BLD: Tensor, advance_B: Tensor) -> None:
        """After a forward whose first `advance_B` tokens are final, remember the last of them."""
        if self.boundary_BD is None:
            return
        last_B11 = (advance_B - 1).clamp_min(0)[:, None, None]
        last_BD = hidden_BLD.gather(1, last_B11.expand(-1, -1, hidden_BLD.shape[-1]))[:, 0]
        self.boundary_BD = torch.where(advance_B[:, None] > 0, last_BD, self.boundary_BD)

    def select(self, rows_M: Tensor) -> None:
        """Keep only these sequences, in this order."""
        self.keys = [keys[rows_M] for keys in self.keys]
        self.values = [values[rows_M] for values in self.values]
        self.blocks_BS = self.blocks_BS[rows_M]
        if self.boundary_BD is not None:
            self.boundary_BD = self.boundary_BD[rows_M]

"""The paged key/value cache.

Shapes: N layers, S slots, K key/value heads, H head dimension.

Slots come in pages of equal size. Which page holds which positions of a sequence is the business of
its user, who says with each forward where the new tokens' keys and values go and which slots each
sequence reads (`d2f.ops.packed.PackedTokens`). So a cache is exact or not by what is written: the
pipeline writes live blocks again at each step and a finished one for the last time from its final
tokens; other methods may overwrite or refresh any slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from d2f.models.spec import ModelSpec

DUMP_PAGE = 0
"""The page that padding is written to; no sequence owns it."""


class PagedCache:
    """Keys and values of all layers in `num_pages` pages of `page_size` positions.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> PagedCache(tiny_spec("llada"), num_pages=4, page_size=8).kv_N2SKH.shape
        torch.Size([2, 2, 32, 4, 8])
    """

    _each_layer = True  # has room of its own

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_pages: int,
        page_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        layers = spec.num_layers if self._each_layer else 1
        shape = (layers, 2, num_pages * page_size, spec.num_kv_heads, spec.head_dim)
        # Not cleared: a slot is read only after it was written.
        self.kv_N2SKH = torch.empty(shape, device=device, dtype=dtype)
        self.kv_N2SKH[:, :, :page_size] = 0

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers."""
        size = self.page_size
        pages_N2PSKH = self.kv_N2SKH.unflatten(2, (self.num_pages, size))
        pages_N2PSKH[:, :, target].copy_(pages_N2PSKH[:, :, source])

    @staticmethod
    def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page in all layers."""
        return spec.kv_bytes_per_token // 2 * dtype.itemsize * page_size

    def layer(self, index: int) -> Tensor:
        """Keys and values of one layer: (2, S, K, H)."""
        return self.kv_N2SKH[index if self._each_layer else 0]


class ScratchCache(PagedCache):
    """Room for the keys and values of one layer, which every layer uses in its turn.

    For forwards that compute all tokens anew and keep nothing.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> ScratchCache(tiny_spec("llada"), num_pages=4, page_size=8).kv_N2SKH.shape
        torch.Size([1, 2, 32, 4, 8])
    """

    _each_layer = False

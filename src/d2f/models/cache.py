"""The paged key/value cache: the tensor, whose its pages are, and the prompts that it keeps.

Shapes: N layers, S slots, K key/value heads, H head dimension, D hidden size.

Slots come in pages of equal size. Which page holds which positions of a sequence is the business of
its user, who says with each forward where the new tokens' keys and values go and which slots each
sequence reads (`d2f.ops.packed.PackedTokens`). So a cache is exact or not by what is written: the
pipeline writes live blocks again at each step and a finished one for the last time from its final
tokens; other methods may overwrite or refresh any slot.

Pages are counted: a page that several sequences read (a shared prompt) is free again when the last
of them has let go of it.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.errors import ConfigError, D2FError, counted
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
        # Not cleared: a slot is read only after it was written.
        shape = self._shape(spec, num_pages * page_size)
        self.kv_N2SKH = torch.empty(shape, device=device, dtype=dtype)
        self.kv_N2SKH[:, :, :page_size] = 0

    @classmethod
    def fitting(
        cls,
        spec: ModelSpec,
        *,
        page_size: int,
        max_sequences: int,
        budget_bytes: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PagedCache:
        """A cache of the budget, or of the memory that is free.

        Never more than `max_sequences` of the model's greatest length could fill. Without a budget,
        a GPU gives nine tenths of its free memory less 2 GB for a step's own tensors, a CPU a
        quarter of its free memory, at most 1 GB.

        Raises:
            ConfigError: The budget holds no page.
        """
        page_bytes = cls.page_bytes(spec, page_size, dtype)
        useful = max_sequences * -(-spec.max_positions // page_size)
        budget = budget_bytes if budget_bytes is not None else free_bytes(device)
        pages = min(budget // page_bytes, useful)
        if pages < 1:
            raise ConfigError(
                f"{budget / 1e6:,.1f} MB for the key/value cache hold no page of "
                f"{counted(page_size, 'token')} ({page_bytes / 1e6:,.1f} MB); give it more with "
                "kv_cache_bytes, or lower page_size"
            )
        # One for padding.
        return cls(spec, num_pages=pages + 1, page_size=page_size, device=device, dtype=dtype)

    @classmethod
    def _shape(cls, spec: ModelSpec, num_slots: int) -> tuple[int, ...]:
        layers = spec.num_layers if cls._each_layer else 1
        return layers, 2, num_slots, spec.num_kv_heads, spec.head_dim

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in all layers."""
        size = self.page_size
        pages_N2PSKH = self.kv_N2SKH.unflatten(2, (self.num_pages, size))
        pages_N2PSKH[:, :, target].copy_(pages_N2PSKH[:, :, source])

    @classmethod
    def page_bytes(cls, spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page in all layers."""
        return math.prod(cls._shape(spec, page_size)) * dtype.itemsize

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


class PagePool:
    """The free pages and how often each other page is held.

    Args:
        num_pages: Those of the cache; page 0 belongs to nobody.

    Example:
        >>> pool = PagePool(num_pages=4)
        >>> pages = pool.take(2)
        >>> pages, pool.num_free
        ([1, 2], 1)
        >>> pool.release(pages)
        >>> pool.num_free
        3
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(DUMP_PAGE + 1, num_pages))[::-1]
        self.num_pages = len(self._free)
        self._holders: dict[int, int] = {}
        self._kept: dict[int, int] = {}
        """Number of kept prompts that hold each page; pages that none holds are left out."""
        self._num_idle = 0
        """Number of pages that only kept prompts hold."""
        self.wanted_by: dict[object, int] = {}
        """The number of the request that waits for pages, by lane."""

    @property
    def num_free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Number of pages that no sequence holds; only kept prompts hold some of them."""
        return len(self._free) + self._num_idle

    def take(self, count: int) -> list[int]:
        """Pages for a sequence; there must be as many."""
        if count > len(self._free):
            raise D2FError(f"{count} pages are wanted, but {len(self._free)} are free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders |= dict.fromkeys(pages, 1)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages once more that somebody holds."""
        for page in pages:
            self._num_idle -= self._is_idle(page)
            self._holders[page] += 1

    def num_held_once(self, pages: Sequence[int]) -> int:
        """Count those of these pages that are free once one holder lets go of them."""
        return sum(self._holders[page] == 1 for page in pages)

    def release(self, pages: Sequence[int]) -> None:
        """Let go of pages."""
        # The first page comes out first again, so that a lone sequence gets neighbouring pages.
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                self._free.append(page)
            else:
                self._num_idle += self._is_idle(page)

    def keep(self, pages: Sequence[int]) -> None:
        """Hold the pages of a prompt, which a sequence has written, for later requests with it."""
        self.share(pages)
        for page in pages:
            self._kept[page] = self._kept.get(page, 0) + 1

    def give_up(self, pages: Sequence[int]) -> None:
        """Let go of the pages of such a prompt."""
        for page in pages:
            self._num_idle -= self._is_idle(page)
            self._kept[page] -= 1
            if self._kept[page] == 0:
                del self._kept[page]
        self.release(pages)

    def _is_idle(self, page: int) -> bool:
        return self._holders[page] == self._kept.get(page)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedPrompt:
    """A whole prompt whose keys and values are in the cache."""

    pages: list[int]
    """All pages of the prompt; the last one may be filled in part."""
    boundary_D: Tensor | None
    """Final hidden state of its last position, where the architecture needs it."""


class PromptCache:
    """Whole prompts that may be used again; the one unused for longest is given up first.

    One engine has one model, one adapter and one kind of attention, so a prompt's ids are its key.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self._entries: OrderedDict[tuple[int, ...], CachedPrompt] = OrderedDict()

    def __len__(self) -> int:
        """Prompts held."""
        return len(self._entries)

    def find(self, prompt: Sequence[int]) -> CachedPrompt | None:
        """The entry of a prompt, which thereby counts as used."""
        key = tuple(prompt)
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, prompt: Sequence[int], pages: Sequence[int], boundary_D: Tensor | None) -> None:
        """Hold a prompt's pages beyond the life of the sequence that computed them."""
        self.pool.keep(pages)
        former = self._entries.pop(tuple(prompt), None)
        if former is not None:
            self.pool.give_up(former.pages)
        entry = CachedPrompt(pages=list(pages), boundary_D=boundary_D)
        self._entries[tuple(prompt)] = entry

    def clear(self) -> None:
        """Give up all prompts."""
        for entry in self._entries.values():
            self.pool.give_up(entry.pages)
        self._entries.clear()

    def make_room(self, count: int, spared: CachedPrompt | None = None) -> bool:
        """Give up prompts until `count` pages are free; whether they are.

        None is given up in vain: neither where not enough pages can become free, nor a prompt
        whose pages running sequences hold as well.
        """
        given_up, missing = [], count - self.pool.num_free
        if missing > 0:
            for key, entry in self._entries.items():
                freed = 0 if entry is spared else self.pool.num_held_once(entry.pages)
                if freed > 0:
                    given_up.append(key)
                    missing -= freed
                if missing <= 0:
                    break
        if missing > 0:
            return False
        for key in given_up:
            self.pool.give_up(self._entries.pop(key).pages)
        return True


def enough_bytes(
    spec: ModelSpec, lengths: Iterable[int], *, page_size: int, dtype: torch.dtype
) -> int:
    """Bytes of a cache in which sequences of these lengths never wait for pages.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> enough_bytes(tiny_spec("llada"), [20], page_size=16, dtype=torch.float32)
        24576
    """
    # Joining requests leave one page for each of those running.
    pages = sum(-(-length // page_size) + 1 for length in lengths)
    return pages * PagedCache.page_bytes(spec, page_size, dtype)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of free memory that a cache may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(int(0.9 * (free + unused)) - 2 * 10**9, 0)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 4 * 10**9
    return min(free // 4, 10**9)

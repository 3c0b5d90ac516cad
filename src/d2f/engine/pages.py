"""The pages of the cache on the host: how many there are, and whose they are.

Pages are counted: a page that several sequences read (a shared prompt) is free again when the last
of them has let go of it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.errors import ConfigError, D2FError, counted
from d2f.models.cache import PagedCache
from d2f.models.spec import ModelSpec


class PagePool:
    """The free pages and how often each other page is held.

    Example:
        >>> pool = PagePool(range(1, 4))
        >>> pages = pool.take(2)
        >>> pages, pool.num_free
        ([1, 2], 1)
        >>> pool.release(pages)
        >>> pool.num_free
        3
    """

    def __init__(self, pages: Iterable[int]) -> None:
        self._free = list(pages)[::-1]
        self.num_pages = len(self._free)
        self._holders: dict[int, int] = {}
        self._kept: dict[int, int] = {}
        """How many kept prompts hold each page; pages that none holds are left out."""
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
        """How many of these pages are free once one holder lets go of them."""
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
        self._pool = pool
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
        self._pool.keep(pages)
        former = self._entries.pop(tuple(prompt), None)
        if former is not None:
            self._pool.give_up(former.pages)
        entry = CachedPrompt(pages=list(pages), boundary_D=boundary_D)
        self._entries[tuple(prompt)] = entry

    def clear(self) -> None:
        """Give up all prompts."""
        for entry in self._entries.values():
            self._pool.give_up(entry.pages)
        self._entries.clear()

    def make_room(self, count: int, spared: CachedPrompt | None = None) -> bool:
        """Give up prompts until `count` pages are free; whether they are.

        None is given up in vain: neither where not enough pages can become free, nor a prompt
        whose pages running sequences hold as well.
        """
        given_up, missing = [], count - self._pool.num_free
        if missing > 0:
            for key, entry in self._entries.items():
                freed = 0 if entry is spared else self._pool.num_held_once(entry.pages)
                if freed > 0:
                    given_up.append(key)
                    missing -= freed
                if missing <= 0:
                    break
        if missing > 0:
            return False
        for key in given_up:
            self._pool.give_up(self._entries.pop(key).pages)
        return True


def cache_pages(
    spec: ModelSpec,
    *,
    page_size: int,
    max_batch_size: int,
    budget_bytes: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> int:
    """Pages of the cache: of the budget, or of the memory that is free.

    Never more than `max_batch_size` sequences of the model's greatest length could fill. Without a
    budget, a GPU gives nine tenths of its free memory less 2 GB for a step's own tensors, a CPU a
    quarter of its free memory, at most 1 GB.

    Raises:
        ConfigError: The budget holds no page.
    """
    page_bytes = PagedCache.page_bytes(spec, page_size, dtype)
    useful = max_batch_size * -(-spec.max_positions // page_size)
    budget = budget_bytes if budget_bytes is not None else free_bytes(device)
    pages = min(budget // page_bytes, useful)
    if pages < 1:
        raise ConfigError(
            f"{budget / 1e6:,.1f} MB for the key/value cache hold no page of "
            f"{counted(page_size, 'token')} "
            f"({page_bytes / 1e6:,.1f} MB); give it more with kv_cache_bytes, or lower page_size"
        )
    # One for padding.
    return pages + 1


def enough_bytes(
    spec: ModelSpec,
    lengths: Iterable[int],
    *,
    page_size: int,
    max_batch_size: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of a cache in which sequences of these lengths never wait for pages.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> enough_bytes(
        ...     tiny_spec("llada"), [3, 20], page_size=16, max_batch_size=1, dtype=torch.float32
        ... )
        24576
    """
    longest = sorted(lengths, reverse=True)[:max_batch_size]
    # Joining requests leave one page for each of those running.
    pages = sum(-(-length // page_size) + 1 for length in longest)
    return pages * PagedCache.page_bytes(spec, page_size, dtype)


def free_bytes(device: torch.device) -> int:
    """What a cache may take of the free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(int(0.9 * (free + unused)) - 2 * 10**9, 0)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        free = 4 * 10**9
    return min(free // 4, 10**9)

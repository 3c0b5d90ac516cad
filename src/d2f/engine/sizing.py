"""How large a step and the cache are made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from d2f.errors import ConfigError, counted
from d2f.models.cache import PagedCache
from d2f.models.spec import ModelSpec

_STEPS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
FREE_TOKENS = 192
"""Up to about so many query tokens a step is bound by reading the weights; further ones cost
little: on an H100 a step of 64 takes 1.13 times that of one token, of 128 1.28 times."""


def round_up(count: int, steps: Sequence[int] = _STEPS) -> int:
    """The smallest captured size that holds `count`: fine at first, then by quarters of a power.

    Example:
        >>> [round_up(n) for n in (1, 33, 200, 1100)]
        [1, 64, 256, 1280]
    """
    for step in steps:
        if count <= step:
            return step
    quarter = 1 << ((count - 1).bit_length() - 3)
    return -(-count // quarter) * quarter


def power_of_two(count: int) -> int:
    """The smallest power of two of at least `count`.

    Example:
        >>> power_of_two(5)
        8
    """
    return 1 << max(count - 1, 0).bit_length()


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

"""Seeds for parts of a run: functions of (seed, part, number), so that resuming needs no state."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, part: str, number: int = 0) -> int:
    """A seed for one part of a run, unrelated to that of any other part.

    Example:
        >>> derive_seed(0, "noise", 1) == derive_seed(0, "noise", 2)
        False
    """
    digest = hashlib.blake2b(f"{seed}/{part}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, part: str, number: int = 0) -> torch.Generator:
    """A CPU generator in the state that `derive_seed` names; CPU noise is the same everywhere."""
    return torch.Generator().manual_seed(derive_seed(seed, part, number))

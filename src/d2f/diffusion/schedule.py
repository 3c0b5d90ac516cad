"""Mask ratios t_1 … t_N of a sequence's blocks during distillation (paper, section 3.2).

Shapes: B sequences, N blocks of the longest response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.errors import ConfigError, unknown_name

KINDS = ("monotone", "original", "random")


@dataclass(frozen=True, kw_only=True)
class MaskRatioSchedule:
    """Draws the mask ratios of a sequence's blocks.

    Kinds:
        monotone: the paper's rising ratios, N independent draws from [low, high], sorted. The last
            blocks come near `high`, like the newest blocks of the decoding window.
        original: the rule of the authors' code: t_1 is uniform in [low, high], and each increment
            is uniform in [0, (high - t_1) / (N - 1)]. That code uses 0.2 to 0.7.
        random: independent draws from [low, high], unsorted (the ablation of table 4).

    Raises `ConfigError` for an unknown kind or ends that are not 0 <= low <= high <= 1, high > 0.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> ratio_BN = MaskRatioSchedule().sample(torch.tensor([3]), g)
        >>> bool((ratio_BN.diff() >= 0).all())
        True
    """

    kind: str = "monotone"
    low: float = 0.3
    """Smallest ratio of the first block."""
    high: float = 0.7
    """Largest ratio of the last block; 1.0 masks it whole."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("mask-ratio schedule", self.kind, KINDS))
        if not (0 <= self.low <= self.high <= 1 and self.high > 0):
            raise ConfigError(
                f"mask ratios from {self.low} to {self.high}: they must satisfy "
                "0 <= low <= high <= 1 and high > 0"
            )

    def sample(self, num_blocks_B: Tensor, generator: torch.Generator) -> Tensor:
        """Draw ratios (B, N), float32, on the generator's device; N is the largest block count.

        The distribution of a sequence's ratios depends on its own number of blocks only, not on the
        other sequences of the batch. Entries past a sequence's last block are `high`.
        """
        device = generator.device
        count_B1 = num_blocks_B.to(device).reshape(-1, 1)
        size = (count_B1.shape[0], max(int(count_B1.max()), 1))
        u_BN = torch.rand(size, generator=generator, device=device)
        inside_BN = torch.arange(size[1], device=device)[None] < count_B1
        if self.kind == "original":
            first_B1 = self.low + (self.high - self.low) * u_BN[:, :1]
            step_BN = u_BN * (self.high - first_B1) / (count_B1 - 1).clamp_min(1)
            step_BN[:, 0] = 0
            ratio_BN = (first_B1 + step_BN.cumsum(-1)).clamp_max(self.high)
        else:
            ratio_BN = self.low + (self.high - self.low) * u_BN
            if self.kind == "monotone":
                ratio_BN = torch.where(inside_BN, ratio_BN, 2.0).sort(dim=-1).values
        return torch.where(inside_BN, ratio_BN, self.high)

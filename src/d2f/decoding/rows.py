"""The state of the sequences that are decoded together, on the model's device.

Shapes: B rows, one sequence each; N blocks of K positions, the response of a row; L prompt
positions; E end-of-sequence ids; P pages of a row; D hidden size.

A row of blocks smaller than K leaves the rest of each block unused (`Rows.order_BNK`). Rows keep
their addresses for as long as the storage stays, so that a captured graph may run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from d2f.diffusion.policy import DecodingPolicy
from d2f.ops.sampling import CONFIDENCE_CODES

UNBOUNDED = 2**30
"""`max_live_blocks` of a policy that sets none; more than any count or place."""


@dataclass(frozen=True, kw_only=True)
class RowStart:
    """What a row starts from: a request, and what was decoded of it before."""

    prompt: Sequence[int]
    max_new_tokens: int
    policy: DecodingPolicy
    eos_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    early_stop: bool = True
    tokens: Sequence[int | None] = ()
    """The response so far, None where not decoded; empty at first."""
    num_opened: int = 0
    """Blocks that are open already."""
    num_forwards: int = 0
    num_query_tokens: int = 0
    num_cached: int = 0
    """First positions whose keys and values lie in the row's pages already."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The first B rows of the storage."""

    # Whole numbers, in the order of the storage.
    prompt_B: Tensor
    """Tokens of the prompt."""
    bound_B: Tensor
    """First position behind the response."""
    size_B: Tensor
    """Block size."""
    total_B: Tensor
    """Blocks of the response."""
    max_live_B: Tensor
    early_stop_B: Tensor
    confidence_B: Tensor
    """What ranks the forced token, as `d2f.ops.sampling` numbers it."""
    top_k_B: Tensor
    seed_B: Tensor
    done_B: Tensor
    """1 where there is nothing to do, or no sequence."""
    start_B: Tensor
    """First position that the next forward computes; all before are cached."""
    end_B: Tensor
    """First position that it does not compute."""
    forwards_B: Tensor
    queries_B: Tensor
    opened_B: Tensor
    """Blocks that are open in the next forward."""
    complete_B: Tensor
    """Leading blocks without a mask in the next forward, which caches them."""
    state_FB: Tensor
    """The same numbers from `done_B` on, as one tensor: what a step changes."""
    # Real numbers.
    add_B: Tensor
    activate_B: Tensor
    threshold_B: Tensor
    """Confidence threshold, rounded to fp32 as confidences are."""
    temperature_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    # The rest.
    tokens_BNK: Tensor
    """The response; the mask token where not decoded, and where no position is."""
    order_BNK: Tensor
    """Place in the response, `UNBOUNDED` where no position is. int64."""
    length_BN: Tensor
    """Positions of each block, 1 where no block is; float64, as shares are."""
    fully_BN: Tensor
    """Blocks that are fully active."""
    eos_BE: Tensor
    """End-of-sequence ids, -1 where a row has fewer."""
    prompt_BL: Tensor
    pages_BP: Tensor
    """Page table, int32."""
    boundary_BD: Tensor | None
    """Final hidden state of the position before `start_B`, where the architecture predicts a token
    from the position before it."""

    def update(self, runs_B: Tensor, **state: Tensor) -> None:
        """New values, int64, of the first fields of the state, in its order, for rows that run."""
        assert tuple(state) == STATE[: len(state)]
        old_FB = self.state_FB[: len(state)]
        torch.where(runs_B, torch.stack([*state.values()]), old_FB, out=old_FB)


_REALS = ("add_B", "activate_B", "threshold_B", "temperature_B", "top_p_B", "min_p_B")
_OTHERS = (
    "tokens_BNK", "order_BNK", "length_BN", "fully_BN", "eos_BE", "prompt_BL", "pages_BP",
    "boundary_BD",
)  # fmt: skip
_INTS = tuple(f.name for f in fields(Rows) if f.name not in (*_REALS, *_OTHERS, "state_FB"))
STATE = _INTS[_INTS.index("done_B") :]
"""Names of `Rows.state_FB`."""


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """Room of the storage; the largest that any row needs."""

    num_blocks: int
    block_size: int
    prompt_length: int
    num_eos: int

    @classmethod
    def of(cls, start: RowStart) -> RowSizes:
        """What one sequence needs."""
        size = min(start.policy.block_size, start.max_new_tokens)
        return cls(
            num_blocks=-(-start.max_new_tokens // start.policy.block_size),
            block_size=size,
            prompt_length=max(len(start.prompt), 1),
            num_eos=max(len(start.eos_token_ids), 1),
        )

    def union(self, other: RowSizes) -> RowSizes:
        """Room for both."""
        mine, others = vars(self), vars(other)
        return RowSizes(**{name: max(mine[name], others[name]) for name in mine})


class RowStorage:
    """Room for `max_rows` sequences.

    Example:
        >>> sizes = RowSizes(num_blocks=2, block_size=4, prompt_length=8, num_eos=1)
        >>> storage = RowStorage(sizes, max_rows=3, num_pages=5, mask_token_id=9)
        >>> storage.rows(2).tokens_BNK.shape
        torch.Size([2, 2, 4])
    """

    def __init__(
        self,
        sizes: RowSizes,
        *,
        max_rows: int,
        num_pages: int,
        mask_token_id: int,
        boundary_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sizes, self.mask_token_id = sizes, mask_token_id
        self.device = torch.device(device)
        self._ints_FB = torch.zeros(len(_INTS), max_rows, dtype=torch.long, device=device)
        self._vacant_F1 = torch.zeros(len(_INTS), 1, dtype=torch.long, device=device)
        self._vacant_F1[_INTS.index("done_B")] = 1
        # Padding is reckoned with the last row's block size, and that row may be vacant.
        self._vacant_F1[_INTS.index("size_B")] = 1
        self._ints_FB.copy_(self._vacant_F1)
        self._reals_FB = torch.zeros(len(_REALS), max_rows, dtype=torch.double, device=device)
        grid = (max_rows, sizes.num_blocks, sizes.block_size)
        self._others: dict[str, Tensor | None] = {
            "tokens_BNK": torch.full(grid, mask_token_id, device=device),
            "order_BNK": torch.full(grid, UNBOUNDED, device=device),
            "length_BN": torch.ones(grid[:2], dtype=torch.double, device=device),
            "fully_BN": torch.zeros(grid[:2], dtype=torch.bool, device=device),
            "eos_BE": torch.full((max_rows, sizes.num_eos), -1, device=device),
            "prompt_BL": torch.zeros(
                max_rows, sizes.prompt_length, dtype=torch.long, device=device
            ),
            "pages_BP": torch.zeros(max_rows, num_pages, dtype=torch.int32, device=device),
            "boundary_BD": None
            if boundary_size is None
            else torch.zeros(max_rows, boundary_size, dtype=dtype, device=device),
        }
        self._views: dict[int, Rows] = {}

    def rows(self, count: int) -> Rows:
        """The first `count` rows, as views."""
        if count not in self._views:
            ints_FB = self._ints_FB[:, :count]
            values: dict[str, Any] = dict(zip(_INTS, ints_FB.unbind(), strict=True))
            values["state_FB"] = ints_FB[-len(STATE) :]
            values |= zip(_REALS, self._reals_FB[:, :count].unbind(), strict=True)
            values |= {n: None if t is None else t[:count] for n, t in self._others.items()}
            self._views[count] = Rows(**values)
        return self._views[count]

    def write(
        self, row: int, start: RowStart, values: dict[str, int], fully: Sequence[bool]
    ) -> None:
        """Put a sequence into a row.

        Args:
            row: Its number.
            start: The sequence.
            values: `opened`, `complete`, `start` and `end` of its first forward.
            fully: Which of its blocks are fully active.
        """
        policy = start.policy
        size = min(policy.block_size, start.max_new_tokens)
        ints = values | {
            "prompt": len(start.prompt),
            "bound": len(start.prompt) + start.max_new_tokens,
            "size": size,
            "total": -(-start.max_new_tokens // size),
            "max_live": policy.max_live_blocks or UNBOUNDED,
            "early_stop": start.early_stop,
            "confidence": CONFIDENCE_CODES[policy.confidence],
            "top_k": start.top_k,
            "seed": start.seed,
            "done": False,
            "forwards": start.num_forwards,
            "queries": start.num_query_tokens,
        }
        threshold = float(torch.tensor(policy.confidence_threshold, dtype=torch.float32))
        reals = [policy.add_threshold, policy.activate_threshold, threshold]
        reals += [start.temperature, start.top_p, start.min_p]
        self._ints_FB[:, row] = self.upload([int(ints[name[:-2]]) for name in _INTS])
        self._reals_FB[:, row] = self.upload(reals, torch.double)
        others = self.rows(len(self._ints_FB[0]))
        others.eos_BE[row] = -1
        if start.eos_token_ids:
            others.eos_BE[row, : len(start.eos_token_ids)] = self.upload(start.eos_token_ids)
        if start.prompt:
            others.prompt_BL[row, : len(start.prompt)] = self.upload(start.prompt)
        others.fully_BN[row] = False
        others.fully_BN[row, : len(fully)] = self.upload(fully, torch.bool)
        others.order_BNK[row] = self._order(size, start.max_new_tokens)
        others.length_BN[row] = (others.order_BNK[row] < UNBOUNDED).sum(-1).clamp_min(1)
        others.tokens_BNK[row] = mask = self.mask_token_id
        if start.tokens:
            known = [mask if token is None else token for token in start.tokens]
            others.tokens_BNK[row] = self.upload(self._grid(known, size))

    def _order(self, size: int, length: int) -> Tensor:
        """Places of a response of blocks of `size`: (N, K)."""
        offset_K = torch.arange(self.sizes.block_size, device=self.device)
        first_N1 = torch.arange(self.sizes.num_blocks, device=self.device)[:, None] * size
        place_NK = first_N1 + offset_K
        return torch.where((offset_K < size) & (place_NK < length), place_NK, UNBOUNDED)

    def _grid(self, values: Sequence[int], size: int) -> list[list[int]]:
        """Tokens of the response laid out as blocks of the storage, masks in what is left."""
        sizes, mask = self.sizes, self.mask_token_id
        blocks = [[*values[at : at + size]] for at in range(0, len(values), size)]
        blocks += [[]] * (sizes.num_blocks - len(blocks))
        return [block + [mask] * (sizes.block_size - len(block)) for block in blocks]

    def write_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Enter pages into the table: (row, index in the row, page) each."""
        if not entries:
            return
        row, index, page = self.upload(list(zip(*entries, strict=True))).unbind()
        pages_BP = self._others["pages_BP"]
        assert pages_BP is not None
        pages_BP.index_put_((row, index), page.int())

    def move(self, source: int, target: int) -> None:
        """Move the sequence of one row to another; the first is then without one."""
        for store in (self._ints_FB, self._reals_FB):
            store[:, target] = store[:, source]
        for tensor in self._others.values():
            if tensor is not None:
                tensor[target] = tensor[source]
        self.clear(source)

    def clear(self, row: int) -> None:
        """Take the sequence out of a row."""
        # All of it: what a step computes of vacant rows must fit a storage of other sizes too.
        self._ints_FB[:, row : row + 1] = self._vacant_F1

    def resized(self, sizes: RowSizes) -> RowStorage:
        """A storage with other room that holds the same sequences."""
        pages_BP, boundary_BD = self._others["pages_BP"], self._others["boundary_BD"]
        assert pages_BP is not None
        other = RowStorage(
            sizes,
            max_rows=self._ints_FB.shape[1],
            num_pages=pages_BP.shape[1],
            mask_token_id=self.mask_token_id,
            boundary_size=None if boundary_BD is None else boundary_BD.shape[1],
            dtype=torch.float32 if boundary_BD is None else boundary_BD.dtype,
            device=self.device,
        )
        other._ints_FB.copy_(self._ints_FB)
        other._reals_FB.copy_(self._reals_FB)
        for name, old in self._others.items():
            new = other._others[name]
            if old is not None and new is not None:
                part = tuple(slice(min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
                new[part] = old[part]
        return other

    def upload(self, values: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """Host values as a tensor on the device, without waiting for it."""
        tensor = torch.tensor(values, dtype=dtype)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

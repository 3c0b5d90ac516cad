"""The state of the sequences that are decoded together, on the model's device.

Shapes: B rows, one sequence each; N blocks of K positions, the response of a row; L prompt
positions; E end-of-sequence ids; P pages of a row; D hidden size.

A row of blocks smaller than K leaves the rest of each block unused (`Rows.order_BNK`). Rows keep
their addresses for as long as the storage stays, so that a captured graph may run on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from d2f.decoding.batch import Decoded, RowRequest
from d2f.models.transformer import Transformer
from d2f.ops.sampling import CONFIDENCE_CODES

UNBOUNDED = 2**30
"""`max_live_blocks` of a policy that sets none; more than any count or place."""
MOST_PLACES = 2**24
"""Most response positions of all rows together; a request that needs more room than that beside
those running waits for them."""

Value = TypeVar("Value")


def power_of_two(count: int) -> int:
    """The smallest power of two of at least `count`.

    Example:
        >>> power_of_two(5)
        8
    """
    return 1 << max(count - 1, 0).bit_length()


class RowFacts(NamedTuple, Generic[Value]):
    """Whole numbers of a row that no step changes."""

    prompt: Value
    """Tokens of the prompt."""
    bound: Value
    """First position behind the response."""
    size: Value
    """Block size."""
    total: Value
    """Blocks of the response."""
    max_live: Value
    early_stop: Value
    confidence: Value
    """Code of the measure that ranks the forced token, as `d2f.ops.sampling` numbers it."""
    top_k: Value
    seed: Value


class RowState(NamedTuple, Generic[Value]):
    """Whole numbers of a row that a step changes and reports."""

    done: Value
    """1 where there is nothing to do, or no sequence."""
    start: Value
    """First position that the next forward computes; all before are cached."""
    end: Value
    """First position that it does not compute."""
    forwards: Value
    queries: Value
    opened: Value
    """Blocks that are open in the next forward."""
    complete: Value
    """Leading blocks without a mask in the next forward, which caches them."""


class RowReals(NamedTuple, Generic[Value]):
    """Real numbers of a row that no step changes."""

    add: Value
    activate: Value
    threshold: Value
    """Bound that an accepted token's confidence exceeds, rounded to fp32 as confidences are."""
    temperature: Value
    top_p: Value
    min_p: Value


NEW_ROW = RowState(done=0, start=0, end=0, forwards=0, queries=0, opened=0, complete=0)


@dataclass(kw_only=True, eq=False)
class HostRow(Decoded):
    """A sequence as the host knows it, which may be one step behind the device."""

    asked: RowRequest
    state: RowState[int] = NEW_ROW
    """State last reported; for a row that has run nothing yet, the state in which it began."""

    @property
    def longest(self) -> int:
        """Positions of prompt and longest response."""
        return len(self.asked.prompt) + self.asked.max_new_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The first B rows of the storage; facts and state are int64 (B,), reals float64 (B,)."""

    facts: RowFacts[Tensor]
    state: RowState[Tensor]
    state_FB: Tensor
    """The state as one tensor."""
    reals: RowReals[Tensor]
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
    """Final hidden state of the position before `start`, where the architecture predicts a token
    from the position before it."""

    def update(self, runs_B: Tensor, state: RowState[Tensor]) -> None:
        """New values, int64, of the state of rows that run."""
        torch.where(runs_B, torch.stack([*state]), self.state_FB, out=self.state_FB)

    # As packing names what it reads of the rows.
    prompt_B = property(lambda rows: rows.facts.prompt)
    size_B = property(lambda rows: rows.facts.size)
    start_B = property(lambda rows: rows.state.start)
    end_B = property(lambda rows: rows.state.end)
    done_B = property(lambda rows: rows.state.done)


_NUM_FACTS = len(RowFacts._fields)
# Padding is reckoned with the last row's block size, and that row may be vacant.
_VACANT = (*RowFacts(*[0] * _NUM_FACTS)._replace(size=1), *NEW_ROW._replace(done=1))
"""Facts and state of a row without a sequence."""


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """Room of the storage; the largest that any row needs."""

    num_blocks: int
    block_size: int
    prompt_length: int
    num_eos: int

    @classmethod
    def of(cls, asked: RowRequest) -> RowSizes:
        """Return the sizes that one sequence needs."""
        return cls(
            num_blocks=-(-asked.max_new_tokens // asked.policy.block_size),
            block_size=min(asked.policy.block_size, asked.max_new_tokens),
            prompt_length=max(len(asked.prompt), 1),
            num_eos=max(len(asked.eos_token_ids), 1),
        )

    def rounded(self) -> RowSizes:
        """Powers of two, so that few sizes occur."""
        return RowSizes(**{name: power_of_two(value) for name, value in vars(self).items()})

    def union(self, other: RowSizes) -> RowSizes:
        """Room for both."""
        mine, others = vars(self), vars(other)
        return RowSizes(**{name: max(mine[name], others[name]) for name in mine})

    def num_places(self, max_rows: int) -> int:
        """Response positions of so many rows."""
        return max_rows * self.num_blocks * self.block_size


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
        self.sizes, self.max_rows, self.mask_token_id = sizes, max_rows, mask_token_id
        self.device = torch.device(device)
        self._vacant_F1 = torch.tensor(_VACANT, device=device)[:, None]
        self._ints_FB = self._vacant_F1.repeat(1, max_rows)
        self._reals_FB = torch.zeros(
            len(RowReals._fields), max_rows, dtype=torch.double, device=device
        )
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

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        others = [tensor for tensor in self._others.values() if tensor is not None]
        return [self._ints_FB, self._reals_FB, *others]

    @classmethod
    def for_model(
        cls, model: Transformer, sizes: RowSizes, *, max_rows: int, num_pages: int
    ) -> RowStorage:
        """Room for sequences of a model."""
        spec = model.spec
        return cls(
            sizes,
            max_rows=max_rows,
            num_pages=num_pages,
            mask_token_id=spec.mask_token_id or 0,
            boundary_size=spec.hidden_size if spec.architecture.shifted else None,
            dtype=model.dtype,
            device=model.device,
        )

    def rows(self, count: int) -> Rows:
        """The first `count` rows, as views."""
        if count not in self._views:
            state_FB = self._ints_FB[_NUM_FACTS:, :count]
            others: dict[str, Any] = {
                name: None if tensor is None else tensor[:count]
                for name, tensor in self._others.items()
            }
            self._views[count] = Rows(
                facts=RowFacts(*self._ints_FB[:_NUM_FACTS, :count]),
                state=RowState(*state_FB),
                state_FB=state_FB,
                reals=RowReals(*self._reals_FB[:, :count]),
                **others,
            )
        return self._views[count]

    def write(
        self,
        row: int,
        sequence: HostRow,
        state: RowState[int],
        fully: Sequence[bool],
        threshold: float,
    ) -> None:
        """Put a sequence into a row.

        It begins at `state` with the blocks `fully` active, and goes on with what was decoded of it
        before; the confidence of an accepted token exceeds the threshold.
        """
        asked, policy = sequence.asked, sequence.asked.policy
        size = min(policy.block_size, asked.max_new_tokens)
        facts = RowFacts(
            prompt=len(asked.prompt),
            bound=sequence.longest,
            size=size,
            total=-(-asked.max_new_tokens // size),
            max_live=policy.max_live_blocks or UNBOUNDED,
            early_stop=int(asked.early_stop),
            confidence=CONFIDENCE_CODES[policy.confidence],
            top_k=asked.top_k,
            seed=asked.seed,
        )
        reals = RowReals(
            add=policy.add_threshold,
            activate=policy.activate_threshold,
            threshold=float(torch.tensor(threshold, dtype=torch.float32)),
            temperature=asked.temperature,
            top_p=asked.top_p,
            min_p=asked.min_p,
        )
        self._ints_FB[:, row] = self.upload([*facts, *state])
        self._reals_FB[:, row] = self.upload(reals, torch.double)
        others = self.rows(self.max_rows)
        others.eos_BE[row] = -1
        if asked.eos_token_ids:
            others.eos_BE[row, : len(asked.eos_token_ids)] = self.upload(asked.eos_token_ids)
        if asked.prompt:
            others.prompt_BL[row, : len(asked.prompt)] = self.upload(asked.prompt)
        others.fully_BN[row] = False
        others.fully_BN[row, : len(fully)] = self.upload(fully, torch.bool)
        others.order_BNK[row] = self._order(size, asked.max_new_tokens)
        others.length_BN[row] = (others.order_BNK[row] < UNBOUNDED).sum(-1).clamp_min(1)
        others.tokens_BNK[row] = self.mask_token_id
        if state.forwards:
            others.tokens_BNK[row] = self.upload(self._grid(sequence.tokens, size))

    def _order(self, size: int, length: int) -> Tensor:
        """Places of a response of blocks of `size`: (N, K)."""
        offset_K = torch.arange(self.sizes.block_size, device=self.device)
        first_N1 = torch.arange(self.sizes.num_blocks, device=self.device)[:, None] * size
        place_NK = first_N1 + offset_K
        return torch.where((offset_K < size) & (place_NK < length), place_NK, UNBOUNDED)

    def _grid(self, tokens: Sequence[int | None], size: int) -> list[list[int]]:
        """Tokens of the response laid out as blocks of the storage, masks in what is left."""
        sizes, mask = self.sizes, self.mask_token_id
        values = [mask if token is None else token for token in tokens]
        blocks = [values[at : at + size] for at in range(0, len(values), size)]
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

    def sizes_with(self, asked: RowRequest, least: RowSizes, *, alone: bool) -> RowSizes | None:
        """Room for a sequence beside those stored; on a GPU room only grows, by powers of two.

        None if there must not be so much. A sequence that is alone need not bear with what former
        ones needed.
        """
        sizes, on_gpu = RowSizes.of(asked).union(least), self.device.type == "cuda"
        if on_gpu:
            sizes = sizes.rounded()
        both = sizes.union(self.sizes)
        fits = both.num_places(self.max_rows) <= MOST_PLACES
        if alone:
            return both if on_gpu and fits else sizes
        return both if fits else None

    def resized(self, sizes: RowSizes) -> RowStorage:
        """A storage with other room that holds the same sequences."""
        pages_BP, boundary_BD = self._others["pages_BP"], self._others["boundary_BD"]
        assert pages_BP is not None
        other = RowStorage(
            sizes,
            max_rows=self.max_rows,
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

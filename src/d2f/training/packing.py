"""Rows of several short samples (`data.padding = "packed"`).

Shapes: E samples of a run, S samples of a batch, B rows of a batch, L positions of a row.

Noise and weights are those of the samples, each for itself; only then they move together. So what
is trained on does not depend on how the rows are made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from d2f.diffusion.layout import PADDING_BLOCK
from d2f.errors import counted
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset, generator
from d2f.training.step_inputs import StepInputs, sample_ends


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlaces:
    """The samples that the rows of a batch hold, row after row, and their places."""

    sample_S: Tensor
    """Numbers of the samples."""
    row_S: Tensor
    """The row of the batch that each is in; those of a row follow each other."""
    start_S: Tensor
    """The position in the row at which each sample begins."""
    size: tuple[int, int]
    """B and L."""
    longest: int
    """Positions of the longest of these samples; what lies behind need not be made."""

    def pack(self, inputs: StepInputs) -> StepInputs:
        """Put samples that have a row each, in the order of `sample_S`, into shared rows.

        A sample is what lies before the first `PADDING_BLOCK`. Padding at the end of a row is seen
        by no sample and sees itself only.
        """
        inside_SL = inputs.block_BL != PADDING_BLOCK
        sample_T, position_T = inside_SL.nonzero(as_tuple=True)
        source_T = sample_T * inside_SL.shape[1] + position_T
        target_T = self.row_S[sample_T] * self.size[1] + self.start_S[sample_T] + position_T
        first_S = self._first_blocks((inputs.block_BL * inside_SL).amax(1) + 1)

        def moved(values_SL: Tensor, filler: int) -> Tensor:
            row_T = values_SL.new_full((self.size[0] * self.size[1],), filler)
            row_T.index_copy_(0, target_T, values_SL.flatten().index_select(0, source_T))
            return row_T.view(self.size)

        first_SL = first_S[:, None].expand(inside_SL.shape)
        return StepInputs(
            ids_BL=moved(inputs.ids_BL, 0),
            target_BL=moved(inputs.target_BL, 0),
            weight_BL=moved(inputs.weight_BL, 0),
            block_BL=moved(inputs.block_BL + first_SL, PADDING_BLOCK),
            position_BL=moved(torch.arange(inside_SL.shape[1]).expand(inside_SL.shape), 0),
            first_BL=moved(first_SL, PADDING_BLOCK),
        )

    def _first_blocks(self, count_S: Tensor) -> Tensor:
        """Block number of each sample's first block, as its row's numbers go on: (S,), int32."""
        before_S = count_S.cumsum(0) - count_S
        # Of the row's first sample all that is before is in other rows.
        opens_S = torch.ones_like(self.row_S, dtype=torch.bool)
        opens_S[1:] = self.row_S[1:] != self.row_S[:-1]
        return (before_S - before_S[opens_S][opens_S.cumsum(0) - 1]).to(torch.int32)


class RowPacking:
    """The samples of a run in rows, each row filled as far as whole samples allow.

    Made once: the longest samples are placed first, those of equal length in an order that the seed
    gives, each into the row that it leaves the least room in. Which rows make up a batch is drawn
    anew in each epoch (`SampleOrder`). Both are functions of the seed and the lengths, so all
    processes agree, and a resumed run goes on with the same rows.

    Args:
        length_E: Positions that each sample takes, at most `row_length`.
        row_length: L.
        seed: Of the run.

    Example:
        >>> packing = RowPacking(torch.tensor([2, 5, 3]), row_length=6, seed=0)
        >>> packing.num_rows, round(packing.filled, 2)
        (2, 0.83)
        >>> places = packing.places(torch.tensor([1]))
        >>> places.sample_S, places.start_S
        (tensor([2, 0]), tensor([0, 3]))
    """

    def __init__(self, length_E: Tensor, *, row_length: int, seed: int) -> None:
        self.row_length = row_length
        shuffled_E = torch.randperm(len(length_E), generator=generator(seed, "rows"))
        by_length_E = length_E[shuffled_E].argsort(descending=True, stable=True)
        sample_E = shuffled_E[by_length_E]
        row_E = torch.tensor(_fit(length_E[sample_E].tolist(), row_length), dtype=torch.long)
        order_E = row_E.argsort(stable=True)
        self._sample_E = sample_E[order_E]
        self._count_R = row_E.bincount()
        self._begin_R = self._count_R.cumsum(0) - self._count_R
        self._length_E = length_E = length_E[self._sample_E]
        before_E = length_E.cumsum(0) - length_E
        self._start_E = before_E - before_E[self._begin_R].repeat_interleave(self._count_R)
        self.num_rows = len(self._count_R)
        self.filled = float(length_E.sum()) / (self.num_rows * row_length)
        """Share of the rows' positions that samples take."""

    def text(self) -> str:
        """Tell in one line how the samples are packed."""
        return (
            f"packed into {counted(self.num_rows, 'row', ',')} of "
            f"{counted(self.row_length, 'token', ',')}, {self.filled:.1%} filled"
        )

    def places(self, rows_B: Tensor) -> RowPlaces:
        """Give the samples of some rows, as a batch."""
        count_B = self._count_R[rows_B]
        before_B = count_B.cumsum(0) - count_B
        row_S = torch.arange(len(rows_B)).repeat_interleave(count_B)
        index_S = torch.arange(len(row_S)) + (self._begin_R[rows_B] - before_B)[row_S]
        return RowPlaces(
            sample_S=self._sample_E[index_S],
            row_S=row_S,
            start_S=self._start_E[index_S],
            size=(len(rows_B), self.row_length),
            longest=int(self._length_E[index_S].max()),
        )


def pack_samples(dataset: TokenDataset, config: TrainConfig) -> RowPacking:
    """The rows of a run: a sample takes as many positions as are trained on or seen by those."""
    prompt_E, end_E = dataset.extents()
    limit_E = end_E.new_full((), dataset.sequence_length)
    length_E = sample_ends(prompt_E, end_E, limit_E, config.noise)
    return RowPacking(length_E, row_length=dataset.sequence_length, seed=config.seed)


def _fit(lengths: Sequence[int], row_length: int) -> list[int]:
    """The row of each sample: of those with room for it that with the least, else a new one."""
    rows_by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    rooms = 0  # bit r: there is a row with room for r more
    num_rows, chosen = 0, []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row, num_rows = row_length, num_rows, num_rows + 1
        chosen.append(row)
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return chosen

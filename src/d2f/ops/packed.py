"""Where the tokens of one packed forward belong.

Shapes: T tokens of B rows, packed row after row; P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """The tokens of one forward over the paged cache, and which keys each of them sees.

    Block numbers never fall along a sequence, so "a key is visible iff its block is not after the
    query's" (`d2f.diffusion.layout`) is the same as "its position is before the end of the query's
    block". That end is `limits_T`; a limit never exceeds the row's end.

    Padding follows the last row's tokens: its limit is 0 and its slot lies in page 0, which no row
    owns.
    """

    positions_T: Tensor
    """Absolute position of each token, int64."""
    slots_T: Tensor
    """Cache slot that each token's key and value are written to: page * page_size + offset."""
    limits_T: Tensor
    """Each token sees the keys of its row at positions below this, int64."""
    starts_B: Tensor
    """Index of each row's first token among the T, int64."""
    counts_B: Tensor
    """Tokens of each row, 0 for a row that is not part of this forward, int64."""
    ends_B: Tensor
    """Positions of each row that hold keys once this forward has written its own, int64."""
    pages_BP: Tensor
    """Page table: number of the page that holds positions p * page_size …, int32."""
    page_size: int
    """Positions of a page."""
    max_count: int
    """No row has more tokens than this; known on the host."""
    max_end: int
    """No row ends later than this; known on the host."""

"""The pipeline's rules on states written out by hand."""

import torch

from d2f.decoding import rules


def blocks(*rows: str) -> torch.Tensor:
    """`x` decoded, `.` masked: (1, N, K)."""
    return torch.tensor([[[c == "x" for c in row] for row in rows]])


def test_share_of_a_short_block_counts_its_own_positions():
    length = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
    share = rules.decoded_share(blocks("xx..", "x..."), length)
    assert share.tolist() == [[0.5, 0.5]]


def opened(share, count, *, cached=0, total=4, eos=False, add=0.25, window=None) -> int:
    return int(
        rules.open_blocks(
            torch.tensor([share], dtype=torch.float64),
            torch.tensor([count]),
            torch.tensor([cached]),
            torch.tensor([total]),
            torch.tensor([eos]),
            add_threshold=add,
            max_live_blocks=window,
        )[0]
    )


def test_a_block_opens_at_the_threshold_and_not_below():
    assert opened([0.25, 0.0], 1) == 2
    assert opened([0.2499, 0.0], 1) == 1


def test_the_prompt_opens_the_first_block():
    assert opened([0.0, 0.0], 0, add=1.0) == 1


def test_no_block_opens_after_eos_past_the_end_or_beyond_the_window():
    assert opened([1.0, 0.0], 1, eos=True) == 1
    assert opened([1.0, 1.0], 2, total=2) == 2
    assert opened([1.0, 1.0], 2, cached=0, window=2) == 2
    assert opened([1.0, 1.0], 2, cached=1, window=2) == 3


def test_activation_is_for_good_and_follows_the_predecessor():
    share = torch.tensor([[0.9, 0.95, 0.1]], dtype=torch.float64)
    marked = torch.tensor([[False, True, False]])
    fully = rules.activate(share, marked, activate_threshold=0.95)
    assert fully.tolist() == [[True, True, True]]
    fully = rules.activate(share, ~marked & marked, activate_threshold=0.95)
    assert fully.tolist() == [[True, False, True]]


def test_accept_above_the_threshold_else_one_where_fully_active():
    confidence = torch.tensor([[[0.9, 0.5, 0.95], [0.3, 0.4, 0.4], [0.3, 0.2, 0.1]]])
    candidate = torch.ones(1, 3, 3, dtype=torch.bool)
    fully = torch.tensor([[True, True, False]])
    accepted = rules.accept(candidate, confidence, confidence, fully, confidence_threshold=0.9)
    assert accepted[0].tolist() == [
        [False, False, True],  # 0.9 is not above 0.9
        [False, True, False],  # the first of equals
        [False, False, False],  # semi-active: nothing
    ]


def test_nothing_is_forced_in_a_block_without_candidates():
    none = torch.zeros(1, 1, 3, dtype=torch.bool)
    one = torch.ones(1, 1, 3)
    accepted = rules.accept(none, one, one, ~none.any(-1), confidence_threshold=0.5)
    assert not accepted.any()


def test_nan_confidence_still_makes_progress():
    candidate = torch.tensor([[[False, True, True]]])
    confidence = torch.full((1, 1, 3), torch.nan)
    fully = torch.tensor([[True]])
    accepted = rules.accept(candidate, confidence, confidence, fully, confidence_threshold=0.5)
    assert accepted.tolist() == [[[False, True, False]]]


def test_only_leading_blocks_complete():
    first_gap, opened = torch.tensor([4, 5, 3, 99]), torch.tensor([3, 1, 2, 2])
    assert rules.completed_blocks(first_gap, opened, torch.tensor(4)).tolist() == [1, 1, 0, 2]


def test_the_rank_decides_only_what_is_forced():
    candidate = torch.tensor([[[False, True, True], [True, True, True]]])
    confidence = torch.tensor([[[0.9, 0.4, 0.3], [0.2, 0.95, 0.1]]])
    rank = torch.tensor([[[-0.1, -3.0, -2.0], [-0.5, -9.0, torch.nan]]])
    fully = torch.ones(1, 2, dtype=torch.bool)
    accepted = rules.accept(candidate, confidence, rank, fully, confidence_threshold=0.9)
    assert accepted[0].tolist() == [[False, False, True], [False, True, False]]
    rank[0, 0, 2] = torch.nan
    accepted = rules.accept(candidate, confidence, rank, fully, confidence_threshold=0.9)
    assert accepted[0, 0].tolist() == [False, True, False]


def test_thresholds_may_differ_by_sequence():
    share = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.1, 0.0]], dtype=torch.float64)
    one = torch.ones(3, dtype=torch.long)
    threshold = torch.tensor([0.1, 0.2, 0.1], dtype=torch.float64)
    count = rules.open_blocks(
        share, one, one - 1, one + 3, one > 1,
        add_threshold=threshold, max_live_blocks=torch.tensor([2**40, 2**40, 1]),
    )  # fmt: skip
    assert count.tolist() == [2, 1, 1]
    fully = rules.activate(
        share, torch.zeros(3, 2, dtype=torch.bool), activate_threshold=threshold[:, None]
    )
    assert fully[:, 1].tolist() == [True, False, True]
    confidence = torch.full((3, 1, 1), 0.15)
    accepted = rules.accept(
        confidence > 0, confidence, confidence, torch.zeros(3, 1, dtype=torch.bool),
        confidence_threshold=threshold.float()[:, None, None],
    )  # fmt: skip
    assert accepted.flatten().tolist() == [True, False, True]

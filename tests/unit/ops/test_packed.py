"""The layout of a packed forward: the twin against plain Python, the kernels against the twin."""

from dataclasses import dataclass, fields

import pytest
import torch

from d2f.ops.packed import Packing, find_candidates, pack_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 7
PAGE = 4


@dataclass(frozen=True)
class Rows:
    """Rows as the first ones of larger storage, as the engine's are."""

    prompt_B: torch.Tensor
    size_B: torch.Tensor
    start_B: torch.Tensor
    end_B: torch.Tensor
    done_B: torch.Tensor
    tokens_BNK: torch.Tensor
    prompt_BL: torch.Tensor
    pages_BP: torch.Tensor


def random_rows(num_rows, *, seed=0, blocks=3, block_size=5, prompts=True, done=0.2) -> Rows:
    """Rows of any block size up to K that compute some stretch of prompt and response."""
    make = torch.Generator().manual_seed(seed)

    def randint(low, high, *size):
        return torch.randint(low, high, size or (num_rows,), generator=make)

    size_B = randint(1, block_size + 1)
    limit_B = 1 + randint(0, 10**6) % (size_B * blocks)
    prompt_B = randint(0, 6)
    longest = 5 + blocks * block_size
    opened_B = randint(1, blocks + 1)
    end_B = prompt_B + torch.minimum(opened_B * size_B, limit_B)
    low_B = torch.zeros_like(prompt_B) if prompts else prompt_B
    start_B = low_B + randint(0, 10**6) % (end_B - low_B + 1)
    done_B = (torch.rand(num_rows, generator=make) < done).long()
    ints_FB = torch.zeros(5, num_rows + 3, dtype=torch.long)
    ints_FB[:, :num_rows] = torch.stack([prompt_B, size_B, start_B, end_B, done_B])
    room = num_rows + 2
    tokens_BNK = randint(MASK - 2, MASK + 1, room, blocks, block_size)
    prompt_BL = randint(0, MASK + 1, room, 5)
    pages_BP = randint(1, 50, room, -(-longest // PAGE)).int()
    columns = ints_FB.to(DEVICE)[:, :num_rows].unbind()
    others = (t.to(DEVICE)[:num_rows] for t in (tokens_BNK, prompt_BL, pages_BP))
    return Rows(*columns, *others)


def options(num_tokens, *, prefill=True, causal=False):
    return {
        "num_tokens": num_tokens,
        "page_size": PAGE,
        "max_count": 20,
        "max_end": 20,
        "prefill": prefill,
        "causal": causal,
    }


def naive_tokens(rows: Rows, num_tokens: int, causal: bool):
    """(position, slot, limit, id, row, response, number of candidates of the row before) each."""
    tokens, full = [], False
    for row in range(len(rows.prompt_B)):
        prompt, size, start, end, done = (
            int(column[row])
            for column in (rows.prompt_B, rows.size_B, rows.start_B, rows.end_B, rows.done_B)
        )
        stretch = [] if done else list(range(start, end))
        full = full or len(tokens) + len(stretch) > num_tokens
        number = 0
        for position in [] if full else stretch:
            response = position - prompt
            if response < 0:
                token, limit = int(rows.prompt_BL[row, position]), prompt
            else:
                token = int(rows.tokens_BNK[row, response // size, response % size])
                limit = min(prompt + (response // size + 1) * size, end)
            slot = int(rows.pages_BP[row, position // PAGE]) * PAGE + position % PAGE
            limit = position + 1 if causal else limit
            tokens.append((position, slot, limit, token, row, response, number))
            number += response >= 0 and token == MASK
    return tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("causal", [False, True])
def test_twin_lays_out_row_after_row(seed, causal):
    rows = random_rows(6, seed=seed)
    for num_tokens in (1, 9, 40, 100):
        packing = pack_tokens(rows, **options(num_tokens, causal=causal))
        packed = packing.packed
        naive = naive_tokens(rows, num_tokens, causal)
        count = len(naive)
        found_6T = torch.stack([
            packed.positions_T, packed.slots_T, packed.limits_T,
            packing.ids_T, packing.row_T, packing.response_T,
        ])  # fmt: skip
        assert found_6T.T[:count].tolist() == [list(token[:6]) for token in naive]
        assert packing.inside_T.tolist() == [at < count for at in range(num_tokens)]
        # Padding is written to page 0 and sees nothing.
        assert not packed.slots_T[count:].any()
        assert not packed.limits_T[count:].any()
        counts = [sum(token[4] == row for token in naive) for row in range(6)]
        assert packed.counts_B.tolist() == counts
        assert packed.starts_B.tolist() == [sum(counts[:row]) for row in range(6)]
        assert packed.ends_B.tolist() == [
            int(end) if c else 0 for c, end in zip(counts, rows.end_B, strict=True)
        ]

        wanted = [at for at, t in enumerate(naive) if t[5] >= 0 and t[3] == MASK]
        candidates = find_candidates(
            packing, rows, mask_token_id=MASK, num_candidates=len(wanted) + 2
        )
        assert candidates.live_M.tolist() == [True] * len(wanted) + [False] * 2
        live = candidates.live_M
        assert candidates.index_M[live].tolist() == wanted
        assert candidates.row_M[live].tolist() == [naive[at][4] for at in wanted]
        assert candidates.response_M[live].tolist() == [naive[at][5] for at in wanted]
        assert candidates.position_M[live].tolist() == [naive[at][0] for at in wanted]
        assert candidates.number_M[live].tolist() == [naive[at][6] for at in wanted]
        places = [
            int(torch.tensor([naive[at][4], *divmod(naive[at][5], int(rows.size_B[naive[at][4]]))])
                @ torch.tensor([15, 5, 1])) for at in wanted
        ]  # fmt: skip
        assert candidates.place_M.tolist() == [*places, 6 * 15, 6 * 15]


def test_rows_behind_one_that_does_not_fit_sit_out():
    rows = random_rows(3, done=0)
    rows.start_B.copy_(rows.end_B - 1)
    rows.start_B[1] = rows.end_B[1] - 3
    packing = pack_tokens(rows, **options(3))
    assert packing.runs_B.tolist() == [True, False, False]
    assert packing.packed.counts_B.tolist() == [1, 0, 0]
    assert packing.inside_T.tolist() == [True, False, False]


def assert_kernels_equal_twins(rows: Rows, num_candidates=None, **given) -> Packing:
    kernels = pytest.importorskip("d2f.ops.triton.packed")
    expected, found = pack_tokens(rows, **given), kernels.pack_tokens(rows, **given)
    assert_equal(found, expected)
    assert_equal(found.packed, expected.packed)
    for count in [num_candidates] if num_candidates else [5, given["num_tokens"]]:
        settings = {"mask_token_id": MASK, "num_candidates": count}
        assert_equal(
            kernels.find_candidates(found, rows, **settings),
            find_candidates(expected, rows, **settings),
        )
    return expected


def assert_equal(found, expected):
    for field in fields(expected):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        elif field.name != "packed":
            assert ours == theirs, field.name


@pytest.mark.parametrize("num_rows", [1, 2, 5, 17])
@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_equal_twins(num_rows, prefill, causal):
    for seed in range(2):
        rows = random_rows(num_rows, seed=seed, prompts=prefill)
        for num_tokens in (1, 7, 90):
            assert_kernels_equal_twins(rows, **options(num_tokens, prefill=prefill, causal=causal))


def test_kernels_equal_twins_where_no_row_runs():
    rows = random_rows(4, done=1)
    assert not assert_kernels_equal_twins(rows, **options(8)).inside_T.any()
    rows = random_rows(4, done=0)
    rows.start_B.copy_(rows.end_B)
    assert assert_kernels_equal_twins(rows, **options(8)).runs_B.all()


@pytest.mark.parametrize("token", [MASK, MASK - 1])
def test_kernels_equal_twins_with_every_candidate_and_none(token):
    rows = random_rows(5, prompts=False)
    rows.tokens_BNK.fill_(token)
    packing = assert_kernels_equal_twins(rows, **options(75), num_candidates=80)
    assert (packing.ids_T[packing.inside_T] == token).all()


def test_kernels_equal_twins_over_several_programs(monkeypatch):
    kernels = pytest.importorskip("d2f.ops.triton.packed")
    monkeypatch.setattr(kernels, "SCANNED_TOKENS", 16)
    monkeypatch.setattr(kernels, "PAIRS", 512)
    for seed in range(2):
        rows = random_rows(17, seed=seed)
        assert_kernels_equal_twins(rows, **options(100))
        # Rows that begin and end where programs do.
        rows.start_B.copy_((rows.end_B - 16).clamp_min(0))
        assert_kernels_equal_twins(rows, **options(100))

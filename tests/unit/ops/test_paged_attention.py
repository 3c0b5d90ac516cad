"""Attention over pages: the twin against a softmax in float64, the kernels against the twin."""

import dataclasses

import pytest
import torch

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, visible
from d2f.ops import attention as dense
from d2f.ops import paged_attention as twin
from d2f.ops.packed import PackedTokens

try:
    from d2f.ops.triton import attention_plan as plans
    from d2f.ops.triton import paged_attention as kernels
except ImportError:
    plans = kernels = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(kernels is None, reason="needs triton")


def pack(rows, page_size, padding=0, shuffle=True, spare=(0, 0), device=DEVICE):
    """Rows of (end, limits of the last tokens), their pages mixed or one after another.

    `spare` is added to max_count and max_end, which need not be tight.
    """
    generator = torch.Generator().manual_seed(0)
    counts = [len(limits) for _, limits in rows]
    needed = [-(-end // page_size) for end, _ in rows]
    order = torch.arange(1, 1 + sum(needed))
    if shuffle:
        order = order[torch.randperm(len(order), generator=generator)]
    # What lies behind a row's pages is no page at all.
    pages = torch.full((len(rows), max([*needed, 1])), 10**6, dtype=torch.int32)
    for row, part in enumerate(order.split(needed)):
        pages[row, : len(part)] = part
    positions = [
        torch.arange(end - count, end) for (end, _), count in zip(rows, counts, strict=True)
    ]
    slots = [
        pages[row][p // page_size] * page_size + p % page_size for row, p in enumerate(positions)
    ]
    none = torch.zeros(padding, dtype=torch.int64)
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    limits = torch.tensor([limit for _, limits in rows for limit in limits], dtype=torch.int64)
    packed = PackedTokens(
        positions_T=torch.cat([*positions, none]),
        slots_T=torch.cat([*slots, none]),
        limits_T=torch.cat([limits, none]),
        starts_B=starts,
        counts_B=torch.tensor(counts),
        ends_B=torch.tensor([end for end, _ in rows]),
        pages_BP=pages,
        page_size=page_size,
        max_count=max(counts) + spare[0],
        max_end=max(end for end, _ in rows) + spare[1],
    )
    fields = {
        field.name: value.to(device) if isinstance(value, torch.Tensor) else value
        for field in dataclasses.fields(packed)
        for value in [getattr(packed, field.name)]
    }
    return PackedTokens(**fields)


def random_tensors(packed, num_heads, kv_heads, head_dim=16, dtype=torch.float32):
    """Queries, and keys and values with NaN wherever no row has written."""
    generator = torch.Generator().manual_seed(1)
    num_pages = 1 + sum(-(-end // packed.page_size) for end in packed.ends_B.tolist())
    kv = torch.full((2, num_pages * packed.page_size, kv_heads, head_dim), torch.nan)
    for end, pages in zip(packed.ends_B.tolist(), packed.pages_BP.tolist(), strict=True):
        for position in range(end):
            slot = pages[position // packed.page_size] * packed.page_size
            slot += position % packed.page_size
            kv[:, slot] = torch.randn(2, kv_heads, head_dim, generator=generator)
    q = torch.randn(len(packed.limits_T), num_heads, head_dim, generator=generator)
    return q.to(DEVICE, dtype), kv.to(DEVICE, dtype)


def attend_naively(q, kv, packed):
    """One softmax per query and head, in float64."""
    _, num_heads, head_dim = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    q, kv = q.double().cpu(), kv.double().cpu()
    groups = num_heads // kv.shape[2]
    for row, (start, count) in enumerate(
        zip(packed.starts_B.tolist(), packed.counts_B.tolist(), strict=True)
    ):
        for token in range(start, start + count):
            position = torch.arange(int(packed.limits_T[token]))
            page = packed.pages_BP.cpu()[row][position // packed.page_size]
            slots = page * packed.page_size + position % packed.page_size
            keys, values = kv[:, slots].repeat_interleave(groups, dim=2)
            score = torch.einsum("nh,snh->ns", q[token], keys) / head_dim**0.5
            out[token] = torch.einsum("ns,snh->nh", score.softmax(-1), values)
    return out.flatten(1)


def attend(module, q, kv, packed, **options):
    planner = plans if module is kernels else module
    plan = planner.plan_attention(packed, q.shape[1], kv.shape[2], **options)
    return module.paged_attention(q, kv, plan)


def assert_close(got, want, tolerance=2e-6):
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=0, atol=tolerance)


BLOCKS = (9, [5, 5, 5, 5, 9, 9, 9, 9])
CASES = {
    "one row": {"rows": [BLOCKS], "page_size": 3},
    "one row, pages in order": {"rows": [BLOCKS], "page_size": 3, "shuffle": False},
    "one row, padding": {"rows": [BLOCKS], "page_size": 16, "padding": 3},
    "one token sees all": {"rows": [(21, [21])], "page_size": 16},
    "all see all": {"rows": [(7, [7] * 7)], "page_size": 1},
    "uneven rows": {"rows": [BLOCKS, (30, [30]), (4, [1, 2, 4])], "page_size": 3},
    "even rows": {"rows": [(4, [2, 4]), (17, [16, 17])], "page_size": 16},
    "a row without tokens": {"rows": [(5, []), BLOCKS, (8, [])], "page_size": 1, "padding": 2},
    "a row without keys": {"rows": [BLOCKS, (0, [])], "page_size": 16, "padding": 2},
    "one token each": {"rows": [(33, [33]), (1, [1]), (17, [17])], "page_size": 16},
    "one token each, padding": {"rows": [(33, [33]), (1, [1])], "page_size": 3, "padding": 2},
    "only padding": {"rows": [(0, []), (3, [])], "page_size": 3, "padding": 4},
    "only padding, one row": {"rows": [(0, [])], "page_size": 3, "padding": 4},
    "loose bounds": {"rows": [BLOCKS, (12, [])], "page_size": 3, "padding": 1, "spare": (3, 20)},
    "loose bounds, one row": {"rows": [BLOCKS], "page_size": 3, "padding": 1, "spare": (3, 20)},
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def packed(request):
    return pack(**CASES[request.param])


@pytest.fixture(params=[(2, 2), (4, 2), (7, 1)], ids=["G1", "G2", "G7"])
def heads(request):
    return request.param


def test_twin_is_softmax_attention(packed, heads):
    q, kv = random_tensors(packed, *heads)
    assert_close(attend(twin, q, kv, packed), attend_naively(q, kv, packed))


def test_twin_in_bf16(packed):
    q, kv = random_tensors(packed, 4, 2, dtype=torch.bfloat16)
    out = attend(twin, q, kv, packed)
    assert out.dtype == torch.bfloat16
    assert_close(out, attend_naively(q, kv, packed), tolerance=0.03)


def test_twin_without_tokens():
    packed = pack([(3, []), (5, [])], page_size=2)
    q, kv = random_tensors(packed, 4, 2)
    assert attend(twin, q, kv, packed).shape == (0, 64)


@pytest.mark.parametrize("case", ["one row", "uneven rows"])
def test_twin_in_parts(case, monkeypatch):
    packed = pack(**CASES[case])
    q, kv = random_tensors(packed, 4, 2)
    keys = packed.max_end * len(packed.counts_B)
    monkeypatch.setattr(dense, "MOST_MASK_ENTRIES", 3 * 2 * keys)
    plan = twin.plan_attention(packed, 4, 2)
    assert len(plan.mask.parts) > 1
    assert_close(twin.paged_attention(q, kv, plan), attend_naively(q, kv, packed))


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU reading a tensor would wait")
def test_twin_does_no_needless_work_on_the_cpu():
    plan = twin.plan_attention(pack([(40, [40])], page_size=16, shuffle=False), 4, 2)
    assert plan.keys == slice(16, 56)
    assert plan.mask is plan.queries is plan.answers is plan.padding_T1 is None
    plan = twin.plan_attention(pack(**CASES["one token each"]), 4, 2)
    assert plan.queries is plan.answers is plan.padding_T1 is None


@pytest.mark.parametrize("prompt_length", [0, 1, 5, 12])
def test_limits_mean_what_block_numbers_mean(prompt_length):
    length, slots = 13, 16
    layout = BlockLayout(prompt_length=prompt_length, block_size=4)
    blocks = layout.block_numbers(length)
    # The end of a block that reaches beyond the tokens is their end.
    offset = torch.arange(length) - prompt_length
    limits = prompt_length + (offset.div(4, rounding_mode="floor") + 1).clamp_min(0) * 4
    limits = limits.clamp_max(length)
    keys = torch.full((1, slots), PADDING_BLOCK, dtype=torch.int32)
    keys[:, :length] = blocks
    assert torch.equal(visible(blocks, keys)[0], torch.arange(slots) < limits[:, None])


@needs_triton
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
def test_kernels_agree_with_the_twin(packed, heads, fused):
    q, kv = random_tensors(packed, *heads)
    assert_close(attend(kernels, q, kv, packed, fused=fused), attend(twin, q, kv, packed))


@needs_triton
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
def test_kernels_in_half_precision(fused):
    packed = pack(**CASES["uneven rows"])
    # The interpreter does not know bf16 products.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    q, kv = random_tensors(packed, 4, 2, head_dim=32, dtype=dtype)
    got = attend(kernels, q, kv, packed, fused=fused)
    assert_close(got, attend_naively(q, kv, packed), tolerance=0.03)


@needs_triton
@pytest.mark.parametrize("head_dim", [8, 24, 64])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
def test_kernels_take_any_head_size(head_dim, fused):
    packed = pack(**CASES["uneven rows"])
    q, kv = random_tensors(packed, 4, 2, head_dim=head_dim)
    assert_close(attend(kernels, q, kv, packed, fused=fused), attend(twin, q, kv, packed))


# Two rows of two splits and one that ends with its first, with queries that see one or both.
LONG = {
    "rows": [(300, [256, 257, 300]), (256, [256]), (2, [2, 2]), (257, [3, 257])],
    "page_size": 16,
    "padding": 1,
}


@needs_triton
def test_splits_agree_with_the_twin_and_with_one_program():
    packed = pack(**LONG)
    q, kv = random_tensors(packed, 2, 1)
    fused, split = (attend(kernels, q, kv, packed, fused=fused) for fused in (True, False))
    assert torch.equal(fused, split)
    assert_close(split, attend(twin, q, kv, packed))


@needs_triton
def test_a_row_does_not_depend_on_the_batch_or_the_pages():
    alone = pack(LONG["rows"][:1], page_size=3, spare=(2, 0))
    together = pack(**LONG, spare=(2, 1))
    q, kv = random_tensors(together, 2, 1)
    q_alone, kv_alone = random_tensors(alone, 2, 1)
    q[:3] = q_alone
    slots = [
        packed.pages_BP[0][torch.arange(300, device=DEVICE) // packed.page_size] * packed.page_size
        + torch.arange(300, device=DEVICE) % packed.page_size
        for packed in (alone, together)
    ]
    kv[:, slots[1]] = kv_alone[:, slots[0]]
    got = attend(kernels, q, kv, together, fused=False, tile_rows=16)
    want = attend(kernels, q_alone, kv_alone, alone, fused=True, tile_rows=16)
    assert torch.equal(got[:3], want)


@needs_triton
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_tiles_cover_each_token_once(tile_rows):
    counts = [0, 5, 40, 1, 0]
    packed = pack([(count, [count] * count) for count in counts], page_size=16, padding=7)
    plan = plans.plan_attention(packed, 4, 1, tile_rows=tile_rows)
    seen = []
    for first, tokens, row, limit, split_keys, *_ in plan.tiles_IF.tolist():
        assert tokens <= plan.tile_tokens == tile_rows // 4
        assert limit == (counts[row] if tokens and row < len(counts) else 0)
        assert split_keys == 256
        seen += range(first, first + tokens)
    assert sorted(seen) == list(range(sum(counts) + 7))
    assert plan.splits_T.tolist() == [1] * sum(counts) + [0] * 7


@needs_triton
def test_splits_follow_from_the_end_of_a_row():
    ends = [1, 2048, 2049, 32_768, 32_769, 131_072]
    packed = pack([(end, [end]) for end in ends], page_size=64)
    plan = plans.plan_attention(packed, 1, 1)
    assert plan.splits_T.tolist() == [1, 8, 3, 32, 9, 32]
    assert plan.most_splits == max(plan.splits_T.tolist())


@needs_triton
def test_no_shorter_row_has_more_splits_than_are_launched():
    def splits(end):
        size = 256 if end <= 2048 else 1024 if end <= 32_768 else 4096
        return -(-end // size)

    most = 0
    for end in range(1, 70_000, 61):
        most = max(most, splits(end))
        assert plans.split_count(end) >= most

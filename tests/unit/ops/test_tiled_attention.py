"""Tiles of a visibility by block numbers, against the dense rule and SDPA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.training.memory import LiveMemory
from torch._dynamo.testing import CompileCounterWithBackend

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, causal_blocks, visible
from d2f.ops.attention import AttentionMask, attention
from d2f.ops.tiled_attention import TILE, classify_tiles, tiled_attention, tiled_mask
from d2f.testing import tiny_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def paper_blocks(length, prompts, block_size=32, ends=None):
    """Prompts of some lengths, blocks behind, padding past `ends`."""
    layout = BlockLayout(prompt_length=torch.tensor(prompts), block_size=block_size)
    blocks = layout.block_numbers(length)
    if ends is not None:
        blocks[torch.arange(length) >= torch.tensor(ends)[:, None]] = PADDING_BLOCK
    return blocks


def packed_blocks(length, samples):
    """Rows of samples, each with as many blocks as it says, and padding: their numbers.

    `samples` lists (positions, blocks) of the samples of each row.
    """
    blocks = torch.full((len(samples), length), PADDING_BLOCK, dtype=torch.int32)
    first = blocks.clone()
    for row, own in enumerate(samples):
        start = number = 0
        for size, count in own:
            end = min(start + size, length)
            blocks[row, start:end] = number + torch.arange(end - start) * count // size
            first[row, start:end] = number
            start, number = end, number + count
    return blocks, first


def dense_tiles(blocks, first=None):
    """The tiles by their definition: some or all of their TILE * TILE positions are visible."""
    missing = -blocks.shape[1] % TILE
    dense = F.pad(visible(blocks, blocks, first), (0, missing, 0, missing))
    tiles = dense.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).transpose(2, 3)
    whole = tiles.all(-1).all(-1)
    return tiles.any(-1).any(-1) & ~whole, whole


@st.composite
def block_numbers(draw):
    length, seed = draw(st.integers(1, 4 * TILE)), draw(st.integers(0, 2**16))
    g = torch.Generator().manual_seed(seed)
    # Runs of equal numbers make whole and empty tiles likely in any order.
    run = draw(st.sampled_from([1, 20, TILE, 200]))
    highest = draw(st.integers(1, 6))
    blocks = torch.randint(highest, (2, length // run + 1), generator=g).repeat_interleave(run, 1)
    blocks = blocks.sort().values if draw(st.booleans()) else blocks
    blocks = blocks[:, :length].to(torch.int32)
    if draw(st.booleans()):
        ends = torch.randint(length + 1, (2, 1), generator=g)
        blocks[torch.arange(length) >= ends] = PADDING_BLOCK
    return blocks


@settings(max_examples=60, deadline=None)
@given(block_numbers())
def test_tiles_are_those_of_the_dense_mask(blocks):
    partial, whole = classify_tiles(blocks)
    expected_partial, expected_whole = dense_tiles(blocks)
    assert torch.equal(partial, expected_partial)
    assert torch.equal(whole, expected_whole)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4 * TILE),
    st.lists(
        st.lists(st.tuples(st.integers(1, 300), st.integers(1, 9)), max_size=9),
        min_size=1,
        max_size=3,
    ),
)
def test_tiles_of_packed_rows_are_those_of_the_dense_mask(length, samples):
    for blocks, first in (
        packed_blocks(length, samples),
        (packed_blocks(length, samples)[1],) * 2,  # full attention
    ):
        for found, expected in zip(
            classify_tiles(blocks, first), dense_tiles(blocks, first), strict=True
        ):
            assert torch.equal(found, expected)


def test_a_query_sees_its_own_sample_only():
    blocks, first = packed_blocks(8, [[(3, 2), (4, 4)]])
    seen = visible(blocks, blocks, first)[0].int().tolist()
    assert seen == [
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 512])
def test_lists_of_tiles_go_both_ways(length):
    blocks = paper_blocks(length, [0, length // 2], ends=[length, length // 2 + 1])
    mask = tiled_mask(blocks)
    lists = (
        (mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices),
        (
            mask.full_kv_num_blocks,
            mask.full_kv_indices,
            mask.full_q_num_blocks,
            mask.full_q_indices,
        ),
    )
    for (kv_count, kv_index, q_count, q_index), chosen in zip(
        lists, dense_tiles(blocks), strict=True
    ):
        for count, index, tiles in (
            (kv_count, kv_index, chosen),
            (q_count, q_index, chosen.transpose(1, 2)),
        ):
            for b, row in ((b, row) for b in range(2) for row in range(tiles.shape[1])):
                found = index[b, 0, row, : count[b, 0, row]].tolist()
                assert sorted(found) == tiles[b, row].nonzero()[:, 0].tolist()
    assert mask.shape == (2, 1, length, length)


def test_nothing_of_the_length_squared_is_made():
    blocks = paper_blocks(8192, [100, 3000])
    with LiveMemory() as memory:
        tiled_mask(blocks)
    assert memory.largest <= 2 * 8192


def make_inputs(length, heads, kv_heads, size, device="cpu"):
    g = torch.Generator().manual_seed(length)
    shapes = [(2, length, heads, size), *[(2, length, kv_heads, size)] * 2]
    return [torch.randn(s, generator=g).to(device).requires_grad_(True) for s in shapes]


def dense_attention(q, k, v, blocks, first=None):
    mask = AttentionMask(
        lambda start, end: visible(
            blocks[:, start:end], blocks, None if first is None else first[:, start:end]
        ),
        (len(blocks), blocks.shape[1], blocks.shape[1]),
        q.shape[2] // k.shape[2],
    )
    return attention(q, k, v, mask)


@pytest.fixture
def flex_trains_on_cpu(monkeypatch):
    # Only the check refuses gradients on the CPU; the unfused operation has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._warn_once", lambda *_, **__: None, raising=False
    )


def assert_same(found, expected, inputs, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "kv_heads"), [("blocks", 4), ("causal", 2), ("padded", 2)])
def test_unfused_attention_is_that_of_the_dense_mask(kind, kv_heads, flex_trains_on_cpu):
    length = 150
    blocks = {
        "blocks": paper_blocks(length, [7, 130]),
        "causal": causal_blocks(length).expand(2, -1),
        "padded": paper_blocks(length, [7, 100], ends=[150, 120]),
    }[kind]
    inputs = make_inputs(length, 4, kv_heads, 8)
    found = tiled_attention(*inputs, tiled_mask(blocks))
    assert_same(found, dense_attention(*inputs, blocks), inputs, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_model_is_compiled_once_for_all_block_numbers(flex_trains_on_cpu):
    torch._dynamo.reset()
    model = tiny_model("Dream").requires_grad_(True)
    ids = torch.randint(90, (2, 140), generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda mask: model(ids, mask=mask, recompute=True), backend=counter, dynamic=False
    )
    weights = list(model.layers.parameters())
    # What a model computes once and keeps is there before training compiles it.
    model(ids)
    for prompt in (5, 60):
        blocks = paper_blocks(140, [prompt, 130], ends=[140, 136])
        found, expected = compiled(tiled_mask(blocks)), model(ids, blocks_BL=blocks)
        assert_same(found, expected, weights, atol=2e-4, rtol=1e-3)
    assert counter.frame_count == 1


def test_compiled_models_of_one_shape_keep_their_own_rotation():
    ids = torch.arange(64)[None]
    one, other = tiny_model("Dream"), tiny_model("Dream", rope_theta=100.0)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        compiled = torch.compile(model, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(ids), model(ids))


@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("length", [64, 300, 512])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fused_attention_is_that_of_the_dense_mask(length, kv_heads):
    assert torch.get_float32_matmul_precision() == "highest"
    compiled = torch.compile(tiled_attention, dynamic=False)
    inputs = make_inputs(length, 4, kv_heads, 64, "cuda")
    blocks = paper_blocks(length, [7, length // 2], ends=[length, length - 9]).cuda()
    found = compiled(*inputs, tiled_mask(blocks))
    assert_same(found, dense_attention(*inputs, blocks), inputs, atol=1e-4, rtol=1e-3)


@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("length", [300, 512])
def test_fused_attention_of_packed_rows_is_that_of_the_dense_mask(length):
    compiled = torch.compile(tiled_attention, dynamic=False)
    inputs = make_inputs(length, 4, 2, 64, "cuda")
    samples = [[(60, 3), (90, 5), (140, 2)], [(length // 2, 9), (length // 2 - 9, 1)]]
    blocks, first = (numbers.cuda() for numbers in packed_blocks(length, samples))
    found = compiled(*inputs, tiled_mask(blocks, first))
    assert_same(found, dense_attention(*inputs, blocks, first), inputs, atol=1e-4, rtol=1e-3)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_making_the_mask_waits_for_nothing():
    blocks = paper_blocks(1024, [7, 500]).cuda()
    tiled_mask(blocks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tiled_mask(blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""Padding, batching and caching never change a row."""

from __future__ import annotations

import pytest
import torch

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, causal_blocks
from d2f.errors import ConfigError
from d2f.models.cache import KVCache
from d2f.testing import tiny_model

TYPES = ["llada", "Dream", "llama", "qwen2"]
DIFFUSION = ["llada", "Dream"]
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def random_ids(*shape, seed=0):
    return torch.randint(0, 94, shape, generator=torch.Generator().manual_seed(seed))


def block_layout(model, prompt_length):
    if model.spec.architecture.causal:
        return None
    return BlockLayout(prompt_length=prompt_length, block_size=4)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("blocks", [False, True])
def test_padding_and_batch_mates_change_nothing(model_type, blocks):
    model = tiny_model(model_type)
    lengths, prompts = [5, 17, 12], [2, 7, 0]
    ids_BL = random_ids(3, 17)
    layout = block_layout(model, torch.tensor(prompts)) if blocks else None
    batched = model.logits(ids_BL, layout, torch.tensor(lengths))
    assert batched.isfinite().all()
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        alone = model.logits(
            ids_BL[row : row + 1, :length], block_layout(model, prompt) if blocks else None
        )
        torch.testing.assert_close(batched[row, :length], alone[0], **TOLERANCE)


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_a_later_block_changes_nothing_before_it(model_type):
    model, ids_BL = tiny_model(model_type), random_ids(1, 14)
    layout = block_layout(model, 6)
    before = model.logits(ids_BL, layout)
    ids_BL[:, 10:] = random_ids(1, 4, seed=1)
    torch.testing.assert_close(model.logits(ids_BL, layout)[:, :10], before[:, :10], **TOLERANCE)
    assert not torch.allclose(model.logits(ids_BL, layout)[:, 11:], before[:, 11:])


def test_full_attention_sees_everything():
    model, ids_BL = tiny_model("llada"), random_ids(1, 9)
    before = model.logits(ids_BL)
    ids_BL[0, -1] = (ids_BL[0, -1] + 1) % 94
    assert not torch.allclose(model.logits(ids_BL)[:, 0], before[:, 0])


def test_autoregressive_models_take_no_layout():
    with pytest.raises(ConfigError, match="qwen2 attends causally"):
        tiny_model("qwen2").logits(random_ids(1, 4), BlockLayout(prompt_length=1, block_size=2))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("pieces", [[6, 4, 4, 3], [10, 7], [14, 3]])
def test_cached_pieces_equal_one_forward(model_type, pieces):
    """Pieces end where blocks end, so each is final when the next one comes."""
    model, ids_BL = tiny_model(model_type), random_ids(2, 17)
    layout = block_layout(model, 6)
    whole = model.logits(ids_BL, layout)
    blocks_BL = causal_blocks(17) if layout is None else layout.block_numbers(17)
    blocks_BL = blocks_BL.expand_as(ids_BL)
    positions_BL = torch.arange(17).expand_as(ids_BL)
    cache = KVCache(model.spec, num_sequences=2, num_slots=20)
    got, start = [], 0
    for length in pieces:
        new = slice(start, start + length)
        hidden_BLD = model(
            ids_BL[:, new],
            positions_BL[:, new],
            blocks_BL[:, new],
            cache=cache,
            slots_BL=positions_BL[:, new],
        )
        aligned_BLD = model.align(hidden_BLD, positions_BL[:, new], cache)
        cache.keep_boundary(hidden_BLD, torch.full((2,), length))
        got.append(model.head(aligned_BLD))
        start += length
    torch.testing.assert_close(torch.cat(got, dim=1), whole, **TOLERANCE)


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_live_blocks_are_overwritten_exactly(model_type):
    """Slots written again and again, rows at different places, padding written nowhere."""
    model, prompts = tiny_model(model_type), torch.tensor([3, 6])
    layout = block_layout(model, prompts)
    length = 14
    ids_BL = random_ids(2, length)
    blocks_BL = layout.block_numbers(length)
    positions_BL = torch.arange(length).expand(2, -1)
    cache = KVCache(model.spec, num_sequences=2, num_slots=length)

    def forward(ids_BL, positions_BL, real_BL):
        blocks = torch.where(real_BL, blocks_BL.gather(1, positions_BL), PADDING_BLOCK)
        slots = torch.where(real_BL, positions_BL, -1)
        return model(ids_BL, positions_BL, blocks, cache=cache, slots_BL=slots)

    def inside(lengths_B, positions_BL):
        return positions_BL < lengths_B[:, None]

    first = slice(0, 6)
    hidden_BLD = forward(
        ids_BL[:, first], positions_BL[:, first], inside(prompts, positions_BL[:, first])
    )
    cache.keep_boundary(hidden_BLD, prompts)
    live_BL = prompts[:, None] + torch.arange(8)
    for seed in (1, 2):  # two steps of denoising: the ids of live blocks differ each time
        ids_BL = ids_BL.scatter(1, live_BL, random_ids(2, 8, seed=seed))
        hidden_BLD = forward(ids_BL.gather(1, live_BL), live_BL, torch.ones(2, 8, dtype=torch.bool))
        got = model.head(model.align(hidden_BLD, live_BL, cache))
        for row in range(2):
            end = int(prompts[row]) + 8
            alone = model.logits(
                ids_BL[row : row + 1, :end], block_layout(model, int(prompts[row]))
            )
            torch.testing.assert_close(got[row], alone[0, -8:], **TOLERANCE)


@pytest.mark.parametrize("model_type", DIFFUSION)
def test_select_keeps_rows_with_their_state(model_type):
    model, ids_BL = tiny_model(model_type), random_ids(3, 8)
    positions_BL = torch.arange(8).expand(3, -1)
    cache = KVCache(model.spec, num_sequences=3, num_slots=12)
    zeros_BL = torch.zeros(3, 8, dtype=torch.int32)
    hidden_BLD = model(ids_BL, positions_BL, zeros_BL, cache=cache, slots_BL=positions_BL)
    cache.keep_boundary(hidden_BLD, torch.full((3,), 8))
    cache.select(torch.tensor([2, 0]))
    new = random_ids(2, 4, seed=3)
    at = torch.arange(8, 12).expand(2, -1)
    hidden_BLD = model(new, at, torch.ones(2, 4, dtype=torch.int32), cache=cache, slots_BL=at)
    got = model.head(model.align(hidden_BLD, at, cache))
    whole = model.logits(torch.cat([ids_BL[[2, 0]], new], 1), block_layout(model, 8))
    torch.testing.assert_close(got, whole[:, 8:], **TOLERANCE)


@pytest.mark.parametrize("name", ["llada", "Dream", "qwen2"])
def test_attention_in_parts_is_the_same(name, monkeypatch):
    model = tiny_model(name)
    ids = torch.arange(1, 47).reshape(2, 23)
    layout = None if name == "qwen2" else BlockLayout(prompt_length=5, block_size=4)
    lengths = torch.tensor([23, 17])
    whole = model.logits(ids, layout, lengths)
    # Room for a few query rows at a time.
    monkeypatch.setattr("d2f.ops.attention.MOST_MASK_ENTRIES", 300)
    parts = model.logits(ids, layout, lengths)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts[1, :17], whole[1, :17], atol=1e-5, rtol=1e-5)

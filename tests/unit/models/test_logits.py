"""Padding and batching never change a row."""

from __future__ import annotations

import pytest
import torch

from d2f.diffusion.layout import BlockLayout
from d2f.errors import ConfigError
from d2f.models.families import FAMILIES
from d2f.testing import tiny_model

TYPES = list(FAMILIES)
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

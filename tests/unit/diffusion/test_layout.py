"""Block numbers and the visibility rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, causal_blocks, visible
from d2f.errors import ConfigError


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 20))
def test_blocks_tile_the_response(prompt, size, response):
    numbers = BlockLayout(prompt_length=prompt, block_size=size).block_numbers(prompt + response)
    expected = [0] * prompt + [1 + i // size for i in range(response)]
    assert numbers.tolist() == [expected]


def test_each_sequence_has_its_own_grid():
    layout = BlockLayout(prompt_length=torch.tensor([1, 3]), block_size=2)
    assert layout.block_numbers(4).tolist() == [[0, 1, 1, 2], [0, 0, 0, 1]]


def test_the_rule_renders_full_causal_and_block_causal_attention():
    zero = torch.zeros(1, 4, dtype=torch.int32)
    assert visible(zero, zero).all()
    causal = causal_blocks(4)
    assert torch.equal(visible(causal, causal)[0], torch.ones(4, 4).tril().bool())
    block = BlockLayout(prompt_length=2, block_size=1).block_numbers(4)
    assert visible(block, block)[0].int().tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_padding_is_seen_by_no_real_query():
    real, padding = torch.tensor([[0, 5]]), torch.tensor([[PADDING_BLOCK]])
    assert not visible(real, padding).any()


@pytest.mark.parametrize("values", [{"block_size": 0}, {"prompt_length": -1}])
def test_bad_layouts(values):
    with pytest.raises(ConfigError):
        BlockLayout(**({"prompt_length": 1, "block_size": 1} | values))

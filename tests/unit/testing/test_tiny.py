"""The tiny models behave as the tests that use them assume."""

from __future__ import annotations

import pytest
import torch

from d2f.errors import ConfigError
from d2f.testing import tiny_config, tiny_model, write_tokenizer
from d2f.testing.written import CHARACTERS
from d2f.text import Tokenizer

IDS = torch.arange(60)[None]


@pytest.mark.parametrize("model_type", ["llada", "Dream", "llama", "qwen2"])
def test_confidences_spread(model_type):
    best_BL = tiny_model(model_type).logits(IDS).softmax(-1).amax(-1)
    assert best_BL.min() < 0.4
    assert best_BL.max() > 0.8


def test_seeds_differ():
    one, same, other = (tiny_model("llada", seed).logits(IDS) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_unknown_type():
    with pytest.raises(ConfigError, match="did you mean 'Dream'"):
        tiny_config("dream")


def test_tokenizer_covers_the_tiny_vocabulary(tmp_path):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path))
    assert tokenizer.vocab_size == 96
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (94, 95)
    assert tokenizer.encode(CHARACTERS) == list(range(94))
    assert tokenizer.decode(range(94)) == CHARACTERS
    assert tokenizer.encode("<|mask|><|endoftext|>") == [94, 95]

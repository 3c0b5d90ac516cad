"""Autoregression with a cache equals autoregression without."""

import pytest
import torch

from d2f import generate_ids
from d2f.testing import tiny_model


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_cached_equals_recomputed(name):
    model = tiny_model(name)
    prompt = [3, 1, 4, 1, 5]
    result = generate_ids(
        model, prompt, strategy="autoregressive", max_new_tokens=12, eos_token_id=()
    )
    ids = list(prompt)
    for _ in range(12):
        with torch.inference_mode():
            # One more token, so that the last row predicts what follows the prompt.
            logits = model.logits(torch.tensor([[*ids, 0]]))
        ids.append(int(logits[0, -1].argmax()))
    assert result.token_ids == ids[len(prompt) :]
    assert result.num_forwards == 12
    assert result.num_query_tokens == len(prompt) + 11


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batched_equals_alone(temperature):
    model = tiny_model("qwen2")
    prompts = [[1], [2, 3, 4, 5, 6, 7], [8, 9]]
    options = {"strategy": "autoregressive", "max_new_tokens": 9, "temperature": temperature}
    stop = generate_ids(model, prompts[1], eos_token_id=(), **options).token_ids[2]
    together = generate_ids(model, prompts, eos_token_id=stop, **options)
    alone = [generate_ids(model, prompt, eos_token_id=stop, **options) for prompt in prompts]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert together[1].finish_reason == "eos"
    assert [r.num_forwards for r in together] == [len(r.token_ids) for r in together]

"""Forwards over cached features against whole forwards, and what they compute."""

import pytest
import torch

from d2f.models.feature_cache import FeatureCache, Refresh, least_similar, put, take
from d2f.testing import tiny_adapter, tiny_model

PADDING, PROMPT, RESPONSE = 3, 5, 7
BOUNDARY = PADDING + PROMPT
FULL = Refresh(boundary=BOUNDARY, prompt=True, response=True)
KINDS = {
    "full": FULL,
    "response": Refresh(boundary=BOUNDARY, prompt=False, response=True),
    "prompt": Refresh(boundary=BOUNDARY, prompt=True, response=False),
    "prompt and some": Refresh(boundary=BOUNDARY, prompt=True, response=False, num_tokens=2),
    "some": Refresh(boundary=BOUNDARY, prompt=False, response=False, num_tokens=2),
    "all, as some": Refresh(boundary=BOUNDARY, prompt=True, response=False, num_tokens=RESPONSE),
    "none": Refresh(boundary=BOUNDARY, prompt=False, response=False),
}


@pytest.fixture(params=["llada", "Dream"])
def model(request):
    return tiny_model(request.param)


def draw_ids(seed, padding_id=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (1, PROMPT + RESPONSE), generator=generator)
    return torch.cat([torch.full((1, PADDING), padding_id), ids], dim=1)


@torch.inference_mode()
def refreshed(model, ids, cache, refresh):
    hidden = model.forward_refresh(ids, torch.tensor([PADDING]), cache, refresh)
    return hidden[:, PADDING:]


def whole(model, ids):
    with torch.inference_mode():
        return model(ids[:, PADDING:])


def new_cache(model):
    cache = FeatureCache(model.spec, num_slots=32)
    for features in (cache.layer(index, 32) for index in range(model.spec.num_layers)):
        for values in vars(features).values():
            values.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_whole_forward_of_the_same_ids_every_refresh_gives_the_same(model, kind):
    ids, cache = draw_ids(1), new_cache(model)
    refreshed(model, ids, cache, FULL)
    torch.testing.assert_close(refreshed(model, ids, cache, KINDS[kind]), whole(model, ids))


@pytest.mark.parametrize("kind", ["full", "all, as some"])
def test_what_computes_all_forgets_what_was_there(model, kind):
    cache = new_cache(model)
    refreshed(model, draw_ids(1), cache, FULL)
    got = refreshed(model, draw_ids(2), cache, KINDS[kind])
    torch.testing.assert_close(got, whole(model, draw_ids(2)))


def test_padding_is_not_seen(model):
    got = [refreshed(model, draw_ids(1, pad), new_cache(model), FULL) for pad in (0, 17)]
    assert torch.equal(*got)


def test_adapters_take_part(model):
    tiny_adapter(model)
    got = refreshed(model, draw_ids(1), new_cache(model), FULL)
    torch.testing.assert_close(got, whole(model, draw_ids(1)))


def test_what_is_not_computed_stays_in_the_residual(model):
    """New ids come in by the embedding only; the layers add what they added before."""
    old, new, cache = draw_ids(1), draw_ids(2), new_cache(model)
    refreshed(model, old, cache, FULL)
    added = []
    with torch.inference_mode():
        for index in range(model.spec.num_layers):
            features = cache.layer(index, old.shape[1])
            added += [features.attention_BLD.clone(), features.mlp_BLD.clone()]
        x = model.embed(new)
        for one in added:
            x = x + one
        expected = model.norm(x)[:, PADDING:]
    torch.testing.assert_close(refreshed(model, new, cache, KINDS["none"]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_due_goes_through_the_layers(model, kind):
    """Query projections and the feed-forward network see the queries only, values the span."""
    rows = {"q_proj": [], "down_proj": [], "v_proj": []}
    cache = new_cache(model)
    refreshed(model, draw_ids(1), cache, FULL)
    for layer in model.layers:
        for name, seen in rows.items():
            layer.get_submodule(name).register_forward_hook(
                lambda _, args, __, seen=seen: seen.append(args[0].shape[1])
            )
    refresh, length = KINDS[kind], BOUNDARY + RESPONSE
    refreshed(model, draw_ids(2), cache, refresh)
    queries = refresh.num_queries(length)
    expected = [queries] * len(model.layers) if queries else []
    assert rows["q_proj"] == rows["down_proj"] == expected
    spans = {"prompt": BOUNDARY, "response": RESPONSE, "some": RESPONSE, "none": 0}
    span = spans.get(kind, length)
    assert rows["v_proj"] == ([span] * len(model.layers) if span else [])


def test_the_least_similar_tokens_are_chosen_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 6, 2, 4, generator=generator)
    new = old * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0, 3.0]).view(1, 6, 1, 1)
    new[0, 4], new[0, 2] = -old[0, 4], new[0, 2] + 0.01
    assert least_similar(new, old, 2).tolist() == [[4, 2]]


def test_tokens_that_changed_by_rounding_go_by_position():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(1, 50, 2, 16, generator=generator)
    new = old * (1 + 1e-7 * torch.randn(old.shape, generator=generator))
    new[0, 30] += 0.1
    assert least_similar(new, old, 4).tolist() == [[30, 0, 1, 2]]


def test_put_undoes_take():
    x = torch.arange(24.0).view(1, 4, 2, 3)
    rows = torch.tensor([[3, 1]])
    taken = take(x, rows)
    assert torch.equal(taken, x[:, [3, 1]])
    y = torch.zeros_like(x)
    put(y, rows, taken)
    assert torch.equal(y, x * torch.tensor([0.0, 1, 0, 1]).view(1, 4, 1, 1))

"""Forwards over cached features against whole forwards, and what they compute."""

from dataclasses import replace

import pytest
import torch

from d2f.models.feature_cache import FeatureCache, Refresh, least_similar
from d2f.ops.backend import select_backend
from d2f.testing import tiny_adapter, tiny_model

RESPONSE, PROMPT, PADDING = 7, 5, 3
LENGTH = RESPONSE + PROMPT + PADDING
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH = select_backend("torch", "cpu")


def refresh_of(**values):
    return Refresh(response_length=RESPONSE, **values)


FULL = refresh_of(prompt=True, response=True)
KINDS = {
    "full": FULL,
    "response": refresh_of(prompt=False, response=True),
    "prompt": refresh_of(prompt=True, response=False),
    "prompt and some": refresh_of(prompt=True, response=False, num_tokens=2),
    "some": refresh_of(prompt=False, response=False, num_tokens=2),
    "all, as some": refresh_of(prompt=True, response=False, num_tokens=RESPONSE),
    "none": refresh_of(prompt=False, response=False),
}


@pytest.fixture(params=["llada", "Dream"])
def model(request):
    return tiny_model(request.param)


def draw_ids(seed):
    """Prompt and response, in their order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 90, (PROMPT + RESPONSE,), generator=generator)


@torch.inference_mode()
def refreshed(model, ids, cache, refresh, *, padding_id=0, backend=TORCH):
    """Hidden states in the order of the positions."""
    model.prepare_steps()
    padding = torch.full((PADDING,), padding_id)
    positions = [*range(PROMPT, PROMPT + RESPONSE), *range(PROMPT), *[0] * PADDING]
    hidden = model.forward_refresh(
        torch.cat([ids[PROMPT:], ids[:PROMPT], padding]).to(model.device),
        torch.tensor(positions, device=model.device),
        torch.tensor([PROMPT + RESPONSE], device=model.device),
        cache,
        refresh,
        backend,
    )
    return torch.cat([hidden[RESPONSE : RESPONSE + PROMPT], hidden[:RESPONSE]])


def whole(model, ids):
    with torch.inference_mode():
        return model(ids[None])[0]


def new_cache(model):
    cache = FeatureCache(model.spec, num_slots=32, device=model.device)
    cache.kv_N2SKH.fill_(torch.nan)
    cache.outputs_N2SD.fill_(torch.nan)
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
    ids = draw_ids(1)
    got = [refreshed(model, ids, new_cache(model), FULL, padding_id=pad) for pad in (0, 17)]
    assert torch.equal(*got)


def test_adapters_take_part(model):
    tiny_adapter(model)
    cache = new_cache(model)
    for kind in ("full", "all, as some"):
        got = refreshed(model, draw_ids(1), cache, KINDS[kind])
        torch.testing.assert_close(got, whole(model, draw_ids(1)))


@pytest.mark.parametrize("kind", ["full", "prompt and some", "some", "none"])
def test_kernels_compute_the_same(kind):
    pytest.importorskip("triton")
    model, kernels = tiny_model("Dream").to(DEVICE), select_backend("triton", DEVICE)
    caches = [new_cache(model), new_cache(model)]
    for ids, refresh in ((draw_ids(1), FULL), (draw_ids(2), KINDS[kind])):
        got = refreshed(model, ids, caches[0], refresh, backend=kernels)
        expected = refreshed(model, ids, caches[1], refresh)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_is_not_computed_stays_in_the_residual(model):
    """New ids come in by the embedding only; the layers add what they added before."""
    old, new, cache = draw_ids(1), draw_ids(2), new_cache(model)
    refreshed(model, old, cache, FULL)
    with torch.inference_mode():
        x = model.embed(new)
        for index in range(model.spec.num_layers):
            features = cache.features(index, LENGTH)
            for added in (features.attention_LD, features.mlp_LD):
                x = x + torch.cat([added[RESPONSE : RESPONSE + PROMPT], added[:RESPONSE]])
        expected = model.norm(x)
    torch.testing.assert_close(refreshed(model, new, cache, KINDS["none"]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_due_goes_through_the_layers(model, kind):
    """One product of the values where tokens are chosen; all others read the queries only."""
    cache, refresh = new_cache(model), KINDS[kind]
    refreshed(model, draw_ids(1), cache, FULL)
    rows = []

    def count(name):
        def spy(x, *rest):
            rows.append(len(x))
            return getattr(TORCH, name)(x, *rest)

        return spy

    counting = replace(TORCH, linear=count("linear"), gated_linear=count("gated_linear"))
    refreshed(model, draw_ids(2), cache, refresh, backend=counting)
    queries = refresh.num_queries(LENGTH)
    compared = {"prompt and some": LENGTH, "all, as some": LENGTH, "some": RESPONSE}
    # Queries, keys and values, output, gate and up, down.
    layer = [queries] * 4 if queries else []
    if kind in compared:
        layer = [compared[kind], queries, *layer]
    assert rows == layer * model.spec.num_layers


def test_the_least_similar_tokens_are_chosen_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, 8, generator=generator)
    new = old * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0, 3.0])[:, None]
    new[4], new[2] = -old[4], new[2] + 0.01
    assert least_similar(new, old, 2).tolist() == [4, 2]


def test_tokens_that_changed_by_rounding_go_by_position():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(50, 32, generator=generator)
    new = old * (1 + 1e-7 * torch.randn(old.shape, generator=generator))
    new[30] += 0.1
    assert least_similar(new, old, 4).tolist() == [30, 0, 1, 2]

"""dLLM-Cache against vanilla, where both are the same, and against a slow twin everywhere."""

import math

import pytest
import torch
from tests.unit.decoding.unpaged import sequences

from d2f import Engine, EngineConfig, Request, generate_ids
from d2f.decoding.dllm_cache import DLLMCacheBatch
from d2f.decoding.strategies import RefreshOptions
from d2f.decoding.vanilla import transfer_plan
from d2f.decoding.workspace import Workspace
from d2f.errors import ConfigError, RequestError
from d2f.models import feature_cache
from d2f.testing import tiny_model

ALWAYS = {"prompt_interval": 1, "response_interval": 1}
ALL_AS_SHARE = {"prompt_interval": 1, "response_interval": 1000, "refresh_share": 1.0}


def prompt_of(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 90, (length,), generator=generator).tolist()


def sequence(prompt, limit, **settings):
    return sequences([prompt], [limit], **({"seed": 0} | settings))


def start(model, asked, workspace=None, **options):
    model.prepare_steps()
    # Padded, as where steps are captured.
    workspace = workspace or Workspace(model.device, use_graphs=False, pads=True)
    return DLLMCacheBatch(model, asked, workspace, RefreshOptions(**options))


def decode(model, asked, workspace=None, **options):
    batch = start(model, asked, workspace, **options)
    while not all(batch.finished()):
        batch.step()
    [result] = batch.results([0])
    return result


@pytest.fixture(scope="module", params=["llada", "Dream"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family)


@pytest.mark.parametrize("options", [ALWAYS, ALL_AS_SHARE], ids=["intervals", "share"])
@pytest.mark.parametrize("seed", range(4))
def test_computing_all_in_every_step_is_vanilla(family, options, seed):
    model, prompt = tiny_model(family, seed), prompt_of((7, 1, 32, 45)[seed], seed)
    common = {
        "max_new_tokens": 40, "num_steps": 25, "block_length": 16, "eos_token_id": (),
    }  # fmt: skip
    slow = generate_ids(model, prompt, strategy="vanilla", **common)
    fast = generate_ids(model, prompt, strategy="dllm-cache", **common, **options)
    assert fast == slow
    assert fast.probabilities == pytest.approx(slow.probabilities, abs=1e-5)


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.8}])
def test_it_samples_as_vanilla_does(model, truncation):
    common = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3, "eos_token_id": (), **truncation}
    # dLLM-Cache decodes as LLaDA does, whatever the model's own sampler.
    slow = generate_ids(
        model, prompt_of(6), strategy="vanilla", algorithm="low_confidence", **common
    )
    fast = generate_ids(model, prompt_of(6), strategy="dllm-cache", **common, **ALWAYS)
    assert fast == slow
    assert fast.probabilities == pytest.approx(slow.probabilities, abs=1e-5)


@pytest.mark.parametrize("early_stop", [True, False])
def test_it_stops_as_vanilla_does(model, early_stop):
    free = generate_ids(model, prompt_of(4), max_new_tokens=24, eos_token_id=(), strategy="vanilla")
    common = {
        "max_new_tokens": 24, "eos_token_id": [free.token_ids[5], 91], "early_stop": early_stop,
        "block_length": 6,
    }  # fmt: skip
    slow = generate_ids(model, prompt_of(4), strategy="vanilla", **common)
    fast = generate_ids(model, prompt_of(4), strategy="dllm-cache", **common, **ALWAYS)
    assert fast == slow
    assert fast.probabilities == pytest.approx(slow.probabilities, abs=1e-5)
    assert fast.finish_reason == "eos"
    assert (fast.num_forwards < 24) == early_stop


class SlowTwin:
    """The method on one token after the other, with features in lists and no padding."""

    def __init__(self, model, prompt, limit, *, prompt_interval, response_interval, share):
        self.model, self.prompt, self.limit = model, prompt, limit
        self.intervals, self.share = (prompt_interval, response_interval), share
        self.ids = prompt + [model.spec.mask_token_id] * limit
        length = len(self.ids)
        names = ("k", "v", "attention", "mlp")
        self.features = [{name: [None] * length for name in names} for _ in model.layers]
        self.chosen, self.num_query_tokens = [], 0

    def rotate(self, heads, position):
        half = heads.shape[-1] // 2
        angle = position * 10000.0 ** (-torch.arange(half) / half)
        a, b = heads[:, :half], heads[:, half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], 1)

    def share_of_response(self, layer, own, x):
        count = math.floor(self.share * self.limit + 1e-9)
        count = max(count, 1) if self.share > 0 else 0
        if count == 0:
            return []
        likeness = []
        for p in range(len(self.prompt), len(self.ids)):
            new = layer.qkv.v_proj(layer.attention_norm(x[p]))
            old = own["v"][p].flatten()
            own["v"][p] = new.view(-1, layer.qkv.head_dim)
            likeness.append((min(float(new @ old / new.norm() / old.norm()), 1 - 1e-6), p))
        chosen = sorted(p for _, p in sorted(likeness)[:count])
        self.chosen.append(chosen)
        return chosen

    def compute(self, layer, own, x, positions):
        queries = {}
        for p in positions:
            h = layer.attention_norm(x[p])
            q, k, own["v"][p] = layer.qkv.heads(h)
            queries[p], own["k"][p] = self.rotate(q, p), self.rotate(k, p)
        keys, values = torch.stack(own["k"]), torch.stack(own["v"])
        for p, q in queries.items():
            outs = []
            for head, query in enumerate(q):
                shared = head * keys.shape[1] // len(q)
                weight = (keys[:, shared] @ query / math.sqrt(layer.qkv.head_dim)).softmax(0)
                outs.append(weight @ values[:, shared])
            own["attention"][p] = layer.o_proj(torch.cat(outs))
            h = layer.mlp_norm(x[p] + own["attention"][p])
            own["mlp"][p] = layer.down_proj(layer.gate_up(h))

    def forward(self, step):
        prompt, response = (step % interval == 0 for interval in self.intervals)
        before = range(len(self.prompt))
        after = range(len(self.prompt), len(self.ids))
        x = [self.model.embed.weight[i] for i in self.ids]
        for number, (layer, own) in enumerate(zip(self.model.layers, self.features, strict=True)):
            part = list(after) if response else self.share_of_response(layer, own, x)
            due = (list(before) if prompt else []) + part
            self.num_query_tokens += len(due) if number == 0 else 0
            self.compute(layer, own, x, due)
            x = [row + own["attention"][p] + own["mlp"][p] for p, row in enumerate(x)]
        return [self.model.norm(row) for row in x]

    @torch.inference_mode()
    def decode(self, num_steps, block_length):
        shifted, mask = self.model.spec.architecture.shifted, self.model.spec.mask_token_id
        plan = transfer_plan(self.limit, num_steps=num_steps, block_length=block_length)
        for step, (start, end, keep) in enumerate(plan):
            hidden = self.forward(step)
            guesses = []
            for p in range(len(self.prompt) + start, len(self.prompt) + end):
                if self.ids[p] == mask:
                    logits = self.model.head(hidden[max(p - 1, 0) if shifted else p])
                    probabilities = logits.softmax(0)
                    logits[mask] = -math.inf
                    token = int(logits.argmax())
                    guesses.append((-float(probabilities[token]), p, token))
            for _, p, token in sorted(guesses)[:keep]:
                self.ids[p] = token
        return self.ids[len(self.prompt) :]


@pytest.mark.parametrize(
    ("prompt_length", "limit", "prompt_interval", "response_interval", "share"),
    [
        (5, 20, 50, 7, 0.25),
        (3, 17, 4, 3, 0.4),
        (33, 9, 2, 100, 0.1),
        (1, 14, 100, 100, 0.0),
        (4, 14, 3, 5, 0.0),
        (2, 16, 2, 4, 0.5),
        (7, 12, 1, 6, 0.75),
        (6, 12, 5, 1, 0.01),
    ],
)
def test_the_slow_twin_finds_the_same(
    model, monkeypatch, prompt_length, limit, prompt_interval, response_interval, share
):
    prompt = prompt_of(prompt_length, seed=limit)
    twin = SlowTwin(
        model, prompt, limit, prompt_interval=prompt_interval,
        response_interval=response_interval, share=share,
    )  # fmt: skip
    expected = twin.decode(num_steps=None, block_length=8)

    chosen, least_similar = [], feature_cache.least_similar

    def watched(*args):
        rows = least_similar(*args)
        chosen.append([prompt_length + row for row in sorted(rows.tolist())])
        return rows

    monkeypatch.setattr(feature_cache, "least_similar", watched)
    result = decode(
        model, sequence(prompt, limit), block_length=8, prompt_interval=prompt_interval,
        response_interval=response_interval, refresh_share=share,
    )  # fmt: skip
    assert result.token_ids == expected
    assert chosen == twin.chosen
    assert bool(chosen) == (share > 0 and response_interval > 1)
    assert result.num_query_tokens == twin.num_query_tokens
    assert result.num_forwards == limit


def test_caching_changes_what_is_decoded(model):
    """Else the other tests could pass by computing all in every step."""
    prompt = prompt_of(12)
    full = decode(model, sequence(prompt, 24), **ALWAYS)
    cached = decode(model, sequence(prompt, 24), prompt_interval=50, response_interval=24)
    assert cached.token_ids != full.token_ids
    assert cached.num_query_tokens == 12 + 24 + 23 * 6
    assert full.num_query_tokens == 24 * 36


def test_what_is_counted_is_what_is_due(family, monkeypatch):
    model, due = tiny_model(family), []
    forward = model.forward_refresh
    monkeypatch.setattr(
        model,
        "forward_refresh",
        lambda *args: due.append(args[4].num_queries(42)) or forward(*args),
    )
    options = {"prompt_interval": 4, "response_interval": 3, "refresh_share": 0.5}
    result = decode(model, sequence(prompt_of(32), 10), num_steps=7, **options)
    # Steps 0, 4: prompt; steps 0, 3, 6: response; half of it else.
    assert due == [42, 5, 5, 10, 37, 5, 10]
    assert result.num_query_tokens == sum(due)
    assert result.num_forwards == 7
    assert result.num_prefill_forwards == 0


def test_an_empty_prompt_is_never_due(model):
    """Its ids are not compared: with nothing but masks, all positions are equally confident."""
    options = {"prompt_interval": 2, "response_interval": 4, "refresh_share": 0.5}
    result = decode(model, sequence([], 16), **options)
    assert len(result.token_ids) == 16
    assert result.num_query_tokens == 4 * 16 + 12 * 8


def poison(batch):
    """Leave behind what would spoil every later answer that reads it."""
    with torch.inference_mode():
        batch.cache.kv_N2SKH.fill_(torch.nan)
        batch.cache.outputs_N2SD.fill_(torch.nan)
        batch.state.finite.fill_(False)
        batch.state.stopped.fill_(True)
        batch.state.ids_L.fill_(1)


def test_requests_in_turn_leave_nothing_to_each_other(model):
    requests = [(40, 12), (3, 20), (0, 8), (40, 12), (35, 12), (300, 5)]
    workspace = Workspace(model.device, pads=True)
    for length, limit in requests:
        asked = sequence(prompt_of(length), limit, eos=(95,))
        batch = start(model, asked, workspace)
        while not all(batch.done):
            batch.step()
        [shared] = batch.results([0])
        assert shared == decode(model, asked)
        poison(batch)


def test_the_engine_serves_it_beside_others(model):
    requests = [
        Request(prompt_ids=prompt_of(n), max_new_tokens=9 + n, strategy=strategy, eos_token_id=())
        for n, strategy in [(3, "dllm-cache"), (8, "vanilla"), (5, "dllm-cache")]
    ]
    engine = Engine(model, EngineConfig(max_batch_size=1))
    try:
        results = engine.generate(requests)
    finally:
        engine.close()
    for request, result in zip(requests, results, strict=True):
        assert len(result.token_ids) == request.max_new_tokens
        if request.strategy == "dllm-cache":
            assert result == decode(model, sequence(request.prompt_ids, request.max_new_tokens))


def test_watching_it(model):
    batch = start(model, sequence(prompt_of(3), 8), num_steps=2)
    batch.step()
    [block] = batch.view(0)
    assert len(block.token_ids) == 8
    assert block.token_ids.count(None) == 4
    assert batch.finished() == [False]
    assert batch.results([]) == []


def test_logits_that_are_not_finite_give_no_answer(family):
    model = tiny_model(family)
    with torch.inference_mode():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(RequestError, match="not finite"):
        generate_ids(model, [1, 2], max_new_tokens=4, strategy="dllm-cache")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_interval": 0}, "prompt_interval is 0"),
        ({"prompt_interval": 2.5}, "prompt_interval is 2.5"),
        ({"response_interval": -1}, "response_interval is -1"),
        ({"response_interval": True}, "response_interval is True"),
        ({"refresh_share": -0.1}, "refresh_share is -0.1"),
        ({"refresh_share": 1.01}, "refresh_share is 1.01"),
        ({"refresh_share": float("nan")}, "refresh_share is nan"),
        ({"refresh_share": "half"}, "refresh_share is 'half'"),
        ({"refresh_share": True}, "refresh_share is True"),
        ({"num_steps": 1, "block_length": 8}, "need at least 2"),
        ({"promt_interval": 3}, "did you mean 'prompt_interval'"),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(ConfigError, match=message):
        generate_ids(model, [1, 2], max_new_tokens=16, strategy="dllm-cache", **options)


@pytest.mark.parametrize(
    ("share", "length", "tokens"),
    [(0.25, 32, 8), (0.25, 31, 7), (0.01, 8, 1), (0.0, 8, 0), (0.29, 100, 29), (1, 7, 7)],
)
def test_the_share_is_rounded_down(share, length, tokens):
    assert RefreshOptions(refresh_share=share).num_tokens(length) == tokens


def test_no_step_waits_for_the_host(family):
    """On the meta device there is nothing to read, so a step that needed a value would fail."""
    model = tiny_model(family).to("meta")
    options = {"prompt_interval": 4, "response_interval": 3}
    for settings in ({}, {"temperature": 0.5, "top_p": 0.9}):
        batch = start(
            model, sequence(prompt_of(5), 20, eos=(95,), early_stop=False, **settings), **options
        )
        while not all(batch.done):
            batch.step()
        assert batch.num_forwards == [20]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_steps_give_the_same(family):
    model = tiny_model(family).to("cuda")
    captured = Workspace(model.device)
    options = {"prompt_interval": 5, "response_interval": 3}
    for length, limit in [(4, 24), (30, 24), (40, 12), (4, 24)]:
        asked = sequence(prompt_of(length), limit)
        expected = decode(model, asked, **options)
        assert decode(model, asked, captured, **options) == expected
    assert captured.num_graphs >= 4

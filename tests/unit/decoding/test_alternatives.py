"""Every strategy tells the tokens that could have stood where one was accepted."""

from __future__ import annotations

import dataclasses

import pytest
from tests.unit.engine.workload import cached_model

from d2f import DecodingPolicy, Engine, EngineConfig, Request
from d2f.engine.generate import generate_ids
from d2f.errors import RequestError

POLICY = DecodingPolicy(block_size=5, confidence_threshold=0.3, add_threshold=0.2)
STRATEGIES = [
    ("pipelined", {}),
    ("serial", {}),
    ("reference", {}),
    ("vanilla", {"num_steps": 9}),
    ("vanilla", {"num_steps": 9, "algorithm": "entropy"}),
    ("parallel", {"block_length": 5, "factor": 2.0}),
    ("prefix-cache", {"block_length": 5}),
    ("dual-cache", {"block_length": 5}),
    ("dllm-cache", {"num_steps": 9}),
]
CASES = [(name, *case) for name in ("llada", "Dream") for case in STRATEGIES]
CASES.append(("qwen2", "autoregressive", {}))
SAMPLING = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.1, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "seed": 5},
]


def check(result, count: int, *, sampled: bool, truncated: bool) -> None:
    assert len(result.alternatives) == len(result.token_ids) > 0
    for token, probability, found in zip(
        result.token_ids, result.probabilities, result.alternatives, strict=True
    ):
        assert 0 < len(found) <= count
        assert truncated or len(found) == count
        values = [p for _, p in found]
        assert values == sorted(values, reverse=True)
        assert len({other for other, _ in found}) == len(found)
        assert sum(values) <= 1 + 1e-5
        if not sampled:
            assert found[0][0] == token
        if token in dict(found):
            assert dict(found)[token] == pytest.approx(probability, rel=1e-4)
        else:
            assert sampled
            assert probability <= values[-1] + 1e-6


@pytest.mark.parametrize(("name", "strategy", "options"), CASES)
@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "sampled", "truncated"])
def test_they_stand_in_the_distribution_of_the_accepted_token(name, strategy, options, sampling):
    settings = {"max_new_tokens": 14, "eos_token_id": (), "strategy": strategy}
    settings |= options | sampling
    policy = POLICY if strategy in ("pipelined", "serial", "reference") else None
    plain = generate_ids(cached_model(name), [1, 2, 3], policy, **settings)
    asked = generate_ids(cached_model(name), [1, 2, 3], policy, num_alternatives=4, **settings)
    # Who asks gets the same answer.
    assert asked == plain
    assert plain.alternatives == []
    check(asked, 4, sampled=bool(sampling), truncated="top_k" in sampling)


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_that_do_not_ask_get_none_beside_those_that_do(overlap):
    base = Request(prompt_ids=[1, 2], max_new_tokens=12, policy=POLICY, eos_token_id=())
    requests = [
        dataclasses.replace(base, prompt_ids=[seed, 2], num_alternatives=count)
        for seed, count in enumerate([0, 20, 3, 0])
    ]
    engine = Engine(
        cached_model("llada"), EngineConfig(kv_cache_bytes=10**6, page_size=4, overlap=overlap)
    )
    results = engine.generate(requests)
    for request, result in zip(requests, results, strict=True):
        alone = generate_ids(
            cached_model("llada"), request.prompt_ids, POLICY, max_new_tokens=12, eos_token_id=()
        )
        assert result == alone
        if request.num_alternatives:
            check(result, request.num_alternatives, sampled=False, truncated=False)
        else:
            assert result.alternatives == []


@pytest.mark.parametrize("strategy", ["pipelined", "vanilla", "reference"])
def test_they_are_seen_while_it_runs_and_survive_other_sequences_ends(strategy):
    request = Request(
        prompt_ids=[4, 5], max_new_tokens=12, eos_token_id=(), num_alternatives=2, strategy=strategy
    )
    engine = Engine(cached_model("llada"), EngineConfig(kv_cache_bytes=10**6))
    # Two end early, so that a batch goes on with the rest.
    shorter = dataclasses.replace(request, max_new_tokens=3)
    numbers = [engine.add(shorter), engine.add(shorter), engine.add(request)]
    seen, results = {}, {}
    while len(results) < 3:
        results |= {output.request_id: output.result for output in engine.step()}
        if numbers[2] not in results:
            tokens, found = [], []
            for block in engine.view(numbers[2]):
                tokens += block.token_ids
                found += block.alternatives
            for place, token in enumerate(tokens):
                if token is None:
                    assert found[place] == ()
                else:
                    assert seen.setdefault(place, found[place]) == found[place]
    result = results[numbers[2]]
    assert seen
    assert all(result.alternatives[place] == found for place, found in seen.items())
    assert all(len(found) == 2 for found in result.alternatives)


@pytest.mark.parametrize("count", [-1, 21, True, 2.0, None])
def test_no_such_number(count):
    with pytest.raises(RequestError, match="num_alternatives"):
        generate_ids(cached_model("llada"), [1], num_alternatives=count)


@pytest.mark.parametrize("min_p", [-0.1, 1.5, True, "a", float("nan")])
def test_no_such_min_p(min_p):
    with pytest.raises(RequestError, match="min_p"):
        generate_ids(cached_model("llada"), [1], min_p=min_p)


@pytest.mark.parametrize(("name", "strategy", "options"), CASES)
def test_the_highest_min_p_leaves_nothing_to_chance(name, strategy, options):
    settings = {"max_new_tokens": 10, "eos_token_id": (), "strategy": strategy, **options}
    settings |= {"temperature": 1.5, "min_p": 1.0}
    one, other = (
        generate_ids(cached_model(name), [1, 2], seed=seed, **settings) for seed in (1, 2)
    )
    assert one == other
    assert one != generate_ids(cached_model(name), [1, 2], seed=2, **settings | {"min_p": 0.0})

"""The engine: queueing, batches, streams."""

import pytest

from d2f import DecodingPolicy, Engine, EngineConfig, Request, generate_ids
from d2f.errors import ConfigError, RequestError
from d2f.testing import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llada")


def test_mixed_requests_come_back_in_order(model):
    policy = DecodingPolicy(block_size=4, confidence_threshold=0.03)
    requests = [
        Request(prompt_ids=[i] * (i + 1), max_new_tokens=3 + i, policy=policy, strategy=strategy)
        for i, strategy in enumerate(["pipelined", "vanilla", "pipelined", "serial", "pipelined"])
    ]
    results = Engine(model, EngineConfig(max_batch_size=2)).generate(requests)
    for request, result in zip(requests, results, strict=True):
        alone = generate_ids(
            model,
            request.prompt_ids,
            policy,
            max_new_tokens=request.max_new_tokens,
            strategy=request.strategy,
        )
        assert result == alone


def test_a_bad_request_leaves_the_others_alone(model):
    engine = Engine(model)
    good = engine.add(Request(prompt_ids=[1, 2], max_new_tokens=4))
    with pytest.raises(RequestError):
        engine.add(Request(prompt_ids=[1, 2], max_new_tokens=0))
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert [output.request_id for output in outputs] == [good]
    assert engine.step() == []


def test_stream_only_grows_and_ends_with_the_result(model):
    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=12, eos_token_id=())
    outputs = list(Engine(model).stream(request))
    for before, after in zip(outputs, outputs[1:], strict=False):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
    assert outputs[-1].result is not None
    assert (
        outputs[-1].result.token_ids
        == generate_ids(model, [1, 2, 3], max_new_tokens=12, eos_token_id=()).token_ids
    )


def test_recommended_policy_is_the_default(model):
    import dataclasses

    policy = DecodingPolicy(block_size=2, confidence_threshold=0.0)
    other = tiny_model("llada")
    other.spec = dataclasses.replace(other.spec, recommended_policy=policy)
    assert generate_ids(other, [1], max_new_tokens=6) == generate_ids(
        model, [1], policy, max_new_tokens=6
    )


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="max_batch_size is 0"):
        EngineConfig(max_batch_size=0)

"""The engine: queueing, batches, streams."""

import dataclasses
import itertools

import pytest
import torch

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
    for before, after in itertools.pairwise(outputs):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
    assert outputs[-1].result is not None
    assert (
        outputs[-1].result.token_ids
        == generate_ids(model, [1, 2, 3], max_new_tokens=12, eos_token_id=()).token_ids
    )


def test_recommended_policy_is_the_default(model):
    policy = DecodingPolicy(block_size=2, confidence_threshold=0.0)
    other = tiny_model("llada")
    other.spec = dataclasses.replace(other.spec, recommended_policy=policy)
    assert generate_ids(other, [1], max_new_tokens=6) == generate_ids(
        model, [1], policy, max_new_tokens=6
    )


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="max_batch_size is 0"):
        EngineConfig(max_batch_size=0)


LONG = Request(prompt_ids=[1, 2, 3], max_new_tokens=30, eos_token_id=())
SHORT = Request(prompt_ids=[4, 5], max_new_tokens=6, eos_token_id=())


def test_callers_do_not_take_each_others_results(model):
    engine = Engine(model)
    first = engine.stream(SHORT)
    next(first)
    queued = engine.add(LONG)
    [result] = engine.generate([LONG])
    assert len(result.token_ids) == 30
    assert list(first)[-1].result is not None
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert [output.request_id for output in outputs] == [queued]


def test_two_streams_take_turns(model):
    engine = Engine(model)
    one, two = engine.stream(LONG), engine.stream(SHORT)
    next(one)
    assert list(two)[-1].result == list(Engine(model).stream(SHORT))[-1].result
    assert list(one)[-1].result == list(Engine(model).stream(LONG))[-1].result


def test_a_dropped_stream_leaves_the_engine(model):
    engine = Engine(model)
    stream = engine.stream(LONG)
    next(stream)
    stream.close()
    assert len(engine.generate([SHORT])[0].token_ids) == 6


def test_a_result_taken_by_step_ends_the_stream_with_an_error(model):
    engine = Engine(model)
    stream = engine.stream(SHORT)
    next(stream)
    while not engine.step():
        pass
    with pytest.raises(RequestError, match="handed out by step"):
        list(stream)


def test_a_forward_that_fails_does_not_poison_the_engine(monkeypatch):
    model = tiny_model("llada")
    engine = Engine(model)

    def fail(*arguments, **settings):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward_packed", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate([LONG, SHORT])
    assert len(engine.generate([SHORT])[0].token_ids) == 6


def test_streamed_tokens_never_pass_the_eos(model):
    free = generate_ids(model, [1, 2, 3], max_new_tokens=20, eos_token_id=())
    request = Request(
        prompt_ids=[1, 2, 3],
        max_new_tokens=20,
        eos_token_id=free.token_ids[4],
        policy=DecodingPolicy(block_size=4, confidence_threshold=0.0),
        early_stop=False,
    )
    for before, after in itertools.pairwise(Engine(model).stream(request)):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids


@pytest.mark.parametrize("name", ["llada", "qwen2"])
def test_logits_that_are_not_finite_give_an_error(name):
    model = tiny_model(name)
    model.norm.weight.data.fill_(torch.nan)
    strategies = ["autoregressive"] if name == "qwen2" else ["pipelined", "vanilla"]
    for strategy in strategies:
        with pytest.raises(RequestError, match="not finite"):
            generate_ids(model, [1, 2], max_new_tokens=4, strategy=strategy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_k": True}, "top_k"),
        ({"top_p": "most"}, "top_p"),
        ({"policy": {"block_size": 4}}, "policy"),
        ({"eos_token_id": 1.5}, "EOS"),
        ({"prompt_ids": "ab"}, "no list of token ids"),
        ({"prompt_ids": [[1], 2]}, "not a whole number"),
    ],
)
def test_wrong_types_are_named(model, values, message):
    with pytest.raises(RequestError, match=message):
        Engine(model).add(Request(**({"prompt_ids": [1, 2]} | values)))


def test_tensors_are_prompts_too(model):
    as_list = generate_ids(model, [[1, 2], [3, 4]], max_new_tokens=4)
    assert generate_ids(model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=4) == as_list
    assert generate_ids(model, torch.tensor([1, 2]), max_new_tokens=4) == as_list[0]


def test_rows_that_were_never_used_take_no_part():
    """The host one step behind sizes steps by powers of two: here 3 requests in 4 rows."""
    requests = [dataclasses.replace(LONG, prompt_ids=[n + 1] * (n + 2)) for n in range(3)]
    behind = EngineConfig(max_batch_size=4, overlap=True)
    model = tiny_model("llada")
    alone = [
        generate_ids(model, r.prompt_ids, max_new_tokens=30, eos_token_id=()) for r in requests
    ]
    assert Engine(model, behind).generate(requests) == alone

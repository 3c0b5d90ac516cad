"""The ends of the ranges: a right result or a clear error, never a hang."""

import pytest

from d2f import DecodingPolicy, generate_ids
from d2f.errors import ConfigError, D2FError, RequestError
from d2f.testing import tiny_model

STRATEGIES = (
    "pipelined", "serial", "reference", "vanilla", "parallel", "prefix-cache", "dual-cache",
)  # fmt: skip
FAST = ("parallel", "prefix-cache", "dual-cache")


@pytest.fixture(scope="module", params=["llada", "Dream"])
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prompt", [[], [5]])
@pytest.mark.parametrize("length", [1, 3])
def test_short_prompts_and_lengths_below_a_block(model, strategy, prompt, length):
    result = generate_ids(
        model, prompt, DecodingPolicy(block_size=16), max_new_tokens=length, eos_token_id=(),
        strategy=strategy,
    )  # fmt: skip
    assert len(result.token_ids) == length


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eos_as_the_first_token_and_several_eos_ids(model, strategy):
    free = generate_ids(model, [1, 2], max_new_tokens=8, eos_token_id=(), strategy=strategy)
    first, last = free.token_ids[0], free.token_ids[-1]
    result = generate_ids(
        model, [1, 2], max_new_tokens=8, eos_token_id=[last, first], strategy=strategy
    )
    assert result.token_ids == [first]
    assert result.finish_reason == "eos"


@pytest.mark.parametrize("add", [0.0, 1.0])
@pytest.mark.parametrize("act", [0.0, 1.0])
@pytest.mark.parametrize("conf", [0.0, 1.0])
@pytest.mark.parametrize("window", [None, 1])
def test_thresholds_at_their_ends(model, add, act, conf, window):
    policy = DecodingPolicy(
        block_size=4,
        add_threshold=add,
        activate_threshold=act,
        confidence_threshold=conf,
        max_live_blocks=window,
    )
    result = generate_ids(model, [1, 2, 3], policy, max_new_tokens=10, eos_token_id=())
    assert len(result.token_ids) == 10
    if conf == 0:
        assert result.num_forwards <= 6  # all of a block at once


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"prompt_ids": [10_000]}, "outside the vocabulary"),
        ({"prompt_ids": [-1]}, "outside the vocabulary"),
        ({"prompt_ids": [1] * 100_000}, "exceed the model's"),
        ({"eos_token_id": 10_000}, "EOS token 10000"),
        ({"strategy": "pipelind"}, "did you mean 'pipelined'"),
        ({"num_steps": 4}, "unknown option 'num_steps'"),
        ({"strategy": "vanilla", "blok_length": 4}, "did you mean 'block_length'"),
        (
            {"strategy": "vanilla", "num_steps": 1, "max_new_tokens": 64, "block_length": 32},
            "need at least 2",
        ),
        ({"strategy": "vanilla", "block_length": 0}, "block_length is 0"),
        ({"strategy": "vanilla", "block_length": True}, "block_length is True; it must be a whole"),
        ({"strategy": "vanilla", "num_steps": 2.5}, "num_steps is 2.5; it must be a whole number"),
        ({"strategy": "vanilla", "num_steps": 0, "algorithm": "origin"}, "num_steps is 0"),
        ({"strategy": "vanilla", "algorithm": "entropi"}, "did you mean 'entropy'"),
        ({"strategy": "vanilla", "algorithm": 3}, "algorithm is 3; it must be a name"),
        (
            {"strategy": "vanilla", "algorithm": "low_confidence", "eps": 0.1},
            "eps is 0.1; it is without effect on algorithm low",
        ),
        ({"strategy": "vanilla", "algorithm": "entropy", "eps": 0}, "eps is 0; it must lie"),
        ({"strategy": "vanilla", "algorithm": "entropy", "eps": 1.0}, "eps is 1.0; it must lie"),
        (
            {"strategy": "vanilla", "algorithm": "origin", "block_length": 8},
            "block_length is 8; it is without effect on algorithm origin",
        ),
        ({"strategy": "vanilla", "threshold": 0.5}, "unknown option 'threshold'"),
        *(
            ({"strategy": strategy} | options, message)
            for strategy in FAST
            for options, message in [
                ({"threshold": 1.5}, "threshold is 1.5; it must lie between 0 and 1"),
                ({"threshold": float("nan")}, "threshold is nan"),
                ({"threshold": "high"}, "threshold is 'high'; it must be a number"),
                ({"factor": 0}, "factor is 0; it must be a number above 0"),
                ({"factor": float("inf")}, "factor is inf"),
                ({"threshold": 0.9, "factor": 1.0}, "give one of them"),
                ({"block_length": 0}, "block_length is 0"),
                ({"num_steps": 4}, "unknown option 'num_steps'"),
            ]
        ),
        ({"strategy": "paralel"}, "did you mean 'parallel'"),
        ({"strategy": "autoregressive"}, "not autoregressive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_requests_name_the_value(model, arguments, message):
    with pytest.raises(D2FError, match=message):
        generate_ids(model, **({"prompt_ids": [1, 2]} | arguments))


def test_diffusion_strategy_on_an_autoregressive_model():
    with pytest.raises(RequestError, match="decode it with strategy autoregressive"):
        generate_ids(tiny_model("qwen2"), [1, 2], strategy="pipelined")


def test_autoregression_needs_a_prompt():
    with pytest.raises(RequestError, match="prompt is empty"):
        generate_ids(tiny_model("qwen2"), [], strategy="autoregressive")


@pytest.mark.parametrize(
    "values",
    [
        {"confidence_threshold": -0.1},
        {"add_threshold": 1.5},
        {"activate_threshold": float("nan")},
        {"block_size": 0},
        {"max_live_blocks": 0},
        {"confidence": "margn"},
    ],
)
def test_policy_refuses_bad_values(values):
    with pytest.raises(ConfigError):
        DecodingPolicy(**values)


def test_policy_from_a_table_refuses_unknown_fields():
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        DecodingPolicy.from_dict({"block_sise": 4})

"""The traces of the authors' own decoding loops: ids and numbers of forwards, exactly."""

import json
from pathlib import Path

import pytest

import d2f

GOLDEN = Path(__file__).parent
MODELS = ("llada-tiny", "dream-tiny")


def traces(name: str) -> list[dict]:
    return json.loads((GOLDEN / name / "decode.json").read_text())


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    name = request.param
    model = d2f.load_model(GOLDEN / name, adapter=GOLDEN / name / "adapter", device="cpu")
    return model, traces(name)


def until_eos(trace: dict) -> list[int]:
    ids, eos = trace["output"], trace["eos_token_id"]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def policy(trace: dict) -> d2f.DecodingPolicy:
    return d2f.DecodingPolicy(
        block_size=trace["block_size"],
        add_threshold=trace["tau_add"],
        activate_threshold=trace["tau_act"],
        confidence_threshold=trace["tau_conf"],
    )


def test_there_are_forty_traces():
    assert sum(len(traces(name)) for name in MODELS) == 40


@pytest.mark.parametrize("strategy", ["pipelined", "reference"])
def test_trace_is_reproduced(case, strategy):
    model, rows = case
    for trace in rows:
        result = d2f.generate_ids(
            model,
            trace["prompt"],
            policy(trace),
            max_new_tokens=trace["max_new_tokens"],
            eos_token_id=trace["eos_token_id"],
            strategy=strategy,
            early_stop=False,
        )
        assert result.token_ids == until_eos(trace)
        assert result.num_forwards == trace["forwards"]
        assert result.num_query_tokens == trace["forwarded_tokens"]


def test_early_stop_gives_the_same_tokens_in_no_more_forwards(case):
    model, rows = case
    for trace in rows:
        result = d2f.generate_ids(
            model,
            trace["prompt"],
            policy(trace),
            max_new_tokens=trace["max_new_tokens"],
            eos_token_id=trace["eos_token_id"],
        )
        assert result.token_ids == until_eos(trace)
        assert result.num_forwards <= trace["forwards"]

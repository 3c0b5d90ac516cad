"""Steps in a steady state, what is read from clocks, and the machine's rates."""

from __future__ import annotations

import pytest
import torch

from d2f.decoding.step import StepShape
from d2f.engine.clock import StepTime
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request
from d2f.engine.steady import SteadyStep
from d2f.errors import ConfigError
from d2f.evaluation.metrics import percentile
from d2f.evaluation.rates import Rates, measure_rates
from d2f.evaluation.step import (
    idle_shares,
    kv_ratio,
    measure_engine,
    measure_step,
    step_ratio,
)
from d2f.models.presets import PRESETS, autoregressive_twin, preset_spec, random_model
from d2f.testing import tiny_model, tiny_spec

RATES = Rates(copy_bytes_per_second=1e9, matmul_flops_per_second=1e9, matmul_size=8)


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        # As published; bytes of keys and values of one token in bf16.
        ("llada-8b", 8_015_581_184, 524_288),
        ("dream-7b", 7_615_616_512, 57_344),
        ("llama-3-8b", 8_030_261_248, 131_072),
        ("qwen2.5-7b", 7_615_616_512, 57_344),
    ],
)
def test_presets_have_the_published_sizes(name, parameters, kv_bytes):
    spec = preset_spec(name)
    assert spec.num_parameters == parameters
    assert spec.kv_bytes_per_token == kv_bytes
    assert preset_spec(name, num_layers=2).num_layers == 2
    assert all(0 <= token < spec.vocab_size for token in spec.eos_token_ids)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="llada-8b"):
        preset_spec("llada8b")
    with pytest.raises(ConfigError, match="num_layers is 0"):
        preset_spec(next(iter(PRESETS)), num_layers=0)


def test_random_weights_follow_from_the_seed():
    one, same, other = (
        random_model(tiny_spec("Dream"), seed=seed, device="cpu", dtype="float32")
        for seed in (1, 1, 2)
    )
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert one.embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.layers[0].o_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert bool((one.norm.weight == 1).all())
    assert bool((one.layers[0].qkv.q_proj.bias == 0).all())


@pytest.mark.parametrize(("name", "twin_name"), [("llada", "llama"), ("Dream", "qwen2")])
def test_a_twin_shares_all_weights_also_packed(name, twin_name):
    model = tiny_model(name)
    twin = autoregressive_twin(model)
    assert twin.spec.architecture.name == twin_name
    model.prepare_steps()
    twin.prepare_steps()
    theirs = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        assert theirs[key].data_ptr() == parameter.data_ptr(), key
    qkv = [each._step_layers[0].qkv._joined.weight_ED.data_ptr() for each in (model, twin)]
    assert qkv[0] == qkv[1]
    assert autoregressive_twin(twin) is twin


def test_bytes_and_operations_by_hand():
    model = tiny_model("llada")
    step = SteadyStep(model, batch_size=3, window=40, kv_length=20)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    weights = 2 * layer + 96 * 32
    norms = (2 * 2 + 1) * 32
    assert step.weight_bytes == 4 * (weights + norms)
    assert step.product_flops == 2 * (3 * 40) * weights
    # Two layers, keys and values, 4 heads of 8, fp32, 60 positions of 3 rows.
    assert step.kv_bytes == 2 * 2 * 4 * 16 // 2 * 4 * 60 * 3
    # 32 tokens see 52 keys, 8 see 60.
    assert step.attention_flops == 4 * 3 * (32 * 52 + 8 * 60) * 2 * 4 * model.spec.head_dim


@pytest.mark.parametrize("name", ["llada", "Dream"])
@pytest.mark.parametrize("window", [1, 5, 32, 33, 64])
def test_a_steady_step_does_the_same_each_time(name, window):
    step = SteadyStep(tiny_model(name), batch_size=3, window=window, kv_length=19, page_size=4)
    for _ in range(2):
        assert len(step.run(2)) == 2
        records = step._start().read()
        assert [record.state.queries for record in records] == [window] * 3
        # The forced token of each row, and no other.
        assert [len(record.tokens) for record in records] == [1, 1, 1]


def test_a_steady_autoregressive_step():
    step = SteadyStep(tiny_model("qwen2"), batch_size=2, window=1, kv_length=19)
    records = step._start().read()
    assert [(record.state.start, record.state.end) for record in records] == [(20, 21)] * 2
    assert [token.place for record in records for token in record.tokens] == [1, 1]
    assert measure_step(step, RATES, num_steps=2)["strategy"] == "autoregressive"


@pytest.mark.parametrize("name", ["batch_size", "window", "kv_length", "page_size"])
def test_a_steady_step_refuses_what_is_below_one(name):
    sizes = {"batch_size": 1, "window": 8, "kv_length": 8, name: 0}
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        SteadyStep(tiny_model("llada"), **sizes)


def test_an_autoregressive_step_has_no_window():
    with pytest.raises(ConfigError, match="window is 2"):
        SteadyStep(tiny_model("llama"), batch_size=1, window=2, kv_length=8)


def test_costs_and_ratios_by_hand():
    model = tiny_model("llada")
    rows = []
    for which, window, length in (
        (autoregressive_twin(model), 1, 20),
        (model, 8, 20),
        (model, 8, 60),
    ):
        step = SteadyStep(which, batch_size=1, window=window, kv_length=length)
        rows.append(measure_step(step, RATES, num_steps=3))
    alone, short, long = rows
    assert short["milliseconds_min"] <= short["milliseconds"] <= short["milliseconds_max"]
    assert short["floor_ms"] == short["weight_bytes"] / 1e6
    assert short["floor_with_kv_ms"] == pytest.approx(
        (short["weight_bytes"] + short["kv_bytes"]) / 1e6
    )
    assert short["ratio_to_floor"] == short["milliseconds"] / short["floor_ms"]
    flops = short["product_flops"] + short["attention_flops"]
    assert short["share_of_matmul_rate"] == pytest.approx(flops / (short["milliseconds"] * 1e6))
    assert short["query_tokens_per_second"] == pytest.approx(8000 / short["milliseconds"])
    [ratio] = step_ratio(rows)
    assert ratio["ratio"] == short["milliseconds"] / alone["milliseconds"]
    [added] = kv_ratio(rows, RATES)
    assert added["added_ms"] == pytest.approx(long["milliseconds"] - short["milliseconds"])
    assert added["added_read_ms"] == pytest.approx((long["kv_bytes"] - short["kv_bytes"]) / 1e6)


def test_percentiles_by_hand():
    assert [percentile([3.0, 1.0, 2.0], p) for p in (0, 33, 34, 50, 99, 100)] == [1, 1, 2, 2, 3, 3]


def make_time(begin, end, prefill=False):
    shape = StepShape(
        num_rows=1, num_tokens=1, num_candidates=1, max_count=1, max_end=1, prefill=prefill
    )
    return StepTime(shape, (begin, end), begin, end)


def test_idle_time_by_hand():
    steps = [
        make_time(0.0, 5.0, prefill=True),
        make_time(7.0, 8.0),  # after a prefill: neither its gap nor its time counts
        make_time(8.5, 9.5),  # gap 0.5
        make_time(9.5, 11.5),  # gap 0, twice as long as the fastest
        make_time(12.0, 13.0),  # gap 0.5
    ]
    shares = idle_shares(steps)
    assert shares["num_decode_only_steps"] == 3
    assert shares["idle_share"] == pytest.approx(1 / 5)
    assert shares["idle_share_at_most"] == pytest.approx(1 - 3 / 5)
    assert shares["step_ms_p99"] == 2000
    with pytest.raises(ConfigError, match="no two decode-only steps"):
        idle_shares(steps[:2])


def test_the_engine_under_the_clock():
    engine = Engine(tiny_model("llada"), EngineConfig(imposed_acceptance=(1,)))
    request = Request(prompt_ids=[1, 2, 3], max_new_tokens=12, eos_token_id=())
    report = measure_engine(engine, [request])
    assert report["num_steps"] == 12
    assert report["num_prefill_steps"] == 1
    assert report["num_decode_only_steps"] == 10
    assert 0 <= report["idle_share"] <= report["idle_share_at_most"] + 1e-9 <= 1
    assert report["host_ms_per_step"] > 0
    # Off again.
    assert engine._clock is None


def test_rates_of_this_machine():
    rates = measure_rates("cpu", "float32")
    assert rates.copy_bytes_per_second > 1e8
    assert rates.matmul_flops_per_second > 1e8
    assert rates.matmul_size == 1024

"""Races at several batch sizes, and requests in bursts."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.bursts import mixed_requests, run_bursts

from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.request import Request
from d2f.errors import ConfigError, RequestError
from d2f.evaluation.answering import Answer, Run, timed_run
from d2f.evaluation.race import Entrant, acceptance_trace, race_by_run, speed_ratios, summarise_runs
from d2f.testing import tiny_model


def make_requests(strategy="pipelined", count=3, limit=12):
    return [
        Request(
            prompt_ids=[i + 1] * (3 + i), max_new_tokens=limit, eos_token_id=(), strategy=strategy
        )
        for i in range(count)
    ]


def imposed_engine(counts, batch_size=1):
    config = EngineConfig(imposed_acceptance=counts, max_batch_size=batch_size)
    return Engine(tiny_model("llada"), config)


def test_a_timed_run_counts_as_the_results_do():
    run = timed_run(imposed_engine((4,)), make_requests())
    assert [answer.num_tokens for answer in run.answers] == [12] * 3
    assert run.accepted == [[4, 4, 4]] * 3
    assert run.num_forwards == 9
    assert len(run.steps_ms) == 8
    # The first forward of each carries its prompt.
    assert run.decode_tokens == 3 * 8
    assert 0 < run.decode_seconds < run.seconds


def test_a_prompt_is_computed_anew_in_each_run():
    engine = imposed_engine((4,))
    first, second = (timed_run(engine, make_requests()) for _ in range(2))
    assert first.num_query_tokens == second.num_query_tokens
    assert second.decode_tokens == 3 * 8


def test_tokens_behind_an_eos_do_not_count():
    engine = imposed_engine((4,))
    free = timed_run(engine, make_requests(count=1))
    eos = free.answers[0].token_ids[5]
    assert eos not in free.answers[0].token_ids[:5]
    run = timed_run(engine, [dataclasses.replace(make_requests(count=1)[0], eos_token_id=eos)])
    assert run.answers[0].num_tokens == 6
    assert run.accepted == [[4, 4]]
    assert run.decode_tokens == 2


def test_strategies_take_turns_and_are_judged():
    model = tiny_model("llada")
    engines = {
        "diffusion": Engine(model, EngineConfig(max_batch_size=2)),
        "rival": Engine(tiny_model("qwen2"), EngineConfig(max_batch_size=2)),
    }
    entrants = [
        Entrant(name="pipelined", engine=engines["diffusion"], requests=make_requests()),
        Entrant(
            name="autoregressive",
            engine=engines["rival"],
            requests=make_requests("autoregressive"),
            is_right=lambda index, ids: index == 1 and len(ids) == 12,
        ),
    ]
    seen = []
    fast, slow = race_by_run(entrants, 2, num_runs=2, on_run=lambda name, run: seen.append(name))
    assert seen == ["pipelined", "autoregressive"] * 2
    assert (fast["score"], slow["score"]) == (None, pytest.approx(1 / 3))
    assert slow["tokens_per_forward"] == slow["mean_of_tokens_per_forward"] == 1
    speed = slow["tokens_per_second"]
    assert speed["lowest"] <= speed["median"] <= speed["highest"]
    assert fast["num_runs"] == 2
    assert fast["batch_size"] == 2
    assert fast["num_graphs_captured_in_runs"] == 0
    assert fast["warm_up_seconds"] > 0


def test_a_race_refuses_no_runs_and_requests_that_cannot_be():
    engine = imposed_engine((4,))
    entrant = Entrant(name="x", engine=engine, requests=make_requests("autoregressive"))
    with pytest.raises(ConfigError, match="num_runs is 0"):
        race_by_run([entrant], 1, num_runs=0)
    with pytest.raises(RequestError, match="not autoregressive"):
        race_by_run([entrant], 1)


def make_run(accepted, decode_seconds=0.5):
    return Run(
        answers=[
            Answer(
                index=index,
                token_ids=[1] * sum(counts),
                num_forwards=len(counts),
                num_query_tokens=0 if index else 40,
            )
            for index, counts in enumerate(accepted)
        ],
        seconds=2.0,
        decode_tokens=3,
        decode_seconds=decode_seconds,
        steps_ms=[1.0, 3.0, 2.0],
        num_preemptions=1,
        num_captured=0,
        accepted=accepted,
    )


def test_a_recorded_trace_by_hand():
    run = make_run([[3, 4, 0, 9], [5, 4, 1], [7], [2, 1]])
    # 17 / 4, 9 / 3, 1 / 2; only one of four goes on after that.
    assert acceptance_trace(run) == [4, 3, 1]
    engine = imposed_engine(tuple(acceptance_trace(run)))
    assert timed_run(engine, make_requests(count=1)).accepted == [[4, 3, 1, 1, 1, 1, 1]]


def test_a_summary_by_hand():
    runs = [make_run([[3, 4], [5]]), make_run([[3, 4], [5]], 1.0)]
    summary = summarise_runs(runs, lambda index, ids: len(ids) == 5)
    assert summary["tokens_per_second"] == {"median": 6, "lowest": 6, "highest": 6}
    assert summary["decode_tokens_per_second"] == {"median": 3, "lowest": 3, "highest": 6}
    assert summary["tokens_per_forward"] == 4
    assert summary["mean_of_tokens_per_forward"] == (3.5 + 5) / 2
    assert summary["query_tokens_per_forward"] == pytest.approx(40 / 3)
    assert summary["step_ms_p50"] == 2
    assert summary["step_ms_p99"] == 3
    assert summary["seconds_per_prompt"] == 1
    assert summary["score"] == 0.5


@pytest.mark.parametrize(
    ("ratios", "overtaken"),
    [([3, 2, 1.5], None), ([3, 0.9, 0.5], 4), ([3, 0.9, 1.1], None), ([0.5, 0.9, 0.4], 1)],
)
def test_where_autoregression_overtakes(ratios, overtaken):
    rows = []
    for batch_size, ratio in zip((1, 4, 16), ratios, strict=True):
        for name, speed in (("pipelined", ratio * 10), ("autoregressive", 10)):
            value = {"median": speed}
            rows.append(
                {
                    "name": name,
                    "batch_size": batch_size,
                    "tokens_per_second": value,
                    "decode_tokens_per_second": value,
                }
            )
    found = speed_ratios(rows)
    assert [line["end_to_end"] for line in found["by_batch_size"]] == pytest.approx(ratios)
    assert found["overtaken_at"] == {"end_to_end": overtaken, "decode_only": overtaken}


def test_bursts_finish_with_a_quarter_of_the_pages():
    model = tiny_model("Dream")
    requests = mixed_requests(10, 94, prompt_lengths=(4, 20), new_tokens=(8, 40))
    need = sum(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    per_token = model.spec.kv_bytes_per_token * 2
    config = EngineConfig(page_size=4, kv_cache_bytes=need * per_token // 4)
    result = run_bursts(Engine(model, config), requests, burst=4, steps_between=2)
    alone = [Engine(model).generate([request])[0].token_ids for request in requests]
    assert result.answers == alone
    summary = result.summary()
    assert summary["num_finished"] == 10
    assert summary["num_tokens"] == sum(r.max_new_tokens for r in requests)
    assert summary["step_ms_p50"] <= summary["step_ms_p99"] <= summary["step_ms_max"]
    with pytest.raises(ConfigError, match="a burst"):
        run_bursts(Engine(model), requests, burst=0)

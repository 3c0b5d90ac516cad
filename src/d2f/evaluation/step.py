"""Measure the cost of one decoding step against the best rates of the machine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from d2f.engine.clock import StepTime
from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.engine.steady import SteadyStep
from d2f.errors import ConfigError
from d2f.evaluation.metrics import percentile
from d2f.evaluation.rates import Rates

_SIZES = (
    "backend", "batch_size", "window", "kv_length", "max_positions", "weight_bytes", "kv_bytes",
    "product_flops", "attention_flops", "seconds_to_capture",
)  # fmt: skip

StepCost = dict[str, Any]
"""A row of `d2f bench step`; see `measure_step`."""


def measure_step(step: SteadyStep, rates: Rates, *, num_steps: int = 30) -> StepCost:
    """Run a step many times, after some runs that do not count.

    `milliseconds` is the median. `floor_ms` is the time to read the weights once, at the rate of a
    copy, and `floor_with_kv_ms` to read keys and values, too. `share_of_matmul_rate` is that of all
    products, attention's too, and `share_of_matmul_rate_weights` of those with weights alone.

    Raises:
        ConfigError: `num_steps` is below 1.

    Example:
        >>> from d2f.testing import tiny_model
        >>> step = SteadyStep(tiny_model("llada"), batch_size=1, window=8, kv_length=20)
        >>> rates = Rates(copy_bytes_per_second=1e9, matmul_flops_per_second=1e9, matmul_size=8)
        >>> measure_step(step, rates, num_steps=2)["floor_ms"] == step.weight_bytes / 1e6
        True
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}; it must be at least 1")
    # On a GPU as many, so that the host has the buffers that it reads results into.
    step.run(num_steps if step.on_gpu else 3)
    times = step.run(num_steps)
    median = percentile(times, 50)
    floor_ms = 1000 * step.weight_bytes / rates.copy_bytes_per_second
    possible = rates.matmul_flops_per_second * median / 1000
    return {
        "strategy": "autoregressive" if step.model.spec.architecture.causal else "pipelined",
        **{name: getattr(step, name) for name in _SIZES},
        "num_steps": num_steps,
        "milliseconds": median,
        "milliseconds_min": min(times),
        "milliseconds_max": max(times),
        "milliseconds_p99": percentile(times, 99),
        "floor_ms": floor_ms,
        "floor_with_kv_ms": floor_ms + 1000 * step.kv_bytes / rates.copy_bytes_per_second,
        "ratio_to_floor": median / floor_ms,
        "share_of_matmul_rate": (step.product_flops + step.attention_flops) / possible,
        "share_of_matmul_rate_weights": step.product_flops / possible,
        "query_tokens_per_second": 1000 * step.num_tokens / median,
    }


def step_ratio(rows: Sequence[StepCost]) -> list[dict[str, Any]]:
    """Divide each row's time by that of the autoregressive row of its batch and cached length."""

    def key(row: StepCost) -> tuple[int, int, int]:
        return row["batch_size"], row["kv_length"], row["max_positions"]

    alone = {key(row): row for row in rows if row["strategy"] == "autoregressive"}
    return [
        {name: row[name] for name in ("batch_size", "window", "kv_length")}
        | {"ratio": row["milliseconds"] / alone[key(row)]["milliseconds"]}
        for row in rows
        if row["strategy"] != "autoregressive" and key(row) in alone
    ]


def kv_ratio(rows: Sequence[StepCost], rates: Rates) -> list[dict[str, Any]]:
    """Divide the time that longer keys and values add by the time to read them once."""
    names = ("strategy", "batch_size", "window")
    groups: dict[tuple[Any, ...], list[StepCost]] = {}
    for row in rows:
        groups.setdefault((*(row[n] for n in names), row["max_positions"]), []).append(row)
    found = []
    for key, group in groups.items():
        short, long = (pick(group, key=lambda row: row["kv_length"]) for pick in (min, max))
        if short["kv_length"] == long["kv_length"]:
            continue
        added_ms = long["milliseconds"] - short["milliseconds"]
        read_ms = 1000 * (long["kv_bytes"] - short["kv_bytes"]) / rates.copy_bytes_per_second
        found.append(
            {
                **dict(zip(names, key, strict=False)),
                "kv_lengths": [short["kv_length"], long["kv_length"]],
                "added_ms": added_ms,
                "added_read_ms": read_ms,
                "ratio": added_ms / read_ms,
            }
        )
    return found


def measure_engine(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Run requests through an engine of its own, and see how long the device waits for the host.

    Between two decode-only steps nothing should happen. `idle_share` is the sum of these gaps /
    all time from the first to the last step of each series. The start of a step may itself be
    late, which the gaps do not show; `idle_share_at_most` counts as idle all that exceeds the
    fastest tenth of the steps of a shape.

    Args:
        engine: A fresh one: the first run's surplus over the later ones is its start-up time.
        requests: Their prompts should be long and their acceptance imposed, for many like steps.

    Raises:
        ConfigError: There are no two decode-only steps in a row.
    """
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        engine.generate(requests)
        seconds.append(time.perf_counter() - start)
        engine.forget_prompts()
    with engine.timed() as clock:
        start = time.perf_counter()
        engine.generate(requests)
        wall = time.perf_counter() - start
        steps = clock.times()
    return {
        "seconds_to_start": seconds[0] - seconds[1],
        "num_steps": len(steps),
        "num_prefill_steps": sum(step.shape.prefill for step in steps),
        "host_ms_per_step": 1000 * (wall - clock.seconds_waited) / len(steps),
        **idle_shares(steps),
    }


def idle_shares(steps: Sequence[StepTime]) -> dict[str, Any]:
    """Measure the gaps between decode-only steps, and the time of these steps from end to end.

    Raises:
        ConfigError: There are no two decode-only steps in a row.
    """
    pairs = [
        (one, other)
        for one, other in itertools.pairwise(steps)
        if not one.shape.prefill and not other.shape.prefill
    ]
    if not pairs:
        raise ConfigError("there are no two decode-only steps in a row; ask for more tokens")
    lengths: dict[Any, list[float]] = {}
    for _, step in pairs:
        lengths.setdefault(step.shape, []).append(step.end - step.begin)
    fastest = {shape: percentile(times, 10) for shape, times in lengths.items()}
    span = sum(other.end - one.end for one, other in pairs)
    gaps = [other.begin - one.end for one, other in pairs]
    periods = [1000 * (other.end - one.end) for one, other in pairs]
    return {
        "num_decode_only_steps": len(pairs),
        "idle_share": sum(gaps) / span,
        "idle_share_at_most": 1 - sum(fastest[step.shape] for _, step in pairs) / span,
        "gap_ms": percentile([1000 * gap for gap in gaps], 50),
        "step_ms_p50": percentile(periods, 50),
        "step_ms_p99": percentile(periods, 99),
    }

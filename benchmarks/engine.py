"""Measure the engine against its bars: steps at 8B, the race of strategies, bursts of requests.

    python benchmarks/engine.py --output benchmarks/reports/DATE-engine-GPU
    python benchmarks/engine.py --parts steps --shape dream-7b --output dream

The script writes a JSON file for each part and README.md with the verdicts. It is made for one GPU
with 80 GB, on which all parts take some minutes; --layers and other options make it small enough to
try on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bursts import mixed_requests, run_bursts

from d2f import Engine, EngineConfig, Request, load_model
from d2f.cli.bench_race import problem_field, race_report, shape_field
from d2f.cli.bench_step import engine_gaps, summarize
from d2f.cli.device import choose_device, fastest_dtype
from d2f.decoding import reference
from d2f.engine.steady import SteadyStep
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.rates import measure_rates
from d2f.evaluation.results import write_json
from d2f.evaluation.step import measure_step
from d2f.models.presets import autoregressive_twin, preset_spec, random_model
from d2f.models.transformer import Transformer
from d2f.shipped import shipped_model

LEAST_MARGIN = 1e-5
"""Answers must equal the oracle's if every comparison that it makes has a larger margin."""
LONG = 16384
# strategy, batch size, window, cached positions, whether the engine is built for 16k positions
STEPS = (
    ("autoregressive", 1, 1, 1024, False),
    ("pipelined", 1, 64, 1024, False),
    ("pipelined", 1, 1, 1024, False),
    ("pipelined", 1, 32, 1024, False),
    ("pipelined", 1, 128, 1024, False),
    ("pipelined", 1, 64, 1024, True),
    ("pipelined", 1, 64, LONG, True),
    ("autoregressive", 1, 1, 1024, True),
    ("autoregressive", 1, 1, LONG, True),
    ("pipelined", 4, 64, 1024, False),
    ("autoregressive", 16, 1, 1024, False),
    ("pipelined", 16, 64, 1024, False),
)
Verdict = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def verdict(
    measure: str, value: float | None, bar: float, aim: float, least: bool = False
) -> Verdict:
    """Return a row of the table of verdicts; `least`: larger values are better."""
    good = {"bar": False, "aim": False}
    if value is not None:
        good = {
            name: value >= limit if least else value <= limit
            for name, limit in (("bar", bar), ("aim", aim))
        }
    word = "not measured" if value is None else "missed"
    return {
        "measure": measure,
        "value": value,
        "bar": bar,
        "aim": aim,
        "sign": ">=" if least else "<=",
        "verdict": "aim met" if good["aim"] else "bar met" if good["bar"] else word,
    }


# ------------------------------------------------------------------------------------------ steps


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    model = build(options)
    twin = autoregressive_twin(model)
    gaps = {
        "pipelined": engine_gaps(model, [1, 64, options.kv], 192, 16, options.backend),
        "autoregressive": engine_gaps(twin, [1, 1, options.kv], 192, 16, options.backend),
    }
    rates = measure_rates(options.device, options.dtype)
    rows = []
    for strategy, batch, window, length, long in STEPS:
        length = options.kv if length == 1024 else options.long_kv
        step = SteadyStep(
            model if strategy == "pipelined" else twin,
            batch_size=batch,
            window=window,
            kv_length=length,
            backend=options.backend,
            max_positions=options.long_kv + 64 if long else None,
        )
        row = measure_step(step, rates, num_steps=options.steps)
        rows.append(row)
        say(
            f"{strategy:15} batch {batch:3} window {window:3} cached {length:6}: "
            f"{row['milliseconds']:.3f} ms, {row['ratio_to_floor']:.3f} x floor, "
            f"{row['share_of_matmul_rate']:.1%} of matmul"
        )
        del step
        free_memory()
    report = {
        "model": options.shape,
        "num_layers": model.spec.num_layers,
        "engine": gaps,
        **{k: v for k, v in summarize(rates, rows, None).items() if k != "engine"},
    }
    report["verdicts"] = step_verdicts(report, options.kv)
    return report


def step_verdicts(report: dict[str, Any], kv: int) -> list[Verdict]:
    def row(strategy: str, batch: int, window: int) -> dict[str, Any]:
        wanted = (strategy, batch, window, kv)
        return next(
            r
            for r in report["steps"]
            if (r["strategy"], r["batch_size"], r["window"], r["kv_length"]) == wanted
        )

    one, alone = row("pipelined", 1, 64), row("autoregressive", 1, 1)
    full = row("pipelined", 16, 64)
    ratio = one["milliseconds"] / alone["milliseconds"]
    [added] = (
        r for r in report["added_time_over_reading_added_kv"] if r["strategy"] == "pipelined"
    )
    name = f"{report['model']}, {report['num_layers']} layers"
    idle = max(gaps["idle_share"] for gaps in report["engine"].values())
    start = max(gaps["seconds_to_start"] for gaps in report["engine"].values())
    return [
        verdict(
            f"{name}, batch 1, window 64, KV {kv}: step / floor", one["ratio_to_floor"], 1.35, 1.25
        ),
        verdict("the same step / autoregressive step", ratio, 1.2, 1.1),
        verdict("autoregressive step / floor", alone["ratio_to_floor"], 1.25, 1.18),
        verdict(
            "batch 16, window 64: share of the matmul rate",
            full["share_of_matmul_rate"], 0.6, 0.75, least=True,
        ),
        verdict("GPU idle between decode-only steps", idle, 0.03, 0.01),
        verdict(
            f"KV {kv} -> {added['kv_lengths'][1]}: added time / reading the added KV",
            added["ratio"], 1.5, 1.25,
        ),
        verdict("start-up, load excluded, in seconds", start, 60, 60),
    ]  # fmt: skip


def build(options: argparse.Namespace) -> Transformer:
    start = time.perf_counter()
    spec = preset_spec(options.shape, num_layers=options.layers)
    model = random_model(spec, device=options.device, dtype=options.dtype)
    say(f"{options.shape}: random weights in {time.perf_counter() - start:.1f} s")
    return model


# ------------------------------------------------------------------------------------------- race


def measure_race(options: argparse.Namespace) -> dict[str, Any]:
    batches = options.batches
    pair = (str(shipped_model("student")), str(shipped_model("autoregressive")))
    entered = problem_field(
        pair, None, max(options.prompts, *batches), options.device, options.dtype, 2026
    )
    report = race_report(entered, batches, options.prompts, options.runs, 16, options.backend)
    ratios = report["pipelined_over_autoregressive"]["by_batch_size"]
    single = next((line["decode_only"] for line in ratios if line["batch_size"] == 1), None)
    report["verdicts"] = [
        verdict(
            "shipped model, batch 1, decode only: pipelined / autoregressive", single, 3, 5,
            least=True,
        )
    ]  # fmt: skip
    return report


def measure_imposed(options: argparse.Namespace) -> dict[str, Any]:
    most = max(4, *options.batches)
    entered = shape_field(build(options), options.shape, (64, 128), (options.accept,), most, 2026)
    return race_report(entered, options.batches, 4, options.runs, 16, options.backend)


# ----------------------------------------------------------------------------------------- bursts


def measure_bursts(options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"prompts": "random", "pages": "a quarter of what all need"}
    oracle: list[list[int]] = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(shipped_model(), device=options.device, dtype=dtype)
        requests = mixed_requests(options.requests, model.spec.vocab_size)
        per_token = model.spec.kv_bytes_per_token // 2 * model.dtype.itemsize
        needs = [len(r.prompt_ids) + r.max_new_tokens for r in requests]
        config = EngineConfig(
            max_batch_size=options.requests,
            # But at least as many pages as one request needs.
            kv_cache_bytes=max(sum(needs) // 4, max(needs) + 16) * per_token,
            backend=options.backend,
        )
        engine = Engine(model, config)
        # In the second run all graphs have been captured.
        run_bursts(engine, requests, burst=options.burst)
        engine.forget_prompts()
        result = run_bursts(engine, requests, burst=options.burst)
        engine.close()
        if dtype == "float32":
            oracle = ask_oracle(model, requests[: options.oracle])
        different = [
            index for index, answer in enumerate(oracle) if answer != result.answers[index]
        ]
        report[dtype] = result.summary() | {
            "num_compared": len(oracle),
            "share_equal_to_fp32_oracle": 1 - len(different) / max(len(oracle), 1),
        }
        if dtype == "float32":
            margins = [oracle_margin(model, requests[index]) for index in different]
            excused = sum(margin <= LEAST_MARGIN for margin in margins)
            report[dtype] |= {"num_different": len(different), "num_within_margin": excused}
        say(f"bursts in {dtype}: {report[dtype]}")
    exact = report["float32"]
    failed = sum(r["num_requests"] - r["num_finished"] for r in (exact, report["bfloat16"]))
    wrong = exact["num_different"] - exact["num_within_margin"]
    report["verdicts"] = [
        verdict(f"{options.requests} requests in bursts: how many do not finish", failed, 0, 0),
        verdict("… in fp32, not the oracle's ids though its margin is over 1e-5", wrong, 0, 0),
        verdict(
            "… share within the margin",
            exact["num_within_margin"] / max(len(oracle), 1), 0.01, 0.01,
        ),
    ]  # fmt: skip
    return report


def ask_oracle(model: Transformer, requests: list[Request]) -> list[list[int]]:
    torch.set_float32_matmul_precision("highest")
    start = time.perf_counter()
    results = Engine(model).generate([replace(r, strategy="reference") for r in requests])
    say(f"the oracle: {len(results)} answers in {time.perf_counter() - start:.1f} s")
    return [result.token_ids for result in results]


def oracle_margin(model: Transformer, request: Request) -> float:
    """Return the oracle's smallest margin: to a threshold, or between the two best tokens."""
    policy = model.spec.recommended_policy
    assert policy is not None
    least, choose = [1.0], reference.choose_tokens

    def watched(logits_MV: torch.Tensor, **settings: Any) -> Any:
        choice = choose(logits_MV, **settings)
        top_M2 = logits_MV.softmax(-1).topk(2).values
        least.append(float((top_M2[:, 0] - top_M2[:, 1]).min()))
        least.append(float((choice.probability_M - policy.confidence_threshold).abs().min()))
        return choice

    reference.choose_tokens = watched
    try:
        Engine(model).generate([replace(request, strategy="reference")])
    finally:
        reference.choose_tokens = choose
    return min(least)


# ----------------------------------------------------------------------------------------- report

PARTS = {
    "steps": measure_steps,
    "race": measure_race,
    "imposed": measure_imposed,
    "bursts": measure_bursts,
}


def write_readme(to: Path) -> None:
    """Write the report of all parts in the folder, of this run and earlier ones."""
    files = {name: to / f"{name}.json" for name in PARTS}
    reports = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
    environment = next(iter(reports.values()))["environment"]
    made = dict.fromkeys(
        f"`python benchmarks/engine.py {r['arguments']}`" for r in reports.values()
    )
    lines = [
        f"# The engine on {environment['processor']}, {environment['time'][:10]}",
        "",
        f"{environment['dtype']}, torch {environment.get('torch', torch.__version__)}; made by "
        f"{' and '.join(made)}. All numbers are in the JSON files.",
        "",
        "| measure | value | bar | aim | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for report in reports.values():
        for v in report.get("verdicts", ()):
            value = "–" if v["value"] is None else f"{v['value']:.3f}"
            bar = f"{v['sign']} {v['bar']}"
            lines.append(f"| {v['measure']} | {value} | {bar} | {v['aim']} | {v['verdict']} |")
    if "steps" in reports:
        lines += ["", *steps_section(reports["steps"])]
    for name, title in (
        ("race", "Shipped models on word problems"),
        ("imposed", "Random weights, acceptance imposed"),
    ):
        if name in reports:
            lines += ["", *race_section(title, reports[name])]
    if "bursts" in reports:
        lines += ["", "## Bursts", "", "| | float32 | bfloat16 |", "| --- | --- | --- |"]
        both = [reports["bursts"][dtype] for dtype in ("float32", "bfloat16")]
        # An empty list of errors is left out: the number of finished requests tells the same.
        for key in (key for key in both[0] if both[0][key] != []):
            values = [r.get(key, "–") for r in both]
            shown = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in values]
            lines.append(f"| {key.replace('_', ' ')} | {shown[0]} | {shown[1]} |")
    (to / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def steps_section(report: dict[str, Any]) -> list[str]:
    rates = report["rates"]
    lines = [
        "## Steps",
        "",
        f"{report['model']}, {report['num_layers']} layers, random weights. Copy "
        f"{rates['copy_bytes_per_second'] / 1e9:.0f} GB/s (read + written), matmul "
        f"{rates['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s.",
        "",
        "| strategy | batch | window | cached | longest | ms | min | max | GB weights | GB KV "
        "| x floor | of matmul | weights only |",
        "| --- |" + " --- |" * 12,
    ]
    for r in report["steps"]:
        lines.append(
            f"| {r['strategy']} | {r['batch_size']} | {r['window']} | {r['kv_length']} "
            f"| {r['max_positions']} | {r['milliseconds']:.3f} | {r['milliseconds_min']:.3f} "
            f"| {r['milliseconds_max']:.3f} | {r['weight_bytes'] / 1e9:.2f} "
            f"| {r['kv_bytes'] / 1e9:.2f} | {r['ratio_to_floor']:.3f} "
            f"| {r['share_of_matmul_rate']:.1%} | {r['share_of_matmul_rate_weights']:.1%} |"
        )
    for name, gaps in report["engine"].items():
        lines += [
            "",
            f"Engine, {name}: idle {gaps['idle_share']:.2%} (at most "
            f"{gaps['idle_share_at_most']:.2%}) over {gaps['num_decode_only_steps']} steps, median "
            f"gap {gaps['gap_ms']:.3f} ms, step p50 {gaps['step_ms_p50']:.2f} ms, p99 "
            f"{gaps['step_ms_p99']:.2f} ms, host {gaps['host_ms_per_step']:.2f} ms per step, "
            f"start-up {gaps['seconds_to_start']:.1f} s.",
        ]
    return lines


def race_section(title: str, report: dict[str, Any]) -> list[str]:
    imposed = report["settings"]["imposed_acceptance"]
    lines = [
        f"## {title}",
        "",
        *([f"Imposed: {', '.join(map(str, imposed))} tokens per forward.", ""] if imposed else []),
        "| batch | strategy | tokens/s end to end (lowest-highest) | decode only | tokens/forward "
        "| query tokens/forward | ms/step | p99 | preemptions | score |",
        "| --- |" + " --- |" * 9,
    ]
    for r in report["rows"]:
        whole, decode = r["tokens_per_second"], r["decode_tokens_per_second"]
        lines.append(
            f"| {r['batch_size']} | {r['name']} | {whole['median']:.0f} "
            f"({whole['lowest']:.0f}-{whole['highest']:.0f}) "
            f"| {decode['median'] if decode else float('nan'):.0f} | {r['tokens_per_forward']:.2f} "
            f"| {r['query_tokens_per_forward']:.0f} | {r['milliseconds_per_step']:.2f} "
            f"| {r['step_ms_p99']:.2f} | {r['num_preemptions']} "
            f"| {'–' if r['score'] is None else format(r['score'], '.1%')} |"
        )
    ratios = report["pipelined_over_autoregressive"]
    lines.append("")
    for line in ratios["by_batch_size"]:
        lines.append(
            f"- batch {line['batch_size']}: pipelined / autoregressive {line['end_to_end']:.2f} "
            f"end to end, {line['decode_only'] or float('nan'):.2f} decode only"
        )
    for measure, batch_size in ratios["overtaken_at"].items():
        where = "at none of these" if batch_size is None else f"from batch {batch_size} on"
        lines.append(f"- autoregression is faster, {measure.replace('_', ' ')}: {where}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the report")
    parser.add_argument(
        "--parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)}; none: report only"
    )
    parser.add_argument("--shape", default="llada-8b", help="of steps and imposed")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--kv", type=int, default=1024, help="cached positions of a step")
    parser.add_argument("--long-kv", type=int, default=LONG, help="... of the longest")
    parser.add_argument("--steps", type=int, default=30, help="measured runs of each step")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256])
    parser.add_argument("--prompts", type=int, default=100, help="of the race, at least the batch")
    parser.add_argument("--runs", type=int, default=3, help="of each strategy in a race")
    parser.add_argument("--accept", type=int, default=4, help="imposed tokens per forward")
    parser.add_argument("--requests", type=int, default=256, help="of the bursts")
    parser.add_argument("--burst", type=int, default=32, help="requests that arrive at once")
    parser.add_argument("--oracle", type=int, default=256, help="requests asked of the oracle")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, the faster on a CPU")
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"--parts {name}: choose from {', '.join(PARTS)}")
    options.device = choose_device(options.device)
    options.dtype = options.dtype or fastest_dtype(options.device)
    options.output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(device=options.device, dtype=options.dtype)
    # The command in the report leaves the output folder out.
    without = {"--output", str(options.output), f"--output={options.output}"}
    arguments = " ".join(word for word in sys.argv[1:] if word not in without)
    for name in options.parts:
        start = time.perf_counter()
        report = PARTS[name](options)
        free_memory()
        seconds = time.perf_counter() - start
        say(f"{name}: {seconds:.0f} s")
        report |= {"environment": environment, "arguments": arguments, "seconds": seconds}
        write_json(options.output / f"{name}.json", report)
        # Written after each part, so that an interrupted run leaves a report.
        write_readme(options.output)
    write_readme(options.output)
    print((options.output / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

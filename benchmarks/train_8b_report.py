"""Write README.md and train.png from the measurements of `train_8b.py`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2f.training.trainer import PHASES

Results = dict[str, dict[str, Any]]
COLORS = ("#999999", "#4c78a8", "#f58518", "#e45756", "#72b7b2", "#54a24b")
TRAININGS = (
    "llada_1", "llada_4", "llada_max", "dream_1", "dream_4", "dream_max",
    "two_one", "two_ddp", "two_fsdp", "full",
)  # fmt: skip
FALLEN = 0.5
"""Share of its first value below which the loss on the repeated batch counts as fallen."""


def write_report(folder: Path) -> None:
    """Write README.md and, if matplotlib is installed, train.png from all results in a folder."""
    results: Results = {}
    for file in sorted(folder.glob("*.json")):
        results[file.stem] = json.loads(file.read_text())
    if not results:
        return
    lines = [*head(results), *verdicts(results), *costs(results), *phases(results)]
    lines += [*largest(results), *repeats(results), *parity(results), *small(results)]
    if draw(results, folder / "train.png"):
        lines += ["", "![Time of the phases, and memory](train.png)"]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(results: Results) -> Iterator[str]:
    found = [r["environment"] for r in results.values() if "environment" in r]
    places = sorted({f"{e['processor']}, {e['dtype']}, torch {e['torch']}" for e in found})
    dates = sorted({e["time"][:10] for e in found})
    span = " to ".join(dict.fromkeys((*dates[:1], *dates[-1:])))
    yield f"# Training on {'; '.join(places)}, {span}"
    yield ""
    yield "Made by `benchmarks/train_8b.py`; docs/measuring.md says what is counted, the JSON files"
    yield "have all numbers. Shapes have random weights and tokens: speed and memory are those of"
    yield "the real models, what they learn means nothing. The rows two_* are of one run."


# --------------------------------------------------------------------------------------- verdicts


def verdicts(results: Results) -> Iterator[str]:
    yield ""
    yield "| measure | value | bar | aim | |"
    yield "| --- | --- | --- | --- | --- |"
    for short in ("llada", "dream"):
        bars = (1, 4) if short == "llada" else (None, None)
        for recomputes, bar in zip((False, True), bars, strict=True):
            how = "with" if recomputes else "without"
            found = largest_of(results, short, recomputes)
            yield row(f"{short}: largest micro-batch {how} checkpointing", found, bar, None, "d")
        best = max(
            (share for r in rows_of(results, short) if (share := r["utilisation"]["nominal"])),
            default=None,
        )
        yield row(f"{short}: model FLOPs utilisation, best row", best, 0.35, 0.5, ".1%")
        peaks = [
            r["loss_peak_bytes"] / 1e9
            for r in rows_of(results, short)
            if r["micro_batch"] == 4 and r["loss_peak_bytes"] is not None
        ]
        peak = max(peaks, default=None)
        name = f"{short}: memory of the loss over its inputs at micro-batch 4, GB"
        yield row(name, peak, 2.0, 0.5, ".2f", most=True)
        repeat = (results.get(f"{short}_1") or {}).get("repeat")
        fallen = None if not repeat else repeat["losses"][-1] / repeat["losses"][0]
        steps = repeat["num_steps"] if repeat else 100
        name = f"{short}: loss on one batch after {steps} steps / before, no NaN"
        yield row(name, fallen, FALLEN, None, ".3g", most=True)
    for name in ("two_ddp", "two_fsdp"):
        one, two = speeds(results, "two_one"), speeds(results, name)
        for size in sorted(one.keys() & two.keys()) or [None]:
            ratio = None if size is None else two[size] / one[size]
            of = "" if size is None else f", micro-batch {size}"
            yield row(f"{name}: tokens/s of two GPUs / of one{of}", ratio, 1.8, 1.95, ".2f")
    full = best_row(results, "full")
    memory = full["peak_bytes"] / 2**30 if full and full["peak_bytes"] else None
    yield row("full fine-tuning on two GPUs: GiB of each", memory, None, None, ".1f")
    gap = score_gap(results)
    shown = None if gap is None else f"{gap[0]:+.2%} ± {1.96 * gap[1]:.2%}"
    good = gap is not None and gap[0] + 1.96 * gap[1] >= 0
    word = "not measured" if gap is None else "bar met" if good else "missed"
    yield f"| small model: score - that of the shipped one | {shown or '–'} | interval | | {word} |"


def row(
    name: str,
    value: float | None,
    bar: float | None,
    aim: float | None,
    form: str,
    most: bool = False,
) -> str:
    """Return a row of the table; `most`: smaller values are better."""

    def meets(limit: float | None) -> bool:
        return limit is not None and (value <= limit if most else value >= limit)

    sign = "<=" if most else ">="
    shown = [f"{sign} {limit:{form}}" if limit is not None else "" for limit in (bar, aim)]
    if value is None:
        word = "not measured"
    elif bar is None:
        word = "reported"
    else:
        word = "aim met" if meets(aim) else "bar met" if meets(bar) else "missed"
    return line([name, "–" if value is None else f"{value:{form}}", *shown, word])


def rows_of(results: Results, short: str) -> Iterator[dict[str, Any]]:
    for name in (f"{short}_1", f"{short}_4", f"{short}_max"):
        yield from (r for r in results.get(name, {}).get("rows", []) if r["fits"])


def best_row(results: Results, name: str) -> dict[str, Any] | None:
    rows = [r for r in results.get(name, {}).get("rows", []) if r["fits"]]
    return max(rows, key=lambda r: r["tokens_per_second"], default=None)


def speeds(results: Results, name: str) -> dict[int, float]:
    """Return tokens per second by micro-batch."""
    rows = results.get(name, {}).get("rows", [])
    return {r["micro_batch"]: r["tokens_per_second"] for r in rows if r["fits"]}


def largest_of(results: Results, short: str, recomputes: bool) -> int | None:
    """Return the largest micro-batch that the search found, or else the largest measured."""
    found = [*results.get(f"{short}_max", {}).get("largest_micro_batch", [])]
    found += rows_of(results, short)
    sizes = (r["micro_batch"] for r in found if r["checkpointing"] == recomputes)
    return max(sizes, default=None)


def score_gap(results: Results) -> tuple[float, float] | None:
    """Return the difference of both scores on the same problems, and its standard error."""
    if not {"small_score", "small_shipped"} <= results.keys():
        return None
    new, old = (
        [int(c) for c in results[name]["rows"][0]["correct"]]
        for name in ("small_score", "small_shipped")
    )
    gaps = [a - b for a, b in zip(new, old, strict=True)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / max(len(gaps) - 1, 1)
    return mean, math.sqrt(variance / len(gaps))


# ----------------------------------------------------------------------------------------- tables


def trainings(results: Results) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return name, report and row of all measured steps."""
    for name in TRAININGS:
        for found in results.get(name, {}).get("rows", []):
            yield name, results[name], found


def costs(results: Results) -> Iterator[str]:
    columns = (
        "measure", "model", "GPUs", "compiled", "micro-batch", "recomputes", "ms", "tokens/s",
        "TFLOP", "of peak", "of peak, all pairs", "of matmul", "peak GiB", "loss GiB",
    )  # fmt: skip
    yield from title("Steps", columns)
    for name, report, found in trainings(results):
        settings = report["settings"]
        start = [
            name,
            f"{report['model']['name'].rsplit('/', 1)[-1]}, "
            + (f"LoRA r={settings['lora']}" if settings["lora"] else "all weights"),
            f"{settings['processes']}",
            "yes" if is_compiled(report) else "no",
            f"{found['micro_batch']}",
            "yes" if found["checkpointing"] else "no",
        ]
        if not found["fits"]:
            yield line([*start, "out of memory", *[""] * 7])
            continue
        share = found["utilisation"]
        yield line(
            [
                *start,
                f"{found['milliseconds']:.1f}",
                f"{found['tokens_per_second']:.0f}",
                f"{found['flops']['total'] / 1e12:.4g}",
                percent(share["nominal"]),
                percent(share["nominal_all_pairs"]),
                percent(share["measured"]),
                ", ".join(map(gib, found["peak_bytes_of_each"])),
                gib(found["loss_peak_bytes"]),
            ]
        )


def is_compiled(report: dict[str, Any]) -> bool:
    """Return whether the models were compiled, as they are on a GPU only."""
    return report["settings"]["compiled"] and report["environment"]["device"].startswith("cuda")


def phases(results: Results) -> Iterator[str]:
    yield from title(
        "Where the time goes, in ms", ("measure", "micro-batch", "recomputes", *PHASES)
    )
    for name, _, found in trainings(results):
        if found["fits"]:
            yield line(
                [
                    name,
                    f"{found['micro_batch']}",
                    "yes" if found["checkpointing"] else "no",
                    *(f"{found['phases_ms'][phase]:.1f}" for phase in PHASES),
                ]
            )


def largest(results: Results) -> Iterator[str]:
    names = [name for name in ("llada_max", "dream_max") if name in results]
    if names:
        yield from title(
            "Largest micro-batch", ("measure", "recomputes", "micro-batch", "GiB for tensors")
        )
    for name in names:
        for found in results[name]["largest_micro_batch"]:
            yield line(
                [
                    name,
                    "yes" if found["checkpointing"] else "no",
                    f"{found['micro_batch']}{' or more' * found['at_least']}",
                    f"{results[name]['memory_limit_gib']:g}",
                ]
            )


def repeats(results: Results) -> Iterator[str]:
    found = [(n, r["repeat"]) for n, r in results.items() if r.get("repeat")]
    if found:
        yield from title("One batch again and again", ("measure", "lr", "loss at step", "floor"))
    for name, repeat in found:
        losses = ", ".join(f"{step}: {loss:.4g}" for step, loss in repeat["loss_at"].items())
        yield line([name, f"{repeat['lr']:g}", losses, f"{repeat['floor']:.3g}"])


def parity(results: Results) -> Iterator[str]:
    if "parity" not in results:
        return
    yield from title(
        "Fast paths against plain ones", ("what", "of", "fast - fp32", "plain - fp32", "")
    )
    for found in results["parity"]["rows"]:
        errors = [f"{found[key]:.2e}" if key in found else "" for key in ("fast", "plain")]
        if "difference" in found:
            errors = [f"{found['difference']:.2e} from each other", ""]
        yield line([found["name"], found["of"], *errors, "ok" if found["ok"] else "TOO FAR"])


def small(results: Results) -> Iterator[str]:
    names = [name for name in ("small_score", "small_shipped") if name in results]
    if names:
        yield from title(
            "The shipped student's recipe with the loss in chunks",
            ("model", "strategy", "score", "standard error", "tokens per forward", "problems"),
        )
    for name in names:
        for found in results[name]["rows"]:
            yield line(
                [
                    name,
                    found["name"],
                    f"{found['score']:.2%}",
                    f"{found['score_standard_error']:.2%}",
                    f"{found['tokens_per_forward']:.2f}",
                    f"{results[name]['num_problems']}",
                ]
            )


def title(text: str, columns: tuple[str, ...]) -> Iterator[str]:
    yield from ("", f"## {text}", "", line(columns), line(["---"] * len(columns)))


def line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def gib(num_bytes: int | None) -> str:
    return "–" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


# ------------------------------------------------------------------------------------------ figure


def draw(results: Results, file: Path) -> bool:
    """Draw bars of phases per token and of memory; False without matplotlib or results."""
    found = [(n, report, r) for n, report, r in trainings(results) if r["fits"]]
    if not found:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no train.png without matplotlib", file=sys.stderr)
        return False
    figure = Figure(figsize=(12, 0.45 * len(found) + 1.8), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    names = [
        f"{name}: micro-batch {r['micro_batch']}{', recomputing' * r['checkpointing']}"
        for name, _, r in found
    ]
    places = range(len(found))
    left = [0.0] * len(found)
    for phase, color in zip(PHASES, COLORS, strict=True):
        tokens = [r["micro_batch"] * report["settings"]["length"] for _, report, r in found]
        widths = [
            1e3 * r["phases_ms"][phase] / n for (_, _, r), n in zip(found, tokens, strict=True)
        ]
        time_axis.barh(places, widths, left=left, color=color, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    time_axis.set_yticks(places, names)
    time_axis.invert_yaxis()
    time_axis.set_xlabel("microseconds per token of a process")
    time_axis.legend(ncols=len(PHASES), loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    memory = [(r["peak_bytes"] or 0) / 2**30 for _, _, r in found]
    bars = memory_axis.barh(places, memory, color=COLORS[1])
    memory_axis.bar_label(bars, [f"{m:.1f}" if m else "–" for m in memory], padding=3)
    memory_axis.set_xlim(0, 1.2 * max(*memory, 1.0))
    memory_axis.set_xlabel("peak memory of a GPU, GiB")
    for axis in (time_axis, memory_axis):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    return True

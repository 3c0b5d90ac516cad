"""Result files of an evaluation that never ran: every number is made up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2f.evaluation.report.reading import load_results
from d2f.evaluation.report.rows import Comparison

TOKENS = 50
"""Of every made-up answer."""


def fake_summary(
    row: str,
    *,
    experiment: str = "methods",
    method: str | None = None,
    speed: float | Sequence[float] | None = 100.0,
    score: float | str | None = 0.9,
    tokens_per_forward: float = 1.0,
    query_tokens_per_forward: float = 1.0,
    batch_size: int = 1,
    num_problems: int = 1000,
    **changes: Any,
) -> dict[str, Any]:
    """A `summary.json` that fits together.

    Args:
        row: Name of the row.
        experiment: It belongs to.
        method: None: the row's name.
        speed: Tokens/s, or their median, lowest and highest; None: not measured.
        score: Share of right answers, or their digits; None: not measured.
        tokens_per_forward: Both kinds.
        query_tokens_per_forward: Computed, not answered.
        batch_size: Of the speed.
        num_problems: Scored.
        **changes: Further entries of the summary.

    Example:
        >>> fake_summary("serial", speed=50.0)["speed"]["seconds_per_problem"]["median"]
        1.0
    """
    counts = {
        "tokens_per_forward": tokens_per_forward,
        "mean_of_tokens_per_forward": tokens_per_forward,
        "query_tokens_per_forward": query_tokens_per_forward,
        "mean_tokens": TOKENS,
        "computed_per_answered": query_tokens_per_forward / tokens_per_forward,
    }
    summary: dict[str, Any] = {
        "format": 1,
        "row": row,
        "method": method or row,
        "label": method or row,
        "experiment": experiment,
        "family": "fake family",
        "test_set": "fake problems",
        "task": "word-problems",
        "labels": {},
        "simulated": None,
        "model": {"name": "fake", "adapter": None, "num_parameters": 1, "sha256": "0"},
        "strategy": method or row,
        "policy": None,
        "options": {},
        "max_new_tokens": 64,
        "num_fewshot": None,
        "grid": None,
        "environment": {
            "processor": "fake processor",
            "dtype": "float32",
            "torch": "0.0",
            "git_commit": "0123456789abcdef",
            "git_dirty": False,
            "time": "2000-01-01T00:00:00+00:00",
        },
        "recipe": {"seed": 0, "split": "test"},
        "recipe_file": "fake.toml",
        "score": None if score is None else _score(score, num_problems) | counts,
        "speed": None if speed is None else _speed(speed, tokens_per_forward, batch_size) | counts,
    }
    return summary | changes


def write_row(folder: Path, summary: dict[str, Any], *, problems: bool = True) -> Path:
    """Write a row's folder, with a file of problems whose ids are their numbers.

    Returns:
        The row's folder.
    """
    path = folder / str(summary["row"])
    path.mkdir(parents=True, exist_ok=True)
    (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if problems and summary["score"] is not None:
        digits = summary["score"]["correct"]
        lines = [
            json.dumps({"index": index, "id": str(index), "correct": digit == "1"})
            for index, digit in enumerate(digits)
        ]
        (path / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_results(folder: Path, **changes: Any) -> Path:
    """Rows of every experiment, in a folder for each.

    Args:
        folder: Where they go.
        **changes: Entries of all summaries.

    Returns:
        The folder.

    Example:
        `write_results(tmp_path, family="another family")`
    """
    for summary in _all_rows():
        write_row(folder / str(summary["experiment"]), summary | changes)
    return folder


def _all_rows() -> list[dict[str, Any]]:
    """Speeds and scores about as the paper's claims want them."""
    methods = (
        # row, tokens/s, score, tokens per forward, query tokens per forward
        ("autoregressive", 300, 0.945, 1.0, 1.0),
        ("vanilla", 80, 0.95, 0.8, 64.0),
        ("vanilla-eos-stop", 95, 0.95, 1.0, 64.0),
        ("vanilla-512", 14, 0.95, 0.1, 512.0),
        ("dllm-cache", 110, 0.948, 0.8, 16.0),
        ("fast-dllm-parallel", 240, 0.946, 4.0, 64.0),
        ("fast-dllm-prefix", 310, 0.945, 4.0, 48.0),
        ("fast-dllm-dual", 330, 0.94, 3.8, 16.0),
        ("undistilled", 250, 0.45, 3.0, 20.0),
        ("serial", 420, 0.951, 2.1, 16.0),
        ("pipelined", 1000, 0.949, 6.2, 24.0),
    )
    rows = [
        fake_summary(
            name, speed=speed, score=score, tokens_per_forward=rho, query_tokens_per_forward=query
        )
        for name, speed, score, rho, query in methods
    ]
    for conf, speed, score in ((0.95, 950, 0.95), (0.9, 1050, 0.94), (0.85, 1200, 0.91)):
        for add, gain in ((0.1, 1.0), (0.5, 1.02), (0.7, 1.03), (conf, 0.99)):
            labels = {"add_threshold": add, "activate_threshold": conf}
            rows.append(
                fake_summary(
                    f"thresholds-{conf}-{add}",
                    experiment="thresholds",
                    method="pipelined",
                    speed=speed * gain,
                    score=score - 0.01 * (add > 0.1),
                    tokens_per_forward=speed * gain / 160,
                    labels=labels | {"confidence_threshold": conf},
                )
            )
    rows += [
        fake_summary(
            f"steps-{steps}",
            experiment="steps",
            method="vanilla",
            speed=80 * 64 / steps,
            score=score,
            tokens_per_forward=0.8 * 64 / steps,
            labels={"num_steps": steps},
        )
        for steps, score in ((32, 0.8), (16, 0.5), (8, 0.1))
    ]
    return rows + _noise_rows() + _other_rows()


def _noise_rows() -> list[dict[str, Any]]:
    schedules = (("monotone", 1000, 0.94), ("random", 880, 0.92), ("ends-masked", 1020, 0.94))
    return [
        fake_summary(
            f"noise-{schedule}-{activate}-{seed}",
            experiment="noise",
            method="pipelined",
            speed=speed + 10 * seed - 200 * activate,
            score=score + 0.002 * seed,
            tokens_per_forward=speed / 160,
            labels={
                "schedule": schedule,
                "activate_threshold": activate,
                "confidence_threshold": 0.9,
                "seed": seed,
            },
        )
        for schedule, speed, score in schedules
        for activate in (0.95, 0.9, 0.85)
        for seed in (1, 2, 3)
    ]


def _other_rows() -> list[dict[str, Any]]:
    rows = [fake_summary("control", experiment="control", speed=78, tokens_per_forward=0.8)]
    rows += [
        fake_summary(
            f"block-{size}",
            experiment="block-size",
            method="pipelined",
            speed=speed,
            score=score,
            tokens_per_forward=speed / 160,
            labels={"block_size": size},
        )
        for size, speed, score in (
            (8, 700, 0.96),
            (16, 1000, 0.95),
            (32, 1100, 0.9),
            (64, 900, 0.8),
        )
    ]
    rows += [
        fake_summary(
            f"{method}-{size}",
            experiment="batch",
            method=method,
            speed=speed * size**power,
            score=None,
            batch_size=size,
            labels={"batch_size": size},
        )
        for method, speed, power in (
            ("autoregressive", 300, 0.9), ("serial", 420, 0.65), ("pipelined", 1000, 0.6)
        )
        for size in (1, 4, 16, 64, 256)
    ]  # fmt: skip
    return rows


def _score(score: float | str, num_problems: int) -> dict[str, Any]:
    if isinstance(score, str):
        digits = score
    else:
        # Some problems are harder than others, for whoever answers them.
        hardest = random.Random(0).sample(range(num_problems), num_problems)
        wrong = set(hardest[: round((1 - score) * num_problems)])
        digits = "".join("0" if index in wrong else "1" for index in range(num_problems))
    share = digits.count("1") / len(digits)
    return {
        "num_problems": len(digits),
        "num_correct": digits.count("1"),
        "score": share,
        "standard_error": (share * (1 - share) / len(digits)) ** 0.5,
        "batch_size": 64,
        "num_errors": 0,
        "seconds_per_problem": 0.01,
        "tokens_per_second": 5000.0,
        "correct": digits,
        "metrics": {},
    }


def _speed(speed: float | Sequence[float], rho: float, batch_size: int) -> dict[str, Any]:
    ends = (speed, 0.98 * speed, 1.03 * speed) if isinstance(speed, int | float) else speed
    median, lowest, highest = ends
    return {
        "num_problems": 100,
        "num_runs": 3,
        "batch_size": batch_size,
        "tokens_per_second": {"median": median, "lowest": lowest, "highest": highest},
        "decode_tokens_per_second": None,
        "seconds_per_problem": {
            "median": TOKENS / median,
            "lowest": TOKENS / highest,
            "highest": TOKENS / lowest,
        },
        "milliseconds_per_forward": 1000 * rho / median,
        "score": 0.9,
    }


def compare(folder: Path, *summaries: dict[str, Any]) -> Comparison:
    """Write rows, and read them back as the one comparison that they are."""
    for summary in summaries:
        write_row(folder, summary)
    [comparison] = load_results([folder]).comparisons
    return comparison


def line_of(table, **values):
    """The one line of a table that has these values."""
    [line] = [x for x in table.lines if all(x[key] == value for key, value in values.items())]
    return line


def cells(table, line):
    """What a line of a table shows, by the keys of its columns."""
    return {column.key: column.show(line) for column in table.columns}

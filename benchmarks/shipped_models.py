"""Score the shipped models on held-out problems; search settings of teacher and student.

    python benchmarks/shipped_models.py --output results.json
    python benchmarks/shipped_models.py --search --models runs --output search.json

Settings are searched on the validation split. The table is made on the test split, with the policy
that the student carries. The splits share no problem structure with the training data or with each
other. The script is made for a GPU; on two CPU cores the table takes hours unless --num-problems is
small.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d2f import DecodingPolicy, Engine, EngineConfig, Request, load_model
from d2f.cli.device import choose_device, fastest_dtype
from d2f.evaluation.answering import timed_run
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.race import Tally, gold_limit, lines_of, paired_difference
from d2f.problems import Problem, extract_answer, generate_problems
from d2f.shipped import shipped_model
from d2f.text import Tokenizer

MODELS = ("autoregressive", "teacher", "student")


def score_problems(
    name: str,
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    make_request: Callable[[list[int]], Request],
) -> Tally:
    """Answer all problems in the engine's batches.

    The seconds of an answer are the whole run's, shared out evenly: a throughput, not a latency.
    """
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in problems]
    lines = lines_of(timed_run(engine, [make_request(prompt) for prompt in prompts]))
    for problem, line in zip(problems, lines, strict=True):
        line["correct"] = extract_answer(tokenizer.decode(line["token_ids"])) == problem.answer
    return Tally(name, lines)


class Scorer:
    """Loads models when they are first asked for and prints a line for every run."""

    def __init__(self, options: argparse.Namespace, problems: Sequence[Problem]) -> None:
        self.folders = {
            name: shipped_model(name) if options.models is None else options.models / name
            for name in MODELS
        }
        self.device = choose_device(None)
        self.dtype = options.dtype or fastest_dtype(self.device)
        self.config = EngineConfig(max_batch_size=options.batch_size)
        self.problems = problems
        self.engines: dict[str, Engine] = {}
        self.tokenizers: dict[str, Tokenizer] = {}
        self.limit = 0

    def engine(self, model: str) -> Engine:
        if model not in self.engines:
            folder = self.folders[model]
            loaded = load_model(folder, device=self.device, dtype=self.dtype)
            self.engines[model] = Engine(loaded, self.config)
            self.tokenizers[model] = Tokenizer.load(folder)
            responses = [problem.response for problem in self.problems]
            self.limit = gold_limit(responses, self.tokenizers[model], 32)
        return self.engines[model]

    def run(self, name: str, model: str, **settings: Any) -> Tally:
        engine = self.engine(model)
        row = score_problems(
            name,
            engine,
            self.tokenizers[model],
            self.problems,
            lambda ids: Request(prompt_ids=ids, max_new_tokens=self.limit, **settings),
        )
        s = row.summary()
        print(
            f"{name:34s} {s['score']:.2%} ±{s['score_standard_error']:.2%}  "
            f"{s['tokens_per_forward']:5.2f} tokens/forward  {s['mean_tokens']:.1f} tokens  "
            f"{s['query_tokens_per_forward']:.0f} computed/forward  "
            f"{sum(line['seconds'] for line in row.lines):.1f} s",
            file=sys.stderr,
            flush=True,
        )
        return row


def search(scorer: Scorer, models: Sequence[str], block_sizes: Sequence[int]) -> dict[str, Any]:
    """Score every setting of the grid on the validation problems."""
    rows: list[dict[str, Any]] = []
    if "teacher" in models:
        for length in (8, 16, 32):
            row = scorer.run(
                f"vanilla, blocks of {length}",
                "teacher",
                strategy="vanilla",
                options={"block_length": length},
            )
            rows.append({"block_length": length, **row.summary()})
    if "student" in models:
        grid = itertools.product(block_sizes, (0.1, 0.5), (0.9, 0.95, 0.98, 0.99))
        for size, add, confidence in grid:
            policy = DecodingPolicy(
                block_size=size, add_threshold=add, confidence_threshold=confidence
            )
            name = f"pipelined {size} {add}/0.95/{confidence}"
            row = scorer.run(name, "student", policy=policy)
            rows.append({"policy": policy.to_dict(), **row.summary()})
    return {"rows": rows}


def table(scorer: Scorer, models: Sequence[str], block_length: int) -> dict[str, Any]:
    """The figures of the model card on the test problems."""
    rows: dict[str, Tally] = {}
    if "autoregressive" in models:
        rows["autoregressive"] = scorer.run(
            "autoregressive", "autoregressive", strategy="autoregressive"
        )
    if "teacher" in models:
        rows["vanilla"] = scorer.run(
            "vanilla", "teacher", strategy="vanilla", options={"block_length": block_length}
        )
    if "student" in models:
        policy = scorer.engine("student").model.spec.recommended_policy
        rows["pipelined"] = scorer.run("pipelined", "student")
        rows["serial"] = scorer.run("serial", "student", strategy="serial")
        if "teacher" in models:
            rows["undistilled"] = scorer.run("undistilled, pipelined", "teacher", policy=policy)
    differences = {}
    for one, other in itertools.permutations(rows, 2):
        gap, error = paired_difference(rows[one], rows[other])
        differences[f"{one} - {other}"] = {
            "difference": gap,
            "standard_error": error,
            "interval_95": [gap - 1.96 * error, gap + 1.96 * error],
        }
    return {
        "vanilla_block_length": block_length,
        # One digit for each problem, so that rows of several runs can be paired.
        "rows": [
            row.summary() | {"correct": "".join(str(int(right)) for right in row.correct)}
            for row in rows.values()
        ],
        "paired_differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="folder of the three; default: the shipped")
    parser.add_argument("--only", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--search", action="store_true", help="search settings, on validation")
    parser.add_argument("--num-problems", type=int, default=5120)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--block-sizes", type=int, nargs="*", default=[16, 32])
    parser.add_argument("--block-length", type=int, default=16, help="of vanilla, in the table")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, the faster on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("shipped_models.json"))
    options = parser.parse_args()
    split = "validation" if options.search else "test"
    problems = list(generate_problems(options.num_problems, seed=options.seed, split=split))
    scorer = Scorer(options, problems)
    if options.search:
        report = search(scorer, options.only, options.block_sizes)
    else:
        report = table(scorer, options.only, options.block_length)
    report = {
        "environment": describe_environment(device=scorer.device, dtype=scorer.dtype),
        "split": split,
        "seed": options.seed,
        "num_problems": len(problems),
        "batch_size": options.batch_size,
        "max_new_tokens": scorer.limit,
        **report,
    }
    part = options.output.with_name(options.output.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, options.output)


if __name__ == "__main__":
    main()

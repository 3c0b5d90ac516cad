"""Compare autoregression on a CPU with that of transformers: tokens/s, in turns in one process.

    python benchmarks/cpu_transformers.py --model FOLDER
    python benchmarks/cpu_transformers.py --model FOLDER --dtype float32 --threads 1 --turns 9

FOLDER holds a Llama or Qwen2 checkpoint. In each turn both libraries answer the same prompt
greedily with the same number of tokens, the prompt's forward included; the order changes from turn
to turn. The result is the median over turns of the ratio of both speeds, so slow drifts of the
machine's speed cancel. No other program should run meanwhile, since both libraries use all cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version

from d2f import Engine, EngineConfig, Request, load_model
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.results import write_json

TEXT = """The river rises in the hills above the town, where it is no wider than a step. Below the
mill it takes in two streams, turns west through meadows that it floods in most springs, and reaches
the sea at a harbour that has been too shallow for ships since the storms of the last century.
"""
"""Text of the prompts: as many of its tokens as a prompt needs, repeated if need be."""
Answer = Callable[[list[int], int], list[int]]


def our_answer(folder: str, dtype: torch.dtype) -> Answer:
    engine = Engine(load_model(folder, device="cpu", dtype=dtype), EngineConfig(max_batch_size=1))

    def answer(prompt: list[int], length: int) -> list[int]:
        engine.forget_prompts()
        request = Request(
            prompt_ids=prompt, max_new_tokens=length, strategy="autoregressive", eos_token_id=()
        )
        return engine.generate([request])[0].token_ids

    return answer


def their_answer(folder: str, dtype: torch.dtype) -> Answer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # Without an end token both libraries produce exactly the requested number of tokens.
    model.generation_config.eos_token_id = None

    def answer(prompt: list[int], length: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, len(prompt) :].tolist()

    return answer


def seconds(answer: Answer, prompt: list[int], length: int) -> tuple[float, list[int]]:
    start = time.perf_counter()
    tokens = answer(prompt, length)
    assert len(tokens) == length
    return time.perf_counter() - start, tokens


def race(answers: dict[str, Answer], prompt: list[int], length: int, turns: int) -> dict[str, Any]:
    """Return the tokens/s of both libraries and the ratio in each turn."""
    rates: dict[str, list[float]] = {name: [] for name in answers}
    tokens: dict[str, list[int]] = {}
    for answer in answers.values():
        answer(prompt, min(length, 8))
    for turn in range(turns):
        for name in list(answers)[:: 1 if turn % 2 == 0 else -1]:
            took, tokens[name] = seconds(answers[name], prompt, length)
            rates[name].append(length / took)
    ours, theirs = (rates[name] for name in answers)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    first, second = tokens.values()
    same = [a == b for a, b in zip(first, second, strict=True)]
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": length,
        "tokens_per_second": rates,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5 if turns > 1 else None,
        "first_tokens_equal": [*same, False].index(False),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[30, 300])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    answers = {
        "d2f": our_answer(options.model, dtype),
        "transformers": their_answer(options.model, dtype),
    }
    text_ids = AutoTokenizer.from_pretrained(options.model).encode(TEXT)
    rows = []
    for count in options.prompt_tokens:
        prompt = (text_ids * (count // len(text_ids) + 1))[:count]
        row = race(answers, prompt, options.new_tokens, options.turns)
        rows.append(row)
        ours, theirs = (statistics.median(rate) for rate in row["tokens_per_second"].values())
        error = f" ± {row['standard_error']:.2f}" if row["standard_error"] else ""
        print(
            f"{options.dtype}, {torch.get_num_threads()} threads, prompt of {count}, "
            f"{options.new_tokens} new tokens: d2f {ours:.1f} tokens/s, transformers {theirs:.1f}, "
            f"ratio {row['ratio']:.2f}{error} over {options.turns} turns; the first "
            f"{row['first_tokens_equal']} tokens are equal"
        )
        sys.stdout.flush()
    if options.json:
        report = {
            "model": options.model,
            "transformers": transformers_version,
            **describe_environment(device="cpu", dtype=options.dtype),
            "races": rows,
        }
        write_json(options.json, report)


if __name__ == "__main__":
    main()

"""Compare the perplexity that a model assigns to students' answers with that of its own answers.

Each file is the output of `d2f generate --input PROMPTS --output FILE`, all for the same prompts
(texts, not conversations); the first file has the model's own answers. Perplexity is exp of the
mean negative log-likelihood of a token. Its standard error treats answers as independent samples;
that of the ratio to the first file's perplexity is computed from pairs of answers to the same
prompt.

    python benchmarks/perplexity.py --model MODEL --answers own.jsonl student.jsonl --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import d2f
from d2f.errors import D2FError
from d2f.hub import resolve_folder
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer


def likelihoods(model: Transformer, tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Return the log-likelihood and token count of each answer, its end included: (N, 2)."""
    sequences = []
    for row in rows:
        prompt_ids = tokenizer.encode_prompt(row["prompt"])
        answer_ids = tokenizer.encode(row["response"])
        if row["finish_reason"] != "length":
            answer_ids = [*answer_ids, model.spec.eos_token_ids[0]]
        sequences.append((prompt_ids, answer_ids))
    result = torch.zeros(len(rows), 2, dtype=torch.float64)
    for i, (prompt_ids, answer_ids) in enumerate(sequences):
        # Answers are scored one by one, since the logits of a batch would take gigabytes.
        ids_1L = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
        with torch.inference_mode():
            likely_LV = model.logits(ids_1L)[0].log_softmax(-1)
        answer_L = torch.gather(likely_LV, 1, ids_1L.T)[len(prompt_ids) :, 0]
        result[i] = torch.tensor([answer_L.double().sum().item(), len(answer_L)])
        print(f"\r{i + 1} of {len(rows)} answers", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return result


def summary(own: Tensor, other: Tensor, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the perplexity of a file's answers, and its ratio to that of the model's own.

    `own` and `other` are results of `likelihoods` for answers to the same prompts.
    """
    mean, share_N = _mean(other)
    own_mean, own_share_N = _mean(own)
    perplexity, ratio = math.exp(mean), math.exp(mean - own_mean)
    forwards = sum(row["num_forwards"] for row in rows)
    return {
        "answers": len(rows),
        "mean_tokens": other[:, 1].mean().item(),
        "ended_by_length": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "tokens_per_forward": sum(row["num_tokens"] for row in rows) / forwards,
        "perplexity": perplexity,
        "perplexity_error": perplexity * _error(share_N),
        "ratio": ratio,
        "ratio_error": ratio * _error(share_N - own_share_N),
    }


def _mean(table: Tensor) -> tuple[float, Tensor]:
    """Return the mean loss of a token, and each answer's contribution to its error (N,)."""
    loss_N, tokens_N = -table[:, 0], table[:, 1]
    mean = (loss_N.sum() / tokens_N.sum()).item()
    return mean, (loss_N - mean * tokens_N) / tokens_N.sum()


def _error(share_N: Tensor) -> float:
    """Return the standard error of a sum over independent answers."""
    return share_N.std().item() * math.sqrt(len(share_N))


def read_answers(paths: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return each file's answers, in one order, to the prompts that all files answer.

    An empty answer without an end has no likelihood and counts as missing.
    """
    files = {}
    for path in paths:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        files[path.stem] = {
            (row["row"], row.get("sample", 0)): row
            for row in rows
            if row["response"] or row["finish_reason"] != "length"
        }
    common = sorted(set.intersection(*(set(rows) for rows in files.values())))
    return {name: [rows[key] for key in common] for name, rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    chosen = read_answers(options.answers)
    if len(next(iter(chosen.values()))) < 2:
        raise SystemExit("the files have fewer than two answers to the same prompts")
    try:
        model = d2f.load_model(options.model, dtype=torch.float32)
        tokenizer = Tokenizer.load(resolve_folder(options.model))
    except D2FError as error:
        raise SystemExit(str(error)) from None
    tables = {name: likelihoods(model, tokenizer, rows) for name, rows in chosen.items()}
    own = next(iter(tables.values()))
    figures = {name: summary(own, tables[name], rows) for name, rows in chosen.items()}
    for name, figure in figures.items():
        print(
            f"{name}: perplexity {figure['perplexity']:.2f} ± {figure['perplexity_error']:.2f}, "
            f"{figure['ratio']:.3f} ± {figure['ratio_error']:.3f} of the "
            f"model's own; {figure['tokens_per_forward']:.2f} tokens per forward, "
            f"{figure['mean_tokens']:.0f} tokens, {figure['ended_by_length']:.0%} cut"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How likely a model finds answers: what students' answers lose against its own.

Each file is what `d2f generate --input PROMPTS --output FILE` has written, all to the same prompts;
the first holds the model's own answers. Perplexity is exp of the mean negative log-likelihood of a
token; its error, and that of the ratio to the first file, are over answers, paired by prompt.

    python benchmarks/perplexity.py --model MODEL --answers own.jsonl student.jsonl --json FILE
"""

from __future__ import annotations

import argparse
import json
import math
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
    """Log-likelihood and number of the tokens of each answer, its end included: (N, 2)."""
    sequences = []
    for row in rows:
        prompt_ids = tokenizer.encode_prompt(row["prompt"])
        answer_ids = tokenizer.encode(row["response"])
        if row["finish_reason"] != "length":
            answer_ids = [*answer_ids, model.spec.eos_token_ids[0]]
        sequences.append((prompt_ids, answer_ids))
    result = torch.zeros(len(rows), 2, dtype=torch.float64)
    for i, (prompt_ids, answer_ids) in enumerate(sequences):
        # One answer at a time: the logits of a batch would take gigabytes.
        ids_1L = torch.tensor([[*prompt_ids, *answer_ids]], device=model.device)
        with torch.inference_mode():
            likely_LV = model.logits(ids_1L)[0].log_softmax(-1)
        answer_L = torch.gather(likely_LV, 1, ids_1L.T)[len(prompt_ids) :, 0]
        result[i] = torch.tensor([answer_L.double().sum().item(), len(answer_L)])
    return result


def summary(own: Tensor, other: Tensor, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Perplexity of a file's answers, and its ratio to that of the model's own."""
    loss_N, base_N = (-table[:, 0] / table[:, 1] for table in (other, own))
    mean, error = _mean(-other[:, 0], other[:, 1])
    difference = loss_N - base_N
    paired = difference.std().item() / math.sqrt(len(difference))
    forwards = sum(row["num_forwards"] for row in rows)
    return {
        "answers": len(rows),
        "mean_tokens": other[:, 1].mean().item(),
        "ended_by_length": sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        "tokens_per_forward": sum(row["num_tokens"] for row in rows) / forwards,
        "perplexity": math.exp(mean),
        "perplexity_error": math.exp(mean) * error,
        "ratio_per_answer": math.exp(difference.mean().item()),
        "ratio_per_answer_error": math.exp(difference.mean().item()) * paired,
    }


def _mean(loss_N: Tensor, tokens_N: Tensor) -> tuple[float, float]:
    """Mean loss of a token, and its standard error with answers as the independent samples."""
    mean = (loss_N.sum() / tokens_N.sum()).item()
    rest_N = loss_N - mean * tokens_N
    error = rest_N.std().item() * math.sqrt(len(loss_N)) / tokens_N.sum().item()
    return mean, error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--answers", type=Path, nargs="+", required=True)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    try:
        model = d2f.load_model(options.model, dtype=torch.float32)
        tokenizer = Tokenizer.load(resolve_folder(options.model))
    except D2FError as error:
        raise SystemExit(str(error)) from None
    files = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in options.answers
    }
    # Prompts that every file answers.
    common = set.intersection(*({row["row"] for row in rows} for rows in files.values()))
    chosen = {n: [row for row in rows if row["row"] in common] for n, rows in files.items()}
    tables = {name: likelihoods(model, tokenizer, rows) for name, rows in chosen.items()}
    own = next(iter(tables.values()))
    figures = {name: summary(own, tables[name], rows) for name, rows in chosen.items()}
    for name, figure in figures.items():
        print(
            f"{name}: perplexity {figure['perplexity']:.2f} ± {figure['perplexity_error']:.2f}, "
            f"{figure['ratio_per_answer']:.3f} ± {figure['ratio_per_answer_error']:.3f} of the "
            f"model's own; {figure['tokens_per_forward']:.2f} tokens per forward, "
            f"{figure['mean_tokens']:.0f} tokens, {figure['ended_by_length']:.0%} cut"
        )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`benchmarks/perplexity.py`: which answers are compared, and how sure the figures are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))
    import perplexity

    yield perplexity
    sys.modules.pop("perplexity", None)


def test_errors_are_those_of_answers_drawn_again(script):
    g = torch.Generator().manual_seed(0)
    tokens_N = torch.randint(5, 300, (200,), generator=g).double()
    hard_N = 1 + torch.rand(200, generator=g).double()
    own = torch.stack([-hard_N * tokens_N, tokens_N], 1)
    other_N = (tokens_N * (0.5 + torch.rand(200, generator=g))).round() + 1
    other = torch.stack([-(hard_N + 0.2) * other_N, other_N], 1)
    rows = [{"finish_reason": "eos", "num_tokens": 4, "num_forwards": 2}] * 200
    figures = script.summary(own, other, rows)
    assert figures["tokens_per_forward"] == 2
    assert script.summary(own, own, rows)["ratio_error"] == 0
    again = torch.randint(200, (3000, 200), generator=g)
    (own_loss, own_count), (loss, count) = (table[again].sum(1).unbind(1) for table in (own, other))
    drawn = torch.exp(-loss / count)
    ratio = drawn / torch.exp(-own_loss / own_count)
    assert figures["perplexity_error"] == pytest.approx(drawn.std().item(), rel=0.1)
    assert figures["ratio_error"] == pytest.approx(ratio.std().item(), rel=0.1)
    # Most of what makes one prompt's answers harder than another's, makes both harder.
    assert figures["ratio_error"] < figures["perplexity_error"] / figures["perplexity"]


def test_answers_to_the_same_prompts_are_compared(script, tmp_path):
    def write(name, rows):
        file = tmp_path / f"{name}.jsonl"
        lines = [
            json.dumps({"row": row, "response": text, "finish_reason": end}) + "\n"
            for row, text, end in rows
        ]
        file.write_text("".join(lines))
        return file

    files = [
        write("own", [(1, "a", "eos"), (2, "b", "eos"), (3, "c", "eos"), (5, "", "eos")]),
        write("student", [(3, "d", "eos"), (1, "e", "length"), (2, "", "length"), (5, "f", "eos")]),
    ]
    answers = script.read_answers(files)
    assert [row["response"] for row in answers["own"]] == ["a", "c", ""]
    assert [row["response"] for row in answers["student"]] == ["e", "d", "f"]

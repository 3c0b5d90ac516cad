"""The paper's own numbers, to be set beside ours: measured on an A100, at 8B."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

LABEL = "paper, A100, 8B"
_FILE = Path(__file__).with_name("published.csv")
# Our tasks, and the paper's test set of the same kind for its two models.
_TEST_SETS = {
    "word-problems": ("GSM8K-4-shot", "GSM8K-CoT-8-shot"),
    "gsm8k": ("GSM8K-4-shot", "GSM8K-CoT-8-shot"),
    "gsm8k-variants": ("GSM8K-4-shot", "GSM8K-CoT-8-shot"),
    "gsm8k_cot": ("GSM8K-4-shot", "GSM8K-CoT-8-shot"),
    "minerva_math": ("Math-4-shot", "Math-4-shot"),
    "minerva_math500": ("Math-4-shot", "Math-4-shot"),
    "functions": ("MBPP-3-shot", "MBPP-3-shot"),
    "mbpp": ("MBPP-3-shot", "MBPP-3-shot"),
    "humaneval": ("HumanEval-0-shot", "HumanEval-0-shot"),
}


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of a table, or one point of a figure."""

    table: str
    """`table1` … `table7`, `figure1`, `figure2`."""
    family: str
    """`LLaDA` or `Dream`; of an autoregressive model, the one it stands beside."""
    model: str
    test_set: str
    method: str
    """Name of the method in our result files."""
    tokens_per_second: float | None
    seconds_per_problem: float | None
    mean_tokens: float | None
    score: float | None
    """Share of right answers, in percent."""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Counterpart:
    """The paper's experiment that one of ours is set beside."""

    family: str
    test_set: str

    @property
    def name(self) -> str:
        """Name of the counterpart in table headers."""
        return f"{self.family}, {self.test_set}"

    def find(self, method: str, *tables: str) -> PaperRow | None:
        """The first row of the method in these tables."""
        return next(iter(self.rows(method, *tables)), None)

    def rows(self, method: str, *tables: str) -> list[PaperRow]:
        """All rows of the method in these tables."""
        return [
            row
            for row in load_paper()
            if row.table in tables
            and (row.family, row.test_set, row.method) == (self.family, self.test_set, method)
        ]


@cache
def load_paper() -> tuple[PaperRow, ...]:
    """All numbers of the paper's tables 1 to 7 and figures 1 and 2.

    Values read off a plot are marked by `~` in the file and taken as they are.

    Example:
        >>> row = load_paper()[4]
        >>> row.method, row.test_set, row.tokens_per_second
        ('pipelined', 'GSM8K-4-shot', 52.5)
    """

    def number(text: str) -> float | None:
        return float(text.lstrip("~")) if text else None

    with _FILE.open(encoding="utf-8", newline="") as lines:
        return tuple(
            PaperRow(
                table=line["table"],
                family=line["family"],
                model=line["model"],
                test_set=line["test_set"],
                method=line["method"],
                tokens_per_second=number(line["tokens_per_second"]),
                seconds_per_problem=number(line["seconds_per_problem"]),
                mean_tokens=number(line["mean_tokens"]),
                score=number(line["score"]),
                settings=dict(p.split("=", 1) for p in line["settings"].split(";") if p),
            )
            for line in csv.DictReader(lines)
        )


def counterparts(task: str, family: str) -> list[Counterpart]:
    """Return the counterparts in the paper of a task: for LLaDA, for Dream, or for both.

    Args:
        task: As recipes name it.
        family: Of the models; where it names LLaDA or Dream, only that one is a counterpart.

    Example:
        >>> [c.name for c in counterparts("gsm8k_cot", "D2F-Dream-7B")]
        ['Dream, GSM8K-CoT-8-shot']
    """
    test_sets = dict(zip(("LLaDA", "Dream"), _TEST_SETS.get(task, ()), strict=False))
    named = [name for name in test_sets if name.lower() in family.lower()]
    return [Counterpart(family=name, test_set=test_sets[name]) for name in named or test_sets]


def over_autoregressive(test_set: str, method: str) -> dict[str, float]:
    """Figure 1's tokens/s over those of LLaMA3, by family, as the paper's claims count them.

    Example:
        >>> {k: round(v, 2) for k, v in over_autoregressive("GSM8K-4-shot", "pipelined").items()}
        {'Dream': 2.5}
    """
    points = [p for p in load_paper() if (p.table, p.test_set) == ("figure1", test_set)]
    base = [p.tokens_per_second for p in points if p.model.startswith("LLaMA3")]
    return {
        p.family: p.tokens_per_second / base[0]
        for p in points
        if p.method == method and p.tokens_per_second and base and base[0]
    }


def ablation_counterpart(task: str) -> Counterpart | None:
    """Return the counterpart of tables 3 and 4 and figure 2: D2F-Dream with 512 new tokens.

    Example:
        >>> ablation_counterpart("word-problems").test_set
        'GSM8K-4-shot'
    """
    test_set = _TEST_SETS.get(task, ("",))[0]
    return Counterpart(family="Dream", test_set=test_set) if test_set else None


def gap(value: float) -> str:
    """Write a difference of scores, in points."""
    return f"{value:+.1f}"


def minus(one: float | None, other: float | None) -> float | None:
    """Take the other from the one, where both are there."""
    return None if one is None or other is None else one - other

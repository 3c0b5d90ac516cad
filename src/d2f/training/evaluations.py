"""Evaluations during training: samples held out for them, their lines, the best model so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d2f.errors import TrainingError, counted, first_line
from d2f.models.transformer import Transformer
from d2f.training.config import TrainConfig, to_table
from d2f.training.data import TokenDataset, generator
from d2f.training.run_log import JsonLog, Reporter


class HeldOut(NamedTuple):
    """A sample that is not trained on."""

    prompt_ids: list[int]
    response_ids: list[int]


def hold_out(dataset: TokenDataset, count: int, seed: int) -> list[HeldOut]:
    """Take `count` samples out of a data set, and with them all others that have the same prompts.

    A sample whose response was cut has no answer to be scored by, so it is not chosen. Raises
    `TrainingError` if there are not so many, or nothing would be left to train on.
    """
    chosen: dict[tuple[int, ...], HeldOut] = {}
    order = torch.randperm(len(dataset), generator=generator(seed, "held out")).tolist()
    most = dataset.sequence_length
    for row in order:
        if len(chosen) == count:
            break
        prompt_ids, response_ids = dataset.sample(row)
        if response_ids and len(prompt_ids) + len(response_ids) < most:
            chosen.setdefault(tuple(prompt_ids), HeldOut(prompt_ids, response_ids))
    held_E = torch.tensor([tuple(dataset.sample(i)[0]) in chosen for i in range(len(dataset))])
    if len(chosen) < count or held_E.all():
        raise TrainingError(
            f"evaluate.held_out is {count}, but the data have "
            f"{counted(len(dataset), 'sample', ',')} with "
            f"{len(chosen):,} different prompts among those looked at; lower it"
        )
    dataset.hold_out(held_E)
    return list(chosen.values())


Evaluator = Callable[[Transformer], Mapping[str, Any]]
"""Scores the model: `score` (higher is better), `standard_error`, `tokens_per_forward`, ….."""
SaveBest = Callable[[Transformer, Mapping[str, Any]], object]
"""Keeps the model, with the line of its evaluation."""

BEST_FOLDER = "best"
BEST_FILE = "evaluation.json"


class Evaluations:
    """The evaluations of a run; `save_best` is called with each model better than all before.

    A run resumed after `after_step` goes on with the lines and the best model in its output folder,
    unless that was scored by another measure.
    """

    def __init__(
        self,
        config: TrainConfig,
        evaluator: Evaluator,
        save_best: SaveBest,
        reporter: Reporter,
        *,
        after_step: int = 0,
    ) -> None:
        output = Path(config.output)
        self._evaluator, self._save_best, self._reporter = evaluator, save_best, reporter
        self._log = JsonLog(output / "evaluations.jsonl", after_step=after_step)
        # The folder is the truth: a crash may have lost lines of the log, but not this.
        self.best = read_best(output, measure_of(config)) if after_step else None
        """The line of the best evaluation."""
        if after_step and self.best is None and (output / BEST_FOLDER).exists():
            reporter.note(
                f"{output / BEST_FOLDER} was not scored as this run scores; the next model that is "
                "evaluated replaces it"
            )
        self.last: Mapping[str, Any] | None = None
        """The line of the last step's evaluation; None if that failed or is not made yet."""
        self._unlogged: Mapping[str, Any] | None = None

    def run(self, model: Transformer, step: int) -> None:
        """Score the model, and keep it if it is the best.

        What fails is told and not raised: hours of training must not end because problems cannot be
        scored.
        """
        self.last = None
        try:
            record = {"step": step, **self._evaluator(model)}
            self._log.write([record])
            if is_better(record, self.best):
                self._save_best(model, record)
                self.best = record
        except Exception as error:
            self._reporter.note(
                f"the evaluation at step {step} failed: {first_line(error)}; training goes on"
            )
            return
        self.last = self._unlogged = record
        self._reporter.evaluation(record | {"best_step": self.best["step"] if self.best else step})

    def take(self) -> dict[str, Any]:
        """Give the evaluation since the last line of the log, if any, for the next line."""
        record, self._unlogged = self._unlogged, None
        if record is None:
            return {}
        names = ("step", "score", "tokens_per_forward")
        return {"evaluation": {name: record[name] for name in names if name in record}}


def is_better(record: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether the score is higher, or equal with more tokens per forward."""
    return best is None or _rank(record) > _rank(best)


def _rank(record: Mapping[str, Any]) -> tuple[float, float]:
    return float(record["score"]), float(record.get("tokens_per_forward") or 0.0)


def measure_of(config: TrainConfig) -> str:
    """A hash of the settings that scores depend on: those of others cannot be compared."""
    table = to_table(config)
    evaluate = {k: v for k, v in table["evaluate"].items() if k not in ("every", "batch_size")}
    text = json.dumps([evaluate, table["policy"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_best(output: Path, measure: str) -> dict[str, Any] | None:
    """The evaluation of the model in `best/`; None where there is none of this measure."""
    try:
        record = json.loads((output / BEST_FOLDER / BEST_FILE).read_text(encoding="utf-8"))
        _rank(record)
        return record if record.pop("measure") == measure else None
    except (OSError, ValueError, TypeError, KeyError):
        return None

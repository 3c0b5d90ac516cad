"""Runs that are evaluated, in several real processes; started as a script in each of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tests.unit.training.parallel_runs import file_config, stored_weights

from d2f.cli.train_answers import make_evaluator
from d2f.models.checkpoint import load_model
from d2f.training.processes import Processes
from d2f.training.run import train
from d2f.training.sections import EvaluateConfig


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def watched(files: Path, processes: Processes, lora: bool, sharding: str) -> None:
    """The same run with and without evaluations; the best model loads."""
    name = f"{'lora' if lora else 'all'}-{sharding}"
    settings = EvaluateConfig(every=2, held_out=4, max_new_tokens=4, batch_size=2)
    plain = file_config(
        files, f"{name}-plain", lora, sharding, evaluate=replace(settings, every=10**6)
    )
    config = file_config(files, name, lora, sharding, evaluate=settings)
    train(plain, processes=processes)
    summary = train(config, processes=processes, make_evaluator=make_evaluator)
    one, other = stored_weights(plain), stored_weights(config)
    assert all(torch.equal(one[key], other[key]) for key in one), name
    assert summary.best is not None
    assert summary.data["held_out"] == 4
    if processes.is_main:
        output = Path(config.output)
        assert [record["step"] for record in lines(output, "evaluations.jsonl")] == [2, 4, 6]
        assert all(0 < r["confidence"] <= 1 for r in lines(output, "log.jsonl"))
        assert (output / "best" / "README.md").exists()
        if lora:
            load_model(config.model.init, adapter=output / "best", device="cpu")
        else:
            assert load_model(output / "best", device="cpu").spec.vocab_size == 96


def main() -> None:
    torch.set_num_threads(1)
    with Processes.current("cpu") as processes:
        for lora, sharding in ((False, "full"), (True, "none"), (True, "full")):
            watched(Path(sys.argv[1]), processes, lora, sharding)


if __name__ == "__main__":
    main()

"""Tiny runs in several real processes; started as a script, each process runs all cases it is given.

`python -m tests.unit.training.parallel_runs FOLDER CASE …` in the environment of a launcher.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests.unit.training.tiny_run import make_config, make_trainer

from d2f.models.lora import LoraConfig
from d2f.training.config import TrainConfig
from d2f.training.processes import Processes
from d2f.training.sections import ModelConfig, SampleConfig

ROOT = Path(__file__).parents[3]

STAGES = {
    "autoregressive": ("autoregressive", {}),
    "masked-diffusion": ("masked-diffusion", {}),
    "d2f": ("d2f", {}),
    "d2f-lora": ("d2f", {"lora": LoraConfig(r=4, alpha=8, dropout=0.0)}),
    # Frozen weights of another type than the adapter's.
    "d2f-lora-bfloat16": (
        "d2f",
        {
            "lora": LoraConfig(r=4, alpha=8, dropout=0.0),
            "model": ModelConfig(init="unused", dtype="bfloat16"),
        },
    ),
}
CASES = [f"{stage} {sharding}" for stage in STAGES for sharding in ("none", "full")]


def case_config(case: str, output: Path, **overrides: Any) -> TrainConfig:
    """Four micro-batches of two sequences, whoever computes them."""
    name, sharding = case.split()
    stage, settings = STAGES[name]
    config = make_config(
        output / case.replace(" ", "-"),
        stage,
        steps=4,
        micro_batch_size=2,
        sharding=sharding,
        sample=SampleConfig(every=3),
        # Chunks of a few positions each.
        loss_memory_mib=1,
        **settings,
    )
    return replace(config, **overrides)


def run_case(case: str, output: Path, processes: Processes | None) -> dict[str, Any] | None:
    """Losses, norms, block losses and weights of a run; None on processes other than the main."""
    config = case_config(case, output)
    sampled = []

    def sampler(model):
        assert not model.training
        with torch.no_grad():
            hidden_BLD = model(torch.arange(1, 9)[None])
            sampled.append(model.head(model.align(hidden_BLD)).float())
        return [{"prompt": "p", "answer": "a"}]

    trainer = make_trainer(config, processes=processes, sampler=sampler)
    assert trainer.run()
    with trainer.distributed.whole(torch.device("cpu")) as model:
        if model is None:
            assert not sampled
            return None
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "sampled": sampled}


def start(world_size: int, *arguments: object, module: str = "tests.unit.training.parallel_runs"):
    """The processes of a group, as a launcher starts them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ
            | {name: str(value) for name, value in shared.items()}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(group: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    return [(one.returncode, text) for one in group for text in [one.communicate(timeout=60)[1]]]


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    with Processes.current("cpu") as processes:
        for case in sys.argv[2:]:
            result = run_case(case, output, processes)
            if result is not None:
                torch.save(result, output / f"{case}.pt")


if __name__ == "__main__":
    main()

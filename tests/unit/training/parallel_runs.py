"""Tiny runs in several real processes; as a script, each process runs all cases it is given.

`python -m tests.unit.training.parallel_runs FOLDER NAME …` in the environment of a launcher, where
a name is that of a case or of a scenario, or `cuda` or `compile`, which hold for all cases. Each
scenario that a process has gone through leaves an empty file SCENARIO.RANK in the folder.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tests.unit.training.tiny_run import WatchedLoss, make_config, make_trainer

from d2f.cli.train_answers import make_evaluator
from d2f.errors import CheckpointError, TrainingError
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig
from d2f.training.checkpoint import list_checkpoints, load_state
from d2f.training.config import TrainConfig
from d2f.training.processes import Processes
from d2f.training.run import train
from d2f.training.sections import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SampleConfig,
)
from d2f.training.trainer import Trainer

STAGES = {
    "autoregressive": ("autoregressive", {}),
    "masked-diffusion": ("masked-diffusion", {}),
    "d2f": ("d2f", {"activation_checkpointing": True}),
    "d2f-lora": ("d2f", {"lora": LoraConfig(r=4, alpha=8, dropout=0.0)}),
    # Uneven numbers of masks, and sequences without any.
    "d2f-sequence": (
        "d2f",
        {
            "objective": ObjectiveConfig(normalization="sequence"),
            "noise": NoiseConfig(
                kind="original",
                low=0.01,
                high=0.4,
                block_size=4,
                train_on_eos_blocks=False,
                train_past_eos=False,
            ),
        },
    ),
    # Rows of a few samples each.
    "d2f-packed": (
        "d2f",
        {
            "data": DataConfig(
                kind="problems", num_problems=1, sequence_length=48, padding="packed"
            ),
            "noise": NoiseConfig(
                kind="original", low=0.2, high=0.7, block_size=4, train_on_eos_blocks=False
            ),
        },
    ),
    # Frozen weights of another type than the adapter's.
    "d2f-lora-bfloat16": (
        "d2f",
        {
            "lora": LoraConfig(r=4, alpha=8, dropout=0.0),
            "model": ModelConfig(init="unused", dtype="bfloat16"),
            "activation_checkpointing": True,
        },
    ),
}
CASES = [
    "autoregressive none", "autoregressive full", "masked-diffusion none", "masked-diffusion full",
    "d2f none", "d2f full", "d2f-lora none", "d2f-lora-bfloat16 full",
    "d2f-sequence none", "d2f-sequence full", "d2f-packed none",
]  # fmt: skip
FEW_CASES = [
    "d2f none", "d2f full", "d2f-lora-bfloat16 full", "d2f-sequence none", "d2f-sequence full",
]  # fmt: skip


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
        model=ModelConfig(init="unused", output_dtype="float32"),
        # A large eps, as without it Adam makes much of the rounding of gradients next to 0.
        optimizer=OptimizerConfig(lr=3e-3, eps=1e-4),
        # Chunks of a few positions each.
        loss_memory_mib=1,
    )
    config = replace(config, **settings)
    return replace(config, **overrides)


def run_case(
    case: str, output: Path, processes: Processes, *, compiled: bool = False
) -> dict[str, Any] | None:
    """Sampled logits and final weights of a run; None on processes other than the main."""
    config = case_config(case, output, compile=compiled)
    sampled = []

    def sampler(model):
        assert not model.training
        with torch.no_grad():
            hidden_BLD = model(torch.arange(1, 9, device=model.device)[None])
            sampled.append(model.head(model.align(hidden_BLD)).cpu())
        return [{"prompt": "p", "answer": "a"}]

    trainer = make_trainer(config, processes=processes, sampler=sampler)
    assert trainer.run()
    with trainer.distributed.whole(torch.device("cpu")) as model:
        if model is None:
            assert not sampled
            return None
        weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "sampled": sampled}


def stored_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    files = (Path(config.output) / "final").glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def records(output: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def file_config(files: Path, name: str, lora: bool, sharding: str, **overrides: Any) -> TrainConfig:
    """A run of six steps from the tiny checkpoint and the pairs in `files`."""
    config = make_config(
        files / name,
        "d2f",
        model=ModelConfig(init=str(files / "Dream"), output_dtype="float32"),
        data=DataConfig(
            kind="jsonl",
            paths=(str(files / "pairs.jsonl"),),
            sequence_length=12,
            cache=str(files / "cache"),
        ),
        lora=LoraConfig(r=4, alpha=8, dropout=0.3) if lora else None,
        micro_batch_size=2,
        sharding=sharding,
    )
    return replace(config, **overrides)


@contextmanager
def at_step(step: int, action: Callable[[Trainer], object], rank: int, processes: Processes):
    """Something happens on one process before a step."""
    inner = Trainer._train_step

    def train_step(trainer):
        if trainer.step + 1 == step and processes.rank == rank:
            action(trainer)
        inner(trainer)

    with mock.patch.object(Trainer, "_train_step", train_step):
        yield


def terminate(trainer: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def poison(trainer: Trainer) -> None:
    def poisoned(loss, inputs):
        value, loss_BL = loss(inputs)
        return value * float("nan"), loss_BL

    WatchedLoss(trainer, poisoned)


def refused(message: str, run: Callable[[], object]) -> None:
    with pytest.raises((TrainingError, CheckpointError), match=message):
        run()


def resume(files: Path, processes: Processes) -> None:
    """Stopped by a signal to one process and gone on with, a run is as if it had not been."""
    for lora, sharding in ((False, "full"), (True, "full"), (True, "none")):
        name = f"{'lora' if lora else 'all'}-{sharding}"
        straight = file_config(files, f"{name}-straight", lora, sharding)
        assert train(straight, processes=processes).finished
        stopped = file_config(files, f"{name}-stopped", lora, sharding)
        with at_step(3, terminate, 1, processes):
            summary = train(stopped, processes=processes)
        assert (summary.finished, summary.steps) == (False, 3)
        assert [path.name for path in list_checkpoints(Path(stopped.output))] == [
            "checkpoint-00000003"
        ]
        if processes.is_main:
            shutil.copytree(stopped.output, files / f"{name}-kept")
        torch.manual_seed(12345 + processes.rank)  # what happens in between must not leak in
        assert train(stopped, resume=True, processes=processes).steps == 6
        one, other = stored_weights(straight), stored_weights(stopped)
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key


def reshard(files: Path, processes: Processes) -> None:
    """Checkpoints of a process alone go on in shards, and those in shards as copies."""
    straight = stored_weights(file_config(files, "all-full-straight", False, "full"))
    if processes.is_main:
        shutil.copytree(files / "all-full-kept", files / "as-copies")
    for name, sharding in (("as-copies", "none"), ("alone", "full")):
        config = file_config(files, name, False, sharding)
        assert train(config, resume=True, processes=processes).finished
        torch.testing.assert_close(stored_weights(config), straight, atol=5e-6, rtol=1e-5)


def faults(files: Path, processes: Processes) -> None:
    """What is broken ends the run on all processes with one message, and spoils nothing."""

    def kept(name: str) -> TrainConfig:
        if processes.is_main:
            shutil.copytree(files / "all-full-kept", files / name)
        processes.wait()
        return file_config(files, name, False, "full")

    def go_on(config: TrainConfig) -> None:
        train(config, resume=True, processes=processes)

    config = kept("missing-shard")
    shards = files / "missing-shard" / "checkpoint-00000003" / "optimizer"
    if processes.is_main:
        (shards / "__1_0.distcp").unlink()
    processes.wait()
    refused("optimizer state is incomplete.*remove the folder", lambda: go_on(config))

    config = kept("poisoned")
    with at_step(5, poison, 1, processes):
        refused("not finite at step 5.*checkpoint-00000004", lambda: go_on(config))

    config = kept("full-disk")
    for rank in (0, 1):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        with at_step(4, terminate, 1, processes):
            if processes.rank == rank:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
            refused("cannot save|cannot write", lambda: go_on(config))
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        processes.wait()
        names = [path.name for path in (files / "full-disk").iterdir() if "checkpoint" in path.name]
        assert names == ["checkpoint-00000003"], names
    go_on(config)


def clock(files: Path, processes: Processes) -> None:
    """The main process's clock decides for all."""
    config = file_config(files, "timed", True, "none", steps=10**6, max_seconds=1)
    summary = train(config, processes=processes)
    assert summary.finished
    assert 1 < summary.steps < 10**6


def unmasked(files: Path, processes: Processes) -> None:
    """Where one process has nothing to predict and the other has, neither waits for ever."""
    config = case_config("masked-diffusion full", files / "unmasked", batch_size=2, steps=6)
    noise = replace(config.noise, low=0.01, high=0.02)
    trainer = make_trainer(replace(config, noise=noise, micro_batch_size=1), processes=processes)
    counts: list[int] = []

    def counted(loss, inputs):
        counts.append(len(inputs.selected_M))
        return loss(inputs)

    WatchedLoss(trainer, counted)
    assert trainer.run()
    of_both = zip(*processes.share(counts), strict=True)
    assert any(bool(one) != bool(other) for one, other in of_both)


def at_once(files: Path, processes: Processes) -> None:
    """Stopped before the first step, a run in shards goes on as if it had not been."""
    config = case_config("d2f full", files / "at-once", steps=1)
    trainer = make_trainer(config, processes=processes)
    trainer.stop()
    assert not trainer.run()
    state = load_state(list_checkpoints(Path(config.output))[-1])
    straight = case_config("d2f full", files / "not-stopped", steps=1)
    runs = [
        make_trainer(config, processes=processes, state=state),
        make_trainer(straight, processes=processes),
    ]
    assert all(trainer.run() for trainer in runs)
    for one, other in zip(*(trainer.student.parameters() for trainer in runs), strict=True):
        assert torch.equal(one.to_local(), other.to_local())


def apart(files: Path, processes: Processes) -> None:
    """Machines that share no disk are told so before the first step."""
    config = file_config(files, f"apart-{processes.rank}", False, "full")
    refused("not all processes see .*apart", lambda: train(config, processes=processes))
    paths = (str(files / "pairs.jsonl"),) * (1 + processes.rank)
    other = replace(config, data=replace(config.data, paths=paths), output=str(files / "apart"))
    refused("the processes read different data", lambda: train(other, processes=processes))


def watched(files: Path, processes: Processes) -> None:
    """The same run with and without evaluations; the best model loads."""
    settings = EvaluateConfig(every=2, held_out=4, max_new_tokens=4, batch_size=2)
    for lora, sharding in ((False, "full"), (True, "none"), (True, "full")):
        name = f"{'lora' if lora else 'all'}-{sharding}-watched"
        seldom = replace(settings, every=10**6)
        plain = file_config(files, f"{name}-seldom", lora, sharding, evaluate=seldom)
        config = file_config(files, name, lora, sharding, evaluate=settings)
        train(plain, processes=processes)
        summary = train(config, processes=processes, make_evaluator=make_evaluator)
        one, other = stored_weights(plain), stored_weights(config)
        assert all(torch.equal(one[key], other[key]) for key in one), name
        assert summary.best is not None
        assert summary.data["held_out"] == 4
        if processes.is_main:
            output = Path(config.output)
            assert [record["step"] for record in records(output, "evaluations")] == [2, 4, 6]
            assert all(0 < record["confidence"] <= 1 for record in records(output, "log"))
            assert (output / "best" / "README.md").exists()
            if lora:
                load_model(config.model.init, adapter=output / "best", device="cpu")
            else:
                assert load_model(output / "best", device="cpu").spec.vocab_size == 96


def killed(files: Path, processes: Processes) -> None:
    """A process is gone in mid-run."""
    config = file_config(files, "killed", False, "full", checkpoint_every=2)
    with at_step(6, lambda _: os.kill(os.getpid(), signal.SIGKILL), 1, processes):
        train(config, processes=processes)


def failed(files: Path, processes: Processes) -> None:
    """A process fails in mid-run."""

    def fail(trainer):
        raise TrainingError("the dog ate a batch")

    config = file_config(files, "failed", True, "none")
    with at_step(4, fail, 1, processes):
        train(config, processes=processes)


SCENARIOS = {
    f.__name__: f
    for f in (resume, reshard, faults, clock, unmasked, at_once, apart, watched, killed, failed)
}


def main() -> None:
    torch.set_num_threads(1)
    output, names = Path(sys.argv[1]), sys.argv[2:]
    cases = [name for name in names if name in CASES]
    with Processes.current("cuda" if "cuda" in names else "cpu") as processes:
        for case in cases:
            result = run_case(case, output, processes, compiled="compile" in names)
            if result is not None:
                torch.save(result, output / f"{case}.pt")
        for name, scenario in SCENARIOS.items():
            if name in names:
                scenario(output, processes)
                (output / f"{name}.{processes.rank}").touch()


if __name__ == "__main__":
    main()

"""A run, from its recipe to the finished model: assemble its parts, train, write the result."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d2f.models.storage import write_json
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer
from d2f.training.assemble import load_data, load_models, tokenizer_folder
from d2f.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_state,
    provenance,
    save_result,
    saving,
)
from d2f.training.config import TrainConfig, to_table
from d2f.training.evaluations import BEST_FOLDER, Evaluator, HeldOut
from d2f.training.processes import Processes
from d2f.training.run_log import Reporter
from d2f.training.trackers import check_trackers
from d2f.training.trainer import Sampler, Trainer

MakeSampler = Callable[[TrainConfig, Tokenizer], Sampler]
MakeEvaluator = Callable[[TrainConfig, Tokenizer], Callable[[Sequence[HeldOut]], Evaluator]]
"""Is called before the model is loaded; its result is called with the samples held out."""
# A launcher passes on the Ctrl-C that its processes got from the terminal, too.
_LAUNCHER_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """The outcome of a run; also written as training_summary.json."""

    finished: bool
    """False: stopped before its end; the newest checkpoint continues it."""
    folder: str
    """The finished model, or the checkpoint."""
    stage: str
    steps: int
    seconds: float
    """Training time, without the first step, samples and checkpoints."""
    tokens: int
    """steps * batch_size * sequence_length; with `padding = "longest"` fewer are computed. Padding
    counts, of which `data` says how much there is with `padding = "packed"`."""
    last: dict[str, Any] | None
    """Last line of the log."""
    best: dict[str, Any] | None
    """The best evaluation, with the folder of that model."""
    warnings: list[str]
    """Warnings that the student's confidence collapses."""
    num_parameters: int
    num_trained_parameters: int
    data: dict[str, Any]
    """Samples: rows, dropped, truncated, used, mean length; bad rows by reason. See `counts`."""
    device: str
    world_size: int
    """Processes that trained together."""
    recipe: dict[str, Any]
    provenance: dict[str, Any]


def train(
    config: TrainConfig,
    *,
    device: str | torch.device | None = None,
    resume: bool = False,
    make_sampler: MakeSampler | None = None,
    make_evaluator: MakeEvaluator | None = None,
    reporter: Reporter | None = None,
    processes: Processes | None = None,
) -> TrainingSummary:
    """Run a recipe: the model ends up in `<output>/final`, the log in `<output>/log.jsonl`.

    Ctrl-C and SIGTERM save a checkpoint and return. A run limited by steps gives the same weights
    each time on a CPU, resumed or not; one limited by `max_seconds` does not.

    Started by `torchrun` or `accelerate launch` in several processes, all of them train the model
    together; each calls this function and gets the same summary.

    Args:
        config: The recipe, from `load_recipe`.
        device: None: the GPU if there is one, else the CPU; of several processes each takes one.
        resume: Go on from the newest checkpoint in the output folder.
        make_sampler: Builds what gives sample answers during training.
        make_evaluator: Builds what scores the model during training.
        reporter: Is told how the run goes; of several processes the main one's is.
        processes: Those that train together, on their device; None: those that a launcher started.

    Raises:
        TrainingError: The output folder already holds a run and `resume` is False, or holds none
            to resume; the data cannot be read; a loss or gradient is not finite; another process is
            gone.
        ConfigError, CheckpointError: Model, tokenizer and recipe do not fit.
        SystemExit: Another process has failed and said why.

    Example:
        `train(load_recipe("recipes/tiny_cpu_autoregressive.toml"))` takes some seconds.
    """
    with nullcontext(processes) if processes else Processes.current(device) as processes:
        reporter = (reporter if processes.is_main else None) or Reporter()
        return _train(config, processes, resume, make_sampler, make_evaluator, reporter)


def _train(
    config: TrainConfig,
    processes: Processes,
    resume: bool,
    make_sampler: MakeSampler | None,
    make_evaluator: MakeEvaluator | None,
    reporter: Reporter,
) -> TrainingSummary:
    if config.trackers:
        check_trackers(config.trackers)
    found = processes.on_main(lambda: find_checkpoint(config, resume=resume, note=reporter.note))
    checkpoint = processes.from_main(found)
    with processes.first_one():
        folder = tokenizer_folder(config)
        tokenizer = Tokenizer.load(folder)
        prepare = make_evaluator(config, tokenizer) if make_evaluator and config.evaluate else None
    model, teacher = load_models(config, tokenizer, processes.device, checkpoint)
    reporter.note(f"{_described(config, model, processes)}; preparing data")
    dataset, held_out = load_data(config, tokenizer, folder, model, processes, reporter.note)
    trainer = Trainer(
        config,
        model,
        dataset,
        teacher=teacher,
        sampler=make_sampler(config, tokenizer) if make_sampler and config.sample else None,
        evaluator=prepare(held_out) if prepare else None,
        save_best=lambda best, record: save_result(
            best, config, folder, trainer.facts(record), best=True
        ),
        reporter=reporter,
        state=load_state(checkpoint) if checkpoint else None,
        processes=processes,
    )
    with _signals(trainer, reporter):
        finished = trainer.run()
    if finished:
        last = trainer.evaluations.last if trainer.evaluations else None
        with saving(Path(config.output)), trainer.distributed.whole(torch.device("cpu")) as whole:
            processes.on_main(
                lambda: save_result(whole or model, config, folder, trainer.facts(last))
            )
    summary = processes.from_main(processes.on_main(lambda: _summarise(config, trainer, finished)))
    assert summary is not None
    return summary


def _summarise(config: TrainConfig, trainer: Trainer, finished: bool) -> TrainingSummary:
    """Write training_summary.json."""
    output, model = Path(config.output), trainer.student
    best = trainer.evaluations.best if trainer.evaluations else None
    summary = TrainingSummary(
        finished=finished,
        folder=str(output / "final" if finished else list_checkpoints(output)[-1]),
        stage=config.stage,
        steps=trainer.step,
        seconds=round(trainer.seconds, 3),
        tokens=trainer.step * config.batch_size * config.data.sequence_length,
        last=trainer.last_record,
        best=None if best is None else {**best, "folder": str(output / BEST_FOLDER)},
        warnings=trainer.warnings,
        num_parameters=model.spec.num_parameters,
        num_trained_parameters=_num_trained(model),
        data=trainer.data_counts(),
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        world_size=trainer.processes.world_size,
        recipe=to_table(config),
        provenance=provenance(),
    )
    write_json(output / "training_summary.json", asdict(summary))
    return summary


def _num_trained(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _described(config: TrainConfig, model: Transformer, processes: Processes) -> str:
    size, trained = model.spec.num_parameters / 1e6, _num_trained(model) / 1e6
    text = f"{config.stage}: {size:.2f}M parameters, {trained:.2f}M trained"
    if processes.world_size == 1:
        return text
    how = "in shards on" if config.sharding == "full" else "a copy on each of"
    return f"{text}, {how} {processes.world_size} processes"


@contextmanager
def _signals(trainer: Trainer, reporter: Reporter) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the run after the step; a second Ctrl-C stops it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    asked = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        if not asked:
            asked = time.monotonic()
            trainer.stop()
            reporter.note("stopping after this step; once more Ctrl-C to stop at once")
            if trainer.processes.world_size == 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        elif number == signal.SIGINT and time.monotonic() - asked > _LAUNCHER_SECONDS:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""From a recipe to a finished model: assemble what a run needs, train, write the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d2f.errors import TrainingError, counted
from d2f.models.storage import write_json
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer
from d2f.training.assemble import load_dataset, load_models, tokenizer_folder
from d2f.training.checkpoint import (
    RECIPE_FILE,
    list_checkpoints,
    load_state,
    provenance,
    save_best,
    save_final,
    saving,
)
from d2f.training.config import TrainConfig, to_table, with_defaults
from d2f.training.data import TokenDataset
from d2f.training.evaluations import BEST_FOLDER, Evaluator, HeldOut, hold_out
from d2f.training.model_card import CardFacts
from d2f.training.processes import Processes
from d2f.training.progress import Reporter
from d2f.training.run_log import Trackers, check_trackers
from d2f.training.trainer import Sampler, Trainer

MakeSampler = Callable[[TrainConfig, Tokenizer], Sampler]
MakeEvaluator = Callable[[TrainConfig, Tokenizer], Callable[[Sequence[HeldOut]], Evaluator]]
"""Called before the model is loaded, and what it gives with the samples that were held out."""
# A checkpoint continues only the run that made it; other settings may change on resuming.
_IDENTITY = ("stage", "seed", "batch_size", "model", "data", "tokenizer", "lora", "evaluate")

_FREE = {
    "data": ("cache", "num_workers"),
    # What of `final/` is no matter of training.
    "model": ("output_dtype", "max_shard_mib", "max_new_tokens", "base_name"),
}


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """What came out of a run; also written as training_summary.json."""

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
    """What was said of the student's confidence."""
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
    if processes is not None:
        return _train(config, processes, resume, make_sampler, make_evaluator, reporter)
    with Processes.current(device) as processes:
        return _train(config, processes, resume, make_sampler, make_evaluator, reporter)


def _train(
    config: TrainConfig,
    processes: Processes,
    resume: bool,
    make_sampler: MakeSampler | None,
    make_evaluator: MakeEvaluator | None,
    reporter: Reporter | None,
) -> TrainingSummary:
    reporter = (reporter if processes.is_main else None) or Reporter()
    check_trackers(config.trackers)
    checkpoint = processes.on_main(lambda: _find_checkpoint(config, resume, reporter))
    checkpoint = processes.from_main(checkpoint)
    prepared = None
    with processes.first_one():
        folder = tokenizer_folder(config)
        tokenizer = Tokenizer.load(folder)
        if make_evaluator is not None and config.evaluate is not None:
            prepared = make_evaluator(config, tokenizer)
    model, teacher = load_models(config, tokenizer, processes.device, checkpoint)
    reporter.note(f"{config.stage}: {_size(model)}{_spread(config, processes)}; preparing data")
    with processes.first_one():
        dataset = load_dataset(config, tokenizer, folder, model, reporter.note)
    _check_same_data(dataset, processes)
    held_out = _hold_out(config, dataset)
    reporter.note(_told(dataset))
    trackers = processes.on_main(lambda: Trackers(config, reporter))
    trainer = Trainer(
        config,
        model,
        dataset,
        teacher=teacher,
        sampler=make_sampler(config, tokenizer) if make_sampler and config.sample else None,
        evaluator=prepared(held_out) if prepared else None,
        save_best=lambda best, record: save_best(
            best, config, folder, _facts(config, trainer, dataset, record), record
        ),
        trackers=trackers,
        reporter=reporter,
        state=load_state(checkpoint) if checkpoint else None,
        processes=processes,
    )
    if dataset.row_counts:
        reporter.note(_told_rows(dataset))
    try:
        finished = trainer.run()
    finally:
        if trackers is not None:
            trackers.close()
    if finished:
        with (
            saving(Path(config.output)),
            trainer.distributed.whole(torch.device("cpu")) as whole,
        ):
            processes.on_main(
                lambda: save_final(
                    whole or model, config, folder, _facts(config, trainer, dataset, _last(trainer))
                )
            )

    def summarise() -> TrainingSummary:
        summary = _summarise(config, trainer, dataset, finished)
        write_json(Path(config.output) / "training_summary.json", asdict(summary))
        return summary

    summary = processes.from_main(processes.on_main(summarise))
    assert summary is not None
    return summary


def _check_same_data(dataset: TokenDataset, processes: Processes) -> None:
    sizes = processes.share((dataset.num_rows, len(dataset), dataset.mean_length))
    if len(set(sizes)) > 1:
        raise TrainingError(
            "the processes read different data; give each machine the same files, or a shared disk"
        )


def _hold_out(config: TrainConfig, dataset: TokenDataset) -> list[HeldOut]:
    """Take the samples that are evaluated on out of the data."""
    settings = config.evaluate
    if settings is None or settings.held_out is None:
        return []
    return hold_out(dataset, settings.held_out, settings.seed)


def _told(dataset: TokenDataset) -> str:
    held_out = f"{dataset.num_held_out:,} held out, " if dataset.num_held_out else ""
    return (
        f"{counted(len(dataset), 'sample', ',')} of "
        f"{counted(dataset.mean_length, 'token', '.0f')} on average, {held_out}"
        f"{dataset.num_dropped:,} dropped and {dataset.num_truncated:,} truncated as over-long; "
        f"too long a prompt: {dataset.num_long_prompts:,} of the dropped, "
        f"{dataset.num_truncated_prompts:,} cut"
    )


def _told_rows(dataset: TokenDataset) -> str:
    counts = dataset.row_counts
    return (
        f"packed into {counted(counts['packed_rows'], 'row', ',')} of "
        f"{counted(dataset.sequence_length, 'token', ',')}, {counts['filled']:.1%} filled"
    )


def _facts(
    config: TrainConfig,
    trainer: Trainer,
    dataset: TokenDataset,
    evaluation: Mapping[str, Any] | None,
) -> CardFacts:
    settings = config.evaluate
    return CardFacts(
        steps=trainer.step,
        data=dataset.counts(),
        loss=trainer.last_record["loss"] if trainer.last_record else None,
        evaluation=evaluation,
        task=(settings.task or "held-out samples") if settings else None,
    )


def _last(trainer: Trainer) -> Mapping[str, Any] | None:
    """The evaluation of the finished model, if there was one."""
    return trainer.evaluations.last if trainer.evaluations else None


def _summarise(
    config: TrainConfig, trainer: Trainer, dataset: TokenDataset, finished: bool
) -> TrainingSummary:
    output, model = Path(config.output), trainer.student
    return TrainingSummary(
        finished=finished,
        folder=str(output / "final" if finished else list_checkpoints(output)[-1]),
        stage=config.stage,
        steps=trainer.step,
        seconds=round(trainer.seconds, 3),
        tokens=trainer.step * config.batch_size * config.data.sequence_length,
        last=trainer.last_record,
        best=_best(trainer, output),
        warnings=trainer.warnings,
        num_parameters=model.spec.num_parameters,
        num_trained_parameters=_num_trained(model),
        data=dataset.counts(),
        device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        world_size=trainer.processes.world_size,
        recipe=to_table(config),
        provenance=provenance(),
    )


def _best(trainer: Trainer, output: Path) -> dict[str, Any] | None:
    record = trainer.evaluations.best if trainer.evaluations else None
    return None if record is None else {**record, "folder": str(output / BEST_FOLDER)}


def _find_checkpoint(config: TrainConfig, resume: bool, reporter: Reporter) -> Path | None:
    """The checkpoint to go on from, checked to be of this run; says what else has changed."""
    output = Path(config.output)
    found = list_checkpoints(output)
    if not resume:
        if found or (output / "final").exists():
            raise TrainingError(
                f"{output} already holds a run; continue it with --resume, choose another "
                "--output, or remove the folder"
            )
        return None
    if not found:
        raise TrainingError(f"{output} holds no checkpoint to resume from")
    try:
        recorded = json.loads((found[-1] / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot resume from {found[-1]}: {error}") from None
    table = to_table(config)
    recorded = with_defaults(recorded)
    for name in _IDENTITY:
        if _identity(recorded, name) != _identity(table, name):
            raise TrainingError(
                f"{found[-1]} was made with another '{name}' than this recipe's, so it cannot be "
                "resumed; start anew with another --output"
            )
    changed = [name for name in table if recorded.get(name) != table[name] and name != "output"]
    if changed:
        reporter.note(f"going on with other settings than before: {', '.join(changed)}")
    return found[-1]


def _identity(table: Mapping[str, Any], name: str) -> Any:
    """A part of a recipe, without what does not change what is trained, or on what."""
    part = table.get(name)
    if name == "evaluate":
        # Only this table's choice of samples changes what is trained on.
        held_out = part.get("held_out") if isinstance(part, Mapping) else None
        return None if held_out is None else (held_out, (part or {}).get("seed"))
    if isinstance(part, Mapping):
        return {key: value for key, value in part.items() if key not in _FREE.get(name, ())}
    return part


def _spread(config: TrainConfig, processes: Processes) -> str:
    if processes.world_size == 1:
        return ""
    how = "in shards on" if config.sharding == "full" else "a copy on each of"
    return f", {how} {processes.world_size} processes"


def _num_trained(model: Transformer) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _size(model: Transformer) -> str:
    trained = _num_trained(model)
    return f"{model.spec.num_parameters / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained"

"""Checkpoints of a run: weights as published, optimizer and RNG state, recipe, provenance.

A run's folder:

- `log.jsonl`, `samples.jsonl`, `training_summary.json`, and `tokenizer/` if the run made one;
- `checkpoint-00000100/`: config.json and weights, or the adapter, with training_state.pt (optimizer
  and random state), recipe.json (resolved) and provenance.json; where the optimizer's state is
  sharded it is in `optimizer/` instead;
- `final/`: the finished model with its tokenizer and a model card, and nothing else;
- where the run is evaluated, `evaluations.jsonl` and `best/`: as `final/`, the model with the best
  score so far, and evaluation.json, that score.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import CheckpointError, TrainingError, counted, first_line
from d2f.models.checkpoint import save_model
from d2f.models.lora import has_adapter, save_adapter
from d2f.models.storage import replaced_folder, write_json
from d2f.models.transformer import Transformer, filled_model
from d2f.provenance import describe_code
from d2f.training.config import TrainConfig, to_table, with_defaults
from d2f.training.evaluations import BEST_FILE, BEST_FOLDER, measure_of
from d2f.training.model_card import CardFacts, model_card
from d2f.training.optimizer import load_shards, load_whole, save_shards
from d2f.training.processes import DistributedModel, Processes

STATE_FILE = "training_state.pt"
RECIPE_FILE = "recipe.json"
_NAME = re.compile(r"checkpoint-(\d{8})")
# A checkpoint continues only the run that made it; other settings may change on resuming.
_IDENTITY = ("stage", "seed", "batch_size", "model", "data", "tokenizer", "lora", "evaluate")
_FREE = {
    "data": ("cache", "num_workers"),
    # Settings of `final/` alone.
    "model": ("output_dtype", "max_shard_mib", "max_new_tokens", "base_name"),
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip


def save_checkpoint(
    distributed: DistributedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    progress: Mapping[str, Any],
    processes: Processes,
) -> Path:
    """Write `checkpoint-<step>`, then remove all but the newest ones; all processes must come here.

    A folder of that name appears only when it is complete; where something could not be written
    (`TrainingError`, `CheckpointError`) those from before are as they were. If the optimizer's
    state is in shards, each process writes its own to a folder that all of them can write to.
    `progress` is the `step` and the `seconds` of training, which `load_state` gives back.
    """
    folder = checkpoint_folder(config, progress["step"])
    sharded = distributed.shards_optimizer
    rng = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(processes.device)
    state: dict[str, Any] = {**progress, "rng": rng}
    if processes.world_size > 1:
        state["process_rng"] = processes.share(rng)
    if not sharded:
        state["optimizer"] = optimizer.state_dict()
    with ExitStack() as stack:
        # Leaves without renaming where an error of any process ends the block.
        opened = processes.on_main(lambda: stack.enter_context(replaced_folder(folder, ["*"])))
        if not sharded:
            processes.on_main(lambda: _write_checkpoint(distributed.model, config, state, opened))
        else:
            new = processes.from_main(opened)
            assert new is not None
            require_shared(new, processes)
            save_shards(distributed.model, optimizer, new, processes)
            with distributed.whole(torch.device("cpu")) as model:
                processes.on_main(lambda: _write_checkpoint(model, config, state, new))
        processes.on_main(stack.close)
    processes.on_main(lambda: _remove_old(config))
    return folder


def require_shared(path: Path, processes: Processes) -> None:
    """Raise `TrainingError` unless what the main process made is there for all; all come here."""
    if not all(processes.share(path.exists())):
        raise TrainingError(
            f"not all processes see {path.parent}; sharded checkpoints need an output folder on a "
            "disk that the machines share"
        )


def checkpoint_folder(config: TrainConfig, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return Path(config.output) / f"checkpoint-{step:08d}"


def _write_checkpoint(
    model: Transformer | None, config: TrainConfig, state: dict[str, Any], folder: Path | None
) -> None:
    assert model is not None and folder is not None  # on the main process
    _save_weights(model, config, folder)
    try:
        torch.save(state, folder / STATE_FILE)
    except RuntimeError as error:  # what torch makes of a full disk
        raise TrainingError(
            f"cannot write {STATE_FILE}, perhaps for want of space on the disk: {first_line(error)}"
        ) from None
    write_json(folder / RECIPE_FILE, to_table(config))
    write_json(folder / "provenance.json", provenance())


@contextmanager
def saving(output: Path) -> Iterator[None]:
    """Add to the error of a save that fails what is left, and how to go on."""
    try:
        yield
    except (CheckpointError, TrainingError, OSError) as error:
        found = list_checkpoints(output)
        left = (
            f"{found[-1]} is whole: make room, and go on with the same command and --resume"
            if found
            else "there is no earlier checkpoint; make room, and start again"
        )
        raise TrainingError(f"{str(error).rstrip('.')}. {left}") from error


def _remove_old(config: TrainConfig) -> None:
    for old in list_checkpoints(Path(config.output))[: -config.keep_checkpoints]:
        shutil.rmtree(old, ignore_errors=True)
    # A process that is killed while it saves leaves these behind.
    for kind in ("new", "old"):
        for stale in Path(config.output).glob(f".checkpoint-*.{kind}-*"):
            shutil.rmtree(stale, ignore_errors=True)


def list_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not output.is_dir():
        return []
    return sorted(path for path in output.iterdir() if _NAME.fullmatch(path.name))


def find_checkpoint(
    config: TrainConfig, *, resume: bool, note: Callable[[str], object]
) -> Path | None:
    """The checkpoint to go on from, checked to be of this run; `note` is told what has changed.

    Raises:
        TrainingError: The output folder holds a run and `resume` is False, or holds none to resume,
            or the checkpoint is of another recipe.
    """
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
    table, recorded = to_table(config), with_defaults(recorded)
    for name in _IDENTITY:
        if _identity(recorded, name) != _identity(table, name):
            raise TrainingError(
                f"{found[-1]} was made with another '{name}' than this recipe's, so it cannot be "
                "resumed; start anew with another --output"
            )
    changed = [name for name in table if recorded.get(name) != table[name] and name != "output"]
    if changed:
        note(f"going on with other settings than before: {', '.join(changed)}")
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


def load_state(folder: Path) -> dict[str, Any]:
    """Optimizer, RNG and loop state of a checkpoint; never runs code from the file.

    Raises `TrainingError` if the file is missing or broken.
    """
    file = folder / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {**state, "step": state["step"], "seconds": state["seconds"]}
    except Exception as error:  # torch raises errors of many kinds for a broken file
        raise TrainingError(f"cannot resume from {file}: {error}") from None


def restore_optimizer(
    distributed: DistributedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    state: Mapping[str, Any],
    processes: Processes,
) -> None:
    """Give an optimizer the state of a checkpoint; all processes must come here.

    Raises `TrainingError` if it is the state of another model, or a part of it is missing.
    """
    if state["step"] == 0:
        return  # whatever state was written was made up to be written
    model = distributed.model
    if "optimizer" not in state:
        load_shards(model, optimizer, checkpoint_folder(config, state["step"]), processes)
        return
    try:
        load_whole(model, optimizer, state["optimizer"], shard=distributed.shards_optimizer)
    except (KeyError, ValueError) as error:
        raise TrainingError(f"the checkpoint does not fit this recipe: {error}") from None


def restore_random(
    state: Mapping[str, Any],
    config: TrainConfig,
    processes: Processes,
    note: Callable[[str], object],
) -> None:
    """Set this process's random state to that of a checkpoint, if the checkpoint has one of it."""
    states = state.get("process_rng", [state["rng"]])
    if len(states) != processes.world_size and config.lora is not None:
        note(
            f"the checkpoint is of {counted(len(states), 'process')} and goes on with "
            f"{processes.world_size}: dropout will differ"
        )
    if processes.rank >= len(states):
        return
    rng = states[processes.rank]
    torch.set_rng_state(rng["cpu"])
    if processes.device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], processes.device)


def save_result(
    model: Transformer,
    config: TrainConfig,
    tokenizer_folder: Path | None,
    facts: CardFacts,
    *,
    best: bool = False,
) -> Path:
    """Write `final/`: the model or adapter, its tokenizer, its decoding policy, a model card.

    All weights are converted to `model.output_dtype` in place, which ends their training. With
    `best` the folder is `best/`, with the evaluation beside, and the model stays as it is.
    """
    name = BEST_FOLDER if best else "final"
    if not has_adapter(model):
        dtype = getattr(torch, config.model.weights_dtype)
        if best:  # on the CPU, so that a second model needs no memory of the GPU
            given = dict(model.named_parameters())
            model = filled_model(model.spec, lambda name, _: given[name].detach().to("cpu", dtype))
        else:
            model = model.to(dtype)
    folder = Path(config.output) / name
    spec = model.spec
    policy = config.policy or spec.recommended_policy
    if policy is None and config.stage == "d2f":
        policy = DecodingPolicy()  # which says that the model is distilled
    with replaced_folder(folder, ["*"]) as new:
        limit = config.model.max_new_tokens or spec.recommended_max_new_tokens
        model.spec = replace(spec, recommended_policy=policy, recommended_max_new_tokens=limit)
        try:
            _save_weights(model, config, new, config.model.adapter_dtype)
        finally:
            model.spec = spec
        for file in _TOKENIZER_FILES:
            if tokenizer_folder is not None and (tokenizer_folder / file).exists():
                shutil.copyfile(tokenizer_folder / file, new / file)
        if best:
            evaluation = {**(facts.evaluation or {}), "measure": measure_of(config)}
            write_json(new / BEST_FILE, evaluation)
        card = model_card(config, spec, policy, facts)
        (new / "README.md").write_text(card, encoding="utf-8")
    return folder


def provenance() -> dict[str, Any]:
    """Versions, commit and GPU, for every run's files."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**describe_code(), "gpu": gpu}


def _save_weights(
    model: Transformer, config: TrainConfig, folder: Path, adapter_dtype: str = "float32"
) -> None:
    if has_adapter(model):
        save_adapter(
            model,
            folder,
            base_model=config.model.base_name or config.model.init or "",
            dtype=adapter_dtype,
            distilled=config.stage != "masked-diffusion",
        )
        return
    mib = config.model.max_shard_mib
    save_model(model, folder, max_shard_bytes=None if mib is None else mib * 2**20)

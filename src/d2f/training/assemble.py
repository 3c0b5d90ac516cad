"""The parts that a run is assembled from: its tokenizer, its models, its data."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from d2f.errors import ConfigError, TrainingError, counted, unknown_name
from d2f.hub import resolve_folder
from d2f.models.checkpoint import as_diffusion, load_model, read_spec
from d2f.models.families import config_from_spec, spec_from_config
from d2f.models.lora import adapter_parameters, attach_adapter, load_adapter, use_config
from d2f.models.lora_config import read_declaration
from d2f.models.lora_folder import with_adapter
from d2f.models.presets import build_model
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset, derive_seed, generator
from d2f.training.evaluations import HeldOut, hold_out
from d2f.training.optimizer import require_gradients
from d2f.training.processes import Processes
from d2f.training.sources import Note, encode_data, read_pairs
from d2f.training.tokenizer import train_tokenizer


def tokenizer_folder(config: TrainConfig) -> Path:
    """Find the folder of the run's tokenizer, which is trained now if the recipe asks for it.

    Raises `CheckpointError` if the folder or hub id holds none.
    """
    folder = find_tokenizer(config)
    if folder is not None:
        return folder
    settings = config.tokenizer
    assert settings is not None and settings.vocab_size is not None
    pairs = read_pairs(config.data, settings.num_samples)
    return train_tokenizer(
        (text for pair in pairs for text in pair.texts()),
        Path(config.output) / "tokenizer",
        vocab_size=settings.vocab_size,
        single_questions=not config.data.columns.conversations,
    )


def find_tokenizer(config: TrainConfig) -> Path | None:
    """Find the folder of the run's tokenizer; None where it is still to be trained.

    Raises `CheckpointError` if there is no such folder or hub id.
    """
    settings = config.tokenizer
    path = config.model.init if settings is None else settings.path
    if path is not None:
        return resolve_folder(path, weights=False)
    folder = Path(config.output) / "tokenizer"
    return folder if (folder / "tokenizer_config.json").exists() else None


def initial_spec(config: TrainConfig) -> ModelSpec:
    """Read the spec of the weights that the run starts from; the weights are not needed.

    Raises `ConfigError` for an unknown entry of `[model.config]`, `CheckpointError` without one.
    """
    if config.model.init is not None:
        spec = read_spec(resolve_folder(config.model.init, weights=False))
        adapter = config.model.init_adapter
        return spec if adapter is None else with_adapter(spec, resolve_folder(adapter))
    assert config.model.config is not None
    spec = spec_from_config(config.model.config, "[model.config]")
    known = config_from_spec(spec) | {"rope_parameters": None, "torch_dtype": None}
    for name in config.model.config:
        if name not in known:
            raise ConfigError(f"[model.config]: {unknown_name('key', name, known)}")
    return spec


def load_models(
    config: TrainConfig, tokenizer: Tokenizer, device: torch.device, checkpoint: Path | None
) -> tuple[Transformer, Transformer | None]:
    """Load the model to train, from its start or a checkpoint, and a teacher that is another one.

    Without another one, the teacher is the model with its adapter off, or the stage has none.
    Raises `ConfigError` if architecture, tokenizer and recipe do not fit, and `CheckpointError`.
    """
    full = config.lora is None
    at_start = checkpoint is None or not full
    model = _initial(config, tokenizer, device) if at_start else None
    teacher = _teacher(config, tokenizer, device, model) if config.own_teacher else None
    if model is None:
        assert checkpoint is not None
        model = load_model(checkpoint, device=device, dtype=config.model.dtype)
    _check_vocabulary(model, tokenizer, config)
    if teacher is not None:
        _check_teacher(model, teacher)
        teacher.eval().requires_grad_(False)
    if config.lora is None:
        require_gradients(model, config.model)
    elif checkpoint is not None or config.model.init_adapter is not None:
        load_adapter(model, checkpoint or str(config.model.init_adapter), merge=False)
        use_config(model, config.lora)
        for parameter in adapter_parameters(model):
            parameter.requires_grad_(True)
    else:
        attach_adapter(model, config.lora, generator(config.seed, "adapter"))
    return model, teacher


def _teacher(
    config: TrainConfig, tokenizer: Tokenizer, device: torch.device, model: Transformer | None
) -> Transformer:
    """Load the other model that teaches; `model` is the start of the run, if it is in memory."""
    settings = config.model
    if settings.teacher != "init":
        return load_model(
            settings.teacher, settings.teacher_adapter, device=device, dtype=settings.dtype
        )
    if config.lora is None:
        return copy.deepcopy(model or _initial(config, tokenizer, device))
    # The student's own adapter will change.
    assert settings.init is not None
    return load_model(settings.init, settings.init_adapter, device, settings.dtype)


def _initial(config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> Transformer:
    """The weights that the run starts from, of the kind that the stage trains."""
    settings = config.model
    adapter = settings.init_adapter
    declared = None if adapter is None else read_declaration(resolve_folder(adapter))
    if settings.init is not None:
        # One that is trained on stays beside the weights.
        merged = adapter if config.lora is None else None
        model = load_model(settings.init, merged, device=device, dtype=settings.dtype)
    else:
        spec = initial_spec(config)
        seed = derive_seed(config.seed, "weights")
        model = build_model(spec, seed=seed, device=device, dtype=settings.dtype)
    causal = model.spec.architecture.causal
    if config.stage == "autoregressive":
        if not causal:
            raise ConfigError(f"{model.spec.architecture.name} is no autoregressive model")
        return model
    taught = None if declared is None else declared.mask_token_id
    candidates = (
        settings.mask_token_id, taught, model.spec.mask_token_id, tokenizer.mask_token_id,
    )  # fmt: skip
    mask = next((token for token in candidates if token is not None), None)
    if mask is None:
        raise ConfigError(
            f"neither {settings.init or '[model.config]'} nor the tokenizer names a mask token; "
            "set model.mask_token_id"
        )
    if causal:
        if config.has_teacher and settings.teacher == "init" and taught is None:
            raise ConfigError(
                f"{settings.init or '[model.config]'} is autoregressive, and nothing has taught it "
                "to fill masks, so it cannot be the teacher; name a diffusion model of the same "
                "tokenizer as model.teacher, or train on the data with "
                'objective.objective = "cross_entropy"'
            )
        return as_diffusion(model, mask_token_id=mask)
    model.spec = replace(model.spec, mask_token_id=mask)
    return model


def _check_vocabulary(model: Transformer, tokenizer: Tokenizer, config: TrainConfig) -> None:
    spec = model.spec
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer has {counted(tokenizer.vocab_size, 'token')}, the model "
            f"{spec.vocab_size}"
        )
    if not spec.eos_token_ids:
        raise ConfigError("the model's config names no eos_token_id")
    own = config.tokenizer is not None and config.tokenizer.vocab_size is not None
    if own and tokenizer.eos_token_id != spec.eos_token_ids[0]:
        raise ConfigError(
            f"eos_token_id is {tokenizer.eos_token_id} in the tokenizer and "
            f"{spec.eos_token_ids[0]} in the model"
        )


def _check_teacher(model: Transformer, teacher: Transformer) -> None:
    if teacher.spec.vocab_size != model.spec.vocab_size or teacher.spec.architecture.causal:
        raise ConfigError(
            f"the teacher, a {teacher.spec.architecture.name} of "
            f"{counted(teacher.spec.vocab_size, 'token')}, "
            f"cannot teach a {model.spec.architecture.name} of {model.spec.vocab_size}"
        )
    if teacher.spec.mask_token_id not in (None, model.spec.mask_token_id):
        raise ConfigError(
            f"the teacher's mask token is {teacher.spec.mask_token_id}, the student's "
            f"{model.spec.mask_token_id}; set model.mask_token_id to the teacher's"
        )


def load_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    folder: Path,
    model: Transformer,
    processes: Processes,
    note: Note,
) -> tuple[TokenDataset, list[HeldOut]]:
    """Encode the run's data for a model, and take out the samples that are evaluated on.

    All processes must come here. `folder` holds the tokenizer, for worker processes; `note` is told
    of bad rows, and what became of the others. Raises `ConfigError` if sequences are longer than
    the model's positions, and `TrainingError` if data cannot be read, or processes read others.
    """
    spec, settings = model.spec, config.data
    if settings.sequence_length > spec.max_positions:
        raise ConfigError(
            f"data.sequence_length is {settings.sequence_length}; the model has "
            f"{counted(spec.max_positions, 'position')}"
        )
    with processes.first_one():
        encoded = encode_data(settings, tokenizer, folder, note, spec)
        dataset = TokenDataset(encoded, settings, eos_token_id=spec.eos_token_ids[0])
    sizes = processes.share((dataset.counts()["rows"], len(dataset), dataset.mean_length))
    if len(set(sizes)) > 1:
        raise TrainingError(
            "the processes read different data; give each machine the same files, or a shared disk"
        )
    held_out = []
    if config.evaluate is not None and config.evaluate.held_out is not None:
        held_out = hold_out(dataset, config.evaluate.held_out, config.evaluate.seed)
    note(dataset.text())
    return dataset, held_out

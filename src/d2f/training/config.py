"""The settings of a training run, and the recipes that write them down.

A recipe is a TOML file with the fields of `TrainConfig`; its tables are the classes in
`d2f.training.sections`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2f.diffusion.policy import DecodingPolicy
from d2f.errors import ConfigError, counted
from d2f.models.lora import LoraConfig
from d2f.recipe import at_least, from_table, one_of, read_recipe
from d2f.training import sections

STAGES = ("autoregressive", "masked-diffusion", "d2f")
SHARDINGS = ("none", "full")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: the top level of a recipe.

    Raises `ConfigError` for values out of range and for tables that the stage does not use.

    Example:
        >>> from d2f.training.sections import DataConfig, ModelConfig, OptimizerConfig
        >>> TrainConfig(
        ...     stage="autoregressive", output="runs/base", steps=100, batch_size=8,
        ...     model=ModelConfig(init="Qwen/Qwen2.5-0.5B"), optimizer=OptimizerConfig(lr=1e-4),
        ...     data=DataConfig(kind="problems", num_problems=1000, sequence_length=256),
        ... ).log_every
        10
    """

    stage: str
    """autoregressive, masked-diffusion or d2f."""
    output: str
    """Folder for checkpoints, logs and the final model."""
    steps: int
    """Updates of the weights; with `max_seconds`, at most."""
    batch_size: int
    """Sequences of an update."""
    micro_batch_size: int | None = None
    """Sequences in memory of a process at once; none: its whole share of the batch. The gradient is
    the same."""
    sharding: str = "none"
    """Weights of each of several processes: none, each holds all (DDP); full, each holds a part of
    the weights, gradients and optimizer state (FSDP2). The result is the same."""
    max_seconds: float | None = None
    """End, and drive the learning rate, by the seconds since the first step instead of by steps.
    Such a run cannot be repeated bit for bit."""
    seed: int = 0
    """Seed of weights, order of samples, noise and dropout."""
    precision: str = "float32"
    """Type of the products: float32, or bfloat16 (autocast; the weights stay as they are)."""
    compile: bool = True
    """Compile the forward and backward passes on a GPU."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass, which computes the layer once more: far
    less memory for a third more work. The gradients are the same."""
    loss_memory_mib: int = 384
    """Memory in MiB for the loss over the vocabulary; logits that need more are computed in chunks
    of positions. The result is the same; on a GPU with `compile`, what fits is compiled whole."""
    log_every: int = 10
    """Steps between lines of the log."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; none: only when the run is stopped."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept."""
    model: sections.ModelConfig
    data: sections.DataConfig
    optimizer: sections.OptimizerConfig
    tokenizer: sections.TokenizerConfig | None = None
    lora: LoraConfig | None = None
    """Train a LoRA adapter with these settings; none: all weights. In a recipe of stage d2f an
    adapter with the default settings is trained unless it says `lora = false`."""
    noise: sections.NoiseConfig | None = None
    objective: sections.ObjectiveConfig | None = None
    sample: sections.SampleConfig | None = None
    evaluate: sections.EvaluateConfig | None = None
    trackers: tuple[str, ...] = ()
    """Names of accelerate's trackers that get the log as well: "tensorboard", "wandb", …"""
    policy: DecodingPolicy | None = None
    """`[policy]`: the decoding policy that the final model carries."""

    def __post_init__(self) -> None:
        one_of("stage", self.stage, STAGES)
        one_of("precision", self.precision, sections.DTYPES)
        one_of("sharding", self.sharding, SHARDINGS)
        for name in (
            "steps", "batch_size", "micro_batch_size", "max_seconds", "log_every",
            "checkpoint_every", "keep_checkpoints", "loss_memory_mib",
        ):  # fmt: skip
            at_least(name, getattr(self, name), 1)
        self._check_tables()
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ConfigError(
                f"batch_size {self.batch_size} is no multiple of micro_batch_size "
                f"{self.micro_batch_size}"
            )
        if self.model.dtype != "float32" and self.lora is None:
            raise ConfigError(
                "model.dtype bfloat16 is for frozen weights below a [lora] adapter; to train all "
                'weights faster, keep float32 and set precision = "bfloat16"'
            )
        if not self.model.train_embeddings and self.lora is not None:
            raise ConfigError(
                "model.train_embeddings = false is for runs that train all weights (lora = false); "
                "an adapter leaves the embeddings as they are"
            )
        if self.model.output_dtype == "int8" and self.lora is None:
            raise ConfigError(
                'model.output_dtype "int8" is for the adapter of a [lora] table; all weights are '
                'stored as "bfloat16" or "float32"'
            )

    @property
    def has_teacher(self) -> bool:
        """Whether the objective compares with a teacher, rather than with the data."""
        return self.stage == "d2f" and self.distillation.objective != "cross_entropy"

    @property
    def distillation(self) -> sections.ObjectiveConfig:
        """`[objective]`, or its defaults where the recipe leaves it out."""
        return self.objective or sections.ObjectiveConfig()

    @property
    def own_teacher(self) -> bool:
        """Whether the teacher is another model than the student with its adapter off."""
        model = self.model
        other = self.lora is None or model.teacher != "init" or model.init_adapter is not None
        return self.has_teacher and other

    def micro_batches(self, processes: int = 1) -> tuple[int, int]:
        """Give the sequences of a micro-batch, and each process's micro-batches of an update.

        Raises `ConfigError` if the batch cannot be divided among the processes.
        """
        size = self.micro_batch_size or self.batch_size // processes
        if size == 0 or self.batch_size % (size * processes):
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be divided evenly among "
                f"{counted(processes, 'process')}"
                + (f" with micro_batch_size {size}" if self.micro_batch_size else "")
            )
        return size, self.batch_size // (size * processes)

    def _check_tables(self) -> None:
        noise = self.noise
        if (noise is None) != (self.stage == "autoregressive"):
            raise ConfigError(
                f"stage {self.stage} {'needs' if noise is None else 'has no use for'} [noise]"
            )
        uniform = noise is not None and noise.kind == "uniform"
        if noise is not None and uniform != (self.stage == "masked-diffusion"):
            raise ConfigError(f'noise.kind "{noise.kind}" does not fit stage {self.stage}')
        ends = noise is None or noise.random_end or not noise.train_on_eos_blocks
        if self.data.padding == "packed" and noise is not None and noise.random_end:
            raise ConfigError(
                'data.padding = "packed" needs to know where samples end before the run; with '
                'noise.random_end each step draws that anew. Set padding to "full" or "longest", '
                "or random_end and train_on_eos_blocks to false"
            )
        if self.data.padding != "full" and not ends:
            raise ConfigError(
                f'data.padding = "{self.data.padding}" has nothing to leave out while '
                "noise.train_on_eos_blocks trains on EOS up to data.sequence_length; set that to "
                'false, or padding to "full"'
            )
        if self.stage != "d2f" and (self.objective is not None or self.model.teacher != "init"):
            raise ConfigError(f"stage {self.stage} has no use for [objective] or model.teacher")
        hard = self.objective is not None and self.objective.objective == "cross_entropy"
        if hard and self.model.teacher != "init":
            raise ConfigError("objective cross_entropy trains on the data; it has no model.teacher")
        strategy = self.evaluate.strategy if self.evaluate else None
        if strategy and (strategy == "autoregressive") != (self.stage == "autoregressive"):
            raise ConfigError(
                f'evaluate.strategy "{strategy}" cannot decode a model of stage {self.stage}'
            )
        if self.tokenizer is None and self.model.init is None:
            raise ConfigError("new weights need a [tokenizer]")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a training recipe.

    Args:
        path: A TOML file.
        overrides: Settings that replace the file's, as `key=value` or `table.key=value`; the value
            is TOML, and taken as text where it is not.

    Raises:
        ConfigError: The file is missing or no TOML; an unknown key or table (the message names the
            nearest known one); a missing, wrongly typed or impossible value.

    Example:
        >>> from tempfile import NamedTemporaryFile
        >>> with NamedTemporaryFile("w", suffix=".toml") as file:
        ...     _ = file.write("stege = 'd2f'"); file.flush()
        ...     load_recipe(file.name)
        Traceback (most recent call last):
        d2f.errors.ConfigError: ...: unknown key 'stege'; did you mean 'stage'? ...
    """
    table = read_recipe(path, overrides)
    # TOML has no word for "none"; false says it.
    if table.setdefault("lora", {} if table.get("stage") == "d2f" else False) is False:
        del table["lora"]
    return from_table(TrainConfig, _renewed(table), str(path))


def with_defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """Add today's settings, at their defaults, to a table that `to_table` once gave."""
    try:
        return to_table(from_table(TrainConfig, _renewed(table), "recipe.json"))
    except ConfigError:
        return dict(table)


def _renewed(table: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the settings of an older recipe: columns had other names in version 0.1."""
    data = table.get("data")
    if not isinstance(data, Mapping):
        return dict(table)
    old = {"prompt_field": "prompt", "response_field": "response"}
    columns = {new: data[name] for name, new in old.items() if name in data}
    rest = {name: value for name, value in data.items() if name not in old}
    if columns:
        given = rest.get("columns", {})
        if not isinstance(given, Mapping) or columns.keys() & given.keys():
            raise ConfigError(
                "data.prompt_field and data.response_field are older words for data.columns.prompt "
                "and data.columns.response; give one of them only"
            )
        rest["columns"] = {**columns, **given}
    return {**table, "data": rest}


def to_table(config: TrainConfig) -> dict[str, Any]:
    """Give the settings as plain JSON values, defaults included, as checkpoints record them."""
    return json.loads(json.dumps(asdict(config)))

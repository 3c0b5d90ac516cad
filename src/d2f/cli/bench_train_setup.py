"""The models, recipe and device that `d2f bench train` measures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.cli.bench_options import Source, describe_model, source_label
from d2f.errors import ConfigError, counted

if TYPE_CHECKING:
    from d2f.cli.step_bench import StepBench
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.training.config import TrainConfig
    from d2f.training.processes import Processes

_LONGEST = 1024
# recipes/shipped_student.toml and recipes/distill_llada_8b_instruct.toml
_SHIPPED: dict[str, Any] = {"length": 272, "loss_memory": 2048, "micro_batch": "8"}
_SHIPPED_NOISE: dict[str, Any] = {"kind": "original", "low": 0.2, "high": 1.0, "block_size": 16}
_NOISE: dict[str, Any] = {"kind": "monotone", "low": 0.3, "high": 0.7, "block_size": 16}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Source):
    """The options of `d2f bench train` that all measured rows share."""

    length: Annotated[
        int | None, typer.Option(help="Tokens of a sequence. Default: 1024; shipped: 272.", min=8)
    ] = None
    lora: Annotated[
        int | None, typer.Option(help="Rank of the adapter. Default: 32; shipped: --full.", min=1)
    ] = None
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False
    dropout: Annotated[
        float, typer.Option(help="Of the adapter; the recipes have 0.1.", min=0, max=1)
    ] = 0.0
    sharding: Annotated[str, typer.Option(help="On several processes: none or full.")] = "none"
    loss_memory: Annotated[
        int | None, typer.Option(help="loss_memory_mib of the recipe, in MiB.", min=1)
    ] = None
    lr: Annotated[float, typer.Option(help="Learning rate.", min=0)] = 1e-4
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="On a GPU.")] = True

    def setup(self, processes: Processes, dtype: str) -> TrainSetup:
        """Fill in the defaults that depend on the model."""
        if self.full and self.lora is not None:
            raise ConfigError("--lora and --full exclude each other")
        shipped = self.shape is None and self.model is None
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "full"}
        given["length"] = self.length or (_SHIPPED["length"] if shipped else _LONGEST)
        given["lora"] = self.lora or (None if self.full or shipped else 32)
        given["loss_memory"] = self.loss_memory or (_SHIPPED["loss_memory"] if shipped else 384)
        return TrainSetup(**given, processes=processes, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """Everything that the measured rows share.

    An update has one micro-batch for each process.
    """

    shape: str | None
    model: str | None
    """Folder or hub id; None without a shape: the shipped student and its teacher."""
    layers: int | None
    length: int
    lora: int | None
    """Rank; None: all weights are trained."""
    dropout: float
    sharding: str
    loss_memory: int
    lr: float
    compiled: bool
    processes: Processes
    dtype: str
    objective: str = "forward_kl"

    @property
    def default_micro_batch(self) -> str:
        """The sizes that are measured without `--micro-batch`."""
        return _SHIPPED["micro_batch"] if self._shipped else "1,4"

    @property
    def device(self) -> str:
        """The device of this process."""
        return str(self.processes.device)

    @property
    def _shipped(self) -> bool:
        return self.shape is None and self.model is None

    def to_dict(self) -> dict[str, Any]:
        """For a result file."""
        names = (
            "length", "lora", "dropout", "sharding", "loss_memory", "lr", "compiled", "objective",
        )  # fmt: skip
        noise = _SHIPPED_NOISE if self._shipped else _NOISE
        return {
            **{name: getattr(self, name) for name in names},
            "noise": noise,
            "processes": self.processes.world_size,
        }

    def config(self, micro_batch: int, checkpointing: bool, output: str) -> TrainConfig:
        """The recipe of a row."""
        from d2f.models.lora import LoraConfig
        from d2f.training.config import TrainConfig
        from d2f.training.sections import (
            DataConfig,
            ModelConfig,
            NoiseConfig,
            ObjectiveConfig,
            OptimizerConfig,
        )

        return TrainConfig(
            stage="d2f",
            output=output,
            steps=2**20,
            log_every=2**20,
            batch_size=micro_batch * self.processes.world_size,
            micro_batch_size=micro_batch,
            precision=self.dtype,
            compile=self.compiled,
            loss_memory_mib=self.loss_memory,
            activation_checkpointing=checkpointing,
            sharding=self.sharding,
            # Neither weights nor data are read: both are made here.
            model=ModelConfig(init="unused", dtype=self.dtype if self.lora else "float32"),
            data=DataConfig(kind="problems", num_problems=1, sequence_length=self.length),
            lora=LoraConfig(r=self.lora, alpha=self.lora, dropout=self.dropout)
            if self.lora
            else None,
            noise=NoiseConfig(**(_SHIPPED_NOISE if self._shipped else _NOISE)),
            objective=ObjectiveConfig(objective=self.objective),
            optimizer=OptimizerConfig(lr=self.lr),
        )

    @contextmanager
    def bench(self, micro_batch: int, checkpointing: bool) -> Iterator[StepBench]:
        """Models, optimizer and steps of a row, all freed at the end."""
        from d2f.cli.step_bench import StepBench, free_memory

        free_memory()
        with TemporaryDirectory(prefix="d2f-bench-") as folder:
            config = self.config(micro_batch, checkpointing, folder)
            student, teacher = self._models(config)
            yield StepBench(config, student, teacher, processes=self.processes)

    def _models(self, config: TrainConfig) -> tuple[Transformer, Transformer | None]:
        """The student with what it trains, and the teacher if it is another model."""
        from d2f.models.checkpoint import load_model
        from d2f.models.lora import attach_adapter
        from d2f.shipped import shipped_model
        from d2f.training.data import generator

        student = self._student(config.model.dtype)
        self._check(student.spec)
        if config.lora is not None:
            attach_adapter(student, config.lora, generator(config.seed, "adapter"))
            return student, None
        if self._shipped:
            folder = shipped_model("teacher")
            teacher = load_model(folder, device=self.device, dtype=config.model.dtype)
        else:
            teacher = copy.deepcopy(student)
        return student.requires_grad_(True), teacher.eval().requires_grad_(False)

    def _student(self, dtype: str) -> Transformer:
        from d2f.models.checkpoint import load_model
        from d2f.models.presets import preset_spec, random_model
        from d2f.shipped import shipped_model

        if self.shape is not None:
            spec = preset_spec(self.shape, num_layers=self.layers)
            return random_model(spec, device=self.device, dtype=dtype)
        source = self.model or shipped_model("student")
        return load_model(source, device=self.device, dtype=dtype)

    def check(self) -> None:
        """Refuse what can be seen to be wrong before anything is measured."""
        from d2f.models.presets import preset_spec

        self.config(1, False, "unused")
        if self.shape is not None:
            self._check(preset_spec(self.shape, num_layers=self.layers))

    def _check(self, spec: ModelSpec) -> None:
        if spec.architecture.causal:
            raise ConfigError(
                f"{self.shape or self.model} is autoregressive; the measured stage distils "
                "diffusion models, such as llada-8b and dream-7b"
            )
        if self.length > spec.max_positions:
            raise ConfigError(
                f"--length {self.length}: the model has {counted(spec.max_positions, 'position')}"
            )

    def describe(self, student: Transformer) -> dict[str, Any]:
        """Describe the measured model, for a result file."""
        from d2f.shipped import shipped_model

        name = self.shape or source_label(self.model or str(shipped_model("student")))
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        return describe_model(student, name, random=self.shape is not None) | {
            "num_trained_parameters": trained
        }

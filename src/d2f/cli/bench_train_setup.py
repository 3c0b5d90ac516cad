"""The models, recipe and device that `d2f bench train` measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2f.cli.bench_options import describe_model, source_label
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

    @classmethod
    def of(
        cls,
        shape: str | None,
        model: str | None,
        *,
        layers: int | None,
        length: int | None,
        lora: int | None,
        full: bool,
        loss_memory: int | None,
        **others: Any,
    ) -> TrainSetup:
        """From the options, with the defaults that depend on the model."""
        if full and lora is not None:
            raise ConfigError("--lora and --full exclude each other")
        if layers is not None and shape is None:
            raise ConfigError("--layers: only a --shape can be cut")
        shipped = shape is None and model is None
        if not full and lora is None and not shipped:
            lora = 32
        return cls(
            shape=shape,
            model=model,
            layers=layers,
            length=length or (_SHIPPED["length"] if shipped else _LONGEST),
            lora=lora,
            loss_memory=loss_memory or (_SHIPPED["loss_memory"] if shipped else 384),
            **others,
        )

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
        from tempfile import TemporaryDirectory

        from d2f.cli.step_bench import StepBench, free_memory

        free_memory()
        with TemporaryDirectory(prefix="d2f-bench-") as folder:
            config = self.config(micro_batch, checkpointing, folder)
            student, teacher = self._models(config)
            yield StepBench(config, student, teacher, processes=self.processes)

    def _models(self, config: TrainConfig) -> tuple[Transformer, Transformer | None]:
        """The student with what it trains, and the teacher if it is another model."""
        import copy

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

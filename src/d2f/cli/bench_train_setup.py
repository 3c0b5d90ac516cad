"""The models, recipe and device of `d2f bench train`, and its measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from d2f.cli.bench_options import describe_model, source_label
from d2f.cli.bench_train import TrainOptions
from d2f.cli.console import log
from d2f.cli.step_bench import StepBench, free_memory, largest, survives
from d2f.errors import ConfigError, counted
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.rates import Rates, nominal_bf16_rate
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig, attach_adapter
from d2f.models.presets import preset_spec
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.shipped import shipped_model
from d2f.training.config import TrainConfig
from d2f.training.data import generator
from d2f.training.processes import Processes
from d2f.training.sections import (
    DataConfig,
    ModelConfig,
    NoiseConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

# recipes/shipped_student.toml and recipes/distill_llada_8b_instruct.toml
_SHIPPED_NOISE: dict[str, Any] = {"kind": "original", "low": 0.2, "high": 1.0, "block_size": 16}
_NOISE: dict[str, Any] = {"kind": "monotone", "low": 0.3, "high": 0.7, "block_size": 16}

_OBJECTIVE = "forward_kl"
_REPORTED = (1, 10, 50, 100)
"""Steps on the repeated batch whose loss is shown, and the last."""
_MOST_TRIED = 32
"""Largest size that `--micro-batch max` tries: each try compiles, and smaller ones fill a GPU."""


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """Everything that the measured rows share.

    An update has one micro-batch for each process.
    """

    options: TrainOptions
    processes: Processes
    dtype: str
    length: int
    lora: int | None
    """Rank; None: all weights are trained."""
    loss_memory: int

    @classmethod
    def of(cls, options: TrainOptions, processes: Processes, dtype: str) -> TrainSetup:
        """Fill in the defaults of the options that depend on the model."""
        if options.full and options.lora is not None:
            raise ConfigError("--lora and --full exclude each other")
        shipped = options.shipped
        return cls(
            options=options,
            processes=processes,
            dtype=dtype,
            length=options.length or (272 if shipped else 1024),
            lora=options.lora or (None if options.full or shipped else 32),
            loss_memory=options.loss_memory or (2048 if shipped else 384),
        )

    @property
    def device(self) -> str:
        """The device of this process."""
        return str(self.processes.device)

    @property
    def _noise(self) -> dict[str, Any]:
        return _SHIPPED_NOISE if self.options.shipped else _NOISE

    def to_dict(self) -> dict[str, Any]:
        """Return the setup for a result file."""
        own, given = ("length", "lora", "loss_memory"), ("dropout", "sharding", "lr", "compiled")
        return {
            **{name: getattr(self, name) for name in own},
            **{name: getattr(self.options, name) for name in given},
            "objective": _OBJECTIVE,
            "noise": self._noise,
            "processes": self.processes.world_size,
        }

    def config(self, micro_batch: int, checkpointing: bool, output: str) -> TrainConfig:
        """The recipe of a row."""
        options, lora = self.options, None
        if self.lora is not None:
            lora = LoraConfig(r=self.lora, alpha=self.lora, dropout=options.dropout)
        return TrainConfig(
            stage="d2f",
            output=output,
            steps=2**20,
            log_every=2**20,
            batch_size=micro_batch * self.processes.world_size,
            micro_batch_size=micro_batch,
            precision=self.dtype,
            compile=options.compiled,
            loss_memory_mib=self.loss_memory,
            activation_checkpointing=checkpointing,
            sharding=options.sharding,
            # Neither weights nor data are read: both are made here.
            model=ModelConfig(init="unused", dtype=self.dtype if self.lora else "float32"),
            data=DataConfig(kind="problems", num_problems=1, sequence_length=self.length),
            lora=lora,
            noise=NoiseConfig(**self._noise),
            objective=ObjectiveConfig(objective=_OBJECTIVE),
            optimizer=OptimizerConfig(lr=options.lr),
        )

    @contextmanager
    def bench(self, micro_batch: int, checkpointing: bool) -> Iterator[StepBench]:
        """Models, optimizer and steps of a row, all freed at the end."""
        free_memory()
        with TemporaryDirectory(prefix="d2f-bench-") as folder:
            config = self.config(micro_batch, checkpointing, folder)
            student, teacher = self._models(config)
            yield StepBench(config, student, teacher, processes=self.processes)

    def _models(self, config: TrainConfig) -> tuple[Transformer, Transformer | None]:
        """The student with what it trains, and the teacher if it is another model."""
        student, _ = self.options.load(self.device, config.model.dtype)
        self._check(student.spec)
        if config.lora is not None:
            attach_adapter(student, config.lora, generator(config.seed, "adapter"))
            return student, None
        if self.options.shipped:
            folder = shipped_model("teacher")
            teacher = load_model(folder, device=self.device, dtype=config.model.dtype)
        else:
            teacher = copy.deepcopy(student)
        return student.requires_grad_(True), teacher.eval().requires_grad_(False)

    def check(self) -> None:
        """Refuse what can be seen to be wrong before anything is measured."""
        self.config(1, False, "unused")
        shape = self.options.shape
        if shape is not None:
            self._check(preset_spec(shape, num_layers=self.options.layers))

    def _check(self, spec: ModelSpec) -> None:
        name = self.options.shape or self.options.model
        if spec.architecture.causal:
            raise ConfigError(
                f"{name} is autoregressive; the measured stage distils "
                "diffusion models, such as llada-8b and dream-7b"
            )
        if self.length > spec.max_positions:
            raise ConfigError(
                f"--length {self.length}: the model has {counted(spec.max_positions, 'position')}"
            )

    def describe(self, student: Transformer) -> dict[str, Any]:
        """Describe the measured model, for a result file."""
        shape, model = self.options.shape, self.options.model
        name = shape or source_label(model or str(shipped_model("student")))
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        return describe_model(student, name, random=shape is not None) | {
            "num_trained_parameters": trained
        }


def measure(
    setup: TrainSetup,
    rates: Rates,
    plan: list[tuple[int | None, bool]],
    steps: int,
    repeat_batch: int,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All rows, and the run on one batch; what there is is saved after each row."""
    report: dict[str, Any] = {
        "environment": describe_environment(device=setup.device, dtype=setup.dtype),
        "model": {},
        "settings": setup.to_dict(),
        "rates": rates.to_dict(),
        "rows": [],
        "largest_micro_batch": [],
        "repeat": {} if repeat_batch else None,
    }
    for number, (size, checkpointing) in enumerate(plan, 1):
        if size is None:
            size = _largest(setup, checkpointing)
            found = {"micro_batch": size, "checkpointing": checkpointing}
            report["largest_micro_batch"].append(found | {"at_least": size == _MOST_TRIED})
        if size > 0:
            _say(setup, f"micro-batch {size}{', recomputing' * checkpointing} …")
            how = size, checkpointing
            report["rows"].append(_row(setup, rates, how, steps, repeat_batch, report))
        save(report | {"complete": number == len(plan)})
    if not report["model"]:
        raise ConfigError("not even the model fits into the memory; cut it by --layers")
    return report


def _row(
    setup: TrainSetup,
    rates: Rates,
    how: tuple[int, bool],
    steps: int,
    repeat_batch: int,
    report: dict[str, Any],
) -> dict[str, Any]:
    """One setting, measured; the first also says what the model is and repeats a batch."""
    row: dict[str, Any] = {"micro_batch": how[0], "checkpointing": how[1]}

    def run() -> None:
        with setup.bench(*how) as bench:
            report["model"] = setup.describe(bench.trainer.student)
            if report["repeat"] == {}:
                # First, as it is about fresh weights; what it leaves is as fast.
                report["repeat"] = row | _repeat(setup, bench, repeat_batch)
            row.update(_costs(setup, bench, rates, steps))

    if setup.processes.world_size == 1:
        row["fits"] = survives(run)
    else:
        # All would have to agree that one lacks memory; here they end with its error.
        run()
        row["fits"] = True
    return row


def _say(setup: TrainSetup, text: str) -> None:
    if setup.processes.is_main:
        log.print(text, style="dim")


def _largest(setup: TrainSetup, checkpointing: bool) -> int:
    """Largest micro-batch of which two steps run."""

    def fits(size: int) -> bool:
        def run() -> None:
            with setup.bench(size, checkpointing) as bench:
                bench.time(1, num_warm_up=1)

        found = survives(run)
        _say(setup, f"micro-batch {size} {'fits' if found else 'does not fit'}")
        return found

    return largest(fits, first=4, most=_MOST_TRIED)


def _costs(setup: TrainSetup, bench: StepBench, rates: Rates, steps: int) -> dict[str, Any]:
    processes = setup.processes
    bench.peak_memory()
    times = bench.time(steps)
    peaks = processes.share(bench.peak_memory())
    mean = max(processes.share(times.mean))
    flops, dense = bench.flops(), bench.flops(only_visible=False)
    processor = describe_environment(device=setup.device, dtype=setup.dtype)["processor"]
    nominal = nominal_bf16_rate(processor) if setup.dtype == "bfloat16" else None
    tokens = bench.config.batch_size * bench.config.data.sequence_length
    return {
        "seconds": asdict(times),
        "milliseconds": 1000 * mean,
        "tokens_per_second": tokens / mean,
        "flops": flops.to_dict(),
        "flops_all_pairs": dense.total,
        "nominal_flops_per_second": nominal,
        "utilisation": {
            "nominal": flops.total / mean / nominal if nominal else None,
            "nominal_all_pairs": dense.total / mean / nominal if nominal else None,
            "measured": flops.total / mean / rates.matmul_flops_per_second,
        },
        "phases_ms": bench.phases(max(steps // 2, 1)),
        "loss_in_student": not bench.trainer.loss.selects,
        "peak_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "peak_bytes_of_each": peaks,
        "loss_peak_bytes": bench.loss_memory(),
        "num_counted": bench.num_counted,
    }


def _repeat(setup: TrainSetup, bench: StepBench, num_steps: int) -> dict[str, Any]:
    """Train on one batch, and hold the loss against the least that there is."""
    losses = bench.repeat(num_steps)
    shown = sorted({n for n in _REPORTED if n <= num_steps} | {num_steps})
    return {
        "num_steps": num_steps,
        "lr": setup.options.lr,
        "objective": _OBJECTIVE,
        "floor": bench.floor(),
        "loss_at": {str(n): losses[n - 1] for n in shown},
        "losses": losses,
    }

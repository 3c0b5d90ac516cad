"""A tiny run: short sequences of a pattern, a tiny model, any stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d2f.models.lora import attach_adapter
from d2f.testing import tiny_model, write_checkpoint, write_tokenizer
from d2f.testing.tiny import EOS_TOKEN_ID
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset
from d2f.training.optimizer import require_gradients
from d2f.training.run_log import Reporter, read_log
from d2f.training.sections import DataConfig, ModelConfig, NoiseConfig, OptimizerConfig
from d2f.training.step_inputs import StepInputs
from d2f.training.token_cache import Encoded
from d2f.training.trainer import Trainer

NOISE = {
    "autoregressive": None,
    "masked-diffusion": NoiseConfig(kind="uniform", low=0.001, high=1.0, block_size=4),
    "d2f": NoiseConfig(kind="original", low=0.2, high=0.7, block_size=4),
}
FAMILY = {"autoregressive": "qwen2", "masked-diffusion": "llada", "d2f": "Dream"}


def make_config(output: Any, stage: str, **overrides: Any) -> TrainConfig:
    config = TrainConfig(
        stage=stage,
        output=str(output),
        steps=6,
        batch_size=8,
        log_every=1,
        model=ModelConfig(init="unused"),
        data=DataConfig(kind="problems", num_problems=1, sequence_length=24),
        optimizer=OptimizerConfig(lr=3e-3),
        noise=NOISE[stage],
    )
    return replace(config, **overrides)


def make_dataset(config: TrainConfig, num_samples: int = 40) -> TokenDataset:
    """Prompts of 1 to 4 tokens; the response counts on from the last of them."""
    encoded = Encoded()
    for i in range(num_samples):
        size = 1 + i % 4
        prompt = [10 + i % 7] * size
        response = [prompt[-1] + 1 + k for k in range(6 + i % 5)]
        encoded.tokens.extend(prompt + response)
        encoded.prompt_lengths.append(len(prompt))
        encoded.response_lengths.append(len(response))
    return TokenDataset(encoded, config.data, eos_token_id=EOS_TOKEN_ID)


def make_trainer(config: TrainConfig, **options: Any) -> Trainer:
    """A trainer on a tiny model; for stage d2f with a LoRA adapter where the config has one."""
    processes = options.get("processes")
    device = torch.device("cpu") if processes is None else processes.device
    model = tiny_model(FAMILY[config.stage]).to(device, getattr(torch, config.model.dtype))
    teacher = None
    if config.lora is not None:
        attach_adapter(model, config.lora, torch.Generator().manual_seed(0))
    else:
        require_gradients(model, config.model)
        if config.stage == "d2f":
            teacher = tiny_model("Dream").to(device)
    return Trainer(config, model, make_dataset(config), teacher=teacher, **options)


def write_files(folder: Path) -> Path:
    """A tiny checkpoint of each family with a tokenizer, and pairs to train on."""
    for family in FAMILY.values():
        write_checkpoint(folder / family, family)
        write_tokenizer(folder / family)
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def stored_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a saved model or adapter."""
    files = Path(folder).glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return read_log(Path(config.output) / "log.jsonl")


class WatchedLoss:
    """Stands in for a trainer's loss: each `loss(inputs)` becomes `watched(loss, inputs)`."""

    def __init__(self, trainer: Trainer, watched: Callable[..., Any]) -> None:
        self._loss, self._watched = trainer.loss, watched
        trainer.loss = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, inputs: StepInputs) -> Any:
        return self._watched(self._loss, inputs)


class Notes(Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

"""Estimates of a run's memory, operations and samples, from its recipe and its model's sizes.

Counted per process (GPU). Shapes: D hidden size, Q query dims (heads times head size), K key/value
dims, F intermediate size, V vocabulary; s and a are the bytes of a number in the residual stream
(the weights' type) and in products (2 under bfloat16, else that of the weights).

- Weights: those of the model in `model.dtype`, an adapter in fp32, and of a teacher of its own.
- Gradients and AdamW's two moments: 4 and 8 bytes for each trained number. Sharded gradients are
  whole while micro-batches are added up.
- Activations of a layer and token: 2D s (inputs of the two norms) + (2Q + 2K) a (queries, keys,
  values, what attention gives; one more Q where heads share keys), and 3F a (gate, its SiLU, up).
  Where all weights are trained, 4D s (what norms give, before and after their weights) and F a
  more. Each adapted projection keeps its input, twice with dropout. With activation checkpointing a
  layer keeps D s, and one layer at a time has all of the above.
- The compiler keeps less of a layer with an adapter: 3D s (inputs of both norms, and what one of
  them gives), (2Q + 2K) a and 2F a, and an adapter's input only with dropout.
- The loss: chunks within `loss_memory_mib`, and at the masked positions hidden states with their
  gradient in fp32.
- bf16 copies of fp32 weights, which autocast keeps for the backward pass: 2 bytes each.

Not counted: the CUDA context (about 0.5 GB), what libraries work with, fragmentation, and what the
compiler saves where all weights are trained. Tests hold the activations against counted ones of
tiny models, within 25%, and the sums against those measured at 8B on a GPU, within 10%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from d2f.errors import D2FError, counted
from d2f.models.checkpoint import as_diffusion
from d2f.models.lora import LoraLinear, adapter_parameters, attach_adapter
from d2f.models.spec import ModelSpec
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer
from d2f.training.assemble import find_tokenizer
from d2f.training.chunked_loss import LOGIT_BYTES
from d2f.training.config import TrainConfig
from d2f.training.data import TokenDataset
from d2f.training.flops import Work, step_flops
from d2f.training.optimizer import require_gradients
from d2f.training.packing import pack_samples
from d2f.training.sources import cached_data

_GRADIENT_BYTES = 4
_OPTIMIZER_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    copies: int
    """bf16 copies of fp32 weights."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(vars(self).values())

    def to_dict(self) -> dict[str, int]:
        """Give the numbers and their sum, for JSON."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Sizes of a run, the memory of each of its processes, and its operations."""

    num_parameters: int
    num_trained: int
    sequences_per_update: int
    tokens_per_update: int
    micro_batch: int
    """Sequences on a GPU at once."""
    accumulated: int
    """Micro-batches of a process for an update."""
    processes: int
    flops_per_update: int
    """Operations of an update on all GPUs together, as model FLOPs utilisation counts them."""
    computed_per_update: int
    """The same, with those that activation checkpointing repeats."""
    memory: Memory
    """Memory of a process under the recipe."""
    other_memory: Memory
    """The same with activation checkpointing the other way."""

    def seconds(self, steps: int, peak: float, share: float) -> float:
        """Seconds of so many updates on GPUs that reach a share of their peak rate (FLOP/s)."""
        return steps * self.computed_per_update / (peak * share * self.processes)


def estimate(
    config: TrainConfig, spec: ModelSpec, *, processes: int = 1, compiled: bool = False
) -> Estimate:
    """Estimate the memory and the operations of a recipe, for processes with a GPU each.

    `spec` is that of `model.init` or `model.config`; on a GPU with `compile` layers are `compiled`.

    Raises:
        ConfigError: The adapter names none of the model's modules, or the batch cannot be divided
            among the processes.

    Example:
        >>> from d2f.models.presets import preset_spec
        >>> from d2f.training.sections import DataConfig, ModelConfig, OptimizerConfig
        >>> config = TrainConfig(
        ...     stage="autoregressive", output="x", steps=1, batch_size=8, micro_batch_size=2,
        ...     model=ModelConfig(init="x"), optimizer=OptimizerConfig(lr=1e-4),
        ...     data=DataConfig(kind="problems", num_problems=1, sequence_length=1024))
        >>> result = estimate(config, preset_spec("llama-3-8b"))
        >>> round(result.memory.optimizer / 1e9), result.accumulated
        (64, 4)
    """
    model = _model(config, spec)
    micro, accumulated = config.micro_batches(processes)
    tokens = config.batch_size * config.data.sequence_length
    # All tokens are taken to see all of their sequence, or row.
    pairs = tokens * config.data.sequence_length
    work = Work(
        num_tokens=tokens,
        num_counted=round(tokens * _counted_share(config)),
        teacher_pairs=pairs,
        student_pairs=pairs // 2 if config.stage == "autoregressive" else pairs,
    )
    found = step_flops(model, None, work)
    flops = found.total - (0 if config.has_teacher else found.teacher)
    recomputed = found.student if config.activation_checkpointing else 0
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = [
        _memory(config, model, processes, recompute=recompute, compiled=compiled)
        for recompute in (False, True)
    ]
    return Estimate(
        num_parameters=model.spec.num_parameters,
        num_trained=num_trained,
        sequences_per_update=config.batch_size,
        tokens_per_update=tokens,
        micro_batch=micro,
        accumulated=accumulated,
        processes=processes,
        flops_per_update=flops,
        computed_per_update=flops + recomputed,
        memory=memory[config.activation_checkpointing],
        other_memory=memory[not config.activation_checkpointing],
    )


def _model(config: TrainConfig, spec: ModelSpec) -> Transformer:
    """The model as the run trains it, without memory for weights."""
    with torch.device("meta"):
        model = Transformer(spec)
    if spec.architecture.causal and config.stage != "autoregressive":
        model = as_diffusion(model, mask_token_id=0)
    if config.lora is None:
        require_gradients(model, config.model)
        return model
    attach_adapter(model, config.lora, torch.Generator())
    return model


def _counted_share(config: TrainConfig) -> float:
    """Share of all positions that count in the loss, if prompts were empty."""
    noise = config.noise
    return 1.0 if noise is None else (noise.low + noise.high) / 2


def _memory(
    config: TrainConfig, model: Transformer, processes: int, *, recompute: bool, compiled: bool
) -> Memory:
    spec, (micro, accumulated) = model.spec, config.micro_batches(processes)
    size = getattr(torch, config.model.dtype).itemsize
    products = 2 if config.precision == "bfloat16" else size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapter = sum(p.numel() for p in adapter_parameters(model))
    shards = processes if config.sharding == "full" else 1
    base = spec.num_parameters * size
    # An adapter is not sharded; one layer, and embedding with head, are whole while they compute.
    weights = (1 + config.own_teacher) * base // shards + 4 * adapter
    if shards > 1:
        weights += (1 - 1 / shards) * (base - (spec.num_layers - 1) * _layer_weights(model) * size)
    kept = trained if adapter else trained // shards
    tokens = micro * config.data.sequence_length
    layer = layer_bytes(model, residual=size, products=products, compiled=compiled)
    activations = spec.num_layers * layer
    if recompute:
        activations = spec.num_layers * spec.hidden_size * size + layer
    counted = round(tokens * _counted_share(config))
    chunks = min(config.loss_memory_mib * 2**20, LOGIT_BYTES * spec.vocab_size * max(counted, 1))
    head = spec.vocab_size * spec.hidden_size * _GRADIENT_BYTES if not adapter else 0
    # Autocast keeps copies until the pass ends; with recomputing, of a layer at a time.
    layers = 1 if recompute else spec.num_layers
    copied = layers * _layer_weights(model) + spec.vocab_size * spec.hidden_size
    return Memory(
        weights=round(weights),
        gradients=_GRADIENT_BYTES * (trained if accumulated > 1 else kept),
        optimizer=_OPTIMIZER_BYTES * kept,
        activations=tokens * activations,
        loss=chunks + head + 2 * 4 * counted * spec.hidden_size,
        copies=2 * copied if products < size else 0,
    )


def _layer_weights(model: Transformer) -> int:
    """Numbers of a layer, without its adapter."""
    spec = model.spec
    tables = (1 if spec.tie_embeddings else 2) * spec.vocab_size * spec.hidden_size
    return (spec.num_parameters - tables - spec.hidden_size) // spec.num_layers


def layer_bytes(model: Transformer, *, residual: int, products: int, compiled: bool = False) -> int:
    """Count the bytes that a layer keeps of a token for the backward pass; see the module.

    `residual` and `products` are the bytes of a number in the residual stream and in products. The
    model may be on the meta device; its trained parameters require gradients.
    """
    spec = model.spec
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    trained = model.norm.weight.requires_grad
    saves = compiled and not trained
    streams = (3 if saves else 2) * spec.hidden_size
    numbers = 2 * query + 2 * kv + (2 if saves else 3) * spec.intermediate_size
    numbers += spec.qk_norm * (query + kv)  # heads before their norm
    if trained:
        streams += 4 * spec.hidden_size
        numbers += spec.intermediate_size + (query if query != kv else 0)
    for module in model.layers[0].modules():
        if isinstance(module, LoraLinear):
            base: nn.Linear = module.base
            copies = (2 if module.config.dropout else 1) - saves
            numbers += copies * base.in_features + len(module.lora_A)
    return streams * residual + numbers * products


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Numbers of a run's samples and of the sequences of an epoch; None: not known yet."""

    num_samples: int | None = None
    num_rows: int | None = None
    """Number of sequences: the samples, or with `padding = "packed"` the rows that hold them."""
    note: str
    """The source of the numbers, or the reason why there are none."""


def plan_data(config: TrainConfig, spec: ModelSpec) -> DataPlan:
    """Count the samples if that is cheap: problems that are generated, or data in the cache."""
    settings = config.data
    if settings.num_problems is not None:
        note = "generated; those that do not fit are dropped when the run starts"
        share = None if settings.padding == "packed" else 1.0
        return _without_held_out(settings.num_problems, config, note, share)
    try:
        folder = find_tokenizer(config)
        if folder is None:
            return DataPlan(note="the tokenizer is trained when the run starts")
        mask = config.model.mask_token_id
        own = spec if mask is None else replace(spec, mask_token_id=mask)
        encoded = cached_data(settings, Tokenizer.load(folder), own)
        if encoded is None:
            return DataPlan(note="the data have not been read with these settings yet")
        dataset = TokenDataset(encoded, settings, eos_token_id=(*spec.eos_token_ids, 0)[0])
    except D2FError as error:
        return DataPlan(note=str(error).partition(". ")[0])
    share = 1.0
    if settings.padding == "packed":
        share = pack_samples(dataset, config).num_rows / len(dataset)
    return _without_held_out(len(dataset), config, "counted in the cache of token ids", share)


def _without_held_out(count: int, config: TrainConfig, note: str, share: float | None) -> DataPlan:
    """Leave out what is evaluated on; a sample takes `share` of a row (None: not known)."""
    left = count - ((config.evaluate.held_out or 0) if config.evaluate else 0)
    if left <= 0:
        return DataPlan(
            note=f"evaluate.held_out {count - left} leaves nothing of {counted(count, 'sample')}"
        )
    rows = None if share is None else math.ceil(left * share)
    return DataPlan(num_samples=left, num_rows=rows, note=note)

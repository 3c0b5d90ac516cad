"""Estimates against what tiny models really hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.training.memory import LiveMemory
from tests.unit.training.tiny_run import make_config, make_trainer

from d2f.cli.bench_train import TrainOptions
from d2f.cli.bench_train_setup import TrainSetup
from d2f.models.lora import LoraConfig, attach_adapter
from d2f.models.presets import preset_spec
from d2f.testing import tiny_model, tiny_spec
from d2f.training.estimate import estimate, layer_bytes
from d2f.training.processes import Processes
from d2f.training.sections import DataConfig, ModelConfig, NoiseConfig

REPORT = Path(__file__).parents[3] / "benchmarks" / "reports" / "2026-11-22-train-h200"
LORA = LoraConfig(r=4, alpha=8, dropout=0.1)
LENGTH = 256
WIDE = {
    "llada": {"d_model": 128, "mlp_hidden_size": 384},
    "Dream": {"hidden_size": 128, "intermediate_size": 384},
}
LAYERS = {"llada": "n_layers", "Dream": "num_hidden_layers"}


def kept_per_layer(family, lora, dtype, autocast, recompute):
    """Bytes per token that one more layer keeps, without copies of weights."""
    kept = []
    for layers in (2, 4):
        model = tiny_model(family, **WIDE[family], **{LAYERS[family]: layers}).to(dtype)
        if lora is None:
            model.requires_grad_(True)
        else:
            attach_adapter(model, lora, torch.Generator().manual_seed(0))
        model.train()
        ids_BL = torch.zeros(2, LENGTH, dtype=torch.long)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            LiveMemory() as memory,
        ):
            states = model(ids_BL, recompute=recompute)
        kept.append(memory.alive)
        del states
    more = (kept[1] - kept[0]) / 2
    if autocast and not recompute:
        # Copies of fp32 weights, which the estimate counts apart.
        projections = [m for m in model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
        more -= sum(2 * m.weight.numel() for m in projections if dtype == torch.float32)
    return more / (2 * LENGTH), model


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize(
    "lora", [None, LORA, LoraConfig(r=4, alpha=8, target_modules="all-linear")]
)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_activations_are_those_counted(family, lora, dtype, autocast):
    if lora is None and dtype == torch.bfloat16:
        pytest.skip("frozen weights only")
    counted, model = kept_per_layer(family, lora, dtype, autocast, recompute=False)
    size = dtype.itemsize
    found = layer_bytes(model, residual=size, products=2 if autocast else size)
    assert found == pytest.approx(counted, rel=0.25)
    counted, _ = kept_per_layer(family, lora, dtype, autocast, recompute=True)
    assert model.spec.hidden_size * size == pytest.approx(counted, rel=0.25)


def measured_rows():
    """What `d2f bench train` found on GPUs."""
    for file in sorted(REPORT.glob("*.json")):
        report = json.loads(file.read_text())
        if "largest_micro_batch" in report:
            yield from (
                pytest.param(
                    report, row, id=f"{file.stem}-{row['micro_batch']}-{row['checkpointing']}"
                )
                for row in report["rows"]
            )


@pytest.mark.parametrize(("report", "row"), list(measured_rows()))
def test_memory_at_8b_is_that_measured_on_a_gpu(report, row):
    settings = dict(report["settings"])
    noise = NoiseConfig(**settings.pop("noise"))
    processes = Processes(torch.device("meta"))
    processes.world_size = settings.pop("processes")
    assert settings.pop("objective", "forward_kl") == "forward_kl"
    options = TrainOptions(shape=report["model"]["name"], full=settings["lora"] is None, **settings)
    setup = TrainSetup.of(options, processes, "bfloat16")
    config = replace(setup.config(row["micro_batch"], row["checkpointing"], "unused"), noise=noise)
    spec = preset_spec(report["model"]["name"])
    found = estimate(config, spec, processes=processes.world_size, compiled=config.compile)
    assert found.memory.total == pytest.approx(row["peak_bytes"], rel=0.1)


@pytest.mark.parametrize(("lora", "embeddings"), [(None, True), (None, False), (LORA, True)])
def test_weights_gradients_and_optimizer_are_those_of_a_run(tmp_path, lora, embeddings):
    model = ModelConfig(init="unused", train_embeddings=embeddings)
    config = make_config(tmp_path, "d2f", steps=1, lora=lora, model=model)
    trainer = make_trainer(config)
    found = estimate(config, tiny_spec("Dream"))
    trainer.run()
    models = [trainer.student, *([trainer.loss.teacher] if lora is None else [])]
    assert found.memory.weights == sum(p.nbytes for m in models for p in m.parameters())
    trained = [p for p in trainer.student.parameters() if p.requires_grad]
    assert found.num_trained == sum(p.numel() for p in trained)
    assert found.memory.gradients == sum(p.nbytes for p in trained)
    states = trainer.update.optimizer.state.values()
    moments = sum(s[name].nbytes for s in states for name in ("exp_avg", "exp_avg_sq"))
    assert found.memory.optimizer == moments
    assert found.memory.total == sum(found.memory.to_dict().values()) - found.memory.total


def test_sharding_processes_and_checkpointing(tmp_path):
    data = DataConfig(kind="problems", num_problems=1, sequence_length=1024)
    config = make_config(tmp_path, "d2f", batch_size=16, micro_batch_size=2, data=data)
    spec = preset_spec("llada-8b")
    one, four = (estimate(config, spec, processes=n) for n in (1, 4))
    assert (one.accumulated, four.accumulated) == (8, 2)
    assert one.memory == four.memory
    assert one.seconds(10, 1e15, 0.4) == pytest.approx(4 * four.seconds(10, 1e15, 0.4))
    sharded = estimate(replace(config, sharding="full"), spec, processes=4)
    assert sharded.memory.optimizer == pytest.approx(one.memory.optimizer / 4)
    assert one.memory.weights / 4 < sharded.memory.weights < one.memory.weights / 2
    # All weights: gradients of micro-batches are added up before they are sharded.
    full = replace(config, sharding="full", lora=None)
    added, at_once = (
        estimate(replace(full, micro_batch_size=size), spec, processes=4).memory.gradients
        for size in (2, 4)
    )
    assert added == 4 * spec.num_parameters == 4 * at_once
    again = estimate(replace(config, activation_checkpointing=True), spec)
    assert again.memory == one.other_memory
    assert again.memory.activations < one.memory.activations / 8
    assert again.flops_per_update == one.flops_per_update
    assert 1.2 < again.computed_per_update / one.computed_per_update < 1.3
    # 2 operations for each weight and token: teacher, student, two gradients.
    expected = 8 * spec.num_parameters * one.tokens_per_update
    assert one.flops_per_update == pytest.approx(expected, rel=0.15)

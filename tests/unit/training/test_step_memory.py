"""A step keeps little for its backward pass: recomputed layers, frozen weights, tiles on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.training.memory import LiveMemory
from tests.unit.training.test_stage_loss import make_batch
from tests.unit.training.tiny_run import FAMILY, make_config, make_trainer
from torch._dynamo.testing import CompileCounterWithBackend

from d2f.models.layer import Layer
from d2f.models.lora import LoraConfig, adapter_parameters, attach_adapter
from d2f.testing import tiny_model
from d2f.testing.tiny import MASK_TOKEN_ID
from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import make_inputs

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STAGES = ["autoregressive", "masked-diffusion", "d2f"]


def make_step(tmp_path, stage, *, recompute, dropout=0.0, precision="float32", family=None):
    """A loss of a model with a LoRA adapter that is not 0, and a batch."""
    config = make_config(tmp_path, stage, activation_checkpointing=recompute, precision=precision)
    model = tiny_model(family or FAMILY[stage])
    g = torch.Generator().manual_seed(0)
    attach_adapter(model, LoraConfig(r=4, alpha=8, dropout=dropout), g)
    for parameter in adapter_parameters(model):
        parameter.data.normal_(0, 0.1, generator=g)
    model.train()
    inputs = make_inputs(
        make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=torch.Generator()
    )
    return StageLoss(config, model), model, inputs


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stage", STAGES)
def test_recomputed_layers_give_the_same_gradients(stage, dropout, precision, tmp_path):
    results = []
    for recompute in (False, True):
        loss, model, inputs = make_step(
            tmp_path, stage, recompute=recompute, dropout=dropout, precision=precision
        )
        torch.manual_seed(1)
        values = [loss(part)[0] for part in inputs.parts(2, select=True)]
        sum(values).backward()
        # The random state must be where it would be without recomputing, for the next step.
        results.append((values, [p.grad for p in adapter_parameters(model)], torch.rand(1)))
    for one, other in zip(*results, strict=True):
        pairs = zip(one, other, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_run_is_the_same_with_recomputed_layers(tmp_path):
    weights = []
    for recompute in (False, True):
        config = make_config(
            tmp_path / str(recompute),
            "d2f",
            activation_checkpointing=recompute,
            micro_batch_size=4,
            lora=LoraConfig(r=4, alpha=8, dropout=0.2),
            steps=2,
        )
        trainer = make_trainer(config)
        assert trainer.run()
        weights.append(adapter_parameters(trainer.student))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_only_what_needs_gradients_is_computed_twice(tmp_path, monkeypatch):
    calls, forward = [], Layer.forward
    monkeypatch.setattr(
        Layer,
        "forward",
        lambda *args, **given: calls.append(torch.is_grad_enabled()) or forward(*args, **given),
    )
    loss, _, inputs = make_step(tmp_path, "d2f", recompute=True)
    value, _ = loss(inputs)
    assert calls == [False] * 2 + [True] * 2
    value.backward()
    assert len(calls) == 6
    with torch.no_grad():
        loss(inputs)
    assert len(calls) == 10


@pytest.mark.parametrize("layers", [2, 6])
def test_of_a_recomputed_layer_only_its_input_is_kept(layers):
    model = tiny_model("llada", n_layers=layers).requires_grad_(True)
    ids = torch.zeros(2, 64, dtype=torch.long)
    kept = {}
    for recompute in (False, True):
        with LiveMemory() as memory:
            states = model(ids, recompute=recompute)
        kept[recompute] = memory.alive
        del states
    width, float32 = model.spec.hidden_size, 4
    # Beside the inputs: the last norm's numbers, and the tables of the rotation.
    assert kept[True] <= (layers + 7) * ids.numel() * width * float32
    assert kept[False] > layers * 10 * ids.numel() * width * float32


def test_no_gradient_of_a_frozen_weight_is_ever_made(tmp_path):
    loss, model, inputs = make_step(tmp_path, "d2f", recompute=False, family="llada")
    part = next(iter(inputs.parts(1, select=True)))
    part = replace(
        part,
        **{
            name: value[:, :8]
            for name, value in vars(part).items()
            if name.endswith("_BL") and value is not None
        },
        selected_M=torch.arange(8),
    )
    frozen = min(layer.qkv.q_proj.base.weight.numel() for layer in model.layers)
    with LiveMemory() as memory:
        loss(part)[0].backward()
    assert memory.largest < frozen
    assert {p.requires_grad for p in model.parameters() if p.grad is None} == {False}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_adapter_keeps_no_wide_copy_of_what_it_reads(dropout):
    model = tiny_model("llada", n_layers=1).to(torch.bfloat16)
    attach_adapter(model, LoraConfig(r=2, alpha=2, dropout=dropout), torch.Generator())
    projection = model.layers[0].qkv.q_proj.train()
    x = torch.zeros(1, 512, 32, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), LiveMemory() as memory:
        out = projection(x)
        del out
        out = projection(x)
    # Output, the product with A twice as narrow as anything, and with dropout the copy and its
    # mask; weights of 2 * 32 are next to nothing.
    copies = 2 if dropout == 0 else 6
    assert memory.alive <= x.numel() * copies + 512 * 2 * 2 * 2 + 2 * 2 * 32 * 2 * 2
    assert out.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("head_dim", "recompute", "backend"), [(16, True, "aot_eager"), (8, False, "eager")]
)
def test_layers_are_compiled_as_one(head_dim, recompute, backend, tmp_path, monkeypatch):
    """Tiles (of heads of 16), an adapter with dropout off, two lengths: on the CPU, not fused."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(Layer.whole, backend=counter, dynamic=False)
    monkeypatch.setattr("d2f.models.layer._compiled_whole", lambda: compiled)
    # Only the check refuses gradients on the CPU; the operation has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    config = make_config(tmp_path, "d2f", activation_checkpointing=recompute)
    model = tiny_model("Dream", hidden_size=4 * head_dim, num_hidden_layers=3)
    attach_adapter(model, LoraConfig(r=4, alpha=8), torch.Generator().manual_seed(0))
    for parameter in adapter_parameters(model):
        parameter.data.fill_(0.02)
    inputs = make_inputs(
        make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=torch.Generator()
    )
    for length in (20, 12):
        part = replace(
            next(iter(inputs.parts(4, select=False))),
            **{
                name: value[:, :length].contiguous()
                for name, value in vars(inputs).items()
                if name.endswith("_BL") and value is not None
            },
        )
        results = []
        for quick in (False, True):
            value, _ = StageLoss(config, model, compiled=quick, alone=False)(part)
            results.append([value, *torch.autograd.grad(value, adapter_parameters(model))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)
    # For each length the teacher's, the first layer's without a gradient of its input, the others'.
    assert counter.frame_count == 2 * 3


@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_steps_in_tiles_are_those_of_the_cpu(stage, recompute, whole, tmp_path):
    # With that many positions their logits would not fit into 1 MiB.
    sizes = {} if whole else {"loss_memory_mib": 1, "batch_size": 4096}
    config = make_config(tmp_path, stage, activation_checkpointing=recompute, **sizes)
    if stage == "masked-diffusion":
        config = replace(config, noise=replace(config.noise, random_end=True))
    # Heads of 16, the smallest that FlexAttention takes.
    width = {"d_model" if FAMILY[stage] == "llada" else "hidden_size": 64}
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(FAMILY[stage], **width).requires_grad_(True).to(device)
        teacher = tiny_model("Dream", seed=1, hidden_size=64).to(device) if stage == "d2f" else None
        loss = StageLoss(config, model, teacher, compiled=device == "cuda")
        inputs = make_inputs(
            make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=torch.Generator()
        )
        part = next(iter(inputs.parts(4, select=loss.selects))).to(torch.device(device))
        value, _ = loss(part)
        value.backward()
        results.append([value.cpu(), *(p.grad.cpu() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@needs_gpu
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_drop_the_same_when_computed_again(recompute, tmp_path):
    """Dropout in bf16 on a GPU: the layer by layer compiled step twice, from the same seed."""
    results = []
    for again in (False, recompute):
        config = make_config(tmp_path, "d2f", activation_checkpointing=again, precision="bfloat16")
        model = tiny_model("Dream", hidden_size=64)
        g = torch.Generator().manual_seed(0)
        attach_adapter(model, LoraConfig(r=4, alpha=8, dropout=0.3), g)
        model = model.to("cuda").train()
        for parameter in adapter_parameters(model):
            parameter.data.fill_(0.02)
        inputs = make_inputs(
            make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=torch.Generator()
        )
        loss = StageLoss(config, model, compiled=True, alone=False)
        torch.manual_seed(1)
        value, _ = loss(next(iter(inputs.parts(4, select=True))).to(model.device))
        value.backward()
        results.append([value, *(p.grad for p in adapter_parameters(model))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)

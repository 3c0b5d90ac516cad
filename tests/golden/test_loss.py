"""Distillation losses and adapter gradients equal what the original program's models give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f.diffusion.layout import BlockLayout
from d2f.models.checkpoint import load_model
from d2f.models.lora import adapter_disabled, adapter_parameters
from d2f.training.objective import distillation_loss

HERE = Path(__file__).parent
TOLERANCE = 1e-4
CASES = {
    "soft_cross_entropy_over_p": ("soft_cross_entropy", "inverse_ratio"),
    "soft_cross_entropy": ("soft_cross_entropy", "none"),
    "forward_kl": ("forward_kl", "none"),
    "reverse_kl": ("reverse_kl", "none"),
    "hard_cross_entropy_over_p": ("cross_entropy", "inverse_ratio"),
}


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def distilled(request):
    """Golden values, batch, student with gradients, its logits and the teacher's."""
    folder = HERE / request.param
    golden = json.loads((folder / "loss.json").read_text())
    batch = load_file(folder / "loss.safetensors")
    model = load_model(folder, folder / "adapter", device="cpu", merge_adapter=False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    layout = BlockLayout(prompt_length=batch["prompt_lengths"], block_size=golden["block_size"])
    with torch.no_grad(), adapter_disabled(model):
        teacher_BLV = model.logits(batch["noisy_ids"])
    return golden, batch, model, model.logits(batch["noisy_ids"], layout), teacher_BLV


def loss_of(distilled, objective, weighting):
    _, batch, _, student_BLV, teacher_BLV = distilled
    target = batch["input_ids"] if objective == "cross_entropy" else teacher_BLV
    masked, ratio = batch["masked"], batch["mask_ratio"]
    return distillation_loss(student_BLV, target, masked, ratio, objective, weighting)


@pytest.mark.parametrize("name", CASES)
def test_loss(distilled, name):
    assert loss_of(distilled, *CASES[name]).item() == pytest.approx(
        distilled[0][name], rel=TOLERANCE
    )


@pytest.mark.parametrize("name", ["soft_cross_entropy_over_p", "reverse_kl"])
def test_adapter_gradient_norm(distilled, name):
    golden, _, model, _, _ = distilled
    loss = loss_of(distilled, *CASES[name])
    gradients = torch.autograd.grad(loss, adapter_parameters(model), retain_graph=True)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(golden[f"adapter_grad_norm_{name}"], rel=TOLERANCE)


def test_forward_kl_has_the_gradient_of_soft_cross_entropy(distilled):
    model = distilled[2]
    pairs = zip(
        *(
            torch.autograd.grad(
                loss_of(distilled, objective, "inverse_ratio"),
                adapter_parameters(model),
                retain_graph=True,
            )
            for objective in ("forward_kl", "soft_cross_entropy")
        ),
        strict=True,
    )
    for first, second in pairs:
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)

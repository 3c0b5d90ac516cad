"""Logits equal what the original programs compute, in fp32 on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from d2f.diffusion.layout import BlockLayout
from d2f.models.checkpoint import load_model
from d2f.models.lora import adapter_disabled

HERE = Path(__file__).parent
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def folder(request):
    return HERE / request.param


@pytest.fixture(scope="module")
def cases(folder):
    tensors = load_file(folder / "forward.safetensors")
    listed = json.loads((folder / "forward.json").read_text())
    assert listed
    return [(case, case["index"], tensors) for case in listed]


def layout(case):
    return BlockLayout(prompt_length=case["prompt_length"], block_size=case["block_size"])


def assert_same(model, logits_BLV, raw_BLV):
    """The golden logits are raw: where the head is shifted, their row p is our row p + 1."""
    if model.spec.architecture.shifted:
        logits_BLV, raw_BLV = logits_BLV[:, 1:], raw_BLV[:, :-1]
    torch.testing.assert_close(logits_BLV, raw_BLV, atol=TOLERANCE, rtol=0)


def test_base(folder, cases):
    model = load_model(folder, device="cpu")
    for case, i, tensors in cases:
        ids_BL = tensors[f"{i}.input_ids"]
        assert_same(model, model.logits(ids_BL), tensors[f"{i}.bidirectional_logits"])
        assert_same(model, model.logits(ids_BL, layout(case)), tensors[f"{i}.block_causal_logits"])


@pytest.mark.parametrize("merge", [False, True])
def test_adapter(folder, cases, merge):
    model = load_model(folder, folder / "adapter", device="cpu", merge_adapter=merge)
    for case, i, tensors in cases:
        logits_BLV = model.logits(tensors[f"{i}.input_ids"], layout(case))
        assert_same(model, logits_BLV, tensors[f"{i}.adapter_block_causal_logits"])


def test_adapter_switched_off(folder, cases):
    model = load_model(folder, folder / "adapter", device="cpu", merge_adapter=False)
    for _, i, tensors in cases:
        with adapter_disabled(model):
            logits_BLV = model.logits(tensors[f"{i}.input_ids"])
        assert_same(model, logits_BLV, tensors[f"{i}.bidirectional_logits"])

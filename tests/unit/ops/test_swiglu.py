"""The feed-forward gate: the twin against naive float64, the kernel against the twin."""

import pytest
import torch

from d2f.ops.swiglu import swiglu

SIZES = [(1, 16), (3, 100), (64, 111), (2, 1100)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("size", SIZES)
def test_twin_is_the_formula(size):
    gate, up = torch.randn(2, *size)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    found = swiglu(torch.cat([gate, up], dim=1))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernel_equals_twin(size, dtype, tolerance):
    triton_swiglu = pytest.importorskip("d2f.ops.triton.swiglu")
    gate_up = (3 * torch.randn(size[0], 2 * size[1])).to(DEVICE, dtype)
    found = triton_swiglu.swiglu(gate_up)
    assert found.dtype == dtype
    torch.testing.assert_close(found, swiglu(gate_up), atol=tolerance, rtol=tolerance)


def test_kernel_gives_zero_far_below():
    triton_swiglu = pytest.importorskip("d2f.ops.triton.swiglu")
    gate_up = torch.tensor([[-200.0, 0.0, 3.0, 1.0]], device=DEVICE)
    assert triton_swiglu.swiglu(gate_up).abs().max() < 1e-30

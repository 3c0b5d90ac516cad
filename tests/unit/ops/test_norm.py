"""Residual sum and RMSNorm: the twin against naive float64, the kernel against the twin."""

import pytest
import torch

from d2f.ops.norm import add_rms_norm

SIZES = [(1, 16), (3, 100), (64, 112)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(num_tokens, width, dtype, device="cpu"):
    torch.manual_seed(num_tokens)
    shapes = ((num_tokens, width), (num_tokens, width), (width,))
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adds", [False, True])
def test_twin_is_the_formula(size, adds):
    x, residual, weight = make(*size, torch.float32)
    normed, total = add_rms_norm(x, residual if adds else None, weight, 1e-3)
    expected = x.double() + (residual.double() if adds else 0)
    scale = (expected.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    torch.testing.assert_close(total.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        normed.double(), expected * scale * weight.double(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kernel_equals_twin(size, adds, dtype, tolerance):
    triton_norm = pytest.importorskip("d2f.ops.triton.norm")
    x, residual, weight = make(*size, dtype, DEVICE)
    residual = residual if adds else None
    for wide in (x, torch.cat([x, x], dim=1)[:, : size[1]]):
        found = triton_norm.add_rms_norm(wide, residual, weight, 1e-3)
        expected = add_rms_norm(wide, residual, weight, 1e-3)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)

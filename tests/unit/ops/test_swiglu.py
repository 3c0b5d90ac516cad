"""The feed-forward gate: the twins against naive float64, the kernels against the twins."""

import pytest
import torch
import torch.nn.functional as F

from d2f.ops.swiglu import gated_linear, swiglu

SIZES = [(1, 16), (3, 100), (64, 111), (2, 1100)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies no bf16")


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


@pytest.fixture(scope="module")
def triton_gated():
    return pytest.importorskip("d2f.ops.triton.swiglu")


def make(num_tokens, num_rows, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, width, generator=generator)
    weight = 3 * torch.randn(2 * num_rows, width, generator=generator) / width**0.5
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype)


def test_projected_twin_is_the_product_and_the_gate():
    x, weight = make(3, 10, 8)
    assert torch.equal(gated_linear(x, weight), swiglu(F.linear(x, weight)))


@pytest.mark.parametrize("shape", [(2, 32, 192), (1, 40, 130), (3, 48, 100), (20, 24, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_tiles_make_up_the_gated_product(triton_gated, shape, dtype, tolerance):
    x, weight = make(*shape, dtype)
    tiling = triton_gated.Tiling(rows=16, depth=32, stages=2, warps=4)
    found = triton_gated.tiled_gated_linear(x, weight, tiling)
    assert found.dtype == dtype
    torch.testing.assert_close(found, gated_linear(x, weight), atol=tolerance, rtol=tolerance)
    apart = torch.cat([x, x], dim=1)[:, : shape[2]]
    assert torch.equal(triton_gated.tiled_gated_linear(apart, weight, tiling), found)


def test_fp32_takes_two_steps(triton_gated):
    x, weight = make(3, 50, 96)
    expected = gated_linear(x, weight)
    torch.testing.assert_close(triton_gated.gated_linear(x, weight), expected, atol=1e-5, rtol=1e-5)


@gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33, 64, 100])
@pytest.mark.parametrize("size", [(512, 1024), (12288, 4096), (1000, 2056), (18944, 3584)])
def test_bf16_equals_the_product_and_the_gate(triton_gated, num_tokens, size):
    x, weight = make(num_tokens, *size, torch.bfloat16)
    found = triton_gated.gated_linear(x, weight)
    torch.testing.assert_close(found, gated_linear(x, weight), atol=6e-2, rtol=3e-2)
    assert torch.equal(found, triton_gated.gated_linear(x, weight))

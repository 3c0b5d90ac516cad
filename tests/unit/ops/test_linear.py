"""The product of few tokens: every way of cutting it gives what torch gives."""

import pytest
import torch
import torch.nn.functional as F

from d2f.ops.linear import linear_fp32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies no bf16")


@pytest.fixture(scope="module")
def triton_linear():
    return pytest.importorskip("d2f.ops.triton.linear")


def make(num_tokens, num_rows, width, dtype=torch.float32):
    torch.manual_seed(num_tokens)
    x = torch.randn(num_tokens, width).to(DEVICE, dtype)
    weight = torch.randn(num_rows, width).to(DEVICE, dtype) / width**0.5
    return x, weight, torch.randn(num_rows).to(DEVICE, dtype)


@pytest.mark.parametrize("shape", [(1, 64, 192), (1, 37, 130), (3, 50, 100), (20, 37, 128)])
def test_tiles_make_up_the_product(triton_linear, shape):
    x, weight, bias = make(*shape)
    tiling = triton_linear.Tiling(rows=16, depth=32, stages=2, warps=4)
    for one in (None, bias):
        found = triton_linear.tiled_linear(x, weight, one, torch.float32, tiling)
        torch.testing.assert_close(found, F.linear(x, weight, one), atol=1e-5, rtol=1e-5)


def test_rows_may_lie_apart(triton_linear):
    x, weight, _ = make(2, 16, 64)
    apart = torch.cat([x, x], dim=1)[:, :64]
    tiling = triton_linear.Tiling(rows=16, depth=32, stages=2, warps=4)
    found = triton_linear.tiled_linear(apart, weight, None, torch.float32, tiling)
    torch.testing.assert_close(found, F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_fp32_and_many_tokens_are_left_to_torch(triton_linear):
    x, weight, bias = make(3, 50, 96)
    assert triton_linear.choose_tiling(x, weight) is None
    assert torch.equal(triton_linear.linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(triton_linear.linear_fp32(x, weight), linear_fp32(x, weight))
    many, weight, _ = make(triton_linear.MOST_TOKENS + 1, 16, 64, torch.bfloat16)
    assert triton_linear.choose_tiling(many, weight) is None


def test_tiles_fit_into_shared_memory(triton_linear, monkeypatch):
    weight = torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta")
    for kilobytes in (99, 163, 227):
        room = kilobytes * 1024
        monkeypatch.setattr(triton_linear, "_shared_memory", lambda device, room=room: room)
        for num_tokens in (2, 16, 32, 64):
            x = torch.empty(num_tokens, 4096, dtype=torch.bfloat16, device="meta")
            tiling = triton_linear.choose_tiling(x, weight)
            step = (tiling.rows + max(num_tokens, 16)) * tiling.depth * 2
            assert 2 <= tiling.stages <= room // step


@gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33, 64, 100])
@pytest.mark.parametrize("size", [(512, 1024), (4096, 4096), (1000, 2056), (17000, 3584)])
def test_bf16_equals_torch(triton_linear, num_tokens, size):
    x, weight, bias = make(num_tokens, *size, torch.bfloat16)
    expected = F.linear(x.float(), weight.float())
    wide = triton_linear.linear_fp32(x, weight)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, expected, atol=2e-4, rtol=2e-4)
    found = triton_linear.linear(x, weight, bias)
    torch.testing.assert_close(found.float(), expected + bias.float(), atol=3e-2, rtol=1e-2)
    assert torch.equal(found, triton_linear.linear(x, weight, bias))

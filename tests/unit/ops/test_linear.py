"""The product of few tokens: every way of cutting it gives what torch gives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f.ops import linear as plain
from d2f.ops.linear import linear, linear_fp32
from d2f.ops.swiglu import gated_linear, swiglu

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


def whole_numbers(num_tokens, num_rows, width, dtype):
    generator = torch.Generator().manual_seed(num_tokens + num_rows)
    sizes = ((num_tokens, width), (num_rows, width))
    return (torch.randint(-50, 51, size, generator=generator).to(dtype) for size in sizes)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 700, 96), (3, 257, 40), (2, 1, 8), (0, 5, 8), (33, 600, 64)])
def test_wide_logits_are_not_rounded_and_parts_make_up_the_whole(monkeypatch, shape, dtype):
    # Sums of these are exact in fp32 in any order, and too long for the dtype of the factors.
    x, weight = whole_numbers(*shape, dtype)
    expected = F.linear(x.double(), weight.double())
    for part_bytes in (1, 4 * shape[2] * 7, 2**20):
        monkeypatch.setattr(plain, "PART_BYTES", part_bytes)
        found = linear_fp32(x, weight)
        assert found.dtype == torch.float32
        assert torch.equal(found.double(), expected)
    if min(shape[:2]) > 1:
        assert not torch.equal(expected, expected.to(dtype).double())


def test_wide_logits_keep_leading_dimensions():
    x, weight = whole_numbers(6, 50, 16, torch.bfloat16)
    found = linear_fp32(x.view(2, 3, 16), weight)
    assert torch.equal(found, linear_fp32(x, weight).view(2, 3, 50))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20), size=st.integers(1, 300), width=st.integers(1, 80), seed=st.integers(0)
)
def test_wide_logits_are_fp32_sums_alone_and_in_a_batch(rows, size, width, seed):
    generator = torch.Generator().manual_seed(seed % 2**63)
    x, weight = (torch.randn(n, width, generator=generator).bfloat16() for n in (rows, size))
    exact = F.linear(x.double(), weight.double())
    # The worst order of the sum rounds `width` times.
    bound = width * 2**-23 * F.linear(x.double().abs(), weight.double().abs())
    together = linear_fp32(x, weight)
    alone = torch.cat([linear_fp32(row, weight) for row in x.split(1)])
    for found in (together, alone):
        assert ((found.double() - exact).abs() <= bound).all()
    assert torch.equal(together, linear_fp32(x, weight))


@pytest.mark.parametrize("num_rows", [0, 1, 2, 17, plain.MOST_TURNED, plain.MOST_TURNED + 1])
@pytest.mark.parametrize("biased", [False, True])
def test_bf16_products_are_rounded_once(num_rows, biased):
    x, weight = whole_numbers(num_rows, 70, 48, torch.bfloat16)
    bias = torch.arange(70).bfloat16() if biased else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = linear(x, weight, bias)
    assert found.is_contiguous()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    if bias is None:
        # The input of the down projection lies across.
        assert torch.equal(linear(x.T.contiguous().T, weight), found)


@pytest.mark.parametrize("num_rows", [1, 5])
def test_gated_products_equal_those_in_two_steps(num_rows):
    x, weight = whole_numbers(num_rows, 64, 24, torch.bfloat16)
    weight = weight / 64
    expected = swiglu(F.linear(x.float(), weight.float()).bfloat16())
    assert torch.equal(gated_linear(x, weight), expected)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_fp32_products_are_torchs(num_rows):
    x, weight, bias = make(num_rows, 50, 96)
    x, weight, bias = x.cpu(), weight.cpu(), bias.cpu()
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(linear_fp32(x, weight), F.linear(x, weight))

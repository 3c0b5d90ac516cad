"""Rotation and cache write: the twin against naive float64, the kernel against the twin."""

import pytest
import torch

from d2f.ops.rope import apply_rope, rope_and_write, rope_frequencies, rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_SLOTS = 96
PAGE = 8

SIZES = [(1, 4, 4, 16), (3, 6, 2, 64), (64, 7, 1, 12), (5, 9, 3, 2)]
"""Tokens, query heads, key heads, head size."""

DTYPES = [  # of the projection, of the tables
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def make(size, dtype=torch.float32, table_dtype=torch.float32, device="cpu"):
    num_tokens, heads, kv_heads, head_dim = size
    torch.manual_seed(num_tokens)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim).to(device, dtype)
    positions = torch.randperm(1000)[:num_tokens]
    cos, sin = rope_tables(positions[None], rope_frequencies(head_dim, 1e4), table_dtype)
    kv = torch.randn(2, NUM_SLOTS, kv_heads, head_dim).to(device, dtype)
    slots = (PAGE + torch.randperm(NUM_SLOTS - PAGE)[:num_tokens]).to(device)
    return qkv, cos[0, :, 0].to(device), sin[0, :, 0].to(device), kv, slots, heads


@pytest.mark.parametrize("size", SIZES)
def test_twin_is_the_formula(size):
    qkv, cos, sin, kv, slots, heads = make(size)
    before, kv_heads, head_dim = kv.clone(), *size[2:]
    q = rope_and_write(qkv, cos, sin, kv, slots, heads)

    packed = qkv.double().unflatten(1, (-1, head_dim))
    pairs = torch.complex(*packed[:, : heads + kv_heads].chunk(2, -1))
    turn = torch.complex(*(t.double()[:, None, : head_dim // 2] for t in (cos, sin)))
    turned = torch.cat([(pairs * turn).real, (pairs * turn).imag], -1)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(q.double(), turned[:, :heads], **close)
    torch.testing.assert_close(kv[0, slots].double(), turned[:, heads:], **close)
    torch.testing.assert_close(kv[1, slots].double(), packed[:, heads + kv_heads :], **close)
    others = torch.ones(NUM_SLOTS, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(kv[:, others], before[:, others])


@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
def test_twin_turns_as_apply_rope(dtype, table_dtype):
    qkv, cos, sin, kv, slots, heads = make((7, 4, 2, 16), dtype, table_dtype)
    q = rope_and_write(qkv, cos, sin, kv, slots, heads)
    expected = apply_rope(qkv.unflatten(1, (-1, 16))[:, :heads], cos[:, None], sin[:, None])
    assert q.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(q, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "table_dtype"), DTYPES)
def test_kernel_equals_twin(size, dtype, table_dtype):
    triton_rope = pytest.importorskip("d2f.ops.triton.rope")
    qkv, cos, sin, kv, slots, heads = make(size, dtype, table_dtype, DEVICE)
    other_kv = kv.clone()
    q = triton_rope.rope_and_write(qkv, cos, sin, kv, slots, heads)
    other_q = rope_and_write(qkv, cos, sin, other_kv, slots, heads)
    assert q.is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(q, other_q, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(kv, other_kv, atol=tolerance, rtol=tolerance)


def test_kernel_writes_a_layer_of_a_larger_cache_and_padding_to_the_first_page():
    triton_rope = pytest.importorskip("d2f.ops.triton.rope")
    qkv, cos, sin, kv, slots, heads = make((5, 4, 2, 16), device=DEVICE)
    slots[3:] = torch.tensor([0, 0])
    layers = torch.stack([kv, kv, kv])
    expected = kv.clone()
    triton_rope.rope_and_write(qkv, cos, sin, layers[1], slots, heads)
    rope_and_write(qkv, cos, sin, expected, slots, heads)
    torch.testing.assert_close(layers[1, :, PAGE:], expected[:, PAGE:])
    assert torch.equal(layers[1, :, 1:PAGE], kv[:, 1:PAGE])
    assert torch.equal(layers[0], kv)
    assert torch.equal(layers[2], kv)

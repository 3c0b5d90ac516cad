"""Choose what computes the layers of a packed forward: plain torch or Triton kernels.

Shapes: T tokens, D hidden size, F intermediate size, N query heads, K key/value heads, H head size,
S cache slots, E = (N + 2K) * H or the outputs of a product.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from d2f.errors import ConfigError, unknown_name
from d2f.ops.linear import linear, linear_fp32
from d2f.ops.norm import add_rms_norm
from d2f.ops.packed import Candidates, PackedTokens, Packing, find_candidates, pack_tokens
from d2f.ops.paged_attention import paged_attention, plan_attention
from d2f.ops.rope import rope_and_write
from d2f.ops.sampling import Choice, choose_tokens
from d2f.ops.swiglu import gated_linear, swiglu

BACKENDS = ("auto", "torch", "triton")
LEAST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPU that the kernels are written for: the first with bf16."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The operations of a packed forward. Each field is described where torch's version stands."""

    name: str
    pack_tokens: Callable[..., Packing]
    """(rows, *, …): the tokens of a forward."""
    find_candidates: Callable[..., Candidates]
    """(packing, rows, *, …): those that need a token."""
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    """(x_TD, residual_TD, weight_D, eps): the normalised sum and the sum."""
    rope_and_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    """(qkv_TE, cos_TH, sin_TH, kv_2SKH, slots_T, num_heads): rotated queries (T, N, H)."""
    plan_attention: Callable[[PackedTokens, int, int], Any]
    """(packed, num_heads, num_kv_heads): what the layers of a forward share."""
    paged_attention: Callable[[Tensor, Tensor, Any], Tensor]
    """(q_TNH, kv_2SKH, plan): (T, N * H)."""
    swiglu: Callable[[Tensor], Tensor]
    """(gate_up_TF2): (T, F)."""
    gated_linear: Callable[[Tensor, Tensor], Tensor]
    """(x_TD, weight_F2D): (T, F), the product and `swiglu` of it."""
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """(x_TD, weight_ED, bias_E): (T, E)."""
    linear_fp32: Callable[[Tensor, Tensor], Tensor]
    """(x_TD, weight_ED): (T, E) in fp32."""
    choose_tokens: Callable[..., Choice]
    """(logits_MV, *, …): the tokens, their probabilities and ranks."""


def select_backend(name: str, device: torch.device | str) -> Backend:
    """The operations of that name, for tensors on `device`.

    "auto" takes the kernels on a GPU that can run them, if Triton is installed, else plain torch.

    Raises:
        ConfigError: The name is unknown, or the kernels cannot run here.

    Example:
        >>> select_backend("auto", "cpu").name
        'torch'
    """
    if name not in BACKENDS:
        raise ConfigError(unknown_name("backend", name, BACKENDS))
    device = torch.device(device)
    if name == "torch" or (name == "auto" and not _runs_kernels(device)):
        return _TORCH
    try:
        kernels = _triton_backend()
    except ImportError as error:
        if name == "auto":
            return _TORCH
        raise ConfigError(
            "backend 'triton' needs the package triton, which cannot be imported "
            f"({error}); install it, or choose the backend 'torch'"
        ) from None
    if not _runs_kernels(device) and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"backend 'triton' cannot run on the device '{device}': it needs a CUDA device of "
            "compute capability 8.0 or more; choose the backend 'torch', or set "
            "TRITON_INTERPRET=1 to interpret the kernels, slowly"
        )
    return kernels


def _runs_kernels(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


_TORCH = Backend(
    name="torch",
    pack_tokens=pack_tokens,
    find_candidates=find_candidates,
    add_rms_norm=add_rms_norm,
    rope_and_write=rope_and_write,
    plan_attention=plan_attention,
    paged_attention=paged_attention,
    swiglu=swiglu,
    gated_linear=gated_linear,
    linear=linear,
    linear_fp32=linear_fp32,
    choose_tokens=choose_tokens,
)


@functools.cache
def _triton_backend() -> Backend:
    from d2f.ops.triton import (
        attention_plan,
        linear,
        norm,
        packed,
        paged_attention,
        rope,
        sampling,
        swiglu,
    )

    return Backend(
        name="triton",
        pack_tokens=packed.pack_tokens,
        find_candidates=packed.find_candidates,
        add_rms_norm=norm.add_rms_norm,
        rope_and_write=rope.rope_and_write,
        plan_attention=attention_plan.plan_attention,
        paged_attention=paged_attention.paged_attention,
        swiglu=swiglu.swiglu,
        gated_linear=swiglu.gated_linear,
        linear=linear.linear,
        linear_fp32=linear.linear_fp32,
        choose_tokens=sampling.choose_tokens,
    )

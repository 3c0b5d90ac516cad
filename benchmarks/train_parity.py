"""Compare the fast paths of training with the plain ones on a GPU in bf16.

    python benchmarks/train_parity.py --output parity.json

It compares attention in tiles with a dense mask, the chunked loss with that of whole logits, and a
compiled step with a plain one. Both results of a pair are compared with the same computation in
fp32, so a row tells the error of each. `--tiny` runs the script on a CPU, where nothing is
compiled.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2f.cli.bench_train import TrainOptions
from d2f.cli.bench_train_setup import TrainSetup
from d2f.diffusion.layout import BlockLayout, visible
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.results import write_json
from d2f.ops.attention import AttentionMask, attention
from d2f.ops.tiled_attention import tiled_attention, tiled_mask
from d2f.training.chunked_loss import TeacherStates, chunked_loss
from d2f.training.objective import OBJECTIVES, position_loss
from d2f.training.processes import Processes

# name, query heads, key heads, head size, length
ATTENTION = (("llada-8b", 32, 32, 128, 1024), ("dream-7b", 28, 4, 128, 1000))
TINY_ATTENTION = (("tiny", 4, 2, 16, 70),)
# name, counted positions, width, vocabulary
LOSS = (("llada-8b", 512, 4096, 126464), ("dream-7b", 512, 3584, 152064))
TINY_LOSS = (("tiny", 20, 16, 96),)
MOST = 2.0
"""Largest allowed ratio of the fast path's error to the plain one's (plus the smallest error)."""
LEAST = 1e-5
MOST_GAP = 0.02
"""Largest allowed relative difference between compiled and plain losses of some updates."""


def relative(found: Tensor, truth: Tensor) -> float:
    """Return the norm of the difference over the norm of the truth, in fp32."""
    gap = (found.float() - truth.float()).norm() / truth.float().norm().clamp_min(1e-30)
    return float(gap)


def with_gradients(work: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of its product with a fixed random tensor.

    On a CPU the result is the output alone, since attention in tiles has no backward pass there.
    """
    if inputs[0].device.type == "cpu":
        return [work(*inputs)]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = work(*leaves)
    draw = torch.Generator(out.device).manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, device=out.device)
    (out.float() * weight).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def compare(
    name: str, what: list[str], fast: list[Tensor], plain: list[Tensor], truth: list[Tensor]
) -> list[dict[str, Any]]:
    rows = []
    for part, one, other, best in zip(what[: len(fast)], fast, plain, truth, strict=True):
        errors = relative(one, best), relative(other, best)
        good = errors[0] <= MOST * errors[1] + LEAST
        rows.append({"name": name, "of": part, "fast": errors[0], "plain": errors[1], "ok": good})
        print(f"{name:34s} {part:10s} fast {errors[0]:.2e}  plain {errors[1]:.2e}", file=sys.stderr)
    return rows


def compare_attention(device: str, dtype: torch.dtype, sizes: Any) -> list[dict[str, Any]]:
    rows = []
    for name, heads, kv_heads, size, length in sizes:
        draw = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn(2, length, count, size, generator=draw, device=device)
            for count in (heads, kv_heads, kv_heads)
        )
        prompts_B = torch.tensor([length // 4, length // 3])
        blocks_BL = BlockLayout(prompt_length=prompts_B, block_size=16).block_numbers(length)
        blocks_BL = blocks_BL.to(device)
        dense = AttentionMask(
            lambda start, end, b=blocks_BL: visible(b[:, start:end], b),
            (2, length, length),
            heads // kv_heads,
        )
        tiles = tiled_mask(blocks_BL)
        # Compiled as in training; without `dynamic` the second size would get another kernel.
        tiled = tiled_attention
        if device != "cpu":
            tiled = torch.compile(tiled_attention, dynamic=False)
        narrow = [tensor.to(dtype) for tensor in (q, k, v)]
        rows += compare(
            f"attention {name}, length {length}",
            ["output", "d query", "d key", "d value"],
            with_gradients(lambda *t, m=tiles, f=tiled: f(*t, m), narrow),
            with_gradients(lambda *t, m=dense: attention(*t, m), narrow),
            with_gradients(lambda *t, m=dense: attention(*t, m), [t.float() for t in narrow]),
        )
    return rows


def compare_loss(device: str, dtype: torch.dtype, sizes: Any) -> list[dict[str, Any]]:
    rows = []
    for name, count, width, vocab in sizes:
        for objective in OBJECTIVES:
            draw = torch.Generator(device).manual_seed(0)

            def normal(*shape: int, g: torch.Generator = draw) -> Tensor:
                return torch.randn(shape, generator=g, device=device).to(dtype)

            student, teacher, head = (
                normal(count, width),
                normal(count, width),
                normal(vocab, width),
            )
            head *= 2 / width**0.5
            weight = torch.rand(count, generator=draw, device=device) / count
            ids = torch.randint(vocab, (count,), generator=draw, device=device)
            given = (student, teacher, head, weight, ids, objective)
            rows += compare(
                f"loss {name}, {objective}",
                ["loss", "d hidden"],
                chunked(*given),
                whole(*given),
                whole(student.float(), teacher.float(), head.float(), weight, ids, objective),
            )
    return rows


def chunked(
    student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor, ids: Tensor, objective: str
) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    hard = objective == "cross_entropy"
    target = ids if hard else TeacherStates(hidden_ME=teacher, head_VE=head)
    loss, _ = chunked_loss(leaf, head, target, weight, objective, memory_bytes=2**27)
    loss.backward()
    return [loss.detach(), leaf.grad]


def whole(
    student: Tensor, teacher: Tensor, head: Tensor, weight: Tensor, ids: Tensor, objective: str
) -> list[Tensor]:
    leaf = student.detach().requires_grad_()
    target = ids if objective == "cross_entropy" else teacher @ head.T
    loss = (weight * position_loss(leaf @ head.T, target, objective)).sum()
    loss.backward()
    return [loss.detach(), leaf.grad]


def compare_steps(device: str, tiny: Path | None) -> list[dict[str, Any]]:
    """Return the losses of some updates, compiled and plain."""
    rows = []
    for shape in ("llada-8b", "dream-7b"):
        losses = []
        for compiled in (True, False):
            options = TrainOptions(
                shape=None if tiny else shape, model=None if tiny is None else str(tiny / shape),
                layers=None if tiny else 2, length=64 if tiny else 1024, lora=32, compiled=compiled,
            )  # fmt: skip
            setup = TrainSetup.of(options, Processes.current(device), "bfloat16")
            with setup.bench(1, False) as bench:
                losses.append(torch.tensor(bench.repeat(5)))
        # There is no fp32 truth here: weights drawn in another type are other weights.
        gap = relative(*losses)
        print(f"{f'5 updates of {shape}, 2 layers':45s} compiled - not {gap:.2e}", file=sys.stderr)
        row = {"name": f"5 updates of {shape}, 2 layers", "of": "losses", "difference": gap}
        rows.append(row | {"ok": gap < MOST_GAP})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("parity.json"))
    parser.add_argument("--tiny", type=Path, help="folder of tiny llada-8b and dream-7b; on a CPU")
    options = parser.parse_args()
    device = "cpu" if options.tiny else "cuda"
    dtype = torch.bfloat16
    rows = [
        *compare_attention(device, dtype, TINY_ATTENTION if options.tiny else ATTENTION),
        *compare_loss(device, dtype, TINY_LOSS if options.tiny else LOSS),
        *compare_steps(device, options.tiny),
    ]
    environment = describe_environment(device=device, dtype="bfloat16")
    write_json(options.output, {"environment": environment, "rows": rows})


if __name__ == "__main__":
    main()

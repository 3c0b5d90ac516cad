"""Floating-point operations that a training step must do, for the model FLOPs utilisation.

Multiplications and additions of matrix products are counted, 2 for each pair: forward of the
teacher, forward and backward of the student. Gradients of frozen weights, which nobody computes,
are not counted, nor is what activation checkpointing or a fused attention computes a second time,
nor all that is no matrix product (norms, rotations, softmax, the optimizer).

- A projection of `in` x `out` weights costs 2 * in * out per token forward, as much again for the
  gradient of its input, and as much again for that of its weights where they are trained. An
  adapter of rank r is two such projections, of `in` x r and r x out, both trained.
- Attention costs 4 * heads * head size per visible pair of query and key forward (scores, then
  values) and twice that backward.
- The head is applied at the positions that count in the loss only.
- Where nothing below is trained no gradient is needed: with an adapter, the frozen projections of
  the first layer that read the embeddings hand none on.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from d2f.models.lora import LoraLinear
from d2f.models.transformer import Transformer
from d2f.training.step_inputs import StepInputs

# The modules of a layer in the order of the forward pass; those of a row read the same input.
_READERS = (
    ("attention_norm",),
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("mlp_norm",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The sizes of a step on which its operations depend."""

    num_tokens: int
    """Positions that the models read, of all sequences."""
    num_counted: int
    """Positions with a weight in the loss."""
    teacher_pairs: int
    """Pairs of query and key of the teacher's attention: length² of each sequence."""
    student_pairs: int
    """Pairs that the student's attention computes."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of a step: the forward passes of both models, and the student's backward pass."""

    teacher: int
    student: int
    backward: int

    @property
    def total(self) -> int:
        """The sum of the three."""
        return self.teacher + self.student + self.backward

    def to_dict(self) -> dict[str, int]:
        """Give the numbers and their sum, for a result file."""
        return {**vars(self), "total": self.total}


def visible_pairs(block_BL: Tensor) -> int:
    """Pairs of query and key where the key's block number is not larger."""
    pairs = 0
    for block_L in block_BL:
        _, count_N = block_L.sort().values.unique_consecutive(return_counts=True)
        pairs += int((count_N * count_N.cumsum(0)).sum())
    return pairs


def describe_work(inputs: StepInputs, *, only_visible: bool = True) -> Work:
    """The work of stage d2f on a batch; `only_visible` False: the student sees all, too."""
    size, length = inputs.ids_BL.shape
    pairs = size * length**2
    return Work(
        num_tokens=size * length,
        num_counted=int((inputs.weight_BL > 0).sum()),
        teacher_pairs=pairs,
        student_pairs=visible_pairs(inputs.block_BL) if only_visible else pairs,
    )


def step_flops(student: Transformer, teacher: Transformer | None, work: Work) -> StepFlops:
    """Operations of a step of stage d2f; without a teacher of its own the student teaches itself.

    The student's parameters that require gradients are the trained ones. LLaDA-8B with a frozen
    base takes about 6 * 7.5e9 operations per token, 2 for each of the teacher, the student and the
    gradient of its inputs.
    """
    ahead, _ = _count(teacher or student, work, work.teacher_pairs, adapters=False)
    forward, backward = _count(student, work, work.student_pairs, adapters=True)
    return StepFlops(teacher=ahead, student=forward, backward=backward)


def _count(model: Transformer, work: Work, num_pairs: int, *, adapters: bool) -> tuple[int, int]:
    """Operations of a model's forward pass, and of its backward pass."""
    spec = model.spec
    forward = backward = num_layers = 0
    # Whether the gradient of what the next modules read is needed.
    flows = _trained(model.embed)
    for layer in model.layers:
        parts = {name.rpartition(".")[2]: part for name, part in layer.named_modules()}
        for names in _READERS:
            modules = [parts[name] for name in names]
            for module in modules:
                ahead, back = _projection(module, flows, adapters=adapters)
                forward += ahead
                backward += back
            flows |= any(map(_trained, modules))
            num_layers += flows and "q_proj" in names
    flows |= _trained(model.norm)
    pairs = 2 * spec.num_heads * spec.head_dim * num_pairs
    head = spec.vocab_size * spec.hidden_size * work.num_counted
    ahead = forward * work.num_tokens + spec.num_layers * pairs + head
    head *= flows + model.head_weight_VD.requires_grad
    return 2 * ahead, 2 * (backward * work.num_tokens + 2 * num_layers * pairs + head)


def _projection(module: nn.Module, flows: bool, *, adapters: bool) -> tuple[int, int]:
    """Products per token of a projection, forward and for the gradients; a norm has none."""
    base, rank = module, 0
    if isinstance(module, LoraLinear):
        base, rank = module.base, len(module.lora_A)
    if not isinstance(base, nn.Linear):
        return 0, 0
    size = base.in_features * base.out_features
    adapter = rank * (base.in_features + base.out_features)
    # The input of an adapter's B always needs a gradient, as A is trained.
    inputs = rank * (base.out_features + flows * base.in_features)
    back = size * (flows + base.weight.requires_grad) + adapter + inputs
    return size + adapters * adapter, back


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())

"""How many floating-point operations a training step must do, for the model FLOPs utilisation.

Counted are multiplications and additions of matrix products, 2 for each pair: forward of the
teacher, forward and backward of the student. Not counted are gradients of frozen weights, which
nobody computes, what activation checkpointing or a fused attention computes a second time, and all
that is no matrix product (norms, rotations, softmax, the optimizer).

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

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from d2f.models.lora import LoraLinear
from d2f.models.transformer import Layer, Transformer
from d2f.training.step_inputs import StepInputs


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is about, as far as its operations depend on it."""

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
    """Operations of a step."""

    teacher: int
    """Forward of the teacher."""
    student: int
    """Forward of the student."""
    backward: int
    """Backward of the student."""

    @property
    def total(self) -> int:
        """All three."""
        return self.teacher + self.student + self.backward

    def to_dict(self) -> dict[str, int]:
        """For a result file."""
        return {**asdict(self), "total": self.total}


def visible_pairs(block_BL: Tensor) -> int:
    """Pairs of query and key where the key's block number is not larger.

    Example:
        >>> import torch
        >>> visible_pairs(torch.tensor([[0, 0, 1, 2]]))
        11
    """
    pairs = 0
    for block_L in block_BL:
        _, count_N = block_L.sort().values.unique_consecutive(return_counts=True)
        pairs += int((count_N * count_N.cumsum(0)).sum())
    return pairs


def describe_work(inputs: StepInputs, *, only_visible: bool = True) -> Work:
    """The work of stage d2f on a batch; `only_visible` False: the student sees all, too.

    Example:
        Of a sequence of 1,024 tokens with a prompt of 256 and blocks of 16, the student sees
        563,200 of 1,048,576 pairs.
    """
    size, length = inputs.ids_BL.shape
    pairs = size * length**2
    return Work(
        num_tokens=size * length,
        num_counted=int((inputs.weight_BL > 0).sum()),
        teacher_pairs=pairs,
        student_pairs=visible_pairs(inputs.block_BL) if only_visible else pairs,
    )


def step_flops(student: Transformer, teacher: Transformer | None, work: Work) -> StepFlops:
    """Operations of a step of stage d2f.

    Args:
        student: Its parameters that require gradients are the trained ones.
        teacher: None: the student with its adapter off.
        work: What the step is about.

    Example:
        LLaDA-8B with a frozen base takes about 6 * 7.5e9 operations per token, 2 for each of the
        teacher, the student and the gradient of its inputs.
    """
    return StepFlops(
        teacher=_forward(teacher or student, work, work.teacher_pairs, adapters=False),
        student=_forward(student, work, work.student_pairs, adapters=True),
        backward=_backward(student, work),
    )


def _forward(model: Transformer, work: Work, num_pairs: int, *, adapters: bool) -> int:
    spec, per_token = model.spec, 0
    for layer in _layers(model):
        for module in _projections(layer):
            base, rank = _parts(module)
            per_token += base.in_features * base.out_features
            if adapters:
                per_token += rank * (base.in_features + base.out_features)
    attention = 2 * spec.num_heads * spec.head_dim * spec.num_layers * num_pairs
    head = spec.vocab_size * spec.hidden_size * work.num_counted
    return 2 * (per_token * work.num_tokens + attention + head)


def _backward(model: Transformer, work: Work) -> int:
    spec, per_token, num_layers = model.spec, 0, 0
    # Whether the gradient of what the next modules read is needed.
    flows = _trained(model.embed)
    for layer in _layers(model):
        flows |= _trained(layer.attention_norm)
        readers = (layer.q_proj, layer.k_proj, layer.v_proj)
        per_token += sum(_gradient(module, flows) for module in readers)
        flows |= any(map(_trained, readers))
        num_layers += flows
        per_token += _gradient(layer.o_proj, flows)
        flows |= _trained(layer.o_proj) or _trained(layer.mlp_norm)
        gates = (layer.gate_proj, layer.up_proj)
        per_token += sum(_gradient(module, flows) for module in gates)
        flows |= any(map(_trained, gates))
        per_token += _gradient(layer.down_proj, flows)
        flows |= _trained(layer.down_proj)
    flows |= _trained(model.norm)
    attention = 4 * spec.num_heads * spec.head_dim * num_layers * work.student_pairs
    head = spec.vocab_size * spec.hidden_size * work.num_counted
    head *= flows + model.head_weight_VD.requires_grad
    return 2 * (per_token * work.num_tokens + attention + head)


def _gradient(module: nn.Module, flows: bool) -> int:
    """Products per token for the gradients of a projection's weights and, if asked, its input."""
    base, rank = _parts(module)
    size = base.in_features * base.out_features
    products = size * (flows + base.weight.requires_grad)
    if rank:
        # Of both halves' weights; of the input of B always, as A is trained; of that of A.
        products += rank * (base.in_features + base.out_features)
        products += rank * base.out_features + flows * rank * base.in_features
    return products


def _parts(module: nn.Module) -> tuple[nn.Linear, int]:
    """A projection, and the rank of the adapter beside it: 0 if there is none."""
    if isinstance(module, LoraLinear):
        return module.base, len(module.lora_A)
    assert isinstance(module, nn.Linear)
    return module, 0


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _layers(model: Transformer) -> list[Layer]:
    return [layer for layer in model.layers if isinstance(layer, Layer)]


def _projections(layer: Layer) -> tuple[nn.Module, ...]:
    attention = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    return (*attention, layer.gate_proj, layer.up_proj, layer.down_proj)

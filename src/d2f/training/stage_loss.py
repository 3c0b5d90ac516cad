"""The loss of a micro-batch: forward passes of teacher and student, and their comparison.

Shapes: B sequences, L positions, T positions of all sequences, M selected positions, D and E
hidden sizes of student and teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2f.diffusion.layout import PADDING_BLOCK, causal_blocks
from d2f.models.lora import adapter_disabled
from d2f.models.transformer import Transformer
from d2f.ops.tiled_attention import MIN_HEAD_DIM, tiled_mask
from d2f.training.chunked_loss import TeacherStates, chunk_size, chunked_loss
from d2f.training.config import TrainConfig
from d2f.training.objective import position_loss
from d2f.training.step_inputs import NUM_LENGTHS, StepInputs

Seen = dict[str, Any]
"""Arguments of a model's `forward` besides the tokens: block numbers, or the mask that `tiled_mask`
made of them (neither: all see all), and positions, where they are not 0, 1, …."""

Observer = Callable[[str], object]
"""Is called with the name of each phase of a training step when the phase has ended."""

Blocks = tuple[Tensor | None, Tensor | None]
"""Block numbers (B or 1, L), None where all see all; and the smallest one that each position sees,
None where that is the row's."""

GRAPHS_PER_LENGTH = 4
"""Graphs that a layer may be compiled to: the teacher's, the student's, the student's first one,
whose input needs no gradient below an adapter; and one to spare for a teacher of its own."""


class StageLoss:
    """The loss of a micro-batch: `loss(inputs)` gives (scalar, loss_BL without gradient).

    Stage d2f runs the teacher first, under full attention and without gradients. The student then
    reads the same noisy tokens under block-causal attention.

    Args:
        config: The recipe.
        student: The model to be trained.
        teacher: Another model that teaches; None: the student with its adapter off, or nobody.
        compiled: Compile what pays; attention then runs in tiles. For GPUs.
        forward: The module that gives the student's hidden states, where DDP wraps the student.
        alone: No other process trains along; with several, hooks in the models cut their graphs.
        observer: Is told of the end of "teacher", "student" and "loss". A loss that is compiled
            together with the student belongs to "student".
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Transformer,
        teacher: Transformer | None = None,
        *,
        compiled: bool = False,
        forward: nn.Module | None = None,
        alone: bool = True,
        observer: Observer | None = None,
    ) -> None:
        self._ended = observer or (lambda phase: None)
        self.student = student
        self.teacher = teacher
        self._forward = forward or student
        self._distils = config.stage == "d2f"
        self._causal = config.stage == "autoregressive"
        random_end = config.noise is not None and config.noise.random_end
        self._padded = random_end or config.data.padding != "full"
        self._recompute = config.activation_checkpointing
        # FlexAttention is a fused kernel only where it is compiled.
        models = [model for model in (student, teacher) if model is not None]
        smallest = min(model.spec.head_dim for model in models)
        self._tiled = compiled and smallest >= MIN_HEAD_DIM
        self._objective = config.distillation.objective if self._distils else "cross_entropy"
        self._autocast = config.precision == "bfloat16"
        self._memory_bytes = config.loss_memory_mib * 2**20
        positions = config.micro_batches()[0] * config.data.sequence_length
        # A compiler fuses the head's output, its softmax and the loss of a small vocabulary into
        # few passes, if all of them have the same shapes at each step. Logits that would not fit
        # are never made: then the layers alone are compiled, and the loss runs in chunks, whose
        # matrices are large enough to need no compiler. So it is where there are hooks in the
        # model, which would cut a graph of the whole into pieces.
        fits = positions <= chunk_size(student.spec.vocab_size, self._memory_bytes)
        self._whole = compiled and alone and fits
        self._by_layer = compiled and not self._whole
        self._student_loss: Callable[..., tuple[Tensor, Tensor]] = self._whole_loss
        self._logits: Callable[..., Tensor] = self._compute_logits
        if compiled:
            _set_compiler(GRAPHS_PER_LENGTH * NUM_LENGTHS)
        if self._whole:
            # Fills what the models compute once and keep, which would else compile them twice.
            with torch.no_grad():
                for model in models:
                    model(torch.zeros((1, 1), dtype=torch.long, device=model.device))
            self._student_loss = torch.compile(self._whole_loss, dynamic=False)
            self._logits = torch.compile(self._compute_logits, dynamic=False)

    @property
    def selects(self) -> bool:
        """Whether inputs should name the positions with a weight; the others then cost no head."""
        return not self._whole

    def __call__(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Give the weighted sum, and the loss of each position (0 where it was not computed)."""
        loss, loss_BL = self._compiled_loss(inputs) if self._whole else self._chunked_loss(inputs)
        self._ended("loss")
        return loss, loss_BL

    def hidden_states(self, inputs: StepInputs, rows_M: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Give aligned hidden states (M, D) at some positions of the flattened batch, and the head.

        Those of the student stand under "", those of the teacher, where the objective has one,
        under "teacher_". Nothing is compiled, so that this may be called now and then.
        """
        compute = partial(self._compute_states, plain=True)
        found = {}
        if self._objective != "cross_entropy":
            states_TE = self._ask_teacher(compute, inputs, tiled=False)
            head_VE = (self.teacher or self.student).head_weight_VD
            found["teacher_"] = (states_TE.index_select(0, rows_M), head_VE)
        seen = self._seen(inputs, self._student_blocks(inputs), tiled=False)
        states_TD = compute(self.student, inputs.ids_BL, seen)
        return {"": (states_TD.index_select(0, rows_M), self.student.head_weight_VD), **found}

    def _ask_teacher(
        self, compute: Callable[..., Tensor], inputs: StepInputs, *, tiled: bool
    ) -> Tensor:
        """Call `compute(teacher, ids_BL, seen)` under full attention and without gradients."""
        view = nullcontext() if self.teacher is not None else adapter_disabled(self.student)
        with torch.no_grad(), view:
            seen = self._seen(inputs, self._teacher_blocks(inputs), tiled=tiled)
            return compute(self.teacher or self.student, inputs.ids_BL, seen)

    def _compiled_loss(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        target = inputs.target_BL.flatten()
        if self._objective != "cross_entropy":
            target = self._ask_teacher(self._logits, inputs, tiled=self._tiled)
            self._ended("teacher")
        seen = self._seen(inputs, self._student_blocks(inputs), tiled=self._tiled)
        result = self._student_loss(inputs.ids_BL, target, inputs.weight_BL, seen)
        self._ended("student")
        return result

    def _chunked_loss(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        rows_M = inputs.selected_M
        target: Tensor | TeacherStates = _selected(inputs.target_BL.flatten(), rows_M)
        if self._objective != "cross_entropy":
            states_TE = self._ask_teacher(self._compute_states, inputs, tiled=self._tiled)
            target = TeacherStates(
                hidden_ME=_selected(states_TE, rows_M),
                head_VE=(self.teacher or self.student).head_weight_VD,
            )
            self._ended("teacher")
        seen = self._seen(inputs, self._student_blocks(inputs), tiled=self._tiled)
        states_TD = self._compute_states(self.student, inputs.ids_BL, seen)
        self._ended("student")
        with self._products(inputs.ids_BL.device):
            loss, loss_M = chunked_loss(
                _selected(states_TD, rows_M),
                self.student.head_weight_VD,
                target,
                _selected(inputs.weight_BL.flatten(), rows_M),
                self._objective,
                memory_bytes=self._memory_bytes,
            )
        if rows_M is not None:
            loss_M = loss_M.new_zeros(inputs.ids_BL.numel()).index_copy(0, rows_M, loss_M)
        return loss, loss_M.view(inputs.ids_BL.shape)

    def _whole_loss(
        self, ids_BL: Tensor, target: Tensor, weight_BL: Tensor, seen: Seen
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss from the logits of all positions."""
        logits_TV = self._compute_logits(self.student, ids_BL, seen)
        loss_BL = position_loss(logits_TV, target, self._objective).view(weight_BL.shape)
        return (weight_BL * loss_BL).sum(), loss_BL.detach()

    def _seen(self, inputs: StepInputs, blocks: Blocks, *, tiled: bool) -> Seen:
        """Give the arguments of a model's `forward` besides the tokens; never compiled."""
        seen: Seen = {}
        if inputs.position_BL is not None:
            seen["positions_BL"] = inputs.position_BL
        blocks_BL, first_BL = blocks
        if blocks_BL is None:
            return seen
        if tiled:
            return seen | {"mask": tiled_mask(blocks_BL.expand(inputs.ids_BL.shape), first_BL)}
        seen["blocks_BL"] = blocks_BL
        if first_BL is not None:
            seen["first_BL"] = first_BL
        return seen

    def _student_blocks(self, inputs: StepInputs) -> Blocks:
        """Block numbers of the student's view."""
        if self._distils:
            return inputs.block_BL, inputs.first_BL
        if not self._causal:
            return self._teacher_blocks(inputs)
        blocks_BL = causal_blocks(inputs.ids_BL.shape[1], inputs.ids_BL.device)
        if inputs.position_BL is None:
            return blocks_BL, None
        # The places in the row; the first of a sample is where its position is 0.
        blocks_BL = blocks_BL.expand_as(inputs.position_BL)
        return blocks_BL, (blocks_BL - inputs.position_BL).to(torch.int32)

    def _teacher_blocks(self, inputs: StepInputs) -> Blocks:
        """Block numbers of the teacher's view, which hides padding and other samples only."""
        if inputs.first_BL is not None:
            return inputs.first_BL, inputs.first_BL
        if not self._padded:
            return None, None
        padding_BL = inputs.block_BL == PADDING_BLOCK
        return torch.where(padding_BL, PADDING_BLOCK, 0).to(torch.int32), None

    def _compute_states(
        self, model: Transformer, ids_BL: Tensor, seen: Seen, *, plain: bool = False
    ) -> Tensor:
        """Aligned hidden states (T, D) of the flattened batch; `plain`: without the compiler."""
        how = {} if plain else {"recompute": self._recompute, "compiled": self._by_layer}
        with self._products(ids_BL.device):
            forward = self._forward if model is self.student else model
            states_BLD = forward(ids_BL, **how, **seen)
            return model.align(states_BLD, seen.get("positions_BL")).flatten(0, 1)

    def _compute_logits(self, model: Transformer, ids_BL: Tensor, seen: Seen) -> Tensor:
        """Aligned logits (T, V) of the flattened batch, fp32."""
        with self._products(ids_BL.device):
            return model.head(self._compute_states(model, ids_BL, seen))

    def _products(self, device: torch.device) -> AbstractContextManager[object]:
        """The dtype of matrix products within the block."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self._autocast)


def _set_compiler(num_graphs: int) -> None:
    """Let a function be compiled for that many shapes, of which torch else gives up at eight."""
    import torch._dynamo

    limit = max(torch._dynamo.config.recompile_limit, num_graphs)
    torch._dynamo.config.recompile_limit = limit
    # Within DDP each graph would be cut where its buckets of gradients end: here, in a layer.
    torch._dynamo.config.optimize_ddp = False


def _selected(values: Tensor, rows_M: Tensor | None) -> Tensor:
    return values if rows_M is None else values.index_select(0, rows_M)

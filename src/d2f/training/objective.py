"""The losses of training: asymmetric distillation, and those of the two stages before it.

Shapes: B sequences, L positions, M selected positions, V vocabulary, N blocks.

Every loss here is a sum over positions of weight * loss, with weights that already carry the
denominator. So the loss of a batch is the sum of the losses of its parts, whatever the parts are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d2f.errors import ConfigError
from d2f.recipe import one_of

OBJECTIVES = ("forward_kl", "reverse_kl", "soft_cross_entropy", "cross_entropy")
WEIGHTINGS = ("inverse_ratio", "none")
NORMALIZATIONS = ("batch", "sequence")


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    masked: Tensor,
    mask_ratio: Tensor | float,
    objective: str = "forward_kl",
    weighting: str = "inverse_ratio",
    normalization: str = "batch",
) -> Tensor:
    """Asymmetric distillation (paper, equation 3): a scalar, fp32, the mean over masked positions.

    With `normalization="sequence"` it is the mean over sequences of each sequence's mean over its
    masked positions, as the authors' code has it, which trains on micro-batches of one sequence.
    A sequence without a masked position then has no mean, and counts as none.

    Objectives, with q the teacher's and p the student's distribution at a position:
        forward_kl: KL(q || p), what the authors' code minimises up to a constant.
        reverse_kl: KL(p || q), as the paper writes it.
        soft_cross_entropy: -sum q log p, the code's own form.
        cross_entropy: -log p of given tokens; pass their ids (B, L) in place of teacher logits.

    Without a masked position the loss is 0, still connected to the student.

    Args:
        student_logits: (B, L, V), under block-causal attention.
        teacher_logits: (B, L, V) over the same noisy tokens under full attention; no gradient
            flows into it. For `cross_entropy`, token ids (B, L).
        masked: (B, L), bool: positions that count.
        mask_ratio: Mask ratio t_i of each position's block: a number, (B, 1) or (B, L).
        objective: One of `OBJECTIVES`.
        weighting: `inverse_ratio` divides each position's loss by its mask ratio; `none` does not.
        normalization: `batch` takes one mean over the masked positions of all sequences, so that
            a sequence weighs as many positions as it has masked; `sequence` weighs sequences alike.

    Raises:
        ConfigError: An unknown name, or shapes that do not belong together.

    Example:
        >>> logits = torch.zeros(1, 2, 3)
        >>> distillation_loss(logits, logits, torch.tensor([[True, False]]), 0.5)
        tensor(0.)
    """
    check_names(objective, weighting, normalization)
    hard = objective == "cross_entropy"
    expected = student_logits.shape[:-1] if hard else student_logits.shape
    if teacher_logits.shape != expected or masked.shape != student_logits.shape[:-1]:
        raise ConfigError(
            f"student logits {tuple(student_logits.shape)}, "
            f"{'target ids' if hard else 'teacher logits'} {tuple(teacher_logits.shape)} and "
            f"masked {tuple(masked.shape)} do not belong together"
        )
    masked = masked.bool()
    ratio = torch.as_tensor(mask_ratio, device=masked.device)
    if ratio.ndim not in (0, 2):
        raise ConfigError(
            f"mask_ratio has shape {tuple(ratio.shape)}; give a number, (B, 1) or (B, L)"
        )
    ratio_BL = ratio.expand(masked.shape)
    weight_BL = distillation_weights(masked, ratio_BL, weighting, normalization)
    # Only masked rows are read: with a vocabulary of 150,000 the others would fill the memory.
    loss_M = position_loss(student_logits[masked], teacher_logits[masked], objective)
    return (weight_BL[masked] * loss_M).sum()


def masked_diffusion_loss(
    logits: Tensor, target_ids: Tensor, masked: Tensor, mask_ratio: Tensor, response: Tensor
) -> Tensor:
    """The bound of a masked diffusion model (LLaDA): a scalar, fp32.

    Sum over masked positions of cross-entropy / t, divided by the number of response positions.

    Args:
        logits: (B, L, V).
        target_ids: (B, L), the clean tokens.
        masked: (B, L), bool.
        mask_ratio: Mask rate t of each position, of a shape that broadcasts to (B, L).
        response: (B, L), bool: positions that could have been masked.

    Example:
        >>> everything = torch.ones(1, 2, dtype=torch.bool)
        >>> masked_diffusion_loss(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long),
        ...                       everything, torch.ones(1, 1), everything)
        tensor(1.3863)
    """
    weight_BL = diffusion_weights(masked, mask_ratio.expand(masked.shape), response)
    loss_M = position_loss(logits[masked], target_ids[masked], "cross_entropy")
    return (weight_BL[masked] * loss_M).sum()


def autoregressive_loss(logits: Tensor, target_ids: Tensor, response: Tensor) -> Tensor:
    """Mean cross-entropy over the response positions: a scalar, fp32.

    Logits (B, L, V) are aligned: row p scores the token at p, as `model.logits` gives them.

    Example:
        >>> autoregressive_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long),
        ...                     torch.ones(1, 1, dtype=torch.bool))
        tensor(0.6931)
    """
    loss_M = position_loss(logits[response], target_ids[response], "cross_entropy")
    return (mean_weights(response)[response] * loss_M).sum()


def position_loss(student_MV: Tensor, target: Tensor, objective: str) -> Tensor:
    """Loss of each selected position: (M,), fp32, not weighted.

    `target` is the teacher's logits (M, V), or token ids (M,) for `cross_entropy`.
    """
    if objective == "cross_entropy":
        return F.cross_entropy(student_MV.float(), target.long(), reduction="none")
    log_p_MV = student_MV.float().log_softmax(dim=-1)
    log_q_MV = target.detach().float().log_softmax(dim=-1)
    if objective == "forward_kl":
        q_MV = log_q_MV.exp()
        # 0 log 0 is 0: a teacher may rule tokens out.
        return torch.where(q_MV > 0, q_MV * (log_q_MV - log_p_MV), 0.0).sum(dim=-1)
    if objective == "reverse_kl":
        return (log_p_MV.exp() * (log_p_MV - log_q_MV)).sum(dim=-1)
    return -(log_q_MV.exp() * log_p_MV).sum(dim=-1)


def mean_weights(counted_BL: Tensor, normalization: str = "batch") -> Tensor:
    """Weights (B, L) that make a sum over the counted positions their mean; all 0 if none is.

    With `sequence` it is the mean of the means of those sequences that have a counted position.

    Example:
        >>> counted_BL = torch.tensor([[True, True], [False, True], [False, False]])
        >>> mean_weights(counted_BL, "sequence")
        tensor([[0.2500, 0.2500],
                [0.0000, 0.5000],
                [0.0000, 0.0000]])
    """
    if normalization == "batch":
        return counted_BL.float() / counted_BL.sum().clamp_min(1)
    count_B1 = counted_BL.sum(dim=-1, keepdim=True)
    num_sequences = (count_B1 > 0).sum().clamp_min(1)
    return counted_BL.float() / (count_B1.clamp_min(1) * num_sequences)


def distillation_weights(
    masked_BL: Tensor, ratio_BL: Tensor, weighting: str, normalization: str = "batch"
) -> Tensor:
    """Weights (B, L) of `distillation_loss`.

    They belong to the whole batch: cut into micro-batches, whose sums are added, they give the
    loss of the whole, whatever each part has masked.
    """
    weight_BL = mean_weights(masked_BL, normalization)
    if weighting == "none":
        return weight_BL
    return torch.where(masked_BL, weight_BL / ratio_BL, 0.0)


def diffusion_weights(masked_BL: Tensor, ratio_BL: Tensor, response_BL: Tensor) -> Tensor:
    """Weights (B, L) of `masked_diffusion_loss`."""
    return torch.where(masked_BL, 1 / (ratio_BL * response_BL.sum().clamp_min(1)), 0.0)


def block_sums(
    loss_BL: Tensor, counted_BL: Tensor, block_BL: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Sum of losses and number of counted positions in each block 1 … N: two tensors (N,)."""
    index_T = block_BL.expand_as(loss_BL).flatten().long().clamp_max(num_blocks)
    zero_N = torch.zeros(num_blocks + 1, device=loss_BL.device)
    counted_T = counted_BL.flatten().float()
    sums_N = zero_N.index_add(0, index_T, loss_BL.flatten().float() * counted_T)
    return sums_N[1:], zero_N.index_add(0, index_T, counted_T)[1:]


def check_names(objective: str, weighting: str, normalization: str) -> None:
    """Raise `ConfigError` for an unknown objective, weighting or normalization."""
    one_of("objective", objective, OBJECTIVES)
    one_of("weighting", weighting, WEIGHTINGS)
    one_of("normalization", normalization, NORMALIZATIONS)

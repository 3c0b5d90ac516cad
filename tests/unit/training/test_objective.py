import pytest
import torch

from d2f.errors import ConfigError
from d2f.training.objective import (
    OBJECTIVES,
    autoregressive_loss,
    block_sums,
    distillation_loss,
    masked_diffusion_loss,
)


def batch(seed=0, size=(3, 7, 11)):
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(size, generator=g) * 3 for _ in range(2))
    masked = torch.rand(size[:2], generator=g) < 0.5
    ratio = torch.rand(size[:2], generator=g) * 0.5 + 0.2
    return student.requires_grad_(), teacher, masked, ratio


@pytest.mark.parametrize("weighting", ["inverse_ratio", "none"])
def test_definitions(weighting):
    student, teacher, masked, ratio = batch()
    p, q = student.softmax(-1), teacher.softmax(-1)
    weight = 1 / ratio if weighting == "inverse_ratio" else torch.ones_like(ratio)
    ids = torch.randint(11, masked.shape)
    expected = {
        "forward_kl": (q * (q / p).log()).sum(-1),
        "reverse_kl": (p * (p / q).log()).sum(-1),
        "soft_cross_entropy": -(q * p.log()).sum(-1),
        "cross_entropy": -p.gather(-1, ids[..., None])[..., 0].log(),
    }
    for objective in OBJECTIVES:
        target = ids if objective == "cross_entropy" else teacher
        loss = distillation_loss(student, target, masked, ratio, objective, weighting)
        torch.testing.assert_close(loss, (expected[objective] * weight)[masked].mean())


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl"])
def test_student_equal_to_the_teacher_has_neither_loss_nor_gradient(objective):
    student, _, masked, ratio = batch()
    loss = distillation_loss(student, student.detach(), masked, ratio, objective)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6


def test_only_masked_positions_and_only_the_student_get_a_gradient():
    student, teacher, masked, ratio = batch()
    teacher.requires_grad_()
    distillation_loss(student, teacher, masked, ratio).backward()
    assert teacher.grad is None
    assert (student.grad[~masked] == 0).all()
    assert (student.grad[masked] != 0).any()


def test_nothing_masked_is_zero_with_a_graph():
    student, teacher, masked, ratio = batch()
    none = torch.zeros_like(masked)
    for loss in (
        distillation_loss(student, teacher, none, ratio),
        masked_diffusion_loss(student, masked.long(), none, ratio, none),
        autoregressive_loss(student, masked.long(), none),
    ):
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.item() == 0
        assert (gradient == 0).all()


def test_losses_are_fp32_for_half_precision_logits():
    student, teacher, masked, ratio = batch()
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), masked, ratio)
    assert half.dtype == torch.float32
    rounded = distillation_loss(
        student.bfloat16().float(), teacher.bfloat16().float(), masked, ratio
    )
    torch.testing.assert_close(half, rounded)


def test_wrong_names_and_shapes_are_refused():
    student, teacher, masked, ratio = batch()
    with pytest.raises(ConfigError, match="did you mean 'reverse_kl'"):
        distillation_loss(student, teacher, masked, ratio, "reverse-kl")
    with pytest.raises(ConfigError, match="did you mean 'inverse_ratio'"):
        distillation_loss(student, teacher, masked, ratio, weighting="inverse")
    with pytest.raises(ConfigError, match=r"\(3, 7, 10\)"):
        distillation_loss(student, teacher[..., :10], masked, ratio)
    with pytest.raises(ConfigError, match="target ids"):
        distillation_loss(student, teacher, masked, ratio, "cross_entropy")


def test_masked_diffusion_loss_divides_by_rate_and_response():
    student, _, masked, _ = batch()
    ids, t = torch.randint(11, masked.shape), torch.tensor([[0.1], [0.5], [0.9]])
    response = torch.ones_like(masked)
    nll = -student.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    expected = (nll / t)[masked].sum() / response.sum()
    torch.testing.assert_close(masked_diffusion_loss(student, ids, masked, t, response), expected)


def test_block_sums():
    loss = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    counted = torch.tensor([[False, True, True, True]])
    sums, counts = block_sums(loss, counted, torch.tensor([[0, 1, 1, 2]]), 3)
    assert sums.tolist() == [6, 8, 0]
    assert counts.tolist() == [2, 1, 0]

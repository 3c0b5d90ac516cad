import pytest
import torch

from d2f.errors import ConfigError
from d2f.training.objective import (
    NORMALIZATIONS,
    OBJECTIVES,
    WEIGHTINGS,
    autoregressive_loss,
    block_sums,
    distillation_loss,
    distillation_weights,
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


def mean_of(student, target, masked, ratio, objective, weighting, normalization):
    """The loss written down position by position."""
    means, everything = [], []
    for b in range(len(student)):
        losses = []
        for j in range(student.shape[1]):
            if not masked[b, j]:
                continue
            log_p = student[b, j].log_softmax(-1)
            if objective == "cross_entropy":
                loss = -log_p[target[b, j]]
            else:
                log_q = target[b, j].log_softmax(-1)
                loss = {
                    "forward_kl": (log_q.exp() * (log_q - log_p)).sum(),
                    "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(),
                    "soft_cross_entropy": -(log_q.exp() * log_p).sum(),
                }[objective]
            losses.append(loss / ratio[b, j] if weighting == "inverse_ratio" else loss)
        if losses:
            means.append(sum(losses) / len(losses))
        everything += losses
    values = means if normalization == "sequence" else everything
    return sum(values) / len(values)


def uneven_masks(seed, size=(5, 9)):
    """Masks of uneven numbers; the second sequence has none."""
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(size, generator=g) < torch.rand(size[0], 1, generator=g)
    masked[0, 0], masked[1] = True, False
    return masked


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_those_of_a_slow_twin(objective, weighting, normalization):
    for seed in range(4):
        masked = uneven_masks(seed)
        student, teacher, _, ratio = batch(seed, (*masked.shape, 11))
        target = torch.randint(11, masked.shape) if objective == "cross_entropy" else teacher
        rest = (objective, weighting, normalization)
        losses = [f(student, target, masked, ratio, *rest) for f in (distillation_loss, mean_of)]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_default_is_the_mean_over_all_masked_positions(weighting):
    student, teacher, masked, ratio = batch()
    given = distillation_loss(student, teacher, masked, ratio, "forward_kl", weighting, "batch")
    default = distillation_loss(student, teacher, masked, ratio, weighting=weighting)
    assert torch.equal(given, default)


def test_sequences_weigh_alike_whatever_else_is_in_the_batch():
    masked, ones = uneven_masks(0), torch.ones(5, 9)
    weight = distillation_weights(masked, ones, "none", "sequence").sum(1)
    torch.testing.assert_close(weight, torch.tensor([0.25, 0.0, 0.25, 0.25, 0.25]))
    one = distillation_weights(masked[:1], ones[:1], "none", "sequence")
    assert torch.equal(one, distillation_weights(masked[:1], ones[:1], "none", "batch"))


def test_only_under_batch_a_sequence_weighs_by_its_length():
    g = torch.Generator().manual_seed(0)
    size, longest = 400, 256
    length_B1 = torch.randint(16, longest + 1, (size, 1), generator=g)
    ratio_B1 = 0.2 + 0.5 * torch.rand(size, 1, generator=g)
    masked = torch.rand(size, longest, generator=g) < ratio_B1
    masked &= torch.arange(longest) < length_B1
    ratio = ratio_B1.expand(size, longest)

    def correlation(values, normalization):
        weight_B = distillation_weights(masked, ratio, "inverse_ratio", normalization).sum(1)
        return torch.corrcoef(torch.stack([weight_B, values[:, 0].float()]))[0, 1].item()

    assert correlation(length_B1, "batch") > 0.9
    assert abs(correlation(length_B1, "sequence")) < 0.1
    # What ADR 1 says of lightly masked sequences.
    assert abs(correlation(ratio_B1, "batch")) < 0.1
    assert correlation(ratio_B1, "sequence") < -0.9


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
        distillation_loss(student, teacher, none, ratio, normalization="sequence"),
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
    with pytest.raises(ConfigError, match="did you mean 'sequence'"):
        distillation_loss(student, teacher, masked, ratio, normalization="sequences")
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

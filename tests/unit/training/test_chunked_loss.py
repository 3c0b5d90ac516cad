from contextlib import nullcontext

import pytest
import torch
from tests.unit.training.memory import LiveMemory

from d2f.training.chunked_loss import LOGIT_BYTES, TeacherStates, chunk_size, chunked_loss
from d2f.training.objective import OBJECTIVES, WEIGHTINGS, distillation_loss, distillation_weights

BATCH, LENGTH, VOCAB, WIDTH, TEACHER_WIDTH = 3, 7, 33, 8, 6
SHAPE = (BATCH, LENGTH)
HEADS = ("own", "shared", "frozen")


class Case:
    """Hidden states of a batch, masks and ratios; the public loss and ours of the same."""

    def __init__(self, objective, weighting="inverse_ratio", heads="own", dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        self.objective, self.weighting = objective, weighting
        self.hidden = torch.randn(*SHAPE, WIDTH, generator=g, dtype=dtype).requires_grad_()
        self.head = torch.randn(VOCAB, WIDTH, generator=g, dtype=dtype)
        self.head.requires_grad_(heads != "frozen")
        shared = heads == "shared"
        width = WIDTH if shared else TEACHER_WIDTH
        self.teacher_hidden = torch.randn(*SHAPE, width, generator=g, dtype=dtype)
        own = torch.randn(VOCAB, width, generator=g, dtype=dtype)
        self.teacher_head = self.head if shared else own
        self.ids = torch.randint(VOCAB, SHAPE, generator=g)
        self.masked = torch.rand(SHAPE, generator=g) < 0.6
        self.ratio = torch.rand(SHAPE, generator=g) * 0.5 + 0.2

    @property
    def num_counted(self):
        return int(self.masked.sum())

    @property
    def weights(self):
        ratio = self.ratio.expand(SHAPE)
        return distillation_weights(self.masked, ratio, self.weighting)[self.masked]

    def plain(self):
        hard = self.objective == "cross_entropy"
        target = self.ids if hard else (self.teacher_hidden @ self.teacher_head.T).detach()
        logits = self.hidden @ self.head.T
        rest = (self.masked, self.ratio, self.objective, self.weighting)
        return distillation_loss(logits, target, *rest)

    def chunked(self, rows=4):
        return self.with_positions(rows)[0]

    def with_positions(self, rows=4):
        target = self.ids[self.masked]
        if self.objective != "cross_entropy":
            target = TeacherStates(
                hidden_ME=self.teacher_hidden[self.masked], head_VE=self.teacher_head
            )
        return chunked_loss(
            self.hidden[self.masked],
            self.head,
            target,
            self.weights,
            self.objective,
            memory_bytes=rows * VOCAB * LOGIT_BYTES,
        )

    def gradients(self, loss):
        trained = [t for t in (self.hidden, self.head) if t.requires_grad]
        return torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_plain_loss(objective, weighting, heads):
    case = Case(objective, weighting, heads)
    assert case.num_counted % 4
    plain, chunked = case.plain(), case.chunked()
    torch.testing.assert_close(chunked, plain, rtol=2e-6, atol=1e-6)
    expected, found = case.gradients(plain), case.gradients(chunked)
    assert len(found) == (1 if heads == "frozen" else 2)
    for one, other in zip(expected, found, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(other, one, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_are_those_of_finite_differences(objective):
    case = Case(objective, heads="own", dtype=torch.float64)

    def loss(hidden, head):
        case.hidden, case.head = hidden, head
        return case.chunked(rows=8)

    assert case.chunked().dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (case.hidden, case.head))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_chunks_of_any_size_give_the_same(objective, monkeypatch):
    case = Case(objective, heads="shared", dtype=torch.float64)
    whole, whole_M = case.with_positions(rows=BATCH * LENGTH)
    expected = case.gradients(whole)
    assert not whole_M.requires_grad
    torch.testing.assert_close((case.weights * whole_M).sum(), whole)
    monkeypatch.setattr("d2f.training.chunked_loss._HEAD_ROWS", 10)
    for rows in (1, 3, case.num_counted):
        loss, loss_M = case.with_positions(rows)
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
        torch.testing.assert_close(loss_M, whole_M, rtol=1e-12, atol=1e-15)
        for one, other in zip(expected, case.gradients(loss), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nothing_counted_is_zero_with_a_graph(objective):
    case = Case(objective)
    case.masked = torch.zeros_like(case.masked)
    loss, loss_M = case.with_positions()
    assert loss.item() == 0
    assert loss_M.shape == (0,)
    assert all((gradient == 0).all() for gradient in case.gradients(loss))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_follow_what_is_done_with_the_loss(objective):
    case = Case(objective)
    once = case.gradients(case.chunked())
    first, second = case.chunked(), case.chunked(rows=2)
    # Scaled as by a gradient scaler, the sum of two micro-batches, and walked through twice.
    scaled = (first * 65536 + second * 32768) / 65536
    again = torch.autograd.grad(first * 1.5, [case.hidden, case.head], retain_graph=True)
    for one, more, total in zip(once, again, case.gradients(scaled), strict=True):
        torch.testing.assert_close(more, one * 1.5, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, one * 1.5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_products_keep_the_loss_in_fp32(objective, autocast):
    exact = Case(objective, dtype=torch.float64)
    case = Case(objective, dtype=torch.float64)
    for name in ("hidden", "head", "teacher_hidden", "teacher_head"):
        value = getattr(exact, name).detach().bfloat16()
        # The same numbers, so only the products' rounding differs.
        trained = getattr(exact, name).requires_grad
        setattr(exact, name, value.double().requires_grad_(trained))
        narrow = value.float() if autocast else value
        setattr(case, name, narrow.requires_grad_(trained))
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = case.chunked()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact.chunked(), rtol=0.01, atol=0.003)
    found = case.gradients(loss)
    for one, other in zip(exact.gradients(exact.chunked()), found, strict=True):
        assert other.dtype == (torch.float32 if autocast else torch.bfloat16)
        assert (other.double() - one).norm() / one.norm() < 0.02


@pytest.mark.parametrize("heads", ["shared", "frozen"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_memory_is_that_of_a_chunk(objective, heads):
    size, vocab, width, rows = 200, 2048, 4, 10
    hidden = torch.randn(size, width, requires_grad=True)
    head = torch.randn(vocab, width, requires_grad=heads != "frozen")
    target = torch.randint(vocab, (size,))
    if objective != "cross_entropy":
        target = TeacherStates(hidden_ME=torch.randn(size, width), head_VE=head)
    weight = torch.rand(size)
    budget = rows * vocab * LOGIT_BYTES
    with LiveMemory() as memory:
        loss, _ = chunked_loss(hidden, head, target, weight, objective, memory_bytes=budget)
        loss.backward()
    # Beside the logits: gradients of hidden states and, if it is trained, of the head, each
    # once as a sum and once as a term or scaled; a few numbers per position.
    per_position = size * (2 * width + 8) * 4
    per_head = 0 if heads == "frozen" else 2 * vocab * width * 4
    assert memory.largest <= max(rows * vocab, vocab * width) * 4
    assert budget / 2 < memory.peak <= budget + per_position + per_head


def test_without_gradients_none_are_computed():
    case = Case("forward_kl")
    with torch.no_grad(), LiveMemory() as memory:
        loss = case.chunked()
    assert not loss.requires_grad
    assert torch.ops.aten.zeros_like.default not in memory.operations
    torch.testing.assert_close(loss, case.plain().detach())


def test_chunks_fill_the_memory_in_whole_tiles():
    assert chunk_size(1000, 100 * 1000 * LOGIT_BYTES) == 64
    assert chunk_size(1000, 63 * 1000 * LOGIT_BYTES) == 63
    assert chunk_size(1000, 1) == 1

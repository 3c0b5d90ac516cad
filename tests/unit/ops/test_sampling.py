"""Tokens, probabilities, ranks and noise: plain torch against sorting, the kernel against both."""

import dataclasses
import importlib.util
import math

import pytest
import torch
from tests.unit.ops.naive_sampling import choose_all

from d2f.diffusion.policy import CONFIDENCES
from d2f.ops import sampling as twin
from d2f.ops.sampling import CONFIDENCE_CODES, Choice, Sampling, gumbel_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 7


@pytest.fixture(params=["torch", "triton"])
def choose(request, monkeypatch):
    """The function under test; arguments and results on the CPU."""
    if request.param == "torch":
        return twin.choose_tokens
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from d2f.ops.triton import sampling as kernel

    # Several chunks, the last one ragged.
    monkeypatch.setattr(kernel, "CHUNK", 512)
    monkeypatch.setattr(kernel, "THRESHOLD_BLOCK", 1024)

    def run(logits_MV, *, mask_token_id, **tensors):
        tensors = {name: _to_device(value) for name, value in tensors.items()}
        choice = kernel.choose_tokens(logits_MV.to(DEVICE), mask_token_id=mask_token_id, **tensors)
        return Choice(*(x.cpu() for x in choice))

    return run


def _to_device(value):
    if isinstance(value, Sampling):
        tensors = {k: v.to(DEVICE) for k, v in vars(value).items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(value, **tensors)
    return None if value is None else value.to(DEVICE)


def make_sampling(temperatures, top_k=None, top_p=None, min_p=None) -> Sampling:
    count = len(temperatures)
    return Sampling(
        temperature_M=torch.tensor(temperatures),
        top_k_M=torch.tensor(top_k or [0] * count),
        top_p_M=torch.tensor(top_p or [1.0] * count),
        seed_M=torch.arange(count) - 2,
        position_M=torch.arange(count) * 5 + 3,
        step_M=torch.arange(count) * 11,
        truncated=bool(top_k or top_p or min_p),
        min_p_M=None if min_p is None else torch.tensor(min_p),
    )


def random_logits(rows: int, vocab_size: int = 1300, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


MIXED = make_sampling(
    [0.0, 1.0, 0.5, 2.0, 1.0, 0.7, 1.0, 3.0],
    top_k=[5, 0, 40, 1, 0, 3, 1300, 2000],
    top_p=[0.5, 1.0, 0.8, 1.0, 0.3, 0.01, 0.95, 0.999],
)
CODES = [0, 1, 2, 0, 1, 2, 1, 2]


def check(choice: Choice, expected: list[tuple[int, float, float]]) -> None:
    assert (choice.token_M.dtype, choice.probability_M.dtype) == (torch.int64, torch.float32)
    token, probability, rank = zip(*expected, strict=True)
    assert choice.token_M.tolist() == list(token)
    torch.testing.assert_close(
        choice.probability_M, torch.tensor(probability), atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(choice.rank_M, torch.tensor(rank), atol=1e-5, rtol=1e-5)


def test_mask_is_never_chosen_but_keeps_its_probability(choose):
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    choice = choose(logits, mask_token_id=1)
    assert int(choice.token_M) == 2
    torch.testing.assert_close(choice.probability_M, logits.softmax(-1)[:, 2])
    assert torch.equal(choice.rank_M, choice.probability_M)


def test_logits_are_left_as_they_were(choose):
    logits = torch.randn(3, 50)
    before = logits.clone()
    logits[:, MASK] = before[:, MASK] = 99.0
    assert (choose(logits, mask_token_id=MASK).token_M != MASK).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("mask", [None, MASK])
def test_greedy_with_each_rank(choose, mask):
    logits = random_logits(6)
    logits[3:, MASK] = 30.0
    codes = [0, 1, 2] * 2
    choice = choose(logits, mask_token_id=mask, confidence_M=torch.tensor(codes))
    check(choice, choose_all(logits, mask, codes))


@pytest.mark.parametrize("truncated", [False, True])
def test_greedy_sampled_and_truncated_rows_in_one_batch(choose, truncated):
    logits = random_logits(8)
    logits[::2, MASK] = 30.0
    sampling = dataclasses.replace(MIXED, truncated=truncated)
    choice = choose(logits, mask_token_id=MASK, confidence_M=torch.tensor(CODES), sampling=sampling)
    check(choice, choose_all(logits, MASK, CODES, sampling))


MIN_P = [0.5, 0.0, 0.05, 1.0, 0.3, 0.01, 0.9, 0.02]


CONFINED = {
    "top_k": [0, 0, 40, 1, 0, 3, 1300, 5],
    "top_p": [1.0, 0.9, 0.8, 1.0, 0.3, 0.01, 0.95, 0.999],
}


@pytest.mark.parametrize("others", [{}, CONFINED])
def test_min_p_keeps_what_is_nearly_as_probable_as_the_best(choose, others):
    logits = random_logits(8, seed=5)
    # The mask token is most probable, and yet nothing is measured by it.
    logits[::2, MASK] = 30.0
    temperatures = [0.0, 1.0, 0.5, 2.0, 1.0, 0.7, 1.0, 3.0]
    sampling = make_sampling(temperatures, min_p=MIN_P, **others)
    choice = choose(logits, mask_token_id=MASK, confidence_M=torch.tensor(CODES), sampling=sampling)
    check(choice, choose_all(logits, MASK, CODES, sampling))


@pytest.mark.parametrize("seed", range(5))
def test_min_p_keeps_what_transformers_keeps(seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    min_p, top_k, top_p = 0.02 + 0.5 * torch.rand(3), torch.randint(1, 40, (3,)), torch.rand(3)
    logits = random_logits(3, 60, seed)
    sampling = make_sampling([1.0] * 3, top_k.tolist(), top_p.tolist(), min_p.tolist())
    tokens, probabilities = twin.most_probable(logits, 60, mask_token_id=None, sampling=sampling)
    for row in range(3):
        scores = logits[row : row + 1]
        for warper in (
            transformers.TopKLogitsWarper(int(top_k[row])),
            transformers.TopPLogitsWarper(float(top_p[row])),
            transformers.MinPLogitsWarper(float(min_p[row])),
        ):
            scores = warper(None, scores)
        found = torch.zeros(60).scatter(0, tokens[row], probabilities[row])
        torch.testing.assert_close(found, scores.softmax(-1)[0])


@pytest.mark.parametrize("sampling", [None, MIXED, dataclasses.replace(MIXED, truncated=False)])
def test_the_most_probable_tokens_are_those_of_the_choice(sampling):
    logits = random_logits(8, seed=3)
    logits[::2, MASK] = 5.0
    tokens, probabilities = twin.most_probable(logits, 20, mask_token_id=MASK, sampling=sampling)
    choice = twin.choose_tokens(logits, mask_token_id=MASK, sampling=sampling)
    assert (probabilities.diff() <= 0).all()
    assert (tokens[probabilities > 0] != MASK).all()
    for row in range(8):
        among = (tokens[row] == choice.token_M[row]).nonzero().flatten().tolist()
        if sampling is None or sampling.temperature_M[row] == 0:
            assert among == [0]
        if among:
            torch.testing.assert_close(probabilities[row, among[0]], choice.probability_M[row])
        else:
            assert choice.probability_M[row] <= probabilities[row, -1]
    # Nothing that is left out is more probable.
    if sampling is None:
        rest = logits.softmax(-1).scatter(1, tokens, 0.0)
        rest[:, MASK] = 0.0
        assert (rest.amax(-1) <= probabilities[:, -1]).all()


@pytest.mark.parametrize("mask", [None, 0])
def test_all_that_equal_the_last_one_kept_are_kept(choose, mask):
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -1.0, 0.0, -3.0]]).repeat(8, 1)
    logits[4:] -= 0.5
    logits[:, -1] = -torch.inf
    sampling = make_sampling(
        [1.0] * 8, top_k=[2, 3, 5, 0, 0, 2, 1, 6], top_p=[1.0, 1, 1, 0.5, 0.9, 0.7, 0.9, 0.95]
    )
    choice = choose(logits, mask_token_id=mask, confidence_M=torch.tensor(CODES), sampling=sampling)
    check(choice, choose_all(logits, mask, CODES, sampling))


def test_the_first_of_equals_is_chosen(choose):
    logits = torch.zeros(3, 1300)
    logits[1, [600, 1200]] = 2.0
    logits[2, MASK + 1 :] = 1.0
    logits[2, MASK] = 4.0
    choice = choose(logits, mask_token_id=0, confidence_M=torch.ones(3, dtype=torch.long))
    assert choice.token_M.tolist() == [1, 600, MASK]
    assert choice.rank_M.tolist()[:2] == [0.0, 0.0]


def test_positions_that_need_no_choice_give_zeros(choose):
    logits = random_logits(8)
    logits[2] = torch.nan
    needed = torch.tensor([True, True, False, True, False, False, True, True])
    settings = {"mask_token_id": MASK, "confidence_M": torch.tensor(CODES)}
    for sampling in (None, MIXED):
        choice = choose(logits, needed_M=needed, sampling=sampling, **settings)
        whole = choose(logits.nan_to_num(), sampling=sampling, **settings)
        for part, full in zip(choice, whole, strict=True):
            assert torch.equal(part, full.where(needed, 0))


def test_a_position_gives_the_same_alone(choose):
    logits = random_logits(8)
    together = choose(logits, mask_token_id=MASK, confidence_M=torch.tensor(CODES), sampling=MIXED)
    for row in range(8):
        one = slice(row, row + 1)
        tensors = {k: v[one] for k, v in vars(MIXED).items() if isinstance(v, torch.Tensor)}
        alone = choose(
            logits[one],
            mask_token_id=MASK,
            confidence_M=torch.tensor(CODES[one]),
            sampling=Sampling(**tensors, truncated=True),
        )
        for part, full in zip(alone, together, strict=True):
            assert torch.equal(part, full[one])


# The interpreter's arithmetic is NumPy's, which warns of what a GPU computes in silence.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [None, make_sampling([1.0] * 3, top_k=[0, 4, 0])])
def test_broken_logits_show_in_the_probability(choose, value, sampling):
    logits = random_logits(3)
    logits[0] = value
    logits[1, 900] = value
    choice = choose(logits, mask_token_id=MASK, sampling=sampling)
    assert choice.probability_M.isfinite().tolist() == [False, False, True]
    assert all(0 <= token < 1300 for token in choice.token_M.tolist())


def test_other_dtypes_and_strides(choose):
    wide = random_logits(4, 1400).bfloat16()
    narrow = wide[:, :1300]
    choice = choose(narrow, mask_token_id=None)
    check(choice, choose_all(narrow.float(), None))


def test_noise_depends_on_its_key_only():
    seed, position, step = (torch.tensor(v) for v in ([1, 1, 2], [5, 6, 5], [0, 0, 0]))
    together = gumbel_noise(seed, position, step, 50)
    for row in range(3):
        alone = gumbel_noise(seed[row : row + 1], position[row : row + 1], step[row : row + 1], 50)
        assert torch.equal(together[row : row + 1], alone)
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_noise_is_the_same_in_both():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from d2f.ops.triton.sampling import choose_tokens

    key = torch.randint(-(2**63), 2**63 - 1, (3, 60), generator=torch.Generator().manual_seed(0))
    flat = make_sampling([1.0] * 60)
    flat = dataclasses.replace(flat, seed_M=key[0], position_M=key[1], step_M=key[2])
    choice = choose_tokens(
        torch.zeros(60, 5000, device=DEVICE), mask_token_id=None, sampling=_to_device(flat)
    )
    # With nothing else to tell tokens apart, the noise chooses.
    assert torch.equal(choice.token_M.cpu(), gumbel_noise(*key, 5000).argmax(-1))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 1.0, [0, 1, 2, 3, 4]), (4, 1.0, [0, 1, 2, 4]), (4, 0.6, [1, 2])],
)
def test_samples_follow_the_softmax_over_what_is_kept(top_k, top_p, kept):
    count = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -8.0])
    zero = torch.zeros(count, dtype=torch.long)
    sampling = Sampling(
        temperature_M=torch.full((count,), 2.0),
        top_k_M=zero + top_k,
        top_p_M=torch.full((count,), top_p),
        seed_M=zero,
        position_M=torch.arange(count),
        step_M=zero,
        truncated=True,
    )
    choice = twin.choose_tokens(logits.expand(count, 6), mask_token_id=5, sampling=sampling)
    found = torch.bincount(choice.token_M, minlength=6).double()
    expected = torch.zeros(6).double()
    weight = (logits[kept] / 2).double().exp()
    # The mask token is drawn by nobody; others keep their proportions.
    expected[kept] = weight / weight.sum() * count
    assert found[expected == 0].sum() == 0
    chi_square = ((found - expected) ** 2)[kept] / expected[kept]
    # Exceeded by chance once in 10,000 with four degrees of freedom.
    assert chi_square.sum() < 23.5


def test_policies_and_codes_name_the_same_ranks():
    assert set(CONFIDENCES) == set(CONFIDENCE_CODES)

"""The rules that keep predictions, against plain lists; and the plans of the samplers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f.decoding.strategies import ALGORITHMS, VanillaOptions
from d2f.decoding.transfer import keep_above, keep_best, keep_by_factor
from d2f.decoding.vanilla import transfer_plan, vanilla_plan
from d2f.ops.sampling import uniform_noise

FAST = settings(max_examples=100, deadline=None, derandomize=True)
# Few values, so that equals occur.
confidence = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0])
blocks = st.lists(st.tuples(st.booleans(), confidence), min_size=1, max_size=9)


def tensors(block):
    candidate = torch.tensor([[flag for flag, _ in block]])
    return candidate, torch.tensor([[value for _, value in block]])


def surest(block, number):
    """The indices of the `number` surest candidates."""
    indices = [i for i, (flag, _) in enumerate(block) if flag]
    return set(sorted(indices, key=lambda i: (-block[i][1], i))[:number])


def kept(flags_BK):
    return {i for i, flag in enumerate(flags_BK[0].tolist()) if flag}


@FAST
@given(blocks, st.integers(0, 10))
def test_the_best_are_kept(block, number):
    assert kept(keep_best(*tensors(block), torch.tensor([number]))) == surest(block, number)


@FAST
@given(blocks, st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_all_above_the_threshold_are_kept_and_the_surest(block, threshold):
    sure = {i for i, (flag, value) in enumerate(block) if flag and value >= threshold}
    assert kept(keep_above(*tensors(block), threshold)) == sure | surest(block, 1)


@FAST
@given(blocks, st.sampled_from([0.01, 0.5, 1.0, 1.6, 3.0, 20.0]))
def test_the_factor_allows_the_largest_number(block, factor):
    values = sorted((value for flag, value in block if flag), reverse=True)
    values = [float(torch.tensor(value)) for value in values]
    allowed = [n for n, c in enumerate(values, 1) if (n + 1) * (1 - c) < factor]
    number = max(allowed, default=1)
    assert kept(keep_by_factor(*tensors(block), factor)) == surest(block, number)


def test_what_is_not_a_number_does_not_hold_decoding_up():
    candidate, broken = torch.tensor([[False, True, True]]), torch.full((1, 3), torch.nan)
    assert kept(keep_above(candidate, broken, 0.5)) == {1}
    assert kept(keep_by_factor(candidate, broken, 0.5)) == {1}
    assert kept(keep_best(candidate, broken, torch.tensor([2]))) == {1, 2}


def test_transfer_plan_counts_every_token_once():
    plan = transfer_plan(50, num_steps=11, block_length=16)
    assert len(plan) == 11
    assert sum(count for _, _, count in plan) == 50


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 80])
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:4])
def test_plans_of_dream_keep_every_token_once(algorithm, num_steps):
    plan = vanilla_plan(50, VanillaOptions(num_steps=num_steps, algorithm=algorithm))
    assert len(plan) == num_steps
    assert {(start, end) for start, end, _ in plan} == {(0, 50)}
    assert sum(count for _, _, count in plan) == 50


def test_eps_is_where_time_ends():
    options = VanillaOptions(num_steps=2, algorithm="origin", eps=0.5)
    share = [p for _, _, p in vanilla_plan(50, options)]
    assert share == [pytest.approx(0.25), 1.0]


def test_uniform_noise_is_even_and_its_own():
    index = torch.arange(10_000)
    noise = uniform_noise(index % 10, index // 100, index % 100)
    assert float(noise.min()) > 0
    assert float(noise.max()) < 1
    assert abs(float(noise.mean()) - 0.5) < 0.01
    assert len(set(noise.tolist())) == 10_000

"""Mask ratios and corruption."""

import pytest
import torch

from d2f.diffusion.corruption import corrupt
from d2f.diffusion.layout import BlockLayout
from d2f.diffusion.schedule import KINDS, MaskRatioSchedule
from d2f.errors import ConfigError

COUNTS = torch.tensor([7] * 400 + [3] * 400)


def draw(seed=0, **values):
    return MaskRatioSchedule(**values).sample(COUNTS, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.2, 0.7), (0.0, 1.0), (0.5, 1.0)])
def test_ratios_stay_within_their_ends(kind, low, high):
    ratio = draw(kind=kind, low=low, high=high)
    assert ratio.shape == (800, 7)
    assert float(ratio.min()) >= low
    assert float(ratio.max()) <= high + 1e-6


def test_monotone_rises_to_its_upper_end_and_random_does_not_rise():
    ratio = draw(kind="monotone", low=0.0, high=1.0)
    assert bool((ratio[:400].diff() >= 0).all())
    assert float(ratio[:400, -1].mean()) == pytest.approx(7 / 8, abs=0.02)
    assert float(ratio[400:, 2].mean()) == pytest.approx(3 / 4, abs=0.03)
    assert bool((draw(kind="random").diff() < 0).any())


def test_original_has_the_means_of_the_authors_code():
    ratio = draw(kind="original", low=0.2, high=0.7)[:400]
    assert bool((ratio.diff() >= 0).all())
    assert float(ratio[:, 0].mean()) == pytest.approx(0.45, abs=0.03)
    assert float(ratio[:, -1].mean()) == pytest.approx(0.575, abs=0.03)


@pytest.mark.parametrize(
    "values",
    [{"kind": "monotne"}, {"low": 0.8}, {"high": 1.2}, {"low": -0.1}, {"high": 0.0, "low": 0.0}],
)
def test_bad_schedules(values):
    with pytest.raises(ConfigError):
        MaskRatioSchedule(**values)


def noised(ratio, seed=0):
    ids = torch.arange(1, 41).reshape(2, 20)
    layout = BlockLayout(prompt_length=torch.tensor([4, 6]), block_size=8)
    return ids, corrupt(
        ids,
        layout,
        ratio,
        mask_token_id=0,
        generator=torch.Generator().manual_seed(seed),
        lengths_B=torch.tensor([20, 18]),
    )


def test_full_masking_spares_prompt_and_padding():
    ids, batch = noised(torch.ones(2, 2))
    expected = torch.zeros(2, 20, dtype=torch.bool)
    expected[0, 4:] = True
    expected[1, 6:18] = True
    assert torch.equal(batch.masked_BL, expected)
    assert torch.equal(batch.ids_BL, torch.where(expected, 0, ids))


def test_each_block_has_its_own_ratio_and_noise_repeats():
    _, batch = noised(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert batch.masked_BL[0].nonzero().flatten().tolist() == list(range(12, 20))
    assert batch.masked_BL[1].nonzero().flatten().tolist() == list(range(6, 14))
    assert batch.ratio_BL[0, :4].tolist() == [0.0] * 4
    half = torch.full((2, 2), 0.5)
    assert torch.equal(noised(half)[1].masked_BL, noised(half)[1].masked_BL)
    assert not torch.equal(noised(half)[1].masked_BL, noised(half, seed=1)[1].masked_BL)

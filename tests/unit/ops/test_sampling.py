"""Tokens, confidences and noise."""

import torch

from d2f.decoding.sampling import choose_tokens, gumbel_noise


def test_mask_is_never_chosen_but_keeps_its_probability():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    token, confidence = choose_tokens(logits, mask_token_id=1)
    assert int(token) == 2
    torch.testing.assert_close(confidence, logits.softmax(-1)[:, 2])


def test_noise_depends_on_its_key_only():
    seed, position, step = (torch.tensor(v) for v in ([1, 1, 2], [5, 6, 5], [0, 0, 0]))
    together = gumbel_noise(seed, position, step, 50)
    for row in range(3):
        alone = gumbel_noise(seed[row : row + 1], position[row : row + 1], step[row : row + 1], 50)
        assert torch.equal(together[row : row + 1], alone)
    assert len({tuple(row.tolist()) for row in together}) == 3


def test_samples_follow_the_softmax():
    count = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    noise = gumbel_noise(
        torch.zeros(count, dtype=torch.long), torch.arange(count), torch.zeros(count).long(), 4
    )
    token, _ = choose_tokens(
        logits.expand(count, 4), mask_token_id=None, temperature=2.0, noise_MV=noise
    )
    share = torch.bincount(token, minlength=4) / count
    expected = (logits / 2).softmax(-1)
    # Four standard errors of a share of at most one half.
    torch.testing.assert_close(share, expected, atol=4 * (0.25 / count) ** 0.5, rtol=0)

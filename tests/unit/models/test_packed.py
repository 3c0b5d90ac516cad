"""Forwards over the paged cache, in pieces and packed, equal one forward without it."""

from __future__ import annotations

import pytest
import torch

from d2f.diffusion.layout import BlockLayout
from d2f.models.cache import PagedCache
from d2f.models.families import FAMILIES
from d2f.ops.backend import select_backend
from d2f.ops.packed import PackedTokens
from d2f.testing import tiny_adapter, tiny_model

TYPES = list(FAMILIES)
DIFFUSION = ["llada", "Dream"]
# Processors sum in different orders: one logit of 768 was 1.14e-5 off on a Xeon.
TOLERANCE = {"atol": 3e-5, "rtol": 1e-5}
BLOCK = 4
TORCH = select_backend("torch", "cpu")


def random_ids(*shape, seed=0):
    return torch.randint(0, 94, shape, generator=torch.Generator().manual_seed(seed))


def whole(model, ids, prompt):
    causal = model.spec.architecture.causal
    layout = None if causal else BlockLayout(prompt_length=prompt, block_size=BLOCK)
    return model.logits(ids[None], layout)[0]


class Cached:
    """Rows of packed forwards: their pages, and which positions are next."""

    def __init__(self, model, prompts, page_size, num_pages, order=None):
        model.prepare_steps()
        self.model, self.prompts, self.page_size = model, prompts, page_size
        self.cache = PagedCache(model.spec, num_pages=num_pages, page_size=page_size)
        pages = torch.arange(1, num_pages, dtype=torch.int32)
        if order is not None:
            pages = pages[torch.randperm(len(pages), generator=order)]
        each = len(pages) // len(prompts)
        self.pages_BP = pages[: each * len(prompts)].view(len(prompts), each)

    def _limit(self, row, position, end):
        if self.model.spec.architecture.causal:
            return position + 1
        prompt = self.prompts[row]
        if position < prompt:
            return min(prompt, end)
        return min(prompt + ((position - prompt) // BLOCK + 1) * BLOCK, end)

    def forward(self, pieces, padding=0):
        """Hidden states of each row's piece: (first position, ids) or None."""
        ids, positions, slots, limits = [], [], [], []
        starts, counts, ends = [], [], []
        for row, piece in enumerate(pieces):
            starts.append(len(ids))
            first, tokens = piece or (0, [])
            counts.append(len(tokens))
            ends.append(first + len(tokens))
            for position, token in enumerate(tokens, start=first):
                page = int(self.pages_BP[row, position // self.page_size])
                ids.append(int(token))
                positions.append(position)
                slots.append(page * self.page_size + position % self.page_size)
                limits.append(self._limit(row, position, ends[-1]))
        for values in (ids, positions, slots, limits):
            values += [0] * padding
        packed = PackedTokens(
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            limits_T=torch.tensor(limits),
            starts_B=torch.tensor(starts),
            counts_B=torch.tensor(counts),
            ends_B=torch.tensor(ends),
            pages_BP=self.pages_BP,
            page_size=self.page_size,
            max_count=max(counts),
            max_end=max(ends),
        )
        hidden_TD = self.model.forward_packed(torch.tensor(ids), packed, self.cache, TORCH)
        return list(hidden_TD[: sum(counts)].split(counts))


def aligned(model, hidden_LD, boundary_D):
    """States that predict each token; the boundary is that of the position before the first."""
    if not model.spec.architecture.shifted:
        return hidden_LD
    before = hidden_LD[:1] if boundary_D is None else boundary_D[None]
    return torch.cat([before, hidden_LD[:-1]])


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("pieces", [[6, 4, 4, 3], [10, 7], [14, 3], [17]])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pieces_equal_one_forward(model_type, pieces, page_size):
    """Pieces end where blocks end, so each is final when the next one comes."""
    model, ids_BL = tiny_model(model_type), random_ids(2, 17)
    cached = Cached(model, [6, 6], page_size, 2 * -(-17 // page_size) + 1)
    got, boundary, start = [[], []], [None, None], 0
    for length in pieces:
        tokens_BL = ids_BL[:, start : start + length]
        hidden = cached.forward([(start, tokens) for tokens in tokens_BL])
        for row in range(2):
            got[row].append(model.head(aligned(model, hidden[row], boundary[row])))
            boundary[row] = hidden[row][-1]
        start += length
    for row in range(2):
        expected = whole(model, ids_BL[row], 6)
        torch.testing.assert_close(torch.cat(got[row]), expected, **TOLERANCE)


@pytest.mark.parametrize("model_type", DIFFUSION)
@pytest.mark.parametrize("adapter", [False, True])
def test_live_blocks_are_overwritten_exactly(model_type, adapter):
    """Slots written again and again, rows at different places, one of them sitting out."""
    model, prompts = tiny_model(model_type), [3, 6, 5]
    if adapter:
        tiny_adapter(model)
    cached = Cached(model, prompts, 3, 19, torch.Generator().manual_seed(1))
    ids = [random_ids(prompt + 8, seed=row) for row, prompt in enumerate(prompts)]
    hidden = cached.forward(
        [(0, tokens[:prompt]) for tokens, prompt in zip(ids, prompts, strict=True)], padding=2
    )
    boundary = [state[-1] for state in hidden]
    for seed, sits_out in ((1, None), (2, 1), (3, 0), (4, None)):
        pieces = []
        for row, prompt in enumerate(prompts):
            ids[row][prompt:] = random_ids(8, seed=seed * 10 + row)
            pieces.append(None if row == sits_out else (prompt, ids[row][prompt:]))
        hidden = cached.forward(pieces, padding=seed)
        for row, prompt in enumerate(prompts):
            if row == sits_out:
                assert len(hidden[row]) == 0
                continue
            got = model.head(aligned(model, hidden[row], boundary[row]))
            expected = whole(model, ids[row], prompt)[prompt:]
            torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("model_type", TYPES)
def test_only_the_tokens_slots_and_page_0_are_written(model_type):
    model = tiny_model(model_type)
    cached = Cached(model, [5, 2], 4, 9)
    cached.cache.kv_N2SKH.fill_(torch.nan)
    before = cached.cache.kv_N2SKH.clone()
    hidden = cached.forward([(0, random_ids(5)), (0, random_ids(2, seed=1))], padding=3)
    written = ~cached.cache.kv_N2SKH.isnan().flatten(3).any(-1).flatten(0, 1).any(0)
    own = {int(cached.pages_BP[0, p // 4]) * 4 + p % 4 for p in range(5)}
    own |= {int(cached.pages_BP[1, 0]) * 4 + p for p in range(2)}
    slots = set(written.nonzero().flatten().tolist())
    assert own <= slots
    assert slots - own <= set(range(4)), "padding goes to page 0 alone"
    untouched = torch.ones(36, dtype=torch.bool)
    untouched[list(slots)] = False
    assert before[:, :, untouched].isnan().all()
    # What slots hold that are no row's never matters, not even NaN.
    assert all(state.isfinite().all() for state in hidden)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_row_is_the_same_in_any_batch_and_order_of_pages(model_type):
    model = tiny_model(model_type)
    ids = [random_ids(n, seed=n) for n in (7, 1, 12)]
    expected = [whole(model, tokens, len(tokens)) for tokens in ids]
    order = torch.Generator().manual_seed(3)
    for page_size, padding in ((1, 0), (2, 1), (5, 4), (16, 9)):
        cached = Cached(model, [7, 1, 12], page_size, 3 * -(-12 // page_size) + 1, order)
        hidden = cached.forward([(0, tokens) for tokens in ids], padding)
        for state, logits in zip(hidden, expected, strict=True):
            got = model.head(aligned(model, state, None))
            torch.testing.assert_close(got, logits, **TOLERANCE)


def test_a_page_can_be_copied():
    model = tiny_model("llada")
    cached = Cached(model, [4, 4], 4, 3)
    ids = random_ids(8)
    cached.forward([(0, ids[:4]), None])
    cached.cache.copy_page(1, 2)
    cached.pages_BP[1] = 2
    # The second row's only page now holds the first row's prompt.
    hidden = cached.forward([None, (3, ids[3:4])])[1]
    torch.testing.assert_close(model.head(hidden), whole(model, ids[:4], 4)[3:], **TOLERANCE)

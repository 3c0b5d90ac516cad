"""Several samples in a row: losses and gradients are those of samples that have a row each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.training.test_padding import (
    STAGES,
    inputs_of,
    make_batch,
    make_loss,
    padded_config,
)
from tests.unit.training.tiny_run import (
    FAMILY,
    Notes,
    WatchedLoss,
    make_config,
    make_trainer,
    write_files,
)

from d2f.diffusion.layout import PADDING_BLOCK
from d2f.errors import ConfigError
from d2f.models.lora import LoraConfig
from d2f.training.confidence import measure_confidence
from d2f.training.objective import block_sums
from d2f.training.packing import RowPacking, RowPlaces
from d2f.training.run import train
from d2f.training.sections import DataConfig, ModelConfig, ObjectiveConfig

CASES = [
    ("autoregressive", {}, {}),
    ("masked-diffusion", {}, {}),
    ("masked-diffusion", {"frontier_share": 0.5, "train_past_eos": False}, {}),
    ("d2f", {}, {}),
    ("d2f", {"train_past_eos": False}, {"normalization": "sequence"}),
    # Nearly everything is masked, the first token of a sample without a prompt, too.
    ("d2f", {"low": 0.98, "high": 1.0}, {"objective": "cross_entropy", "weighting": "none"}),
]
# Samples of `make_batch` with their blocks' ends take at most 30, 200, 73, 65, 128, 18, 164 and 101
# of 200 positions. The order is not theirs, the last row is not full, and sample 4, which has no
# prompt, does not begin its row.
ROWS = [[1], [6, 0], [3, 4], [2, 7, 5]]


def packed_pair(tmp_path, stage, noise, objective):
    """A loss, the samples' inputs with a row each in the order of `ROWS`, and the packed ones."""
    config = padded_config(tmp_path, stage, "packed", **noise)
    if objective:
        config = replace(config, objective=ObjectiveConfig(**objective))
    batch = make_batch()
    sample_S = torch.tensor([sample for row in ROWS for sample in row])
    batch = type(batch)(**{name: value[sample_S] for name, value in vars(batch).items()})
    inputs = inputs_of(config, batch)
    length_S = (inputs.block_BL != PADDING_BLOCK).sum(1).tolist()
    starts, index = [], 0
    for row in ROWS:
        lengths = length_S[index : index + len(row)]
        assert sum(lengths) <= 200
        starts += [sum(lengths[:i]) for i in range(len(row))]
        index += len(row)
    places = RowPlaces(
        sample_S=sample_S,
        row_S=torch.tensor([i for i, row in enumerate(ROWS) for _ in row]),
        start_S=torch.tensor(starts),
        size=(len(ROWS), 200),
        longest=max(length_S),
    )
    return make_loss(config)[0], inputs, places, places.pack(inputs)


def losses_of(loss, inputs, size):
    """The loss of each position, and the sum's gradients."""
    found = []
    for part in inputs.parts(size, select=True):
        value, loss_BL = loss(part)
        value.backward()
        found.append(part.weight_BL * loss_BL)
    gradients = [p.grad.clone() for p in loss.student.parameters() if p.grad is not None]
    loss.student.zero_grad()
    return torch.cat(found), gradients


def samples_of(places, inputs, values_RL):
    """What packed rows hold for each sample."""
    length_S = (inputs.block_BL != PADDING_BLOCK).sum(1).tolist()
    return [
        values_RL[row, start : start + length]
        for row, start, length in zip(
            places.row_S.tolist(), places.start_S.tolist(), length_S, strict=True
        )
    ]


@pytest.fixture
def tiles(monkeypatch):
    # Only the check refuses gradients on the CPU; the unfused operation has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention._warn_once", lambda *_, **__: None, raising=False
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("stage", "noise", "objective", "tiled"),
    [*((*case, False) for case in CASES), *((*CASES[i], True) for i in (0, 3))],
)
def test_losses_and_gradients_are_those_of_samples_alone(
    stage, noise, objective, tiled, tmp_path, tiles
):
    loss, inputs, places, packed = packed_pair(tmp_path, stage, noise, objective)
    expected, gradients = losses_of(loss, inputs, 8)
    loss._tiled = tiled
    for size in (4,) if tiled else (1, 2):
        found, others = losses_of(loss, packed, size)
        assert found.sum() > 0
        for row, one in enumerate(samples_of(places, inputs, found)):
            # The model is in fp64, so that no rounding could hide what a neighbour leaks.
            torch.testing.assert_close(one, expected[row, : len(one)], atol=1e-12, rtol=1e-9)
        for one, other in zip(others, gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_a_samples_tokens_change_no_bit_of_its_neighbours(stage, tmp_path):
    loss, inputs, places, packed = packed_pair(tmp_path, stage, {}, {})
    before = samples_of(places, inputs, losses_of(loss, packed, 4)[0])
    middle = len(before) - 2
    start = int(places.start_S[middle])
    ids = packed.ids_BL.clone()
    ids[-1, start : start + len(before[middle])] = 7
    ids[packed.block_BL == PADDING_BLOCK] = 8
    after = samples_of(places, inputs, losses_of(loss, replace(packed, ids_BL=ids), 4)[0])
    for sample, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (sample != middle)


@pytest.mark.parametrize("stage", ["masked-diffusion", "d2f"])
def test_the_log_is_that_of_samples_alone(stage, tmp_path):
    loss, inputs, _, packed = packed_pair(tmp_path, stage, {}, {})
    sums = []
    for one in (inputs, packed):
        _, loss_BL = loss(one)
        sums.append(block_sums(loss_BL, one.weight_BL > 0, one.block_in_sample_BL, 13))
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-5, atol=1e-6)
    assert torch.equal(sums[0][1], sums[1][1])
    few = [next(one.parts(4, select=True)) for one in (inputs, packed)]
    assert all(measure_confidence(loss, one)["confidence"] > 0 for one in few)


def test_what_a_row_says_of_its_samples():
    inputs = inputs_of(make_row_config())
    blocks = [[0, 1, 1, PADDING_BLOCK], [0, 0, PADDING_BLOCK, PADDING_BLOCK]]
    inputs = replace(
        inputs,
        ids_BL=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        target_BL=torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        weight_BL=torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]),
        block_BL=torch.tensor(blocks, dtype=torch.int32),
    )
    places = RowPlaces(
        sample_S=torch.tensor([0, 1]),
        row_S=torch.tensor([0, 0]),
        start_S=torch.tensor([0, 3]),
        size=(1, 6),
        longest=3,
    )
    row = places.pack(inputs)
    assert row.ids_BL.tolist() == [[5, 6, 7, 8, 9, 0]]
    assert row.weight_BL.tolist() == [[0, 0.5, 0.5, 0, 1, 0]]
    assert row.block_BL.tolist() == [[0, 1, 1, 2, 2, PADDING_BLOCK]]
    assert row.first_BL.tolist() == [[0, 0, 0, 2, 2, PADDING_BLOCK]]
    assert row.position_BL.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert row.block_in_sample_BL.tolist() == [[0, 1, 1, 0, 0, 0]]


def make_row_config():
    return padded_config("unused", "autoregressive", "packed")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=80),
    st.integers(40, 64),
    st.integers(0, 9),
)
def test_rows_hold_every_sample_once_and_none_overlaps(lengths, row_length, seed):
    length_E = torch.tensor(lengths)
    packing = RowPacking(length_E, row_length=row_length, seed=seed)
    places = packing.places(torch.arange(packing.num_rows))
    assert sorted(places.sample_S.tolist()) == list(range(len(lengths)))
    taken = torch.zeros(packing.num_rows, row_length, dtype=torch.long)
    for sample, row, start in zip(
        places.sample_S.tolist(), places.row_S.tolist(), places.start_S.tolist(), strict=True
    ):
        assert start + lengths[sample] <= row_length
        taken[row, start : start + lengths[sample]] += 1
    assert taken.max() == 1
    assert packing.filled == pytest.approx(sum(lengths) / taken.numel())
    # No two rows that are at most half full: one sample of them would have had room.
    assert (2 * taken.sum(1) <= row_length).sum() <= 1
    # Filled from the left.
    assert (taken.diff(dim=1) <= 0).all()
    # Rows again, in any order and more than once.
    rows = torch.tensor([packing.num_rows - 1, 0, packing.num_rows - 1])
    some = packing.places(rows)
    for index, row in enumerate(rows.tolist()):
        own, all_of = some.row_S == index, places.row_S == row
        assert torch.equal(some.sample_S[own], places.sample_S[all_of])
        assert torch.equal(some.start_S[own], places.start_S[all_of])


def test_rows_follow_from_the_seed():
    length_E = torch.randint(5, 40, (200,), generator=torch.Generator().manual_seed(0))
    one, same, other = (RowPacking(length_E, row_length=64, seed=s) for s in (1, 1, 2))
    every = torch.arange(one.num_rows)
    assert torch.equal(one.places(every).sample_S, same.places(every).sample_S)
    assert not torch.equal(one.places(every).sample_S, other.places(every).sample_S)
    assert one.filled > 0.97


@pytest.mark.parametrize("stage", STAGES)
def test_runs_pack_and_micro_batches_change_nothing(stage, tmp_path):
    weights, records = [], []
    for size in (4, 2):
        config = make_config(tmp_path / str(size), stage, batch_size=4, micro_batch_size=size)
        data = replace(config.data, sequence_length=48, padding="packed")
        noise = replace(config.noise, train_on_eos_blocks=False) if config.noise else None
        lora = LoraConfig(r=4, alpha=8) if stage == "d2f" else None
        # A large eps, as without it Adam makes much of the rounding of gradients next to 0.
        optimizer = replace(config.optimizer, eps=1e-4)
        config = replace(config, data=data, noise=noise, lora=lora, optimizer=optimizer)
        trainer = make_trainer(config)

        def watched(loss, inputs, size=size):
            assert inputs.ids_BL.shape == (size, 48)
            assert (inputs.position_BL == 0).sum() > 2 * size
            return loss(inputs)

        WatchedLoss(trainer, watched)
        assert trainer.run()
        weights.append(list(trainer.student.parameters()))
        records.append(trainer.last_record)
        counts = trainer.data_counts()
        # 40 samples of about 12 tokens in rows of 48.
        assert counts["used"] == 40
        assert 9 <= counts["packed_rows"] <= 15
        assert 0.8 < counts["filled"] <= 1
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_run_says_how_its_samples_are_packed(tmp_path):
    config = make_config(
        tmp_path / "run",
        "autoregressive",
        steps=1,
        model=ModelConfig(init=str(write_files(tmp_path) / FAMILY["autoregressive"])),
        data=DataConfig(
            kind="jsonl",
            paths=(str(tmp_path / "pairs.jsonl"),),
            sequence_length=48,
            padding="packed",
        ),
    )
    reporter = Notes()
    data = train(config, device="cpu", reporter=reporter).data
    assert data["used"] == 40
    assert 1 < data["packed_rows"] < 20
    told = f"packed into {data['packed_rows']} rows of 48 tokens, {data['filled']:.1%} filled"
    assert told in reporter.notes


def test_ends_that_are_drawn_anew_cannot_be_packed(tmp_path):
    noise = {"random_end": True, "train_on_eos_blocks": True}
    with pytest.raises(ConfigError, match="random_end"):
        padded_config(tmp_path, "masked-diffusion", "packed", **noise)
    with pytest.raises(ConfigError, match="train_on_eos_blocks"):
        padded_config(tmp_path, "d2f", "packed", train_on_eos_blocks=True)

"""Micro-batches as long as their longest sample: a sample's loss is its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.training.tiny_run import FAMILY, NOISE, WatchedLoss, make_config, make_trainer

from d2f.diffusion.layout import PADDING_BLOCK
from d2f.errors import ConfigError
from d2f.models.lora import LoraConfig, adapter_parameters
from d2f.testing import tiny_model
from d2f.testing.tiny import EOS_TOKEN_ID, MASK_TOKEN_ID
from d2f.training.data import Batch
from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import NUM_LENGTHS, length_multiple, make_inputs

STAGES = ["autoregressive", "masked-diffusion", "d2f"]
LENGTH = 200
ENDS = torch.tensor([30, 199, 64, 65, 120, 12, 150, 90])


def make_batch():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(90, (len(ENDS), LENGTH), generator=g)
    ids = torch.where(torch.arange(LENGTH) < ENDS[:, None] - 1, ids, EOS_TOKEN_ID)
    prompts = torch.tensor([3, 60, 9, 1, 0, 2, 20, 5])
    return Batch(
        ids_BL=ids,
        prompt_length_B=prompts,
        end_B=ENDS,
        length_B=torch.full_like(ENDS, LENGTH),
    )


def padded_config(tmp_path, stage, padding="longest", **noise):
    config = make_config(tmp_path, stage)
    data = replace(config.data, sequence_length=LENGTH, padding=padding)
    if stage != "autoregressive":
        noise = {"block_size": 16, "train_on_eos_blocks": False, **noise}
    given = replace(NOISE[stage], **noise) if NOISE[stage] else None
    return replace(config, data=data, noise=given)


def inputs_of(config, batch=None):
    g = torch.Generator().manual_seed(3)
    return make_inputs(batch or make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=g)


def make_loss(config):
    model = tiny_model(FAMILY[config.stage]).double().requires_grad_(True)
    teacher = tiny_model("Dream", seed=1).double() if config.stage == "d2f" else None
    return StageLoss(config, model, teacher), model


def sample_losses(loss, inputs, size):
    """The weighted loss of each sample (in the inputs' order), and its gradient's sum."""
    parts = []
    for part in inputs.parts(size, select=True):
        value, loss_BL = loss(part)
        value.backward()
        parts.append((part.weight_BL * loss_BL).sum(1))
    gradients = [p.grad.clone() for p in loss.student.parameters() if p.grad is not None]
    loss.student.zero_grad()
    return torch.cat(parts), gradients


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_have_few_lengths_and_all_weights(stage, tmp_path):
    config = padded_config(tmp_path, stage)
    inputs = inputs_of(config)
    parts = list(inputs.parts(2, select=True))
    lengths = [part.ids_BL.shape[1] for part in parts]
    assert lengths == [LENGTH, 128, 128, 64]
    assert sum(part.weight_BL.sum() for part in parts) == pytest.approx(inputs.weight_BL.sum())
    assert torch.equal(
        torch.cat([part.target_BL[:, :64] for part in parts]), inputs.target_BL[:, :64]
    )
    assert length_multiple(LENGTH) == 64
    for length in range(2, 5000, 37):
        assert -(-length // length_multiple(length)) <= NUM_LENGTHS


@pytest.mark.parametrize(
    ("stage", "noise"),
    [
        ("autoregressive", {}),
        ("masked-diffusion", {}),
        ("masked-diffusion", {"frontier_share": 0.5, "train_past_eos": False}),
        ("masked-diffusion", {"random_end": True, "train_on_eos_blocks": True}),
        ("d2f", {}),
        ("d2f", {"train_past_eos": False}),
    ],
)
def test_a_sample_has_the_same_loss_in_every_micro_batch(stage, noise, tmp_path):
    config = padded_config(tmp_path, stage, **noise)
    loss, _ = make_loss(config)
    inputs = inputs_of(config)
    alone, gradients = sample_losses(loss, inputs, 1)
    assert alone.sum() > 0
    for size in (2, 8):
        values, others = sample_losses(loss, inputs, size)
        # The model is in fp64, so that no rounding could hide what a neighbour leaks.
        torch.testing.assert_close(values, alone, atol=1e-12, rtol=1e-10)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-8)


@pytest.mark.parametrize("stage", STAGES)
def test_neighbours_and_what_lies_behind_the_end_change_no_bit(stage, tmp_path):
    config = padded_config(tmp_path, stage)
    loss, _ = make_loss(config)
    inputs = inputs_of(config)
    before, _ = sample_losses(loss, inputs, 8)
    ids = inputs.ids_BL.clone()
    ids[inputs.block_BL == PADDING_BLOCK] = 7
    ids[0] = 8
    after, _ = sample_losses(loss, replace(inputs, ids_BL=ids), 8)
    assert torch.equal(before[1:], after[1:])
    assert before[0] != after[0]


def test_noise_and_autoregressive_losses_are_those_of_full_length(tmp_path):
    for stage in STAGES:
        short, full = (
            inputs_of(padded_config(tmp_path, stage, padding)) for padding in ("longest", "full")
        )
        # Sorted here as there: the longest first, and in the batch's order where equal.
        ends = (short.block_BL != PADDING_BLOCK).sum(1)
        assert ends.tolist() == sorted(ends.tolist(), reverse=True)
        rows = [
            next(i for i in range(len(ENDS)) if torch.equal(full.target_BL[i], target))
            for target in short.target_BL
        ]
        assert sorted(rows) == list(range(len(ENDS)))
        assert torch.equal(short.ids_BL, full.ids_BL[rows])
        assert torch.equal(short.weight_BL, full.weight_BL[rows])
        if stage == "autoregressive":
            loss, _ = make_loss(padded_config(tmp_path, stage))
            torch.testing.assert_close(
                sample_losses(loss, short, 2)[0], sample_losses(loss, full, 8)[0][rows]
            )


def test_a_run_takes_short_micro_batches(tmp_path):
    weights, lengths = [], []

    def watched(loss, inputs):
        lengths.append(inputs.ids_BL.shape[1])
        return loss(inputs)

    for size in (8, 2):
        config = padded_config(tmp_path / str(size), "d2f", block_size=4)
        lora = LoraConfig(r=4, alpha=8)
        trainer = make_trainer(replace(config, micro_batch_size=size, lora=lora, steps=2))
        WatchedLoss(trainer, watched)
        assert trainer.run()
        weights.append(adapter_parameters(trainer.student))
    # The samples have about 20 tokens.
    assert set(lengths) == {64}
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stage", ["masked-diffusion", "d2f"])
def test_nothing_to_cut_is_refused(stage, tmp_path):
    with pytest.raises(ConfigError, match="train_on_eos_blocks"):
        padded_config(tmp_path, stage, train_on_eos_blocks=True)
    with pytest.raises(ConfigError, match=r"data\.padding"):
        padded_config(tmp_path, stage, padding="shortest")

from dataclasses import replace

import pytest
import torch
from tests.unit.training.tiny_run import FAMILY, make_config

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout
from d2f.errors import ConfigError
from d2f.models.lora import adapter_disabled, adapter_parameters
from d2f.testing import tiny_adapter, tiny_model
from d2f.testing.tiny import EOS_TOKEN_ID, MASK_TOKEN_ID
from d2f.training.data import Batch
from d2f.training.objective import (
    NORMALIZATIONS,
    OBJECTIVES,
    autoregressive_loss,
    distillation_loss,
    masked_diffusion_loss,
)
from d2f.training.sections import NoiseConfig, ObjectiveConfig
from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import make_inputs

LENGTH = 20


def make_batch(size=4):
    g = torch.Generator().manual_seed(0)
    prompt, end = torch.tensor([1, 3, 5, 2])[:size], torch.tensor([12, 9, 20, 7])[:size]
    ids = torch.randint(90, (size, LENGTH), generator=g)
    ids = torch.where(torch.arange(LENGTH) < end[:, None] - 1, ids, EOS_TOKEN_ID)
    whole = torch.full_like(end, LENGTH)
    return Batch(ids_BL=ids, prompt_length_B=prompt, end_B=end, length_B=whole)


def inputs_of(config, batch=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return make_inputs(batch or make_batch(), config, mask_token_id=MASK_TOKEN_ID, generator=g)


def models(config):
    student = tiny_model(FAMILY[config.stage]).requires_grad_(True)
    teacher = tiny_model("Dream", seed=1) if config.stage == "d2f" else None
    return student, teacher


def total(loss, inputs, size, *, select):
    return sum(loss(part)[0] for part in inputs.parts(size, select=select))


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("stage", ["autoregressive", "masked-diffusion", "d2f"])
def test_the_loss_is_the_public_one(stage, tmp_path):
    config = make_config(tmp_path, stage)
    batch, inputs = make_batch(), inputs_of(config)
    student, teacher = models(config)
    loss = total(StageLoss(config, student, teacher), inputs, 4, select=True)
    position = torch.arange(LENGTH)
    response = position >= batch.prompt_length_B[:, None]
    masked = inputs.ids_BL == MASK_TOKEN_ID
    if stage == "autoregressive":
        counted = response & (position < batch.end_B[:, None])
        expected = autoregressive_loss(student.logits(batch.ids_BL), batch.ids_BL, counted)
    elif stage == "masked-diffusion":
        # The weight of a masked position is 1 / (t * response positions).
        t = 1 / (inputs.weight_BL.amax(1, keepdim=True) * response.sum())
        logits = student.logits(inputs.ids_BL)
        expected = masked_diffusion_loss(logits, batch.ids_BL, masked, t, response)
    else:
        layout = BlockLayout(prompt_length=batch.prompt_length_B, block_size=4)
        ratio = torch.where(masked, 1 / (inputs.weight_BL * masked.sum()), 1.0)
        expected = distillation_loss(
            student.logits(inputs.ids_BL, layout), teacher.logits(inputs.ids_BL), masked, ratio
        )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("stage", ["autoregressive", "masked-diffusion", "d2f"])
def test_accumulated_parts_are_the_whole(stage, select, tmp_path):
    config = make_config(tmp_path, stage)
    student, teacher = models(config)
    loss, inputs = StageLoss(config, student, teacher), inputs_of(config)
    whole, parts = (total(loss, inputs, size, select=select) for size in (4, 1))
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)
    for one, other in zip(gradients(whole, student), gradients(parts, student), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def uneven_batch():
    """Eight sequences, of which one has nothing to predict: its prompt fills it."""
    g = torch.Generator().manual_seed(0)
    prompt = torch.tensor([1, 3, LENGTH, 2, 4, 9, 2, 1])
    end = torch.tensor([20, 6, LENGTH, 5, 19, 12, 3, 9])
    ids = torch.randint(90, (8, LENGTH), generator=g)
    ids = torch.where(torch.arange(LENGTH) < end[:, None] - 1, ids, EOS_TOKEN_ID)
    whole = torch.full_like(end, LENGTH)
    return Batch(ids_BL=ids, prompt_length_B=prompt, end_B=end, length_B=whole)


def sequence_by_sequence(config, inputs, batch, student, teacher):
    """The distillation loss of one sequence after the other, as a mean of means or of positions."""
    means, masks = [], inputs.ids_BL == MASK_TOKEN_ID
    for b in range(len(masks)):
        if not masks[b].any():
            continue
        layout = BlockLayout(prompt_length=int(batch.prompt_length_B[b]), block_size=4)
        hard = config.objective.objective == "cross_entropy"
        ids = inputs.ids_BL[b : b + 1]
        loss = distillation_loss(
            student.logits(ids, layout),
            inputs.target_BL[b : b + 1] if hard else teacher.logits(ids).detach(),
            masks[b : b + 1],
            1.0,
            config.objective.objective,
            "none",
        )
        means.append(loss * (masks[b].sum() if config.objective.normalization == "batch" else 1))
    batched = config.objective.normalization == "batch"
    return sum(means) / (masks.sum() if batched else len(means))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_mean_does_not_depend_on_how_a_batch_is_cut(
    objective, normalization, compiled, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    settings = ObjectiveConfig(objective=objective, weighting="none", normalization=normalization)
    config = make_config(tmp_path, "d2f", objective=settings)
    noise = replace(config.noise, train_on_eos_blocks=False, train_past_eos=False)
    # In chunks of few positions where the loss is not computed whole.
    config = replace(config, noise=noise, loss_memory_mib=384 if compiled else 1)
    student, teacher = models(config)
    batch = uneven_batch()
    inputs = inputs_of(config, batch)
    masked_B = (inputs.ids_BL == MASK_TOKEN_ID).sum(1)
    assert masked_B[2] == 0
    assert len(masked_B.unique()) > 4
    reference = sequence_by_sequence(config, inputs, batch, student, teacher)
    expected = gradients(reference, student)
    loss = StageLoss(config, student, teacher, compiled=compiled)
    assert loss.selects != compiled
    for size in (8, 4, 2, 1):
        value = total(loss, inputs, size, select=loss.selects)
        torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-5)
        for one, other in zip(gradients(value, student), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_teacher_is_the_model_with_its_adapter_off(tmp_path):
    config = make_config(tmp_path, "d2f", objective=ObjectiveConfig(weighting="none"))
    model = tiny_model("Dream")
    tiny_adapter(model)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    inputs = inputs_of(config)
    loss = total(StageLoss(config, model), inputs, 4, select=True)
    layout = BlockLayout(prompt_length=make_batch().prompt_length_B, block_size=4)
    with adapter_disabled(model), torch.no_grad():
        teacher = model.logits(inputs.ids_BL)
    masked = inputs.ids_BL == MASK_TOKEN_ID
    student = model.logits(inputs.ids_BL, layout)
    expected = distillation_loss(student, teacher, masked, 1.0, weighting="none")
    torch.testing.assert_close(loss, expected)
    assert any(gradient.abs().max() > 0 for gradient in gradients(loss, model))


def test_prompt_stays_and_noise_follows_the_generator(tmp_path):
    for stage in ("masked-diffusion", "d2f"):
        config, batch = make_config(tmp_path, stage), make_batch()
        first, same, other = (inputs_of(config, seed=seed) for seed in (0, 0, 1))
        prompt = torch.arange(LENGTH) < batch.prompt_length_B[:, None]
        assert torch.equal(first.ids_BL[prompt], batch.ids_BL[prompt])
        assert torch.equal(first.ids_BL, same.ids_BL)
        assert not torch.equal(first.ids_BL, other.ids_BL)
        assert torch.equal(first.weight_BL > 0, first.ids_BL == MASK_TOKEN_ID)


def test_rates_are_stratified_over_the_batch(tmp_path):
    noise = NoiseConfig(kind="uniform", low=0.001, high=1.0, block_size=4)
    config = make_config(tmp_path, "masked-diffusion", noise=noise)
    size, length = 16, 2000
    batch = Batch(
        ids_BL=torch.zeros(size, length, dtype=torch.long),
        prompt_length_B=torch.zeros(size, dtype=torch.long),
        end_B=torch.full((size,), length),
        length_B=torch.full((size,), length),
    )
    share = (inputs_of(config, batch).ids_BL == MASK_TOKEN_ID).float().mean(1).sort().values
    steps = share.diff()
    assert steps.min() > 0.02
    assert steps.max() < 0.11


@pytest.mark.parametrize("stage", ["masked-diffusion", "d2f"])
def test_eos_blocks_can_be_left_out(stage, tmp_path):
    config = make_config(tmp_path, stage)
    noise = config.noise
    everything = replace(noise, low=0.999, high=1.0)
    kept = inputs_of(replace(config, noise=everything))
    left_out = inputs_of(replace(config, noise=replace(everything, train_on_eos_blocks=False)))
    batch = make_batch()
    position = torch.arange(LENGTH)
    # Ends 12, 9, 20, 7 and prompts 1, 3, 5, 2 on grids of 4: noise ends at 13, 11, 20, 10.
    end = torch.tensor([13, 11, 20, 10])[:, None]
    after = position >= end
    assert (left_out.ids_BL[after] == batch.ids_BL.expand(4, -1)[after]).all()
    assert (left_out.weight_BL[after] == 0).all()
    assert (kept.weight_BL[after] > 0).float().mean() > 0.9
    assert (left_out.weight_BL[(position < end) & (kept.block_BL > 0)] > 0).float().mean() > 0.9
    answers = replace(everything, train_on_eos_blocks=False, train_past_eos=False)
    answer = inputs_of(replace(config, noise=answers))
    behind = position >= batch.end_B[:, None]
    assert (answer.ids_BL[behind] == batch.ids_BL.expand(4, -1)[behind]).all()
    assert (answer.weight_BL[behind] == 0).all()
    assert (answer.weight_BL[~behind & (kept.block_BL > 0)] > 0).float().mean() > 0.9
    with pytest.raises(ConfigError, match="needs train_on_eos_blocks = false"):
        replace(everything, train_past_eos=False)


def test_without_a_prompt_autoregression_skips_the_first_token(tmp_path):
    batch = replace(make_batch(1), prompt_length_B=torch.tensor([0]))
    weight = inputs_of(make_config(tmp_path, "autoregressive"), batch).weight_BL
    assert weight[0, 0] == 0
    assert (weight[0, 1:12] > 0).all()
    assert (weight[0, 12:] == 0).all()


def test_noise_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not fit"):
        make_config(tmp_path, "masked-diffusion", noise=make_config(tmp_path, "d2f").noise)


def test_frontier_noise_has_one_partly_masked_block(tmp_path):
    noise = replace(make_config(tmp_path, "masked-diffusion").noise, frontier_share=0.5)
    config = make_config(tmp_path, "masked-diffusion", noise=noise)
    inputs, batch = inputs_of(config), make_batch()
    masked = inputs.ids_BL == MASK_TOKEN_ID
    assert (masked[inputs.weight_BL > 0]).all()
    for row in range(2):
        blocks = inputs.block_BL[row]
        shares = [masked[row][blocks == b].float().mean().item() for b in blocks.unique()]
        assert shares == sorted(shares)
        assert sum(0 < share < 1 for share in shares) <= 1
        assert shares[-1] == 1
    student, _ = models(config)
    loss = StageLoss(config, student)
    whole, parts = (total(loss, inputs, size, select=True) for size in (4, 1))
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)
    assert torch.equal(inputs.target_BL, batch.ids_BL)


@pytest.mark.parametrize("frontier_share", [0.0, 0.5])
def test_random_ends_leave_padding_that_changes_nothing(tmp_path, frontier_share):
    noise = replace(
        make_config(tmp_path, "masked-diffusion").noise,
        frontier_share=frontier_share,
        random_end=True,
    )
    config = make_config(tmp_path, "masked-diffusion", noise=noise)
    inputs, batch = inputs_of(config, seed=1), make_batch()
    padding = inputs.block_BL == PADDING_BLOCK
    assert padding.any()
    assert not (padding & (torch.arange(LENGTH) < batch.end_B[:, None])).any()
    assert (inputs.weight_BL[padding] == 0).all()
    student, _ = models(config)
    loss = StageLoss(config, student)
    changed = replace(inputs, ids_BL=torch.where(padding, 17, inputs.ids_BL))
    torch.testing.assert_close(loss(inputs)[0], loss(changed)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stage", ["autoregressive", "masked-diffusion", "d2f"])
def test_logits_that_fit_are_compiled_whole_and_others_never_made(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = make_config(tmp_path, stage)
    student, teacher = models(config)
    # As many positions as do not fit into a MiB; the size of the real inputs plays no part.
    larger = replace(config, batch_size=64, loss_memory_mib=1)
    inputs = inputs_of(config)
    results = []
    for settings, compiled in ((config, True), (larger, True), (larger, False)):
        loss = StageLoss(settings, student, teacher, compiled=compiled)
        assert loss.selects == (settings is larger)
        (part,) = inputs.parts(4, select=loss.selects)
        value, loss_BL = loss(part)
        counted = torch.where(inputs.weight_BL > 0, loss_BL, 0.0)
        results.append((value, counted, *gradients(value, student)))
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, same, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("compiled", [True, False])
def test_nothing_masked_trains_nothing(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = make_config(tmp_path, "d2f")
    student, teacher = models(config)
    inputs = inputs_of(config)
    inputs = replace(inputs, weight_BL=torch.zeros_like(inputs.weight_BL))
    loss = StageLoss(config, student, teacher, compiled=compiled)
    value = total(loss, inputs, 2, select=loss.selects)
    assert value.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(value, student))

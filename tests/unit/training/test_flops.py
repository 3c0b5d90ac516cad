from dataclasses import replace

import pytest
import torch
from tests.unit.training.tiny_run import make_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from d2f.diffusion.layout import PADDING_BLOCK, BlockLayout, visible
from d2f.models.lora import LoraConfig, attach_adapter
from d2f.models.presets import preset_spec
from d2f.models.transformer import Transformer
from d2f.testing import tiny_model
from d2f.testing.tiny import MASK_TOKEN_ID
from d2f.training.data import Batch
from d2f.training.flops import Work, describe_work, step_flops, visible_pairs
from d2f.training.stage_loss import StageLoss
from d2f.training.step_inputs import make_inputs

SIZE, LENGTH = 3, 24


def make_part(config):
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        ids_BL=torch.randint(90, (SIZE, LENGTH), generator=generator),
        prompt_length_B=torch.tensor([1, 6, 9]),
        end_B=torch.full((SIZE,), LENGTH),
        length_B=torch.full((SIZE,), LENGTH),
    )
    inputs = make_inputs(batch, config, mask_token_id=MASK_TOKEN_ID, generator=generator)
    return next(inputs.parts(SIZE, select=True))


def counted_by_torch(work):
    """Operations of all matrix products that run, with attention as plain products of all pairs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


ADAPTERS = {
    "attention": LoraConfig(r=4),
    "all": LoraConfig(r=4, target_modules="all-linear"),
    "output": LoraConfig(r=2, target_modules=("o_proj", "attn_out")),
    "mlp": LoraConfig(r=3, target_modules=("up_proj",)),
    "none": None,
}


@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_formulas_count_what_torch_runs(family, adapter, tmp_path):
    lora = ADAPTERS[adapter]
    config = make_config(tmp_path, "d2f", lora=lora)
    student, teacher = tiny_model(family), None
    if lora is None:
        student.requires_grad_(True)
        teacher = tiny_model(family, num_hidden_layers=1)
    else:
        attach_adapter(student, lora, torch.Generator().manual_seed(0))
    part = make_part(config)
    loss = StageLoss(config, student, teacher)
    flops = step_flops(student, teacher, describe_work(part, only_visible=False))
    found = []
    forward = counted_by_torch(lambda: found.append(loss(part)[0]))
    backward = counted_by_torch(found[0].backward)
    # The chunked loss takes the head's gradients in its forward pass.
    head = 2 * part.selected_M.numel() * student.head_weight_VD.numel()
    early = head * (1 + student.head_weight_VD.requires_grad)
    assert flops.teacher + flops.student == forward - early
    assert flops.backward == backward + early
    assert flops.total == forward + backward


def test_one_layer_by_hand():
    """Width 8, heads 2 x 4, one key head, MLP 16, 10 tokens known; an adapter of rank 1 on q."""
    model = tiny_model(
        "Dream", hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=4, vocab_size=96,
    )  # fmt: skip
    attach_adapter(
        model, LoraConfig(r=1, target_modules=("q_proj",)), torch.Generator().manual_seed(0)
    )
    work = Work(num_tokens=10, num_counted=3, teacher_pairs=100, student_pairs=60)
    flops = step_flops(model, None, work)
    weights = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * (8 * 16)
    head = 8 * 96
    assert flops.teacher == 2 * (10 * weights + 3 * head) + 4 * 2 * 4 * 100
    assert flops.student == 2 * (10 * (weights + 16) + 3 * head) + 4 * 2 * 4 * 60
    # Frozen q, k and v of the only layer read the embeddings, which nobody trains.
    passed_on = 8 * 8 + 3 * (8 * 16)
    adapter = (8 + 8) + 8
    assert flops.backward == 2 * (10 * (passed_on + adapter) + 3 * head) + 8 * 2 * 4 * 60


def test_llada_8b_costs_six_operations_per_frozen_weight_and_token():
    with torch.device("meta"):
        model = Transformer(preset_spec("llada-8b"))
        attach_adapter(model, LoraConfig(r=32), torch.Generator())
    work = Work(num_tokens=1024, num_counted=0, teacher_pairs=0, student_pairs=0)
    frozen = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    adapters = 32 * 4 * 32 * 2 * 4096
    total = step_flops(model, None, work).total
    first = 3 * 4096**2 + 3 * 32 * 4096
    assert total == 2 * 1024 * (3 * frozen + 3 * adapters - first)
    assert total == pytest.approx(6 * 1024 * 6.98e9, rel=0.01)


def test_only_what_is_visible_counts(tmp_path):
    config = make_config(tmp_path, "d2f")
    part = make_part(config)
    assert visible_pairs(part.block_BL) == int(visible(part.block_BL, part.block_BL).sum())
    work, dense = describe_work(part), describe_work(part, only_visible=False)
    assert work == replace(dense, student_pairs=visible_pairs(part.block_BL))
    assert dense.teacher_pairs == SIZE * LENGTH**2
    assert work.num_counted == int((part.weight_BL > 0).sum())


def test_padding_sees_itself_alone_and_all_before():
    block = BlockLayout(prompt_length=2, block_size=2).block_numbers(6)
    block[0, 5] = PADDING_BLOCK
    assert visible_pairs(block) == int(visible(block, block).sum())


def test_the_example_of_a_long_sequence():
    found = visible_pairs(BlockLayout(prompt_length=256, block_size=16).block_numbers(1024))
    assert (
        found
        == 563_200
        == sum(
            count * end for count, end in [(256, 256), *((16, 256 + 16 * n) for n in range(1, 49))]
        )
    )

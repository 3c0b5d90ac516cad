"""Watching a compiled run on a GPU, and the estimate of its memory."""

from dataclasses import replace

import pytest
import torch
from tests.unit.training.test_evaluations import config_for, files, lines
from tests.unit.training.tiny_run import make_config, make_dataset

from d2f.cli.step_bench import free_memory
from d2f.cli.train_answers import make_evaluator
from d2f.models.lora import LoraConfig, attach_adapter
from d2f.models.presets import preset_spec, random_model
from d2f.training.estimate import estimate
from d2f.training.run import train
from d2f.training.sections import DataConfig, EvaluateConfig, ModelConfig
from d2f.training.trainer import Trainer

assert files  # the fixture
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore"),
]
LORA = LoraConfig(r=4, alpha=8)


@pytest.mark.parametrize("lora", [None, LORA])
def test_a_compiled_run_is_evaluated_and_goes_on(files, lora):
    settings = EvaluateConfig(every=2, task="word-problems", num_problems=3, max_new_tokens=8)
    plain = config_for(files, "d2f", "plain", lora=lora)
    watched = config_for(files, "d2f", "watched", lora=lora, evaluate=settings)
    train(plain, device="cuda")
    summary = train(watched, device="cuda", make_evaluator=make_evaluator)
    assert summary.best is not None
    assert [record["step"] for record in lines(watched)] == [2, 4, 6]
    one, other = ([r["loss"] for r in lines(c, "log.jsonl")] for c in (plain, watched))
    assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_is_near(tmp_path, recompute):
    # What tests before this one have left in memory is not the run's.
    free_memory()
    before = torch.cuda.memory_allocated()
    spec = replace(preset_spec("llada-8b", num_layers=4), vocab_size=32_000, mask_token_id=31_999,
                   eos_token_ids=(31_998,))  # fmt: skip
    config = make_config(
        tmp_path,
        "d2f",
        steps=3,
        batch_size=4,
        lora=LoraConfig(r=32, alpha=32, dropout=0.1),
        precision="bfloat16",
        model=ModelConfig(init="unused", dtype="bfloat16"),
        data=DataConfig(kind="problems", num_problems=1, sequence_length=1024),
        activation_checkpointing=recompute,
    )
    model = random_model(spec, device="cuda")
    attach_adapter(model, config.lora, torch.Generator().manual_seed(0))
    trainer = Trainer(config, model, make_dataset(config))
    trainer._train_step()
    torch.cuda.reset_peak_memory_stats()
    trainer._train_step()
    peak = torch.cuda.max_memory_allocated() - before
    found = estimate(config, spec, compiled=True).memory
    assert 0.5 * found.total < peak < 1.3 * found.total, (peak, found.to_dict())

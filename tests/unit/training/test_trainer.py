import json
from dataclasses import replace

import pytest
import torch
from tests.unit.training.tiny_run import WatchedLoss, log_of, make_config, make_trainer

from d2f.errors import TrainingError
from d2f.models.checkpoint import load_model
from d2f.training.checkpoint import list_checkpoints, load_state
from d2f.training.optimizer import learning_rate
from d2f.training.sections import OptimizerConfig, SampleConfig


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_every_stage_learns(stage_config):
    config = replace(
        stage_config, steps=40, log_every=5, optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3)
    )
    assert make_trainer(config).run()
    records = log_of(config)
    assert [record["step"] for record in records] == list(range(5, 41, 5))
    first, last = (records[i]["loss"] for i in (0, -1))
    assert last < 0.9 * first
    blocks = records[-1].get("loss_per_block")
    assert (blocks is None) == (config.stage == "autoregressive")
    if blocks:
        assert len(blocks) == 6
        assert all(block is None or block >= 0 for block in blocks)


def test_samples_logging_and_the_callers_random_state_change_nothing(stage_config, tmp_path):
    results = []
    for name, seed in (("plain", 1), ("watched", 2)):
        config = replace(stage_config, output=str(tmp_path / name))
        sampler = None
        if name == "watched":
            config = replace(config, log_every=4, sample=SampleConfig(every=2))

            def sampler(model):
                assert not model.training
                torch.rand(3)
                return [{"prompt": "p", "answer": "a"}]

        torch.manual_seed(seed)
        state = torch.get_rng_state()
        trainer = make_trainer(config, sampler=sampler)
        assert trainer.run()
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.student.training
        results.append(weights(trainer.student))
    assert_equal(*results)
    lines = (tmp_path / "watched" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def test_micro_batches_make_the_same_run(stage_config, tmp_path):
    if stage_config.lora is not None:
        stage_config = replace(stage_config, lora=replace(stage_config.lora, dropout=0.0))
    results = []
    for size in (8, 1):
        config = replace(stage_config, output=str(tmp_path / str(size)), micro_batch_size=size)
        trainer = make_trainer(config)
        trainer._train_step()
        results.append((trainer._window._losses[0], trainer._window._norm))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, log_every):
    config = make_config(tmp_path, "d2f", log_every=log_every)
    trainer = make_trainer(config)
    seen = {}

    def poisoned(loss, inputs):
        seen[trainer.step] = weights(trainer.student)
        value, loss_BL = loss(inputs)
        return value * (float("nan") if trainer.step == 2 else 1.0), loss_BL

    WatchedLoss(trainer, poisoned)
    with pytest.raises(TrainingError, match=r"not finite at step 3.*checkpoint-00000002"):
        trainer.run()
    assert_equal(weights(trainer.student), seen[2])
    (folder,) = list_checkpoints(tmp_path)
    state = load_state(folder)
    assert state["step"] == 2
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {2.0}
    stored = load_model(folder, device="cpu")
    assert_equal(weights(stored), seen[2])


def test_an_infinite_gradient_alone_is_noticed(tmp_path):
    trainer = make_trainer(make_config(tmp_path, "autoregressive"))
    before = weights(trainer.student)
    trainer.student.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="step 1;"):
        trainer.run()
    assert_equal(weights(trainer.student), before)


def test_time_drives_the_run_where_the_recipe_says_so(tmp_path):
    config = make_config(
        tmp_path,
        "autoregressive",
        steps=10**6,
        max_seconds=1,
        optimizer=OptimizerConfig(lr=1e-3, schedule="linear"),
    )
    trainer = make_trainer(config)
    assert trainer.run()
    assert 1 <= trainer.seconds < 3
    rates = [record["lr"] for record in log_of(config)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.2e-3


def test_weights_decay_but_not_norms_biases_embeddings(tmp_path):
    trainer = make_trainer(make_config(tmp_path, "autoregressive"))
    names = {p: name for name, p in trainer.student.named_parameters()}
    for group in trainer.update.optimizer.param_groups:
        for parameter in group["params"]:
            plain = parameter.ndim < 2 or names[parameter] == "embed.weight"
            assert (group["weight_decay"] == 0) == plain, names[parameter]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1, 0.8682, 0.55, 0.2318, 0.1]),
        ("wsd", [1, 1, 1, 0.55, 0.1]),
    ],
)
def test_learning_rate(schedule, expected):
    config = OptimizerConfig(lr=1.0, schedule=schedule, decay_start=0.5, final_lr_share=0.1)
    rates = [learning_rate(config, 100, share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == pytest.approx(expected, abs=1e-4)
    warm = replace(config, warmup_steps=4)
    assert [learning_rate(warm, step, 0) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("kind", ["new", "old"])
def test_what_a_killed_process_left_is_removed(tmp_path, kind):
    trainer = make_trainer(make_config(tmp_path, "d2f", steps=1))
    left = tmp_path / f".checkpoint-00000007.{kind}-123"
    left.mkdir()
    (left / "file").touch()
    trainer.run()
    assert left.exists()
    assert trainer.save().exists()
    assert not left.exists()

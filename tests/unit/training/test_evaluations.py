"""Evaluation during training: it changes nothing, loses nothing, and keeps the best."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.training.tiny_run import (
    FAMILY,
    make_config,
    make_dataset,
    stored_weights,
    write_files,
)

from d2f.cli.train_answers import make_evaluator
from d2f.errors import ConfigError, D2FError, TrainingError
from d2f.evaluation.quick_score import own_rows
from d2f.models.checkpoint import load_model
from d2f.models.lora import LoraConfig
from d2f.text import Tokenizer
from d2f.training.evaluations import hold_out, is_better
from d2f.training.progress import Terminal
from d2f.training.run import train
from d2f.training.run_log import Reporter
from d2f.training.sections import DataConfig, EvaluateConfig, ModelConfig

LORA = LoraConfig(r=4, alpha=8, dropout=0.3)


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def config_for(files, stage, name="run", **overrides):
    config = make_config(
        files / name,
        stage,
        model=ModelConfig(init=str(files / FAMILY[stage]), output_dtype="float32"),
        data=DataConfig(kind="jsonl", paths=(str(files / "pairs.jsonl"),), sequence_length=12),
    )
    return replace(config, **overrides)


def lines(config, name="evaluations.jsonl"):
    return [json.loads(x) for x in (Path(config.output) / name).read_text().splitlines()]


def scores(*values, after=lambda step: None):
    """A `make_evaluator` with these scores, one after the other; values may be errors."""

    def make(config, tokenizer):
        left = list(values)

        def evaluate(model):
            assert not model.training
            torch.rand(3)
            value = left.pop(0)
            if isinstance(value, Exception):
                raise value
            score, rate = value if isinstance(value, tuple) else (value, 1.0)
            return {"score": score, "standard_error": 0.1, "tokens_per_forward": rate}

        return lambda held_out: evaluate

    return make


class Notes(Reporter):
    def __init__(self):
        self.notes, self.evaluations = [], []

    def note(self, text):
        self.notes.append(text)

    def evaluation(self, record):
        self.evaluations.append(record)


@pytest.mark.parametrize(
    ("stage", "lora"),
    [("autoregressive", None), ("masked-diffusion", None), ("d2f", None), ("d2f", LORA)],
)
def test_it_changes_nothing_and_the_best_is_a_model(files, stage, lora):
    plain = config_for(files, stage, "plain", lora=lora)
    train(plain, device="cpu")
    settings = EvaluateConfig(
        every=2, task="word-problems", num_problems=3, batch_size=2, max_new_tokens=5
    )
    watched = config_for(files, stage, "watched", lora=lora, evaluate=settings)
    before = torch.get_rng_state()
    summary = train(watched, device="cpu", make_evaluator=make_evaluator)
    assert torch.equal(torch.get_rng_state(), before)
    one, other = (stored_weights(Path(c.output) / "final") for c in (plain, watched))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    records = lines(watched)
    assert [record["step"] for record in records] == [2, 4, 6]
    assert all(r["num_problems"] == 3 and r["tokens_per_forward"] > 0 for r in records)
    log = {r["step"]: r.get("evaluation") for r in lines(watched, "log.jsonl")}
    assert {step for step, found in log.items() if found} == {2, 4, 6}
    assert log[4]["score"] == records[1]["score"]
    best = Path(summary.best["folder"])
    assert best.name == "best"
    assert json.loads((best / "evaluation.json").read_text())["step"] == summary.best["step"]
    model = load_model(watched.model.init, adapter=best) if lora else load_model(best, device="cpu")
    assert model.spec.vocab_size == 96
    assert Tokenizer.load(best).vocab_size <= 96


def test_the_best_is_kept_and_replaced(files):
    config = config_for(
        files, "d2f", steps=8, checkpoint_every=2, keep_checkpoints=9, lora=LORA,
        evaluate=EvaluateConfig(every=2, task="word-problems"),
    )  # fmt: skip
    reporter = Notes()
    summary = train(
        config,
        device="cpu",
        make_evaluator=scores(0.5, (0.7, 1.0), (0.7, 2.0), 0.6),
        reporter=reporter,
    )
    assert (summary.best["step"], summary.best["score"]) == (6, 0.7)
    kept, then = (stored_weights(Path(config.output) / n) for n in ("best", "checkpoint-00000006"))
    assert all(torch.equal(kept[name], then[name]) for name in then)
    assert [record["best_step"] for record in reporter.evaluations] == [2, 4, 6, 6]
    assert not any(name.startswith(".") for name in os.listdir(config.output))


def test_equal_scores_are_told_by_tokens_per_forward():
    one = {"score": 0.5, "tokens_per_forward": 2.0}
    assert is_better(one, None)
    assert is_better(one, {"score": 0.5, "tokens_per_forward": 1.9})
    assert not is_better(one, dict(one))
    assert not is_better(one, {"score": 0.6, "tokens_per_forward": 1.0})


@pytest.mark.parametrize("kill_at", [3, 4])
def test_a_resumed_run_doubles_nothing_and_remembers_the_best(files, kill_at):
    settings = EvaluateConfig(every=2, task="word-problems")
    config = config_for(files, "d2f", evaluate=settings, checkpoint_every=3)

    class Killed(Reporter):
        def record(self, record):
            if record["step"] == kill_at:
                if kill_at == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                else:  # without a checkpoint, so that steps are made again
                    raise KeyboardInterrupt

    def go(*values, **options):
        return train(config, device="cpu", make_evaluator=scores(*values), **options)

    if kill_at == 3:
        go(0.9, reporter=Killed())
    else:
        with pytest.raises(KeyboardInterrupt):
            go(0.9, 0.2, reporter=Killed())
        assert [record["step"] for record in lines(config)] == [2, 4]
    kept = stored_weights(Path(config.output) / "best")
    summary = go(0.3, 0.4, resume=True)
    assert [(r["step"], r["score"]) for r in lines(config)] == [(2, 0.9), (4, 0.3), (6, 0.4)]
    assert summary.best["step"] == 2
    now = stored_weights(Path(config.output) / "best")
    assert all(torch.equal(kept[name], now[name]) for name in kept)


def test_scores_of_different_measures_are_not_compared(files):
    settings = EvaluateConfig(every=2, task="word-problems")
    config = config_for(files, "d2f", evaluate=settings, checkpoint_every=3)

    class Killed(Reporter):
        def record(self, record):
            if record["step"] == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, device="cpu", make_evaluator=scores(0.9, 0.1), reporter=Killed())
    harder = replace(config, evaluate=replace(settings, task="functions", every=1))
    notes = Notes()
    summary = train(
        harder, device="cpu", make_evaluator=scores(0.2, 0.3, 0.1), resume=True, reporter=notes
    )
    assert (summary.best["step"], summary.best["score"]) == (5, 0.3)
    assert any("was not scored as this run scores" in note for note in notes.notes)


def test_the_last_step_is_evaluated_too(files):
    config = config_for(files, "d2f", evaluate=EvaluateConfig(every=4, task="word-problems"))
    train(config, device="cpu", make_evaluator=scores(0.1, 0.2))
    assert [record["step"] for record in lines(config)] == [4, 6]
    assert lines(config, "log.jsonl")[-1]["evaluation"]["score"] == 0.2


def test_what_fails_is_told_and_the_run_goes_on(files):
    config = config_for(files, "d2f", evaluate=EvaluateConfig(every=2, task="word-problems"))
    reporter = Notes()
    broken = scores(D2FError("no sandbox here"), RuntimeError("out of memory\nmore"), 0.5)
    summary = train(config, device="cpu", make_evaluator=broken, reporter=reporter)
    assert summary.finished
    told = [note for note in reporter.notes if "failed" in note]
    assert told == [
        "the evaluation at step 2 failed: no sandbox here; training goes on",
        "the evaluation at step 4 failed: out of memory; training goes on",
    ]
    assert [record["step"] for record in lines(config)] == [6]


def test_a_best_model_that_cannot_be_written_leaves_the_old_one(files, monkeypatch):
    config = config_for(files, "d2f", evaluate=EvaluateConfig(every=2, task="word-problems"))
    import d2f.training.checkpoint as module

    whole, calls = module.model_card, []

    def full_disk(*given):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return whole(*given)

    monkeypatch.setattr(module, "model_card", full_disk)
    reporter = Notes()
    train(config, device="cpu", make_evaluator=scores(0.1, 0.2, 0.05), reporter=reporter)
    assert any("No space left" in note for note in reporter.notes)
    best = Path(config.output) / "best"
    assert json.loads((best / "evaluation.json").read_text())["step"] == 2


def test_a_wrong_table_is_refused_before_the_weights_are_read(files):
    config = config_for(files, "d2f")
    for change, message in (
        ({"task": "gsm9k"}, "did you mean 'gsm8k'"),
        ({"task": "word-problems", "strategy": "pipelind"}, "pipelined"),
    ):
        settings = EvaluateConfig(every=2, **change)
        model = replace(config.model, init=str(files / "Dream"))
        (files / "Dream" / "model.safetensors").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=message):
            train(
                replace(config, model=model, evaluate=settings),
                device="cpu",
                make_evaluator=make_evaluator,
            )
    for wrong in (
        {},
        {"task": "functions", "held_out": 3},
        {"held_out": 3, "data": "x"},
        {"held_out": 3, "num_problems": 5},
        {"task": "functions", "answer": "exact"},
    ):
        with pytest.raises(ConfigError, match="evaluate"):
            EvaluateConfig(every=2, **wrong)
    for stage, strategy in (("d2f", "autoregressive"), ("autoregressive", "pipelined")):
        settings = EvaluateConfig(every=2, held_out=3, strategy=strategy)
        with pytest.raises(ConfigError, match=f"cannot decode a model of stage {stage}"):
            config_for(files, stage, evaluate=settings)


# ------------------------------------------------------------------------------------- held out


def test_held_out_samples_are_never_trained_on(tmp_path):
    config = make_config(tmp_path, "d2f")
    dataset = make_dataset(config, 40)
    # Samples repeat after 7 * 4 * 5; prompts after 28, so some prompts come twice.
    everything = [tuple(dataset.sample(row)[0]) for row in range(len(dataset))]
    rows = hold_out(dataset, 5, seed=1)
    prompts = {tuple(row.prompt_ids) for row in rows}
    assert len(rows) == len(prompts) == 5
    left = [tuple(dataset.sample(row)[0]) for row in range(len(dataset))]
    assert prompts.isdisjoint(left)
    assert len(left) == sum(prompt not in prompts for prompt in everything)
    assert dataset.counts()["held_out"] == 40 - len(left) >= 5
    again, other = (hold_out(make_dataset(config, 40), 5, seed=s) for s in (1, 2))
    assert again == rows
    assert other != rows
    with pytest.raises(TrainingError, match=r"held_out is 500.*lower it"):
        hold_out(make_dataset(config, 40), 500, seed=1)


def test_a_run_on_users_own_rows(files):
    settings = EvaluateConfig(every=3, held_out=6, max_new_tokens=4)
    config = config_for(files, "d2f", evaluate=settings)
    summary = train(config, device="cpu", make_evaluator=make_evaluator)
    assert (summary.data["held_out"], summary.data["used"]) == (6, 34)
    assert [record["num_problems"] for record in lines(config)] == [6, 6]
    # How often it is evaluated changes nothing.
    seldom = replace(config, output=str(files / "b"), evaluate=replace(settings, every=100))
    train(seldom, device="cpu", make_evaluator=make_evaluator)
    one, other = (stored_weights(Path(c.output) / "final") for c in (config, seldom))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_the_choice(files):
    settings = EvaluateConfig(every=2, held_out=6)
    config = config_for(files, "d2f", evaluate=settings, checkpoint_every=2)

    class Stop(Reporter):
        def record(self, record):
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    train(config, device="cpu", make_evaluator=scores(0.1), reporter=Stop())
    with pytest.raises(TrainingError, match="'evaluate'"):
        train(replace(config, evaluate=replace(settings, held_out=7)), device="cpu", resume=True)
    more = replace(config, evaluate=replace(settings, every=1))
    assert train(more, device="cpu", make_evaluator=scores(*[0.2] * 3), resume=True).finished


def test_answers_to_own_rows():
    pairs = [("a", "so 4 apples, 12 in all."), ("b", "Paris")]
    task = own_rows(pairs)
    examples = task.examples()
    assert [v.correct for v in task.judge(examples, ["12.0", " Paris\n"])] == [True, True]
    assert [v.correct for v in task.judge(examples, ["4 of 13", "paris"])] == [False, False]
    exact = own_rows(pairs, "exact")
    texts = ["so 4  apples, 12 in all.", "Paris."]
    assert [v.correct for v in exact.judge(examples, texts)] == [True, False]


def test_the_terminal_shows_it(capsys):
    terminal = Terminal()
    terminal.evaluation(
        {
            "step": 4,
            "score": 0.25,
            "standard_error": 0.05,
            "tokens_per_forward": 2.0,
            "best_step": 4,
        }
    )
    terminal.close()
    shown = capsys.readouterr().err
    assert "step 4  score 25.0% ±5.0, 2.00 tokens per forward; the best so far" in shown

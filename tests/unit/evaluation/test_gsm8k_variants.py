"""GSM8K's training problems as benchmarks: their parts, prompts and verdicts."""

from __future__ import annotations

import pytest
from tests.unit.evaluation.harness_files import write_jsonl

from d2f.errors import ConfigError
from d2f.evaluation.tasks import load_task

TRAIN = [
    {
        "question": f"Ann has {n} {chr(45 + n)}s and finds {n + 45} more. How many has she?",
        "answer": f"She has {n}+{n + 45}=<<{n}+{n + 45}={2 * n + 45}>>{2 * n + 45}."
        f"\n#### {2 * n + 45}",
    }
    for n in range(20, 50)
]


@pytest.fixture
def data(tmp_path):
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", TRAIN)
    return tmp_path


def questions_of(task):
    return [example.source[1]["question"] for example in task.examples()]


def test_the_parts_are_kept_apart(data):
    validation = load_task("gsm8k-variants", data=data, split="validation")
    test = load_task("gsm8k-variants", data=data)
    known = {row["question"] for row in TRAIN}
    assert len(questions_of(validation)) == 3
    assert set(questions_of(validation)) <= known
    assert len(set(questions_of(test))) == 27
    assert not set(questions_of(test)) & known
    assert (
        questions_of(load_task("gsm8k-variants", data=data, num_examples=5))
        == (questions_of(test)[:5])
    )
    assert questions_of(load_task("gsm8k-variants", data=data, seed=1)) != questions_of(test)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_prompts_stops_and_verdicts_are_those_of_gsm8k_without_examples(data, split):
    task = load_task("gsm8k-variants", data=data, split=split)
    official = load_task("gsm8k", data=data, split="validation", num_fewshot=0)
    assert (task.name, task.num_fewshot, task.stop) == ("gsm8k-variants", 0, official.stop)
    for example in [*task.examples(), *official.examples()]:
        assert example.prompt == f"Question: {example.source[1]['question']}\nAnswer:"
        assert example.messages == ({"role": "user", "content": example.prompt},)
    example = task.examples()[0]
    assert "<<" not in example.response
    right, wrong, loose = task.judge([example] * 3, [example.response, "#### 7", "7 or 8"])
    assert right.metrics == {
        "exact_match,flexible-extract": 1.0,
        "exact_match,strict-match": 1.0,
    }
    assert (right.correct, wrong.correct, loose.correct) == (True, False, False)


def test_examples_in_the_prompt_are_refused(data):
    with pytest.raises(ConfigError, match="gsm8k-variants has no few-shot prompt"):
        load_task("gsm8k-variants", data=data, num_fewshot=5)


def test_a_folder_without_the_training_problems_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no gsm8k/train\.jsonl"):
        load_task("gsm8k-variants", data=tmp_path)

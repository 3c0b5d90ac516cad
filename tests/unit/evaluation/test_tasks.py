"""Tasks by name, and the native ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from d2f.errors import ConfigError
from d2f.evaluation.native import functions_task
from d2f.evaluation.tasks import TASKS, load_task


def test_all_tasks_have_a_place():
    assert set(TASKS) == {
        "word-problems", "functions", "gsm8k", "gsm8k_cot",
        "minerva_math", "minerva_math500", "humaneval", "mbpp", "advising", "wikisql",
        "gsm8k-variants",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gsm8c"}, "unknown task 'gsm8c'; did you mean 'gsm8k"),
        ({"name": "humanval"}, "did you mean 'humaneval'"),
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"num_examples": 0}, "num_examples must be a whole number from 1 on, not 0"),
        ({"num_examples": True}, "num_examples must be a whole number from 1 on, not True"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number from 0 on, not -1"),
        ({"num_fewshot": 1.5}, "num_fewshot must be a whole number from 0 on, not 1.5"),
        ({"num_fewshot": 2}, "word-problems has no few-shot prompt"),
        ({"clean_up": "paper"}, "the paper cleans up no answers to word-problems"),
        ({"clean_up": "papers"}, "did you mean 'paper'"),
        ({"data": "somewhere"}, "word-problems makes up its problems; leave out the data folder"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_task(**{"name": "word-problems"} | settings)


@pytest.mark.parametrize("name", ["word-problems", "functions"])
def test_native_problems_repeat_and_differ_by_seed_and_split(name):
    first = load_task(name, num_examples=4, seed=3, num_fewshot=0)
    prompts = [example.prompt for example in first.examples()]
    assert len(prompts) == 4
    assert first.name == name
    assert first.stop == ()
    again = load_task(name, num_examples=6, seed=3)
    assert [example.prompt for example in again.examples()][:4] == prompts
    for other in ({"seed": 4}, {"seed": 3, "split": "validation"}):
        examples = load_task(name, num_examples=4, **other).examples()
        assert not set(prompts) & {example.prompt for example in examples}
        assert not {e.id for e in first.examples()} & {e.id for e in examples}


def test_word_problems_are_judged_by_the_last_number():
    task = load_task("word-problems", num_examples=2)
    example = task.examples()[0]
    wrong = f"#### {example.source.answer + 1}"
    texts = [example.response, f"{wrong}\n{example.response}", wrong, "", "#### " + "9" * 5000]
    verdicts = task.judge([example] * len(texts), texts)
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False, False]
    assert verdicts[0].answer == str(example.source.answer)
    assert verdicts[0].reason is None
    assert verdicts[2].answer == str(example.source.answer + 1)
    assert verdicts[3].reason == "no number after ####"
    assert [verdict.metrics for verdict in verdicts[1:3]] == [{"accuracy": 1.0}, {"accuracy": 0.0}]


def test_functions_are_judged_by_running_them():
    task = functions_task(3)
    examples = task.examples()
    texts = [examples[0].response, "import sys\nsys.exit(0)", "def f(:"]
    right, left, broken = task.judge(examples, texts)
    assert right.correct
    assert right.reason is None
    assert right.metrics == {"pass@1": 1.0}
    assert right.answer == texts[0]
    assert not left.correct
    assert not broken.correct
    assert broken.reason
    assert broken.metrics == {"pass@1": 0.0}


def test_an_answer_to_a_function_may_stand_in_a_fence():
    task = functions_task(1)
    [example] = task.examples()
    text = f"Here it is:\n```python\n{example.response}\n```\nDone."
    [verdict] = task.judge([example], [text])
    assert verdict.correct, verdict.reason


def test_answers_to_functions_are_run_together():
    batches = []

    def execute(programs):
        batches.append(list(programs))
        return [SimpleNamespace(passed=i == 1, reason="no") for i in range(len(programs))]

    task = functions_task(3, execute=execute)
    verdicts = task.judge(task.examples(), ["", "", ""])
    assert [len(batch) for batch in batches] == [3]
    assert [verdict.correct for verdict in verdicts] == [False, True, False]


@pytest.mark.parametrize("name", ["word-problems", "functions"])
def test_more_problems_than_anyone_waits_for_are_refused(name):
    with pytest.raises(ConfigError, match="at most 1000000"):
        load_task(name, num_examples=10**12)

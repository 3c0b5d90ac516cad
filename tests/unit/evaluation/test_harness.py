"""lm-eval's benchmarks against lm-eval itself, on rows of our own."""

from __future__ import annotations

import json
import socket
import sys
import warnings

import pytest
from tests.unit.evaluation.harness_files import (
    GSM8K_TEST,
    GSM8K_TRAIN,
    HUMANEVAL,
    MATH500,
    MBPP,
    write_data,
    write_jsonl,
)

from d2f.errors import ConfigError
from d2f.evaluation.harness import FEWSHOT_SEED, load_harness_task
from d2f.evaluation.harness_source import (
    DEFINITIONS,
    find_lm_eval,
    quiet,
    read_definitions,
)
from d2f.evaluation.tasks import load_task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def lm_eval_task(name, data, cache, num_fewshot=None):
    """lm-eval's own task object on the same files, through the data sets' own reader of JSON."""
    [definition] = read_definitions(name)
    files = {
        "gsm8k": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
        "gsm8k_cot": {"test": "gsm8k/test.jsonl"},
        "minerva_math500": {"test": "math/math500.jsonl"},
    }[name]
    definition |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(data / file) for split, file in files.items()},
            "cache_dir": str(cache),
        },
    }
    if num_fewshot is not None:
        definition["num_fewshot"] = num_fewshot
    with quiet():
        from lm_eval.api.task import ConfigurableTask

        task = ConfigurableTask(config=definition)
    task.set_fewshot_seed(1234)
    return task


def render(messages, add_generation_prompt=True):
    assert add_generation_prompt
    return json.dumps(messages)


TEXTS = {
    "gsm8k": [
        " 3-1=<<3-1=2>>2\n#### 2",
        " So she has 2 left",
        "#### 1,000.\n\nQuestion: And 7?",
        "It costs $1,000.00",
        "#### -5",
        "nothing at all",
        "",
        "####",
        "٣ ½ ²²",
    ],
    "minerva_math500": [
        "It is $\\boxed{2}$.",
        "Final Answer: The final answer is $2$. I hope it is correct.",
        "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.",
        "\\boxed{0.5}",
        "2",
        "",
        "\\boxed{",
        "$\\boxed{\\frac{}{}}$",
    ],
}
TEXTS["gsm8k_cot"] = [*TEXTS["gsm8k"], " 3-1 is 2. The answer is 2.", "The answer is 1,000."]


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_cot", "minerva_math500"])
def test_prompts_and_scores_are_those_of_lm_eval(name, data, tmp_path, capsys):
    task = load_harness_task(name, data=data)
    theirs = lm_eval_task(name, data, tmp_path)
    with quiet():
        theirs.build_all_requests()
    prompts = [instance.args[0] for instance in theirs.instances]
    assert [example.prompt for example in task.examples()] == prompts
    assert list(task.stop) == theirs.instances[0].args[1]["until"]
    scores = []
    for text in TEXTS[name]:
        for instance in theirs.instances:
            instance.resps, instance.filtered_resps = [text.split(task.stop[0])[0]], {}
        with quiet():
            theirs.apply_filters()
        scores += [
            {
                f"{metric},{key}": value
                for key, answer in instance.filtered_resps.items()
                for metric, value in theirs.process_results(instance.doc, [answer]).items()
            }
            for instance in theirs.instances
        ]
    examples = task.examples()
    ours = task.judge(list(examples) * len(TEXTS[name]), [t for t in TEXTS[name] for _ in examples])
    assert [dict(verdict.metrics) for verdict in ours] == scores
    first = next(iter(ours[0].metrics))
    assert first == {"minerva_math500": "math_verify,none"}.get(
        name, "exact_match,flexible-extract"
    )
    assert [verdict.correct for verdict in ours] == [score[first] == 1 for score in scores]
    assert 0 < sum(verdict.correct for verdict in ours) < len(ours)
    for metric in scores[0]:
        assert 0 < sum(score[metric] for score in scores) < len(ours)
    capsys.readouterr()  # lm-eval's bars


@pytest.mark.parametrize("name", ["gsm8k", "gsm8k_cot", "minerva_math500"])
def test_conversations_are_those_of_lm_eval(name, data, tmp_path, capsys):
    task = load_harness_task(name, data=data, num_fewshot=3)
    theirs = lm_eval_task(name, data, tmp_path, num_fewshot=3)
    with quiet():
        theirs.build_all_requests(
            apply_chat_template=True, fewshot_as_multiturn=True, chat_template=render
        )
    rendered = [instance.args[0] for instance in theirs.instances]
    assert [json.dumps(example.messages) for example in task.examples()] == rendered
    roles = [message["role"] for message in task.examples()[0].messages]
    assert roles == ["user", "assistant"] * 3 + ["user"]
    capsys.readouterr()


def test_few_shot_examples_can_be_set(data):
    assert load_harness_task("gsm8k", data=data).num_fewshot == 5
    plain = load_harness_task("gsm8k", data=data, num_fewshot=0)
    assert plain.examples()[0].prompt == f"Question: {GSM8K_TEST[0]['question']}\nAnswer:"
    two = load_harness_task("gsm8k", data=data, num_fewshot=2)
    prompts = [example.prompt for example in two.examples()]
    assert [prompt.count("Question:") for prompt in prompts] == [3, 3, 3]
    again = load_harness_task("gsm8k", data=data, num_fewshot=2, num_examples=2)
    assert [example.prompt for example in again.examples()] == prompts[:2]
    # Each problem draws anew, always from the training problems.
    starts = [prompt.split("\n\n")[0] for prompt in prompts]
    assert len(set(starts)) > 1
    assert all(any(row["question"] in start for row in GSM8K_TRAIN) for start in starts)


def test_a_prompt_without_examples_needs_no_training_file(tmp_path):
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", GSM8K_TEST)
    assert len(load_harness_task("gsm8k", data=tmp_path, num_fewshot=0).examples()) == 3
    assert len(load_harness_task("gsm8k_cot", data=tmp_path).examples()) == 3
    with pytest.raises(ConfigError, match=r"has no gsm8k/train\.jsonl"):
        load_harness_task("gsm8k", data=tmp_path)


@pytest.mark.parametrize(
    ("name", "num_fewshot", "message"),
    [
        ("gsm8k", 13, "num_fewshot 13: the task gsm8k has 12 examples"),
        ("gsm8k_cot", 9, "num_fewshot 9: the task gsm8k_cot has 8 examples"),
        ("minerva_math500", 5, "the task minerva_math500 has 4 examples"),
        ("mbpp", 4, "the task mbpp has 3 examples"),
        ("humaneval", 1, "humaneval has no examples for its prompt"),
    ],
)
def test_too_many_examples_are_refused(data, name, num_fewshot, message):
    with pytest.raises(ConfigError, match=message):
        load_harness_task(name, data=data, num_fewshot=num_fewshot)


def test_validation_problems_are_others_and_never_their_own_example(data):
    tests = {example.response for example in load_harness_task("gsm8k", data=data).examples()}
    task = load_harness_task("gsm8k", data=data, split="validation", num_fewshot=11)
    assert len(task.examples()) == len(GSM8K_TRAIN)
    for example in task.examples():
        assert example.response not in tests
        assert example.prompt.count(example.source[1]["question"]) == 1
    with pytest.raises(ConfigError, match="has 11 examples"):
        load_harness_task("gsm8k", data=data, split="validation", num_fewshot=12)
    mbpp = load_harness_task("mbpp", data=data, split="validation").examples()
    assert [example.id for example in mbpp] == ["511", "600"]
    for name in ("humaneval", "minerva_math500"):
        with pytest.raises(ConfigError, match=f"{name} has no validation problems"):
            load_task(name, data=data, split="validation")


def test_all_of_math_is_read_from_one_file(tmp_path):
    write_jsonl(tmp_path / "math" / "test.jsonl", MATH500)
    task = load_harness_task("minerva_math", data=tmp_path, num_examples=5)
    assert [example.id for example in task.examples()] == ["0", "1"]
    assert task.num_fewshot == 4
    assert [v.correct for v in task.judge(task.examples(), ["\\boxed{2}", "3"])] == [True, False]


def test_a_group_from_the_hub_is_all_its_parts(monkeypatch):
    """The hub is a stand-in that holds two problems of each subject."""
    import datasets

    asked = []

    def load_dataset(path, name):
        asked.append((path, name))
        rows = [
            {"problem": f"{name} {n}?", "solution": f"$\\boxed{{{len(asked)}{n}}}$"} for n in (1, 2)
        ]
        return {split: datasets.Dataset.from_list(rows) for split in ("train", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("minerva_math", num_examples=13)
    assert [name for _, name in asked] == [
        "algebra", "counting_and_probability", "geometry", "intermediate_algebra",
        "number_theory", "prealgebra", "precalculus",
    ]  # fmt: skip
    assert {path for path, _ in asked} == {"EleutherAI/hendrycks_math"}
    examples = task.examples()
    assert [example.id for example in examples] == [str(number) for number in range(13)]
    assert examples[12].prompt.endswith("Problem:\nprecalculus 1?\n\nSolution:")
    assert examples[3].prompt.count("Problem:") == 5
    mixed = [examples[12], examples[0], examples[3]]
    texts = ["\\boxed{71}", "\\boxed{71}", "\\boxed{22}"]
    verdicts = task.judge(mixed, texts)
    assert [verdict.correct for verdict in verdicts] == [True, False, True]


def test_gold_answers_are_right(data):
    for name in ("gsm8k", "gsm8k_cot", "humaneval", "mbpp"):
        task = load_harness_task(name, data=data)
        golds = [example.response for example in task.examples()]
        assert all(verdict.correct for verdict in task.judge(task.examples(), golds)), name


def test_a_solution_without_an_answer_is_named(tmp_path):
    rows = [*MATH500, MATH500[0] | {"solution": "It is 2."}]
    file = write_jsonl(tmp_path / "math500.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        load_harness_task("minerva_math500", data=tmp_path)
    assert str(caught.value).startswith(f"{file}:3: lm-eval's task minerva_math500 cannot use")


def passes(program):
    """What the hub's code_eval does, for programs that are known to be harmless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(program, {})
    except Exception:
        return 0.0
    return 1.0


def test_mbpp_is_scored_like_lm_eval(data):
    task = load_harness_task("mbpp", data=data)
    example = task.examples()[0]
    row = MBPP[3]
    assert task.stop == ("[DONE]",)
    assert example.prompt.endswith("\n".join(row["test_list"]) + "\n[BEGIN]\n")
    assert example.prompt.count("[DONE]") == 3
    assert example.messages[-1]["content"].startswith("You are an expert Python programmer")
    texts = [row["code"], "def add(x):\n  return x", "def add(x)", "", f"{row['code']}\n[DONE] x"]
    programs = ["\n".join([text.split("[DONE]")[0], *row["test_list"]]) for text in texts]
    expected = [passes(program) for program in programs]
    verdicts = task.judge([example] * len(texts), texts)
    assert [dict(verdict.metrics) for verdict in verdicts] == [
        {"pass@1": value, "pass_at_1,none": value} for value in expected
    ]
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False, True]
    assert verdicts[0].reason is None
    assert "AssertionError" in verdicts[1].reason
    assert verdicts[1].answer == texts[1]


def test_mbpp_answers_of_all_forms_count(data):
    task = load_harness_task("mbpp", data=data)
    example, code = task.examples()[0], MBPP[3]["code"].replace("\r\n", "\n")
    texts = [f"Here:\n```python\n{code}\nprint(add(input()))\n```\n", "```\ndef add(x): pass\n```"]
    verdicts = task.judge([example] * 2, texts)
    assert [dict(verdict.metrics) for verdict in verdicts] == [
        {"pass@1": value, "pass_at_1,none": 0.0} for value in (1.0, 0.0)
    ]
    paper = load_harness_task("mbpp", data=data, clean_up="paper").judge([example], texts[:1])
    assert dict(paper[0].metrics) == {"pass_at_1,none": 0.0}


def test_mbpp_tests_get_what_the_problem_sets_up(tmp_path):
    node = "class Node:\n  def __init__(self, x):\n    self.x = x\ndef get(node):\n  return node.x"
    row = MBPP[3] | {
        "code": node,
        "test_setup_code": "root = Node(3)",
        "test_list": ["assert get(root) == 3"] * 3,
    }
    write_jsonl(tmp_path / "mbpp.jsonl", [row])
    task = load_harness_task("mbpp", data=tmp_path, num_fewshot=0)
    [verdict] = task.judge(task.examples(), [node])
    assert dict(verdict.metrics) == {"pass@1": 1.0, "pass_at_1,none": 0.0}


@pytest.mark.parametrize(
    ("text", "ours", "paper"),
    [
        ("```python\ndef double(x):\n    return 2 * x\n```", True, True),
        ("    return 2 * x\n", True, True),
        ("```py\ndef double(x):\n    return 2 * x\n```", True, False),
        (
            "```python\nprint(double(1))\n```\n```python\ndef double(x):\n    return 2 * x\n```",
            True,
            False,
        ),
        (
            "```python\ndef double(x):\n    return 2 * x\ndef double(x):\n    return x\n```",
            False,
            True,
        ),
    ],
)
def test_humaneval_is_cleaned_up_as_in_the_paper_on_demand(data, text, ours, paper):
    for clean_up, right in (("ours", ours), ("paper", paper)):
        task = load_harness_task("humaneval", data=data, clean_up=clean_up)
        [verdict] = task.judge(task.examples()[:1], [text])
        assert verdict.correct == right, clean_up
        assert list(verdict.metrics) == ["pass@1", "pass@1,create_test"]


@pytest.mark.parametrize(
    ("text", "official", "cleaned"),
    [
        ("    return 2 * x\n", True, True),
        ("    return x + x\n\nprint(double(", True, True),
        ("    return x\n", False, False),
        ("    return 2 * x\n\ndef main():\n    broken(", True, True),
        ("Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", False, True),
        ("```python\n    return 2 * x\n```", False, True),
        ("```\ndef double(x):\n    return 3 * x\n```", False, False),
        ("\ndef double(x):\n    return 2 * x\n", False, True),
        ("", False, False),
        ("    import sys\n    sys.exit(0)\n", False, False),
    ],
)
def test_humaneval_is_scored_like_lm_eval_and_cleaned_up(data, text, official, cleaned):
    task = load_harness_task("humaneval", data=data)
    [verdict] = task.judge(task.examples()[:1], [text])
    assert verdict.metrics == {"pass@1": float(cleaned), "pass@1,create_test": float(official)}
    assert next(iter(verdict.metrics)) == "pass@1"
    assert verdict.correct == cleaned
    assert (verdict.reason is None) == cleaned
    stop = min((text.find(s) for s in ("\ndef", "\nprint") if s in text), default=len(text))
    row = HUMANEVAL[0]
    program = f"{row['prompt']}{text[:stop]}\n{row['test']}\ncheck({row['entry_point']})"
    if "sys.exit" not in text:
        assert passes(program) == official


def test_humaneval_prompts(data):
    task = load_harness_task("humaneval", data=data)
    assert [example.prompt for example in task.examples()] == [row["prompt"] for row in HUMANEVAL]
    assert [example.id for example in task.examples()] == ["Own/0", "Own/1"]
    assert task.examples()[0].messages == ({"role": "user", "content": HUMANEVAL[0]["prompt"]},)
    assert task.stop == ()
    assert task.num_fewshot == 0


def test_modules_are_left_as_they_were(data):
    before = {name: sys.modules.get(name) for name in ("evaluate", "lm_eval.tasks.mbpp.utils")}
    load_harness_task("mbpp", data=data)
    assert {name: sys.modules.get(name) for name in before} == before


def test_every_definition_is_in_lm_eval():
    folder = find_lm_eval("gsm8k") / "tasks"
    assert [f for files in DEFINITIONS.values() for f in files if not (folder / f).is_file()] == []
    assert FEWSHOT_SEED == 1234


def test_another_lm_eval_or_none_is_refused(monkeypatch, data):
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.99")
    with pytest.raises(ConfigError, match=r"from lm-eval 0\.4\.13, but 0\.4\.99 is installed"):
        load_task("gsm8k", data=data)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'd2f\[eval\]'"):
        load_task("gsm8k", data=data)


def test_missing_packages_for_math_are_named(monkeypatch, data):
    sys.modules.pop("lm_eval.tasks.minerva_math.utils", None)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"needs sympy, math_verify and antlr4.*d2f\[eval\]"):
        load_task("minerva_math500", data=data)


def test_without_data_and_network_the_hub_is_asked_in_vain(monkeypatch, tmp_path):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(ConfigError) as caught:
        load_task("gsm8k", offline=True)
    assert "the hub's local cache has no data set openai/gsm8k of the task gsm8k" in str(
        caught.value
    )
    assert "name a folder of the public files as data" in str(caught.value)
    assert before == huggingface_hub.constants.HF_HUB_OFFLINE


def test_what_the_hub_says_is_passed_on(monkeypatch):
    import datasets

    def refuse(*_args, **_kwargs):
        raise ConnectionError("no route to host.\nTry later")

    with quiet():
        monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConfigError, match=r"the hub does not give .* gsm8k: no route to host\. Ch"):
        load_task("gsm8k")

"""Rows without early stop, prompts that begin with BOS, and counts with the tail: from recipe to
report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from benchmarks.paper.methods import tables_beside_paper
from tests.unit.evaluation.eval_stand_ins import ENVIRONMENT, Letters, Loader, make_recipe
from tests.unit.evaluation.fake_results import fake_summary, write_row

from d2f.errors import ConfigError
from d2f.evaluation.eval_row import EvalRow
from d2f.evaluation.eval_run import Evaluation
from d2f.evaluation.report.document import build_report, markdown
from d2f.evaluation.report.reading import load_results
from d2f.testing.written import EOS_TOKEN
from d2f.text import Tokenizer

LM_EVAL_STOPS = {
    "gsm8k": ("Question:", "</s>", "<|im_end|>"),
    "gsm8k_cot": ("Q:", "</s>", "<|im_end|>"),
    "minerva_math": ("Problem:",),
    "humaneval": ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    "mbpp": ("[DONE]",),
}
ROWS = """
task = "gsm8k_cot"
output = "{output}"
family = "Dream-tiny"
max_new_tokens = 16

[score]
num_problems = 2
batch_size = 3

[models.student]
path = "student"

[[rows]]
name = "vanilla"
model = "student"
strategy = "vanilla"
early_stop = false
options = {{num_steps = 12, block_length = 8}}

[[rows]]
name = "dllm-cache"
model = "student"
strategy = "dllm-cache"
early_stop = false
options = {{num_steps = 16, block_length = 8}}

[[rows]]
name = "fast-dllm-dual"
model = "student"
strategy = "dual-cache"
early_stop = false
options = {{block_length = 8}}

[[rows]]
name = "pipelined"
model = "student"
strategy = "pipelined"
policy = {{block_size = 8}}

[[rows]]
name = "pipelined-whole"
method = "pipelined"
model = "student"
strategy = "pipelined"
early_stop = false
policy = {{block_size = 8}}
"""
FORWARDS = {"vanilla": 12, "dllm-cache": 16}


class NoEnd(Loader):
    """Models that never end by themselves."""

    def __call__(self, name):
        loaded = super().__call__(name)
        loaded.model.spec = replace(loaded.model.spec, eos_token_ids=())
        return loaded


def evaluate(folder, stop, *overrides, **keywords):
    folder.mkdir(exist_ok=True)
    recipe = make_recipe(folder, *overrides, text=ROWS, speed=True)
    task = Letters(2, stop=stop)
    loader = NoEnd(folder / "tokenizer")
    return Evaluation(recipe, task, loader, ENVIRONMENT, recipe_file="recipe.toml", **keywords)


def lines(folder, row, name="problems.jsonl"):
    path = folder / "out" / row / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results without stop strings, and with one that every answer holds."""
    plain, stopped = (tmp_path_factory.mktemp(name) for name in ("plain", "stopped"))
    evaluate(plain, (), "speed.num_runs=1").run()
    texts = [line["text"] for row in FORWARDS for line in lines(plain, row)]
    texts += [line["text"] for line in lines(plain, "fast-dllm-dual") + lines(plain, "pipelined")]
    # Any character that an answer has near its begin; those of lm-eval beside them.
    stops = tuple({text[2] for text in texts})
    summaries = evaluate(stopped, stops + sum(LM_EVAL_STOPS.values(), ())).run()
    return plain, stopped, {summary["row"]: summary for summary in summaries}


def test_stop_strings_leave_the_work_of_fixed_rows_as_it_is(measured):
    plain, stopped, _ = measured
    for row in ("vanilla", "dllm-cache", "fast-dllm-dual", "pipelined-whole"):
        for name in ("problems.jsonl", "speed.jsonl"):
            before = {line["index"]: line for line in lines(plain, row, name)}
            for line in lines(stopped, row, name):
                other = before[line["index"]]
                for key in ("num_forwards", "num_query_tokens", "num_decoded_tokens"):
                    assert line[key] == other[key]
                assert line["num_forwards"] == FORWARDS.get(row, line["num_forwards"])
                assert line["num_tokens"] < line["num_decoded_tokens"] == 16
        assert {line["finish_reason"] for line in lines(stopped, row)} == {"stop"}


def test_a_row_that_stops_early_gives_the_same_answers_for_less(measured):
    _, stopped, summaries = measured
    early, whole = (
        {line["index"]: line for line in lines(stopped, row)}
        for row in ("pipelined", "pipelined-whole")
    )
    assert all(early[index]["token_ids"] == whole[index]["token_ids"] for index in whole)
    assert (
        summaries["pipelined"]["score"]["num_forwards"]
        < summaries["pipelined-whole"]["score"]["num_forwards"]
    )


@pytest.mark.parametrize("task", LM_EVAL_STOPS)
def test_vanilla_runs_all_steps_beside_the_stops_of_lm_eval(tmp_path, task):
    evaluation = evaluate(tmp_path, LM_EVAL_STOPS[task], "speed.num_runs=1", rows=["vanilla"])
    [summary] = evaluation.run()
    assert summary["score"]["num_forwards"] == 12 * 2
    assert {line["num_forwards"] for line in lines(tmp_path, "vanilla", "speed.jsonl")} == {12}


def test_results_of_rows_that_stops_once_ended_are_not_mixed_with_new_ones(tmp_path):
    evaluate(tmp_path, ("x",), rows=["vanilla"]).run()
    file = tmp_path / "out/vanilla/settings.json"
    old = json.loads(file.read_text())
    del old["answers"]["decodes_behind_stops"], old["answers"]["add_bos"]
    file.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="decodes_behind_stops"):
        evaluate(tmp_path, ("x",), rows=["vanilla"])


# ------------------------------------------------------------------------------------------ tails


def test_a_summary_tells_speeds_with_the_tail_beside_those_of_answers(measured):
    _, stopped, summaries = measured
    for row, summary in summaries.items():
        for part in ("score", "speed"):
            counts, tails = summary[part], summary[part]["with_tail"]
            known = lines(stopped, row, "problems.jsonl" if part == "score" else "speed.jsonl")
            decoded = sum(line["num_decoded_tokens"] for line in known)
            forwards = sum(line["num_forwards"] for line in known)
            assert tails["mean_tokens"] == pytest.approx(decoded / len(known))
            assert tails["tokens_per_forward"] == pytest.approx(decoded / forwards)
            assert counts["mean_tokens"] < tails["mean_tokens"]
        speed = summary["speed"]
        ends = ("median", "lowest", "highest")
        assert all(
            speed["with_tail"]["tokens_per_second"][end] > speed["tokens_per_second"][end]
            for end in ends
        )


def test_a_report_counts_answers_or_tails_and_says_which(measured):
    _, stopped, summaries = measured
    results = load_results([stopped / "out"])
    answers = build_report(results)
    tails = build_report(results.with_tail())
    for report, part in ((answers, None), (tails, "with_tail")):
        for line in report.tables("methods")[0].lines:
            speed = summaries[line["row"]]["speed"]
            speed = speed[part] if part else speed
            assert line["mean_tokens"] == speed["mean_tokens"]
            assert line["tokens_per_second"].median == speed["tokens_per_second"]["median"]
            assert line["tokens_per_forward"] == speed["tokens_per_forward"]
    assert all(", tails counted" in table.title for table in tails.tables("methods"))
    assert not any("tails counted" in table.title for table in answers.tables())
    assert "Tails are counted" in markdown(tails, [], "")
    assert "Tails are counted" not in markdown(answers, [], "")
    [beside] = [t for t in tables_beside_paper(results.comparisons[0]) if t.name == "paper"]
    assert any("--count-tail" in note for note in beside.notes)
    [line] = [line for line in answers.tables("reasons")[0].lines if line["row"] == "vanilla"]
    speed = summaries["vanilla"]["speed"]
    assert line["decoded_per_answered"] == pytest.approx(16 / speed["mean_tokens"])


def test_results_of_an_older_version_are_read_and_say_that_tails_are_unknown(tmp_path):
    for name in ("vanilla", "pipelined"):
        write_row(tmp_path, fake_summary(name))
    results = load_results([tmp_path])
    assert not results.warnings
    assert build_report(results).tables("methods")[0].lines[0]["mean_tokens"] == 50
    tails = results.with_tail()
    assert len(tails.warnings) == 2
    for line in build_report(tails).tables("methods")[0].lines:
        assert line["tokens_per_second"] is line["mean_tokens"] is None
        assert line["score"] == 90


@pytest.mark.parametrize(
    "wrong", [{"with_tail": 5}, {"with_tail": {"mean_tokens": "5"}},
              {"with_tail": {"tokens_per_second": 5}}],
)  # fmt: skip
def test_broken_tails_are_refused(tmp_path, wrong):
    summary = fake_summary("vanilla")
    write_row(tmp_path, summary | {"speed": summary["speed"] | wrong})
    with pytest.raises(ConfigError, match="with_tail"):
        load_results([tmp_path])


# -------------------------------------------------------------------------------------------- BOS


def add_bos_token(folder):
    """Let the tokenizer of a folder have a BOS, which it does not add by itself."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": EOS_TOKEN}))
    return Tokenizer.load(folder)


def test_a_recipe_says_whether_prompts_begin_with_bos(tmp_path):
    loader, found = Loader(tmp_path / "tokenizer"), {}
    tokenizer = loader.tokenizer = add_bos_token(tmp_path / "tokenizer")
    for name, overrides in {
        "rule": (), "on": ("models.student.add_bos=true",), "off": ("models.student.add_bos=false",)
    }.items():  # fmt: skip
        recipe = make_recipe(tmp_path, *overrides, text=ROWS).selected(["vanilla"])
        row = EvalRow(recipe.rows[0], recipe, Letters(1), Letters(1).examples(), loader("student"))
        found[name] = row.request(0).prompt_ids
        assert row.describe()["add_bos"] is {"rule": None, "on": True, "off": False}[name]
    assert found["on"] == [tokenizer.bos_token_id, *found["off"]]
    assert found["rule"] == tokenizer.encode_prompt("Say 0, then stop.")


def test_a_tokenizer_without_bos_is_refused_by_name(tmp_path):
    loader = Loader(tmp_path / "tokenizer")
    recipe = make_recipe(tmp_path, "models.student.add_bos=true", text=ROWS)
    with pytest.raises(ConfigError, match=r"row vanilla: .*models\.student\.add_bos = false"):
        Evaluation(recipe, Letters(3), loader, ENVIRONMENT, recipe_file="recipe.toml")

"""Questions to SQL as benchmarks: files, prompts, verdicts, and a whole evaluation."""

from __future__ import annotations

import json

import pytest
from benchmarks.paper.document import build_report
from tests.unit.evaluation.eval_stand_ins import make_evaluation
from tests.unit.evaluation.harness_files import write_jsonl

from d2f.cli import train_answers
from d2f.errors import ConfigError
from d2f.evaluation.report.document import markdown
from d2f.evaluation.report.reading import load_results
from d2f.evaluation.tasks import load_task
from d2f.evaluation.text2sql import TEXT_TO_SQL
from d2f.training.sections import EvaluateConfig

ROWS = {
    "advising": [
        {"question": "Who teaches ?", "sql": 'SELECT A FROM T WHERE B = "x" AND C = 2016'},
        {"question": "When ?", "sql": "SELECT A FROM T"},
    ],
    "wikisql": [
        {
            "columns": ["year", "won (by)"],
            "question": "Who won?",
            "sql": 'SELECT "won (by)" FROM table WHERE "year" = \'1st\'',
            "table": "1-2",
        },
    ],
}
PROMPTS = {
    "advising": "Write SQL for the course database.\nWho teaches ?",
    "wikisql": "Write SQL for a table with the columns year, won (by).\nWho won?",
}


@pytest.mark.parametrize("name", TEXT_TO_SQL)
@pytest.mark.parametrize("place", ["text2sql/{}.jsonl.gz", "{}.jsonl", "text2sql/{}.jsonl"])
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_split_is_read_and_its_own_answers_are_right(tmp_path, name, place, split):
    write_jsonl(tmp_path / place.format(f"{name}.{split}"), ROWS[name])
    task = load_task(name, data=tmp_path, split=split)
    examples = task.examples()
    assert (task.name, task.stop) == (name, ())
    assert examples[0].prompt == PROMPTS[name]
    assert [example.response for example in examples] == [row["sql"] for row in ROWS[name]]
    assert all(verdict.correct for verdict in task.judge(examples, [e.response for e in examples]))
    assert len(load_task(name, data=tmp_path, split=split, num_examples=1).examples()) == 1


def test_verdicts_tell_the_first_difference(tmp_path):
    write_jsonl(tmp_path / "advising.test.jsonl", ROWS["advising"])
    task = load_task("advising", data=tmp_path)
    example = task.examples()[0]
    texts = ['select a from t where c = 2016 and b = "x"\n', example.response.replace("x", "X"), ""]
    right, wrong, empty = task.judge([example] * 3, texts)
    assert (right.correct, right.reason, right.metrics) == (True, None, {"exact_match": 1.0})
    assert wrong.reason == 'expected "x" after \'t where b =\', not "X"'
    assert wrong.metrics == {"exact_match": 0.0}
    assert empty.reason == "expected select at the start, not the end"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            r"reads text2sql/wikisql.test.jsonl \(or .gz\) from a folder; name the folder as data",
        ),
        ({"data": "."}, r"has no text2sql/wikisql.test.jsonl .*text2sql-data"),
        ({"data": "nowhere"}, "nowhere does not exist; name the folder that holds text2sql/wiki"),
        ({"data": ".", "num_fewshot": 2}, "wikisql has no few-shot prompt"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_task("wikisql", **settings)


@pytest.mark.parametrize("columns", [None, "year", [], [1], ["\ud800"]])
def test_a_row_without_columns_is_named(tmp_path, columns):
    write_jsonl(tmp_path / "wikisql.test.jsonl", [ROWS["wikisql"][0] | {"columns": columns}])
    with pytest.raises(ConfigError, match=r"jsonl:1: expected a list of at least 1 text in the co"):
        load_task("wikisql", data=tmp_path)


def test_an_evaluation_and_its_report_show_the_task(tmp_path):
    write_jsonl(tmp_path / "advising.test.jsonl", ROWS["advising"])
    task = load_task("advising", data=tmp_path)
    overrides = ('task="advising"', 'test_set="Advising"', 'max_new_tokens="gold"')
    rows = ["autoregressive", "pipelined"]
    make_evaluation(tmp_path, *overrides, task=task, rows=rows).run()
    lines = (tmp_path / "out/pipelined/problems.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {"test-0", "test-1"}
    results = load_results([tmp_path / "out"])
    report = build_report(results)
    text = markdown(report, (), "d2f report out")
    assert "tiny on Advising" in text
    claims = {line["key"]: line for line in report.tables("claims")[0].lines}
    # Of the paper's claims, not those on mathematics or programs.
    assert claims["autoregressive"]["number"] == "no rows"
    assert claims["score"]["number"] != "no rows"


@pytest.mark.parametrize(
    ("name", "split"),
    [("advising", "validation"), ("gsm8k-variants", "validation"), ("gsm8k", "test")],
)
def test_training_looks_at_no_test_problems_where_there_are_others(monkeypatch, name, split):
    asked = []
    monkeypatch.setattr(train_answers, "load_task", lambda name, **settings: asked.append(settings))
    train_answers._load_task(EvaluateConfig(every=1, task=name))
    assert asked[0]["split"] == split

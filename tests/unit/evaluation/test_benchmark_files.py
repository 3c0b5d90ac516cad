"""Files of a data folder, whole and broken."""

from __future__ import annotations

import gzip
import json

import pytest
from tests.unit.evaluation.harness_files import (
    GSM8K_TEST,
    HUMANEVAL,
    MATH500,
    MBPP,
    write_data,
    write_jsonl,
)

from d2f.errors import ConfigError
from d2f.evaluation.benchmark_files import read_split


def test_rows_keep_the_columns_of_the_task_and_their_place(tmp_path):
    write_data(tmp_path)
    file = tmp_path / "gsm8k" / "test.jsonl"
    expected = [(f"{file}:{number}", row) for number, row in enumerate(GSM8K_TEST, 1)]
    assert read_split("gsm8k", "test", tmp_path) == expected
    assert read_split("gsm8k_cot", "test", str(tmp_path)) == expected
    assert [row for _, row in read_split("humaneval", "test", tmp_path)] == HUMANEVAL
    assert [row for _, row in read_split("minerva_math500", "test", tmp_path)] == [
        {name: row[name] for name in ("problem", "solution")} for row in MATH500
    ]


def test_mbpp_is_cut_by_task_id(tmp_path):
    write_data(tmp_path)

    def ids(split):
        return [row["task_id"] for _, row in read_split("mbpp", split, tmp_path)]

    assert ids("prompt") == [1, 2, 10]
    assert ids("test") == [11, 12, 510]
    assert ids("validation") == [511, 600]
    assert ids("train") == [601]


@pytest.mark.parametrize("name", ["test.jsonl", "test.jsonl.gz", "gsm8k/test.jsonl.gz"])
def test_files_are_found_zipped_and_in_the_folder_itself(tmp_path, name):
    write_jsonl(tmp_path / name, GSM8K_TEST)
    assert len(read_split("gsm8k", "test", tmp_path)) == 3


def test_blank_lines_and_separators_inside_texts_do_no_harm(tmp_path):
    row = {"question": "a\u2028b", "answer": "#### 1"}
    text = "\n" + json.dumps(row, ensure_ascii=False) + "\r\n\n"
    (tmp_path / "test.jsonl").write_bytes(text.encode())
    assert read_split("gsm8k", "test", tmp_path) == [(f"{tmp_path / 'test.jsonl'}:2", row)]


def test_other_columns_are_kept_only_where_they_serve(tmp_path):
    write_jsonl(tmp_path / "math500.jsonl", [row | {"unique_id": "test/1"} for row in MATH500])
    [(_, first), _] = read_split("minerva_math500", "test", tmp_path)
    assert first == {
        "problem": MATH500[0]["problem"],
        "solution": MATH500[0]["solution"],
        "unique_id": "test/1",
    }


@pytest.mark.parametrize("task", ["gsm8k", "minerva_math", "minerva_math500", "humaneval", "mbpp"])
def test_a_folder_without_the_file_is_refused_with_its_name(tmp_path, task):
    expected = {
        "gsm8k": "gsm8k/test.jsonl",
        "minerva_math": "math/test.jsonl",
        "minerva_math500": "math/math500.jsonl",
        "humaneval": "humaneval/HumanEval.jsonl",
        "mbpp": "mbpp/mbpp.jsonl",
    }[task]
    with pytest.raises(ConfigError) as caught:
        read_split(task, "test", tmp_path)
    assert expected in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert ("minerva_math500" in str(caught.value)) == task.startswith("minerva_math")


def test_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist; name the folder that holds gsm"):
        read_split("gsm8k", "test", tmp_path / "nowhere")
    file = write_jsonl(tmp_path / "test.jsonl", GSM8K_TEST)
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        read_split("gsm8k", "test", file)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "a", "answer"', ":2: not valid JSON: "),
        (b'\xff{"question": 1}', ":2: not valid JSON: "),
        (b"[" * 100_000, ":2: not valid JSON: "),
        (b'["a", "b"]', ":2: expected a JSON object, not list"),
        (b'{"question": "a"}', ":2: expected a text in the column 'answer'; the row has question"),
        (b'{"question": 5, "answer": "5"}', ":2: expected a text in the column 'question'"),
        (b'{"question": "\\ud800", "answer": "5"}', ":2: the column 'question' holds '"),
        (b"{}", ":2: expected a text in the column 'question'; the row has no columns"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "test.jsonl"
    file.write_bytes(json.dumps(GSM8K_TEST[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(ConfigError) as caught:
        read_split("gsm8k", "test", tmp_path)
    assert f"{file}{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_id": "11"}, "a whole number in the column 'task_id'"),
        ({"task_id": None}, "a whole number in the column 'task_id'"),
        ({"test_list": ["assert 1"]}, "a list of at least 3 texts in the column 'test_list'"),
        ({"test_list": [1, 2, 3]}, "a list of at least 3 texts in the column 'test_list'"),
    ],
)
def test_a_bad_row_of_mbpp_is_named(tmp_path, change, message):
    file = write_jsonl(tmp_path / "mbpp.jsonl", [*MBPP[:4], MBPP[4] | change])
    with pytest.raises(ConfigError) as caught:
        read_split("mbpp", "test", tmp_path)
    assert str(caught.value).startswith(f"{file}:5: expected {message}")


def test_files_without_rows_of_the_split_are_refused(tmp_path):
    (tmp_path / "test.jsonl").write_text("\n\n")
    with pytest.raises(ConfigError, match=r"test\.jsonl holds no rows"):
        read_split("gsm8k", "test", tmp_path)
    write_jsonl(tmp_path / "mbpp.jsonl", MBPP[:3])
    with pytest.raises(ConfigError, match="split 'test' of mbpp: no task_id from 11 to 510"):
        read_split("mbpp", "test", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "plain", "flipped"])
def test_a_broken_archive_is_named(tmp_path, damage):
    file = tmp_path / "HumanEval.jsonl.gz"
    whole = bytearray(gzip.compress("".join(json.dumps(r) + "\n" for r in HUMANEVAL).encode()))
    if damage == "cut":
        whole = whole[:-20]
    elif damage == "plain":
        whole = bytearray(b'{"task_id": "Own/0"}\n')
    else:
        whole[40] ^= 0xFF
    file.write_bytes(whole)
    # Damage may turn up as bad data or as text that is no JSON.
    with pytest.raises(ConfigError, match=r"HumanEval\.jsonl\.gz(:1: not valid| is broken after)"):
        read_split("humaneval", "test", tmp_path)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "test.jsonl", GSM8K_TEST)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match=r"cannot read .*test\.jsonl: Permission denied"):
        read_split("gsm8k", "test", tmp_path)

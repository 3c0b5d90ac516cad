"""The file of answers: whatever became of it, a run that goes on makes it whole."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f.cli.answer_file import AnswerFile
from d2f.errors import ConfigError, D2FError

SETTINGS = {"seed": 0}
COUNTS = {"num_tokens": 2, "num_forwards": 1, "finish_reason": "eos"}
RECORDS = [
    {"text": "é" * row, "row": row, "sample": sample, **COUNTS}
    for row in (1, 2, 5)
    for sample in (0, 1)
]
STRANGE = [
    json.dumps({**RECORDS[0], **change}).encode() + b"\n"
    for change in ({"row": 10**13}, {"row": -1}, {"row": True}, {"row": 1.0}, {"sample": 2})
]
"""Lines with row and sample that no run writes."""
WHOLE = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def complete(path):
    """What a run does that finds the file as it is; how many answers it gave."""
    answers = AnswerFile(path, SETTINGS, num_samples=2)
    answers.begin({"dtype": "float32"})
    missing = [record for record in RECORDS if not answers.has(record["row"], record["sample"])]
    answers.add(missing[1:])
    answers.add(missing[:1])
    answers.finish()
    answers.close()
    assert answers.totals.answers == len(RECORDS)
    assert answers.totals.tokens == 2 * len(RECORDS)
    return len(missing)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    assert complete(path) == len(RECORDS)
    return path


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    cut=st.integers(0, len(WHOLE)),
    junk=st.sampled_from([b"", b"\0\0\n", b"[1]\n", b'{"row": 1}\n', b'{"row": "a"}\n', *STRANGE]),
)
def test_a_file_of_any_order_cut_anywhere_is_made_whole(path, seed, cut, junk):
    lines = WHOLE.splitlines(keepends=True)
    random.Random(seed).shuffle(lines)
    kept = b"".join(lines)[:cut]
    doubled = kept if kept.endswith(b"\n") and seed % 2 else b""
    path.write_bytes(junk + doubled + kept)
    num_whole = kept.count(b"\n")
    assert complete(path) == len(RECORDS) - num_whole
    assert path.read_bytes() == WHOLE
    assert complete(path) == 0


def test_one_run_at_a_time(path):
    path.write_bytes(WHOLE)
    first = AnswerFile(path, SETTINGS, num_samples=2)
    assert first.about == {"dtype": "float32"}
    with pytest.raises(ConfigError, match="another d2f generate writes to"):
        AnswerFile(path, SETTINGS, num_samples=2)
    first.close()
    AnswerFile(path, SETTINGS, num_samples=2).close()


def test_without_room_for_the_order_all_answers_stay(path, monkeypatch):
    lines = WHOLE.splitlines(keepends=True)
    path.write_bytes(b"".join(reversed(lines)))
    answers = AnswerFile(path, SETTINGS, num_samples=2)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(D2FError, match="all answers are in it; make room, and give the same"):
        answers.finish()
    answers.close()
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert not path.with_name(path.name + ".part").exists()


def test_a_link_stays_one(path, tmp_path):
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    path.write_bytes(b"".join(reversed(WHOLE.splitlines(keepends=True))))
    complete(link)
    assert link.is_symlink()
    assert path.read_bytes() == WHOLE


def test_without_room_for_the_settings_one_line_says_so(tmp_path, monkeypatch):
    answers = AnswerFile(tmp_path / "new.jsonl", SETTINGS)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(D2FError, match=r"cannot write .*settings: full"):
        answers.begin({})
    answers.close()

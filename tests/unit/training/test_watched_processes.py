"""Evaluation, confidence and the best model with two processes, as copies and in shards."""

from tests.unit.training.parallel_runs import finish, start
from tests.unit.training.test_evaluations import files

assert files  # the fixture


def test_two_processes_are_watched_as_one_is(files):
    results = finish(start(2, files, module="tests.unit.training.watched_runs"))
    assert {code for code, _ in results} == {0}, "".join(text for _, text in results)

"""Batches leave captured steps to the next one, which fit it and do not pile up."""

import copy
import types
from types import SimpleNamespace

import pytest
import torch
from tests.unit.decoding.unpaged import run, sequences, summary

from d2f.decoding import workspace
from d2f.decoding.workspace import Workspace
from d2f.testing import tiny_model

CPU = torch.device("cpu")
ALL_OPTIONS = {
    "vanilla": [{}, {"algorithm": "entropy"}, {"block_length": 4}],
    "parallel": [{"threshold": 0.05}, {"threshold": 1.0}, {"factor": 2.0}],
    "prefix-cache": [{"block_length": 4}, {"block_length": 8}, {"factor": 2.0}],
    "dual-cache": [{"block_length": 4}, {"block_length": 8}, {"factor": 2.0}],
    "dllm-cache": [{"block_length": 4}, {"refresh_share": 0.5}, {"prompt_interval": 2}],
}


class Replaying(Workspace):
    """Runs again what the first batch of a shape left, as a graph does."""

    num_replays = 0

    def __init__(self):
        super().__init__(CPU, pads=True)
        self._use_graphs = True

    def _captured(self, step):
        if isinstance(step, types.MethodType):
            # What the batch does with itself later must not matter.
            step = types.MethodType(step.__func__, copy.copy(step.__self__))

        def replay():
            self.num_replays += 1
            step()

        return SimpleNamespace(replay=replay)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)


@pytest.mark.parametrize("kept", [3, 256])
@pytest.mark.parametrize("strategy", list(ALL_OPTIONS))
def test_a_captured_step_serves_every_batch_of_its_key(monkeypatch, strategy, kept):
    monkeypatch.setattr(workspace, "MOST_BUFFERS", kept)
    model, replaying = tiny_model("Dream"), Replaying()
    cases = [
        (prompt, settings, options)
        for options in ALL_OPTIONS[strategy]
        for settings in ({}, {"temperature": 1.0})
        for prompt in ([1, 2, 3], [4, 5])
    ]
    for prompt, settings, options in cases * 2:
        batch = sequences([prompt], [9], eos=(7, 8), **settings)
        [expected] = run(model, strategy, batch, **options)
        [result] = run(model, strategy, batch, replaying, **options)
        assert summary(result) == summary(expected)
    assert replaying.num_replays > 12


def counted(kept):
    """Buffers that tell how often they were made, and a step that counts in them."""
    made = []

    def use(key):
        def make():
            made.append(key)
            return torch.zeros(1)

        count_1 = kept.buffers(key, make)
        kept.run(key, lambda: count_1.add_(1))
        return int(count_1)

    return made, use


def test_buffers_unused_for_longest_are_given_up_with_their_steps(monkeypatch):
    monkeypatch.setattr(workspace, "MOST_BUFFERS", 3)
    kept = Replaying()
    made, use = counted(kept)
    # The third time a captured step runs on the buffers.
    assert [use("a") for _ in range(3)] == [1, 2, 3]
    assert kept.num_graphs == 1
    pool = kept._pool
    for key in "bcabcacb":
        use(key)
    assert made == ["a", "b", "c"]
    assert use("d") == 1
    assert made == ["a", "b", "c", "d"]
    # `a` made room; a step that was captured with the former buffers would count in those.
    assert [use("a") for _ in range(3)] == [1, 2, 3]
    assert kept._pool == pool
    for key in "xyzxyz":
        use(key)
    # No graph was left in between, and a pool without any takes no more.
    assert kept._pool != pool


def test_shapes_without_end_take_no_memory_without_end(monkeypatch):
    monkeypatch.setattr(workspace, "MOST_BUFFERS", 10)
    model, kept = tiny_model("llada"), Workspace(CPU)
    for length in range(1, 30):
        run(model, "parallel", sequences([[1] * length], [2]), kept)
    assert len(kept._buffers) == 10


def test_a_batch_keeps_all_its_buffers(monkeypatch):
    monkeypatch.setattr(workspace, "MOST_BUFFERS", 1)
    kept = Workspace(CPU)
    one, other = (kept.buffers(key, lambda: torch.zeros(1)) for key in "ab")
    assert kept.buffers("a", lambda: torch.ones(1)) is one
    kept.run("step", lambda: None)
    assert kept.buffers("b", lambda: torch.ones(1)) is other
    assert kept.buffers("a", lambda: torch.ones(1)) is not one


def test_steps_unused_for_longest_are_given_up(monkeypatch):
    monkeypatch.setattr(workspace, "MOST_STEPS", 2)
    kept = Replaying()
    _, use = counted(kept)
    for key in "aabbaacca":
        use(key)
    assert kept.num_graphs == 2
    before = kept.num_replays
    use("b")
    assert kept.num_replays == before

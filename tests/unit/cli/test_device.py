"""A command chooses the number of threads to compute with."""

from __future__ import annotations

import time

import pytest
import torch

from d2f.cli.device import choose_threads


@pytest.fixture
def cores(monkeypatch):
    """A machine with a clock on which a product takes so many seconds by its number of threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)

    def build(**seconds):
        state = {"threads": max(int(name[1:]) for name in seconds), "now": 0.0}

        def clock():
            state["now"] += seconds[f"n{state['threads']}"]
            return state["now"]

        monkeypatch.setattr(torch, "get_num_threads", lambda: state["threads"])
        monkeypatch.setattr(torch, "set_num_threads", lambda count: state.update(threads=count))
        monkeypatch.setattr(time, "perf_counter", clock)
        return state

    return build


def test_the_faster_number_of_threads_is_taken(cores):
    idle, busy = {"n1": 1.0, "n2": 0.6}, {"n1": 1.0, "n2": 5.0}
    for seconds, expected in ((idle, 2), (busy, 1)):
        state = cores(**seconds)
        choose_threads(6_000_000, "cpu")
        assert state["threads"] == expected


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_who_chose_is_obeyed(cores, monkeypatch, name):
    state = cores(n1=1.0, n2=5.0)
    monkeypatch.setenv(name, "2")
    choose_threads(6_000_000, "cpu")
    assert state["threads"] == 2


@pytest.mark.parametrize(("size", "device"), [(8_000_000_000, "cpu"), (6_000_000, "cuda")])
def test_large_models_and_gpus_are_left_alone(cores, size, device):
    state = cores(n1=1.0, n2=5.0)
    choose_threads(size, device)
    assert state["threads"] == 2

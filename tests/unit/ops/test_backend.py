"""Each backend is taken where it runs, and a wrong wish is refused."""

import dataclasses
import inspect
import sys

import pytest
import torch

from d2f.errors import ConfigError
from d2f.ops import backend
from d2f.ops.backend import select_backend


@pytest.fixture
def no_triton(monkeypatch):
    """As if the package were not installed."""
    for module in [m for m in sys.modules if m.startswith("d2f.ops.triton")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delattr("d2f.ops.triton", raising=False)
    backend._triton_backend.cache_clear()
    yield
    backend._triton_backend.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU that runs the kernels."""
    monkeypatch.setattr(backend, "_runs_kernels", lambda device: device.type == "cuda")


def test_auto_on_a_cpu_is_torch():
    assert select_backend("auto", "cpu").name == "torch"
    assert select_backend("torch", torch.device("cpu")).name == "torch"


@pytest.mark.usefixtures("gpu")
def test_auto_on_a_gpu_is_triton():
    pytest.importorskip("triton")
    assert select_backend("auto", "cuda").name == "triton"
    assert select_backend("auto", "cpu").name == "torch"
    assert select_backend("torch", "cuda").name == "torch"


@pytest.mark.usefixtures("gpu", "no_triton")
def test_auto_without_triton_is_torch():
    assert select_backend("auto", "cuda").name == "torch"


@pytest.mark.usefixtures("gpu", "no_triton")
def test_missing_triton_is_named():
    with pytest.raises(ConfigError, match="install it, or choose the backend 'torch'"):
        select_backend("triton", "cuda")


def test_triton_on_a_cpu_is_refused_unless_interpreted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"device 'cpu'.*choose the backend 'torch'.*INTERPRET=1"):
        select_backend("triton", "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_backend("triton", "cpu").name == "triton"


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="unknown backend 'tritn'; did you mean 'triton'"):
        select_backend("tritn", "cpu")


def test_kernels_are_called_like_their_twins(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    twins, kernels = select_backend("torch", "cpu"), select_backend("triton", "cpu")
    for field in dataclasses.fields(twins):
        twin, kernel = getattr(twins, field.name), getattr(kernels, field.name)
        if not inspect.isfunction(twin):
            continue
        shared = inspect.signature(twin).parameters
        own = inspect.signature(kernel).parameters
        assert list(own)[: len(shared)] == list(shared), field.name
        further = list(own.values())[len(shared) :]
        assert all(p.default is not inspect.Parameter.empty for p in further), field.name

"""Steps that a GPU captures must not wait for the host, nor take anything from it."""

import pytest
import torch
from tests.unit.decoding.unpaged import sequences, start
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2f.decoding.canvas import Canvas
from d2f.decoding.strategies import ALGORITHMS
from d2f.decoding.workspace import Workspace
from d2f.testing import tiny_model

META = torch.device("meta")
FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::lift_fresh",
}
CASES = [
    *(("vanilla", {"algorithm": algorithm}) for algorithm in ALGORITHMS),
    *(
        (strategy, rule)
        for strategy in ("parallel", "prefix-cache", "dual-cache")
        for rule in ({"threshold": 0.5}, {"factor": 1.0})
    ),
]


class OnDevice(TorchDispatchMode):
    """Refuses what a capture does not bear."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in FORBIDDEN, func
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                assert value.device == META, f"{func} takes or makes a tensor on the host"
                indexed = func._schema.name == "aten::index"
                assert not (indexed and value.dtype == torch.bool), "shapes depend on data"
        return out


class Capturing(Workspace):
    """Runs each step as a capture would, once it was warmed up."""

    def __init__(self):
        super().__init__(META, pads=True)
        self.keys = []

    def run(self, key, step):
        step()
        with OnDevice():
            step()
        self.keys.append(key)


@pytest.mark.parametrize(("strategy", "options"), CASES)
def test_steps_need_no_host(monkeypatch, strategy, options):
    # Meta tensors hold nothing: what asks for a value, or for a shape that hangs on one, fails.
    model = tiny_model("Dream").to(META)
    num_rows = 3 if strategy == "vanilla" else 1
    batch = sequences(
        [[1, 2, 3]] * num_rows,
        [40] * num_rows,
        eos=(7,),
        temperature=0.7,
        top_k=5,
        top_p=0.9,
    )
    gaps = iter([1, 33, 34, 35])
    monkeypatch.setattr(
        Canvas, "report", lambda _: ([next(gaps)] * num_rows, [99] * num_rows, [True] * num_rows)
    )
    workspace = Capturing()
    running = start(model, strategy, batch, workspace, **options)
    for _ in range(4):
        running.step()
    # A full forward and a part, of the first block and of the last.
    assert len(workspace.keys) == 4
    shapes = {"prefix-cache": 3, "dual-cache": 2}
    assert len(set(workspace.keys)) == shapes.get(strategy, 1)


def test_the_check_sees_what_it_should():
    x = torch.ones(3, device=META)
    for bad in (
        lambda: x + torch.ones(3),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0]),
        x.nonzero,
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), OnDevice():
            bad()

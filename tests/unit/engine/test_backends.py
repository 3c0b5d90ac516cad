"""An engine answers the same with plain torch and with Triton's kernels."""

import random

import pytest
import torch
from tests.unit.decoding.unpaged import run, sequences, summary
from tests.unit.engine.workload import (
    cached_model,
    check_answers,
    drive,
    lane_of,
    make_engine,
    random_cases,
)

from d2f.decoding.workspace import Workspace
from d2f.ops.backend import select_backend
from d2f.testing import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["llada", "Dream", "qwen2", "qwen3"])
def test_kernels_answer_as_the_oracle(name):
    pytest.importorskip("triton")
    cases = [case for case in random_cases(name) if case.result.num_forwards <= 4][:4]
    model = cached_model(name) if DEVICE == "cpu" else tiny_model(name).to(DEVICE)
    engine = make_engine(model, 200, backend="triton", overlap=True, page_size=16, max_batch_size=4)
    # What was never written must never be read.
    lane_of(engine).decoder.cache.kv_N2SKH[:, :, 16:] = torch.nan
    outputs = drive(engine, cases, random.Random(0), burst=5)
    assert len(outputs) == len(cases)
    check_answers(outputs, cases)


UNPAGED = [
    ("vanilla", 0.8, {"num_steps": 1, "algorithm": "topk_margin"}),
    ("dual-cache", 0.0, {"block_length": 5, "factor": 6.0}),
    ("vanilla", 0.0, {"num_steps": 3, "block_length": 4}),
    ("vanilla", 0.0, {"num_steps": 4, "algorithm": "entropy"}),
    ("vanilla", 0.0, {"num_steps": 4, "algorithm": "origin"}),
    ("parallel", 0.0, {"block_length": 4, "factor": 4.0}),
    ("prefix-cache", 0.8, {"block_length": 4, "threshold": 0.5}),
    ("dual-cache", 0.8, {"block_length": 4, "threshold": 1.0}),
]


# Interpreted, kernels are slow.
@pytest.mark.parametrize(
    ("strategy", "temperature", "options"), UNPAGED if DEVICE == "cuda" else UNPAGED[:2]
)
def test_kernels_answer_as_torch_without_pages(strategy, temperature, options):
    pytest.importorskip("triton")
    model, device = tiny_model("Dream").to(DEVICE), torch.device(DEVICE)
    num_rows = 2 if strategy == "vanilla" else 1
    batch = sequences(
        [[1, 2, 3], [4]][:num_rows], [10, 9][:num_rows], temperature=temperature, top_p=0.9
    )
    kernels = Workspace(device, backend=select_backend("triton", device), pads=True)
    # Again on a GPU, to replay what was captured.
    workspaces = [kernels] * (3 if DEVICE == "cuda" else 1)
    workspaces.append(Workspace(device, backend=select_backend("torch", device), use_graphs=False))
    runs = [run(model, strategy, batch, workspace, **options) for workspace in workspaces]
    *others, expected = [[summary(answer) for answer in answers] for answers in runs]
    assert others == [expected] * len(others)

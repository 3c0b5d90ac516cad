"""An engine answers the same with plain torch and with Triton's kernels."""

import random

import pytest
import torch
from tests.unit.engine.workload import cached_model, check_answers, drive, make_engine, random_cases

from d2f.testing import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", ["llada", "Dream", "qwen2"])
def test_kernels_answer_as_the_oracle(name):
    pytest.importorskip("triton")
    cases = [case for case in random_cases(name) if case.result.num_forwards <= 4][:4]
    model = cached_model(name) if DEVICE == "cpu" else tiny_model(name).to(DEVICE)
    engine = make_engine(model, 200, backend="triton", overlap=True, page_size=16, max_batch_size=4)
    # What was never written must never be read.
    engine._paged.decoder.cache.kv_N2SKH[:, :, 16:] = torch.nan
    outputs = drive(engine, cases, random.Random(0), burst=5)
    assert len(outputs) == len(cases)
    check_answers(outputs, cases)

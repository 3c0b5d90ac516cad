import json

import pytest
import torch
from tests.unit.training.parallel_runs import CASES, case_config, finish, run_case, start

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders with the results of all cases, by the number of processes."""
    folders = {size: tmp_path_factory.mktemp(f"of-{size}") for size in (1, 2, 4)}
    for size in (2, 4):
        for code, text in finish(start(size, folders[size], *CASES)):
            assert code == 0, text
    for case in CASES:
        torch.save(run_case(case, folders[1], None), folders[1] / f"{case}.pt")
    return folders


def log_of(case, folder):
    path = f"{case_config(case, folder).output}/log.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_processes_and_micro_batches_are_interchangeable(runs, case, size):
    alone, together = (torch.load(runs[n] / f"{case}.pt") for n in (1, size))
    for one, other in zip(log_of(case, runs[1]), log_of(case, runs[size]), strict=True):
        assert one["step"] == other["step"]
        for name in ("loss", "grad_norm", "lr"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        assert one.get("loss_per_block") == pytest.approx(other.get("loss_per_block"), rel=1e-5)
    # Sums of fp32 in another order; Adam divides small gradients by themselves, so that of these
    # the order shows more.
    torch.testing.assert_close(alone, together, atol=3e-6, rtol=1e-5)

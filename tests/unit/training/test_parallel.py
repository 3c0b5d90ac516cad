import json

import pytest
import torch
from tests.unit.training.parallel_runs import CASES, case_config, finish, run_case, start

pytest.importorskip("accelerate")

FOUR = ["d2f none", "d2f full", "d2f-lora-bfloat16 full"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders with the results of all cases, by the number of processes."""
    folders = {size: tmp_path_factory.mktemp(f"of-{size}") for size in (1, 2, 4)}
    for size, cases in ((2, CASES), (4, FOUR)):
        results = finish(start(size, folders[size], *cases))
        assert {code for code, _ in results} == {0}, "".join(text for _, text in results)
    for case in CASES:
        torch.save(run_case(case, folders[1], None), folders[1] / f"{case}.pt")
    return folders


def log_of(case, folder):
    path = f"{case_config(case, folder).output}/log.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("case", "size"), [*((case, 2) for case in CASES), *((case, 4) for case in FOUR)]
)
def test_processes_and_micro_batches_are_interchangeable(runs, case, size):
    alone, together = (torch.load(runs[n] / f"{case}.pt") for n in (1, size))
    for one, other in zip(log_of(case, runs[1]), log_of(case, runs[size]), strict=True):
        assert one["step"] == other["step"]
        for name in ("loss", "grad_norm", "lr"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
        blocks = [record.get("loss_per_block") for record in (one, other)]
        assert (blocks[0] is None) == case.startswith("autoregressive")
        torch.testing.assert_close(*blocks, atol=2e-6, rtol=1e-5)
    # Sums of fp32 in another order; logits are sums of many weights.
    torch.testing.assert_close(alone["weights"], together["weights"], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(alone["sampled"], together["sampled"], atol=2e-5, rtol=1e-5)

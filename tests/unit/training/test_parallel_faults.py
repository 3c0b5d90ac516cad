import json
import signal

import pytest
import torch
from tests.unit.training.parallel_runs import (
    at_step,
    file_config,
    finish,
    start,
    stored_weights,
    terminate,
)

from d2f.testing import write_checkpoint, write_tokenizer
from d2f.training.checkpoint import list_checkpoints
from d2f.training.processes import Processes
from d2f.training.run import train

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint with its tokenizer, and pairs to train on."""
    folder = tmp_path_factory.mktemp("files")
    write_checkpoint(folder / "Dream", "Dream")
    write_tokenizer(folder / "Dream")
    rows = [{"prompt": f"{i}+1=", "response": f"{i + 1}"} for i in range(40)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_resuming_and_faults_in_two_processes(files):
    alone = file_config(files, "alone", False, "full")
    with at_step(3, terminate, 0, Processes(torch.device("cpu"))):
        assert not train(alone, device="cpu").finished
    results = finish(start(2, files, "resume", "reshard", "faults", "clock"))
    assert [code for code, _ in results] == [0, 0], "".join(text for _, text in results)
    # And a checkpoint in shards goes on in a process alone.
    config = file_config(files, "all-full-kept", False, "none")
    assert train(config, device="cpu", resume=True).finished
    straight = stored_weights(file_config(files, "all-full-straight", False, "full"))
    torch.testing.assert_close(stored_weights(config), straight, atol=5e-6, rtol=1e-5)


def test_a_process_that_fails_or_is_gone_ends_the_run_with_one_message(files):
    groups = {name: start(2, files, name) for name in ("killed", "failed")}
    (main, said), (other, silent) = finish(groups["killed"])
    assert (main, other, silent) == (1, -signal.SIGKILL, "")
    assert said.count("TrainingError: another process of this run is gone") == 1
    assert said.count("Traceback") == 1
    names = [path.name for path in list_checkpoints(files / "killed")]
    assert names[-1] == "checkpoint-00000004"
    config = file_config(files, "killed", False, "none", checkpoint_every=2)
    assert train(config, device="cpu", resume=True).finished
    (main, silent), (other, said) = finish(groups["failed"])
    assert (main, other, silent) == (1, 1, "")
    assert said.count("TrainingError: process 1: the dog ate a batch") == 1
    assert said.count("Traceback") == 1

"""A fault in a run gives one clear message and loses nothing but the step in flight."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.training.test_evaluations import LORA, Notes, config_for, files
from tests.unit.training.tiny_run import stored_weights

from d2f.errors import CheckpointError, TrainingError
from d2f.models.checkpoint import load_model
from d2f.testing import write_adapter, write_checkpoint
from d2f.training import checkpoint as checkpoint_module
from d2f.training.checkpoint import list_checkpoints, load_state
from d2f.training.run import train
from d2f.training.run_log import JsonLog
from d2f.training.sections import ColumnConfig

assert files  # the fixture
FULL = OSError(errno.ENOSPC, "No space left on device")


def fail_at(monkeypatch, place, name, call, error):
    """Let a function fail at one of its calls."""
    whole, calls = getattr(place, name), []

    def failing(*given, **options):
        calls.append(1)
        if len(calls) == call:
            raise error
        return whole(*given, **options)

    monkeypatch.setattr(place, name, failing)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(
    ("place", "name", "error"),
    [
        (checkpoint_module, "_save_weights", FULL),
        (checkpoint_module.torch, "save", FULL),
        (checkpoint_module.torch, "save", RuntimeError("[enforce fail] . unexpected pos\nmore")),
        (checkpoint_module, "write_json", FULL),
    ],
)
def test_a_full_disk_at_a_checkpoint(files, monkeypatch, lora, place, name, error):
    config = config_for(files, "d2f", lora=lora, checkpoint_every=2)
    # write_json is called twice for each checkpoint.
    fail_at(monkeypatch, place, name, 3 if name == "write_json" else 2, error)
    with pytest.raises(TrainingError) as caught:
        train(config, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    assert "checkpoint-00000002 is whole: make room, and go on with" in message
    assert "--resume" in message
    assert "space" in message
    (folder,) = list_checkpoints(Path(config.output))
    assert load_state(folder)["step"] == 2
    assert not [path for path in Path(config.output).iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert train(config, device="cpu", resume=True).steps == 6
    plain = config_for(files, "d2f", "plain", lora=lora)
    train(plain, device="cpu")
    one, other = (stored_weights(Path(c.output) / "final") for c in (config, plain))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_disk_at_the_end(files, monkeypatch):
    config = config_for(files, "d2f", checkpoint_every=5)
    fail_at(monkeypatch, checkpoint_module, "_save_weights", 2, FULL)
    with pytest.raises(TrainingError, match="checkpoint-00000005 is whole"):
        train(config, device="cpu")
    monkeypatch.undo()
    assert train(config, device="cpu", resume=True).finished


def test_without_a_checkpoint_it_says_so(files, monkeypatch):
    fail_at(monkeypatch, checkpoint_module, "_save_weights", 1, FULL)
    with pytest.raises(TrainingError, match="there is no earlier checkpoint"):
        train(config_for(files, "d2f", checkpoint_every=2), device="cpu")


def test_a_log_that_cannot_be_written_does_not_end_the_run(files, monkeypatch):
    config = config_for(files, "d2f")
    reporter = Notes()
    fail_at(monkeypatch, JsonLog, "write", 3, FULL)
    assert train(config, device="cpu", reporter=reporter).finished
    assert [note for note in reporter.notes if "log.jsonl misses step 3: No space" in note]
    log = (Path(config.output) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 4, 5, 6]


def test_half_a_line_is_taken_back(tmp_path, monkeypatch):
    log = JsonLog(tmp_path / "log.jsonl")
    log.write([{"step": 1}])
    opened = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise FULL

    monkeypatch.setattr(Path, "open", lambda *given, **more: Full(opened(*given, **more)))
    with pytest.raises(OSError, match="No space"):
        log.write([{"step": 2}])
    monkeypatch.undo()
    log.write([{"step": 3}])
    assert log.path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_data_without_the_mapped_columns(files):
    config = config_for(files, "d2f")
    columns = ColumnConfig(prompt="question", response="answer")
    with pytest.raises(
        TrainingError, match=r"no column 'question'.*columns: prompt, response. Map them"
    ):
        train(replace(config, data=replace(config.data, columns=columns)), device="cpu")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = files / "pairs.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "text": ["b"]}), file)
    data = replace(config.data, kind="dataset", paths=(str(file),))
    with pytest.raises(TrainingError, match=r"pairs.parquet: .*'response'.*prompt, text"):
        train(replace(config, data=data), device="cpu")


def test_an_adapter_is_no_model_to_start_from(files):
    write_adapter(files / "adapter", "Dream")
    config = config_for(files, "d2f")
    model = replace(config.model, init=str(files / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (files / "adapter" / name).write_bytes((files / "Dream" / name).read_bytes())
    with pytest.raises(CheckpointError, match="holds an adapter, not a model; give the base model"):
        train(replace(config, model=model), device="cpu")
    teacher = replace(config.model, teacher=str(files / "adapter"))
    with pytest.raises(CheckpointError, match="holds an adapter, not a model"):
        train(replace(config, model=teacher), device="cpu")


def stopped(config):
    class Stop(Notes):
        def record(self, record):
            if record["step"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(replace(config, checkpoint_every=2), device="cpu", reporter=Stop())
    (folder,) = list_checkpoints(Path(config.output))
    return folder


def test_an_adapter_of_another_model_is_not_gone_on_with(files):
    config = config_for(files, "d2f", lora=LORA)
    stopped(config)
    write_checkpoint(files / "Dream", "Dream", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"adapter for another model than this.*width 64"):
        train(config, device="cpu", resume=True)


def test_a_checkpoint_of_other_sizes_is_not_gone_on_with(files):
    config = config_for(files, "d2f")
    folder = stopped(config)
    state = torch.load(folder / "training_state.pt", weights_only=True)
    for entry in state["optimizer"]["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = torch.zeros(*entry[name].shape, 2)
    torch.save(state, folder / "training_state.pt")
    with pytest.raises(TrainingError, match="does not fit this recipe"):
        train(config, device="cpu", resume=True)
    write_checkpoint(files / "other", "Dream", num_hidden_layers=3)
    for file in (files / "other").glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match="the weights do not fit config"):
        train(config, device="cpu", resume=True)


def test_nan_in_the_weights_to_start_from(files):
    folder = files / "Dream"
    model = load_model(folder, device="cpu")
    from d2f.models.checkpoint import save_model

    model.norm.weight.data.fill_(float("nan"))
    save_model(model, folder)
    config = config_for(files, "d2f")
    with pytest.raises(TrainingError, match="not finite at step 1; the weights of step 0"):
        train(config, device="cpu")

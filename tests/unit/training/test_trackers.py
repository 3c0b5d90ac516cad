"""The log in tensorboard and the like, through accelerate's trackers."""

import sys
from dataclasses import replace

import pytest
from tests.unit.training.tiny_run import Notes, make_config, make_trainer

from d2f.errors import ConfigError
from d2f.training import trackers as module
from d2f.training.trackers import Trackers, check_trackers

accelerate = pytest.importorskip("accelerate")


@pytest.fixture
def made(monkeypatch):
    """All trackers that are made in place of tensorboard's, which need not be installed."""
    found = []

    class Fake(accelerate.tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        main_process_only = True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            self.place, self.started = (run_name, logging_dir), False
            self.settings, self.logged, self.ended = None, [], False
            found.append(self)

        @property
        def tracker(self):
            return self

        def start(self):
            self.started = True

        def store_init_configuration(self, values):
            self.settings = values

        def log(self, values, step=None, **_):
            if step == 5:
                raise RuntimeError("no connection\nat all")
            self.logged.append((step, values))

        def finish(self):
            self.ended = True

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    return found


def test_the_log_goes_to_a_tracker(tmp_path, made):
    config = make_config(tmp_path / "a-run", "d2f", trackers=("tensorboard",), log_every=2)
    reporter = Notes()
    trainer = make_trainer(config, reporter=reporter)
    trainer.run()
    (fake,) = made
    assert fake.place == ("a-run", str(tmp_path / "a-run" / "trackers"))
    assert fake.started
    assert fake.settings["optimizer.lr"] == 3e-3
    assert fake.settings["trackers"] == '["tensorboard"]'
    assert [step for step, _ in fake.logged] == [2, 4, 6]
    assert fake.logged[-1][1]["loss"] == trainer.last_record["loss"]
    assert {"confidence", "teacher_confidence", "lr"} <= fake.logged[0][1].keys()
    assert all(isinstance(v, int | float) for _, values in fake.logged for v in values.values())
    assert fake.ended
    assert reporter.notes == []


def test_a_tracker_that_fails_is_left_out(tmp_path, made):
    config = make_config(tmp_path, "d2f", trackers=("tensorboard",))
    reporter = Notes()
    assert make_trainer(config, reporter=reporter).run()
    assert [step for step, _ in made[0].logged] == [1, 2, 3, 4]
    assert reporter.notes == ["tracker tensorboard fails, and is left out: no connection"]


def test_what_is_missing_is_said_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        check_trackers(("tensorbord",))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package wandb: pip install wandb"):
        check_trackers(("wandb",))
    monkeypatch.setitem(sys.modules, "accelerate.tracking", None)
    with pytest.raises(ConfigError, match=r"package accelerate: pip install 'd2f\[train\]'"):
        Trackers(replace(make_config(tmp_path, "d2f"), trackers=("wandb",)), print)

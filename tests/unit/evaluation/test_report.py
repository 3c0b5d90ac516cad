"""The environment and the plot are written beside the numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import d2f
from d2f import provenance
from d2f.errors import ConfigError
from d2f.evaluation.environment import describe_environment
from d2f.evaluation.plot import plot_race

ROWS = [
    {"name": name, "tokens_per_second": speed, "tokens_per_forward": share, "score": score}
    | {"num_problems": 100}
    for name, speed, share, score in (("autoregressive", 300, 1, 0.95), ("pipelined", 2e3, 20, 1.0))
]


def test_environment():
    environment = describe_environment(device="cpu", dtype="float32")
    assert environment["d2f"] == d2f.__version__
    # The version of a package for CUDA lacks what torch itself says behind a plus.
    assert torch.__version__.startswith(environment["torch"])
    assert environment["num_threads"] == torch.get_num_threads()
    assert environment["processor"].endswith(f"{environment['num_cores']} cores")
    assert environment.keys() >= {"device", "dtype", "python", "git_commit", "time"}
    assert json.loads(json.dumps(environment)) == environment


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package's place on disk, in a repository that may be somebody else's."""
    folder = tmp_path / "d2f"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.setattr(provenance, "_PACKAGE", folder)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return folder, git


def commit_and_dirt():
    code = provenance.describe_code()
    return code["git_commit"], code["git_dirty"]


def test_commit_is_that_of_the_packages_own_repository(package):
    folder, git = package
    assert commit_and_dirt() == (None, None)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert commit_and_dirt() == (None, None)  # not ours: our files are not in it
    git("add", ".")
    git("commit", "-q", "-m", "two")
    commit = git("rev-parse", "HEAD")
    assert commit_and_dirt() == (commit, False)
    (folder / "__init__.py").write_text("changed = True\n")
    assert commit_and_dirt() == (commit, True)


def test_no_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(provenance.subprocess, "run", missing)
    assert commit_and_dirt() == (None, None)


def test_plot_is_a_picture(tmp_path):
    file = tmp_path / "race.png"
    plot_race(ROWS, file, title="2 problems")
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert len(content) > 10_000


def test_plots_score_axis_ends_at_all_problems(tmp_path, monkeypatch):
    drawn = []

    def save(figure, file, **_):
        drawn.append(figure)
        Path(file).touch()

    monkeypatch.setattr(Figure, "savefig", save)
    plot_race(ROWS, tmp_path / "race.png", title="2 problems")
    assert drawn[0].axes[-1].get_xlim() == (0, 1)


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot_race(ROWS, tmp_path / "race.png", title="")

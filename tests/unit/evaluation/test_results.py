"""Files of results under a full disk, a second process, and a file in the way."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from d2f.errors import ConfigError
from d2f.evaluation.results import RowFolder, append_lines, check_writable, write_json


class FullDisk(io.FileIO):
    """Takes a part of what is written, then nothing."""

    def __init__(self, path):
        super().__init__(path, "ab")
        self._room = 12

    def write(self, data):
        if not self._room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, self._room = super().write(data[: self._room]), 0
        return taken


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "problems.jsonl"
    append_lines(path, [{"index": 0}])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path))
        with pytest.raises(OSError, match=r"No space.*problems.jsonl"):
            append_lines(path, [{"index": 1}, {"index": 2}])
    append_lines(path, [{"index": 1}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"index": 0},
        {"index": 1},
    ]


def test_a_file_that_was_not_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})

    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match=r"No space.*a.json"):
        write_json(tmp_path / "a.json", {"a": 2})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_folder_belongs_to_one_process(tmp_path):
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
    script += "print('here', flush=True); sys.stdin.read()"
    (tmp_path / "row").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "row" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=r"another d2f eval writes to .*row; wait for it"):
            RowFolder(tmp_path / "row")
        other.communicate()
    RowFolder(tmp_path / "row")


def test_an_output_that_cannot_be_is_refused_and_one_that_can_is_not_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/out cannot be a folder: .*file is a file"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()

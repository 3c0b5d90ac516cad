"""Token ids on disk: used when they are right, made anew when they are not."""

import json
import os
import tracemalloc
from dataclasses import replace

import pytest
import torch

from d2f.errors import TrainingError
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer
from d2f.training import token_cache
from d2f.training.data import TokenDataset
from d2f.training.sections import ColumnConfig, DataConfig
from d2f.training.sources import encode_data
from d2f.training.token_cache import Encoded, read_cache, write_cache
from d2f.training.tokenizer import train_tokenizer


class Counting(Tokenizer):
    calls = 0

    def encode(self, text):
        Counting.calls += 1
        return super().encode(text)


@pytest.fixture
def tokenizer(tmp_path):
    Counting.calls = 0
    return Counting.load(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def config(tmp_path):
    rows = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n", encoding="utf-8")
    return DataConfig(kind="jsonl", paths=(str(path),), sequence_length=16)


def encode(config, tokenizer, tmp_path):
    """The data, and whether they were encoded now."""
    before = Counting.calls
    return encode_data(config, tokenizer, tmp_path), Counting.calls > before


def test_the_second_time_nothing_is_encoded(tmp_path, tokenizer, config, cache_folder):
    plain, _ = encode(replace(config, cache=False), tokenizer, tmp_path)
    assert plain.cache_file is None
    assert not list(cache_folder.iterdir())
    first, encoded = encode(config, tokenizer, tmp_path)
    assert encoded
    second, encoded = encode(config, tokenizer, tmp_path)
    assert not encoded
    assert plain == first == second
    assert [str(file) for file in cache_folder.iterdir()] == [second.cache_file]
    batches = [
        TokenDataset(data, config, eos_token_id=0).batch(torch.arange(3)).ids_BL
        for data in (plain, second)
    ]
    assert torch.equal(*batches)
    other = replace(config, cache=str(tmp_path / "own"))
    data, encoded = encode(other, tokenizer, tmp_path)
    assert encoded
    assert data.cache_file.startswith(str(tmp_path / "own"))


def test_lengths_leave_the_cache_as_it_is(tmp_path, tokenizer, config):
    encode(config, tokenizer, tmp_path)
    shorter = replace(config, sequence_length=6, max_prompt_length=4, over_long="truncate")
    assert not encode(shorter, tokenizer, tmp_path)[1]


def test_other_data_mapping_or_tokenizer_are_encoded_anew(tmp_path, tokenizer, config):
    encode(config, tokenizer, tmp_path)
    for change in (
        {"response_suffix": "!"},
        {"chat_template": False},
        {"columns": ColumnConfig(prompt="response", response="prompt")},
        {"paths": config.paths * 2},
    ):
        assert encode(replace(config, **change), tokenizer, tmp_path)[1], change
    other = Counting.load(train_tokenizer(["1+1"], tmp_path / "other", vocab_size=260))
    assert encode(config, other, tmp_path)[1]
    path = config.paths[0]
    status = os.stat(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000))
    assert encode(config, tokenizer, tmp_path)[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty", "footer", "other key"])
def test_a_broken_or_foreign_file_is_replaced(tmp_path, tokenizer, config, cache_folder, damage):
    good, _ = encode(config, tokenizer, tmp_path)
    (file,) = cache_folder.iterdir()
    content = file.read_bytes()
    changed = bytearray(content)
    changed[5] ^= 1
    file.unlink()  # `good` still maps the old one
    file.write_bytes(
        {
            "cut": content[:-9],
            "flipped": bytes(changed),
            "foreign": b"something else, and long enough to be read",
            "empty": b"",
            "footer": b"[]" + (2).to_bytes(8, "little") + content[-8:],
            "other key": content.replace(file.stem.encode(), b"0" * len(file.stem)),
        }[damage]
    )
    assert read_cache(file) is None
    data, encoded = encode(config, tokenizer, tmp_path)
    assert encoded
    assert data == good
    assert file.read_bytes() == content
    assert [path.name for path in cache_folder.iterdir()] == [file.name]


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path, tokenizer, config):
    (tmp_path / "file").write_text("in the way")
    notes = []
    blocked = replace(config, cache=str(tmp_path / "file" / "cache"))
    data = encode_data(blocked, tokenizer, tmp_path, notes.append)
    assert data == encode_data(replace(config, cache=False), tokenizer, tmp_path)
    assert notes[0].startswith("token ids are not kept in ")
    assert len(notes) == 2, "the bad row, once"
    assert data.bad_rows.count == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path, tokenizer, config, cache_folder, monkeypatch):
    def full(content, crc=0):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.zlib, "crc32", full)
    notes = []
    assert len(encode_data(config, tokenizer, tmp_path, notes.append).prompt_lengths) == 40
    assert notes[0].endswith("No space left on device")
    assert not list(cache_folder.iterdir())


def test_an_error_while_encoding_leaves_nothing_behind(tmp_path, tokenizer, config, cache_folder):
    with pytest.raises(TrainingError, match="none of 41 rows"):
        encode(replace(config, columns=ColumnConfig(prompt="q")), tokenizer, tmp_path)
    assert not list(cache_folder.iterdir())


def test_samples_are_not_held_in_memory(tmp_path):
    """Five million tokens pass through less than a third of their 20 MB."""
    sample = ([1] * 1_000, [2] * 9_000)
    tracemalloc.start()
    try:
        write_cache(tmp_path / "a.tokens", lambda bad_rows: (sample for _ in range(500)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6e6
    data = read_cache(tmp_path / "a.tokens")
    assert isinstance(data, Encoded)
    assert len(data.tokens) == 5_000_000
    assert data.tokens[2_500_000 - 1 : 2_500_000 + 1].tolist() == [2, 1]
    assert data.prompt_lengths[-1] == 1_000

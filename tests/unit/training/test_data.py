import json
from dataclasses import replace

import pytest
import torch

from d2f.errors import TrainingError
from d2f.testing.tiny import EOS_TOKEN_ID
from d2f.text import Tokenizer
from d2f.training import sources
from d2f.training.data import SampleOrder, TokenDataset
from d2f.training.sections import ColumnConfig, DataConfig
from d2f.training.sources import encode_data, encode_pairs, read_pairs
from d2f.training.token_cache import Encoded
from d2f.training.tokenizer import train_tokenizer

PROBLEMS = DataConfig(kind="problems", num_problems=30, sequence_length=400, seed=3)


def encoded(*pairs):
    result = Encoded()
    for prompt, response in pairs:
        result.tokens.extend([*prompt, *response])
        result.prompt_lengths.append(len(prompt))
        result.response_lengths.append(len(response))
    return result


def config(length, **options):
    return DataConfig(kind="problems", num_problems=1, sequence_length=length, **options)


def counts(data, *names):
    return [data.counts()[name] for name in names]


def test_rows_start_at_0_and_end_in_eos():
    data = TokenDataset(encoded([[1, 2], [3, 4]], [[5], [6]]), config(6), eos_token_id=0)
    batch = data.batch(torch.tensor([1, 0]))
    assert batch.ids_BL.tolist() == [[5, 6, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0]]
    assert batch.prompt_length_B.tolist() == [1, 2]
    assert batch.end_B.tolist() == [3, 5]


def test_over_long_samples_are_dropped_or_truncated_and_counted():
    pairs = encoded([[1], [2, 3]], [[1], [2, 3, 4]], [[1, 2, 3, 4], [5]], [[], [7]])
    dropped = TokenDataset(pairs, config(4), eos_token_id=0)
    assert (len(dropped), *counts(dropped, "dropped", "truncated")) == (2, 2, 0)
    cut = TokenDataset(pairs, config(4, over_long="truncate"), eos_token_id=0)
    assert (len(cut), *counts(cut, "dropped", "truncated")) == (3, 1, 1)
    batch = cut.batch(torch.tensor([1]))
    assert batch.ids_BL.tolist() == [[1, 2, 3, 4]]
    assert batch.end_B.tolist() == [4]
    short = TokenDataset(pairs, config(9, max_prompt_length=3), eos_token_id=0)
    names = ("dropped", "long_prompts", "truncated_prompts")
    assert counts(short, *names) == [1, 1, 0]
    long_prompt = config(9, max_prompt_length=3, long_prompt="truncate")
    behead = TokenDataset(pairs, long_prompt, eos_token_id=0)
    assert (len(behead), *counts(behead, "dropped", "truncated_prompts")) == (4, 0, 1)
    batch = behead.batch(torch.tensor([2, 3]))
    assert batch.ids_BL.tolist() == [[2, 3, 4, 5, 0, 0, 0, 0, 0], [7] + [0] * 8]
    assert batch.prompt_length_B.tolist() == [3, 0]
    with pytest.raises(TrainingError, match="none of 1 sample "):
        TokenDataset(encoded([[1], [2, 3]]), config(3), eos_token_id=0)


def test_no_data():
    with pytest.raises(TrainingError, match="no samples"):
        TokenDataset(Encoded(), config(3), eos_token_id=0)


def test_large_ids_survive():
    data = TokenDataset(encoded([[150_000], [40_000]]), config(3), eos_token_id=151_643)
    assert data.batch(torch.tensor([0])).ids_BL.tolist() == [[150_000, 40_000, 151_643]]


def test_order_is_a_permutation_of_every_epoch_and_needs_no_state():
    order = SampleOrder(num_rows=10, batch_size=4, seed=1)
    drawn = torch.cat([order.rows(step) for step in range(5)]).tolist()
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert SampleOrder(num_rows=10, batch_size=4, seed=1).rows(3).tolist() == drawn[12:16]
    assert SampleOrder(num_rows=10, batch_size=4, seed=2).rows(3).tolist() != drawn[12:16]
    large = SampleOrder(num_rows=3, batch_size=7, seed=0).rows(0).tolist()
    assert sorted(large[:3]) == sorted(large[3:6]) == [0, 1, 2]


def test_data_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK", 8)
    results = [
        encode_data(replace(PROBLEMS, num_workers=workers), tokenizer, tmp_path / "tokenizer")
        for workers in (1, 2)
    ]
    monkeypatch.setattr(sources, "CHUNK", 30)
    results.append(encode_data(PROBLEMS, tokenizer, tmp_path / "tokenizer"))
    assert results[0] == results[1] == results[2]
    assert len(results[0].prompt_lengths) == 30


def test_problems_are_encoded_as_any_other_prompt(tmp_path):
    texts = [text for pair in read_pairs(PROBLEMS) for text in pair]
    folder = train_tokenizer(texts, tmp_path, vocab_size=400)
    tokenizer = Tokenizer.load(folder)
    framed = encode_data(PROBLEMS, tokenizer, folder)
    assert framed == encode_pairs(tokenizer, read_pairs(PROBLEMS))


def test_jsonl(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    rows = [{"q": "1+1=", "a": "2"}, {"q": "a", "a": "b", "more": 1}]
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    fields = {"columns": ColumnConfig(prompt="q", response="a"), "paths": (str(path),)}
    settings = DataConfig(kind="jsonl", sequence_length=8, response_suffix="!", **fields)
    assert list(read_pairs(settings)) == [("1+1=", "2"), ("a", "b")]
    assert list(read_pairs(settings, 1)) == [("1+1=", "2")]
    data = encode_data(settings, tokenizer, tmp_path)
    expected = tokenizer.encode("1+1=2!ab!")
    assert data.tokens.tolist() == expected
    batch = TokenDataset(data, settings, eos_token_id=EOS_TOKEN_ID).batch(torch.tensor([0]))
    assert batch.ids_BL[0].tolist() == [*expected[:6], EOS_TOKEN_ID, EOS_TOKEN_ID]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad\.jsonl:2: not valid JSON"),
        ("[]", r"bad\.jsonl:2: .*'prompt'"),
        ('{"prompt": "a"}', r"bad\.jsonl:2: .*'response'"),
        ('{"prompt": "a", "response": 3}', r"bad\.jsonl:2: .*'response'"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line, encoding="utf-8")
    settings = DataConfig(kind="jsonl", paths=(str(path),), sequence_length=8, bad_rows="refuse")
    with pytest.raises(TrainingError, match=message):
        list(read_pairs(settings))
    assert len(list(read_pairs(replace(settings, bad_rows="report")))) == 1


def test_missing_file(tmp_path):
    settings = DataConfig(kind="jsonl", paths=(str(tmp_path / "no.jsonl"),), sequence_length=8)
    with pytest.raises(TrainingError, match=r"no\.jsonl"):
        list(read_pairs(settings))

"""Data as users have them: files, folders and hub data sets, their columns and their bad rows."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.unit.training.tiny_run import Notes, make_config

from d2f.cli.train_answers import make_sampler
from d2f.errors import ConfigError, TrainingError
from d2f.models.lora import LoraConfig
from d2f.testing import write_checkpoint, write_tokenizer
from d2f.text import Tokenizer
from d2f.training.config import load_recipe, to_table, with_defaults
from d2f.training.data import TokenDataset
from d2f.training.rows import ParquetPart
from d2f.training.run import train
from d2f.training.sections import ColumnConfig, DataConfig, ModelConfig, SampleConfig
from d2f.training.sources import encode_data, encode_prompt, read_held_out, read_pairs
from d2f.training.tokenizer import train_tokenizer

RECIPES = Path(__file__).parents[3] / "recipes"
ROWS = [{"prompt": f"{i}+1=", "response": str(i + 1)} for i in range(5)]
SHARE_GPT = ColumnConfig(messages="conversations", role="from", content="value", system="system")


@pytest.fixture
def chatty(tmp_path):
    return Tokenizer.load(train_tokenizer(["a b c"] * 9, tmp_path / "chatty", vocab_size=300))


def settings(*paths, **options):
    options = {"kind": "dataset", "sequence_length": 32} | options
    return DataConfig(paths=tuple(str(path) for path in paths), **options)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def datasets():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages, at their import
        return pytest.importorskip("datasets")


def test_all_kinds_of_files_hold_the_same_pairs(tmp_path):
    listed = tmp_path / "c.json"
    listed.write_text("\ufeff \n" + json.dumps(ROWS, indent=1), encoding="utf-8")
    marked = tmp_path / "d.json"
    marked.write_text("\ufeff" + "\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    files = [
        write_lines(tmp_path / "a.jsonl", ROWS),
        write_parquet(tmp_path / "b.parquet", ROWS),
        listed,
        marked,
    ]
    expected = [(row["prompt"], row["response"]) for row in ROWS]
    for file in files:
        assert list(read_pairs(settings(file))) == expected, file
    assert list(read_pairs(settings(*files))) == expected * 4
    assert list(read_pairs(settings(tmp_path / "[ab].*"))) == expected * 2
    assert read_held_out(settings(files[1]), 2) == expected[:2]


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", ROWS[2:4])
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", ROWS[4:])
    (tmp_path / "dataset_infos.json").write_text("{}")
    prompts = [pair.prompt for pair in read_pairs(settings(tmp_path))]
    assert prompts == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert [pair.prompt for pair in read_pairs(settings(tmp_path, split="dev"))] == ["4+1="]
    with pytest.raises(TrainingError, match=r"no file of data.split 'test', only train-00000"):
        list(read_pairs(settings(tmp_path, split="test")))


def test_a_folder_written_by_the_library(tmp_path, datasets):
    table = datasets.Dataset.from_list([row | {"more": 1} for row in ROWS])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "several")
    expected = [(row["prompt"], row["response"]) for row in ROWS]
    assert list(read_pairs(settings(tmp_path / "one"))) == expected
    assert list(read_pairs(settings(tmp_path / "several"))) == expected
    with pytest.raises(TrainingError, match=r"no data\.split 'test', only train"):
        list(read_pairs(settings(tmp_path / "several", split="test")))


def test_a_hub_data_set_by_name(tmp_path, datasets, monkeypatch, tokenizer):
    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = settings("someone/something", split="test", subset="main", revision="v1")
    assert len(list(read_pairs(config))) == 5
    options = {"name": "main", "split": "test", "revision": "v1"}
    assert calls == [("someone/something", options)]
    assert len(encode_data(config, tokenizer, tmp_path).prompt_lengths) == 5
    wrong = replace(config, columns=ColumnConfig(prompt="promt"))
    with pytest.raises(
        TrainingError,
        match=r"someone/something: unknown column 'promt'; did you mean 'prompt'\? "
        r"Known: prompt, response\. .*\[data.columns\]",
    ):
        list(read_pairs(wrong))


def test_a_hub_data_set_that_cannot_be_had_is_refused():
    code = (
        "from d2f.training.sections import DataConfig\n"
        "from d2f.training.sources import read_pairs\n"
        "c = DataConfig(kind='dataset', paths=('nobody/nothing',), sequence_length=9)\n"
        "try: list(read_pairs(c))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    pytest.importorskip("datasets")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert run.stdout.startswith("TrainingError there is no file or folder 'nobody/nothing' here")
    assert "hub login" in run.stdout
    assert len(run.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "name", "package"),
    [("hub", "someone/something", "datasets"), ("dataset", "a.parquet", "pyarrow")],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, kind, name, package):
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(TrainingError, match=rf"package {package}: pip install 'd2f\[train\]'"):
        list(read_pairs(settings(name, kind=kind)))


def test_what_is_not_there_or_broken_is_said(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow.parquet")
    broken = write_parquet(tmp_path / "broken.parquet", ROWS)
    broken.write_bytes(broken.read_bytes()[:-20])
    (tmp_path / "list.json").write_text("[{")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    columns = write_parquet(tmp_path / "c.parquet", [{"question": "a", "answer": "b"}])
    for name, message in [
        ("none.jsonl", r"no file or folder '.*none\.jsonl'"),
        ("no-*.jsonl", "no file matches"),
        ("empty", "holds no file of kind"),
        ("notes.txt", r'data.kind = "jsonl"'),
        ("list.json", r"cannot read data .*list\.json: not valid JSON"),
        ("broken.parquet", r"cannot read data .*broken\.parquet.*is it a whole Parquet file\?"),
        (columns.name, r"unknown column 'prompt'. Known: answer, question"),
    ]:
        with pytest.raises(TrainingError, match=message):
            list(read_pairs(settings(tmp_path / name)))


@pytest.fixture
def bad_file(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        json.dumps(ROWS[0]),
        "{",
        '{"prompt": "a"}',
        '{"prompt": "a", "response": null}',
        '{"prompt": " ", "response": "b"}',
        "",
        '{"prompt": "\\ud800", "response": "b"}',
        "[]",
        '{"prompt": 3, "response": "b"}',
        "{}",
        json.dumps(ROWS[1]),
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff", "response": "b"}\n')
    return path


def test_bad_rows_are_counted_with_their_numbers(tmp_path, tokenizer, bad_file):
    notes = []
    config = settings(bad_file)
    for _ in range(2):  # encoded, and from the cache
        data = encode_data(config, tokenizer, tmp_path, notes.append)
        assert len(data.prompt_lengths) == 2
        assert data.bad_rows.counts == {
            "not valid JSON": 1,
            "no column 'response'": 1,
            "'response' is null, not text": 1,
            "'prompt' is empty": 1,
            "'prompt' is not valid Unicode": 1,
            "a list, not an object with the columns 'prompt', 'response'": 1,
            "'prompt' is a number, not text": 1,
            "no column 'prompt'": 1,
            "not valid UTF-8": 1,
        }
        assert data.bad_rows.first["not valid JSON"] == [f"{bad_file}:2"]
        assert data.bad_rows.first["not valid UTF-8"] == [f"{bad_file}:12"]
    assert notes[0] == notes[1]
    assert notes[0].startswith("9 of 11 rows are bad and left out: 1 × not valid JSON (")
    counts = TokenDataset(data, config, eos_token_id=0).counts()
    assert (counts["rows"], counts["used"], counts["bad_rows"]) == (2, 2, 9)
    assert json.loads(json.dumps(counts))["bad_row_counts"] == data.bad_rows.counts


def test_only_the_first_numbers_of_many_bad_rows_are_kept(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ROWS[:1] + [{"prompt": "a"}] * 300)
    notes = []
    bad = encode_data(settings(path), tokenizer, tmp_path, notes.append).bad_rows
    assert bad.count == 300
    assert [row.rpartition(":")[2] for row in bad.first["no column 'response'"]] == [
        str(number) for number in range(2, 102)
    ]
    assert notes[0].endswith("a.jsonl:6, …)")


def test_parquet_may_be_read_with_all_its_columns(tmp_path):
    rows = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    found = list(ParquetPart(path=path).rows())
    assert found == [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)]


def test_bad_text_in_parquet_spoils_no_other_row(tmp_path, tokenizer):
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{part}") for part in ("", ".parquet"))
    raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    table = pyarrow.table({"prompt": text, "response": ["1", "2", None]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    data = encode_data(settings(path), tokenizer, tmp_path)
    assert data.tokens.tolist() == tokenizer.encode("a1")
    assert data.bad_rows.first == {
        "not valid UTF-8": [f"{path}:2"],
        "'response' is null, not text": [f"{path}:3"],
    }


def test_if_all_rows_are_bad_the_columns_are_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}] * 7)
    with pytest.raises(
        TrainingError, match=r"none of 7 rows.*7 × no column 'prompt' .*columns: answer, question"
    ):
        encode_data(settings(path), tokenizer, tmp_path)
    with pytest.raises(TrainingError, match="none of 7 rows"):
        list(read_pairs(settings(path)))


def test_bad_rows_can_be_refused(tmp_path, tokenizer, bad_file):
    encode_data(settings(bad_file), tokenizer, tmp_path)
    with pytest.raises(TrainingError, match=r"bad\.jsonl:2: not valid JSON; data.bad_rows"):
        encode_data(settings(bad_file, bad_rows="refuse"), tokenizer, tmp_path)


def bespoke(*turns, system="Be brief."):
    return {
        "system": system,
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }


def test_conversations(tmp_path, chatty, tokenizer):
    rows = [
        bespoke(("human", "a"), ("gpt", "b")),
        bespoke(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), system=None),
        bespoke(("human", "a"), ("gpt", "b"), system=""),
        bespoke(("human", "a")),
        bespoke(("gpt", "a")),
        bespoke(),
        {"system": "", "conversations": "a"},
        {"system": "", "conversations": ["a"]},
        {"system": "", "conversations": [{"from": "human"}]},
    ]
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "a"}
    turns = [user, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    expected = [([system, user], "b"), (turns, "d"), ("a", "b")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = settings(path, columns=SHARE_GPT)
    assert list(read_pairs(config)) == expected
    assert [list(pair.texts(response=False)) for pair in read_pairs(config)] == [
        ["Be brief.", "a"],
        ["a", "b", "c"],
        ["a"],
    ]
    parquet = write_parquet(tmp_path / "a.parquet", rows[:6])
    assert list(read_pairs(replace(config, paths=(str(parquet),)))) == expected
    data = encode_data(config, chatty, tmp_path)
    assert sorted(data.bad_rows.counts) == [
        "'conversations' ends with a message of role 'user', not the assistant's",
        "'conversations' has no message of the user before the answer",
        "'conversations' holds text where a message should be",
        "'conversations' is empty",
        "'conversations' is text, not a list of messages",
        "a message in 'conversations' has no 'value'",
    ]
    first = chatty.encode_chat([system, user])
    assert data.tokens[: len(first)].tolist() == first
    plain = encode_data(config, tokenizer, tmp_path)
    assert len(plain.prompt_lengths) == 1, "without a template, only what needs none"
    assert plain.bad_rows.counts["several messages, and no chat template to write them"] == 2


def test_the_chat_template_by_choice(tmp_path, chatty, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    for choice, chat in [(None, True), (True, True), (False, False)]:
        data = encode_data(settings(path, chat_template=choice), chatty, tmp_path)
        ids = chatty.encode_prompt("0+1=", chat=chat)
        assert data.tokens[: len(ids)].tolist() == ids == encode_prompt(chatty, "0+1=", choice)
    with pytest.raises(ConfigError, match=r"data.chat_template is true.*no chat template"):
        encode_data(settings(path, chat_template=True), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("columns={promt='a'}", "did you mean 'prompt'"),
        ("columns={messages='a', prompt='b'}", "either messages or prompt and response"),
        ("columns={roles={human='usr'}}", "did you mean 'user'"),
        ("long_prompt='cut'", "unknown data.long_prompt"),
        ("bad_rows='skip'", "unknown data.bad_rows"),
        ("path='a'", "did you mean 'paths'"),
        ("cache=3", "must be of type bool or str"),
        ("prompt_field='b'", "older words"),
    ],
)
def test_wrong_settings_are_refused_by_name(table, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(RECIPES / "distill_dream_7b.toml", [f"data.{table}"])


def test_recipes_and_checkpoints_of_older_versions_still_serve(tmp_path):
    text = (RECIPES / "distill_dream_7b.toml").read_text(encoding="utf-8")
    old = text.replace(
        'columns = { prompt = "question", response = "qwen7b_answer" }',
        'prompt_field = "question"\nresponse_field = "qwen7b_answer"',
    )
    path = tmp_path / "old.toml"
    path.write_text(old, encoding="utf-8")
    config = load_recipe(RECIPES / "distill_dream_7b.toml")
    assert old != text
    assert load_recipe(path) == config
    table = to_table(config)
    for name in [*asdict(ColumnConfig()), "columns", "cache", "bad_rows", "chat_template"]:
        table["data"].pop(name, None)
    table["data"] |= {"prompt_field": "question", "response_field": "qwen7b_answer"}
    assert with_defaults(table)["data"] == to_table(config)["data"] | {"chat_template": None}


@pytest.mark.parametrize("name", ["distill_dream_7b", "distill_llada_8b_instruct"])
def test_the_papers_collections_by_mapping(tmp_path, name, chatty):
    """The two recipes on local files with the collections' columns."""
    rows = [{"question": "1+1=", "qwen7b_answer": "2", "id": i} for i in range(3)]
    recipe = load_recipe(RECIPES / f"{name}.toml").data
    assert all("bs17k_collection_filtered" in path for path in recipe.paths)
    assert len(recipe.paths) == 2
    files = [write_parquet(tmp_path / f"{kind}.parquet", rows) for kind in ("hard", "easy")]
    data = encode_data(replace(recipe, paths=tuple(map(str, files))), chatty, tmp_path)
    assert len(data.prompt_lengths) == 6
    ids = [*chatty.encode_prompt("1+1="), *chatty.encode("2" + recipe.response_suffix)]
    assert data.tokens[: len(ids)].tolist() == ids


@pytest.mark.parametrize("columns", [SHARE_GPT, ColumnConfig(prompt="question")])
def test_a_run_tells_what_became_of_its_rows(tmp_path, columns):
    rows = [bespoke(("human", f"{i}+1="), ("gpt", str(i + 1))) for i in range(12)]
    rows = [row | {"question": "1+1=", "response": "2"} for row in rows]
    rows[3] |= {"conversations": None, "question": None}
    rows[5] |= {"conversations": bespoke(("human", "1" * 60), ("gpt", "2"))["conversations"]}
    rows[5] |= {"question": "1" * 60}
    write_checkpoint(tmp_path / "Dream", "Dream")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (write_tokenizer(tmp_path / "Dream") / "chat_template.jinja").write_text(template)
    config = make_config(
        tmp_path / "out",
        "d2f",
        steps=2,
        batch_size=2,
        lora=LoraConfig(r=2),
        model=ModelConfig(init=str(tmp_path / "Dream")),
        data=settings(write_parquet(tmp_path / "a.parquet", rows), columns=columns),
        sample=SampleConfig(every=2, num_prompts=2, max_new_tokens=4),
    )
    reporter = Notes()
    summary = train(config, device="cpu", make_sampler=make_sampler, reporter=reporter)
    written = json.loads((tmp_path / "out/training_summary.json").read_text())["data"]
    assert written == summary.data
    kept = {name: written[name] for name in ("rows", "long_prompts", "dropped", "used", "bad_rows")}
    assert kept == {"rows": 11, "long_prompts": 1, "dropped": 1, "used": 10, "bad_rows": 1}
    assert list(written["first_bad_rows"].values()) == [[f"{tmp_path / 'a.parquet'}:4"]]
    assert any(note.startswith("1 of 12 rows are bad and left out") for note in reporter.notes)
    sample = json.loads((tmp_path / "out/samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"] == ("Be brief.\n\n0+1=" if columns is SHARE_GPT else "1+1=")

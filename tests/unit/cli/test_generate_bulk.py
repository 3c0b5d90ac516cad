"""`d2f generate --input`: one line for each answer, the same as alone, and none lost or twice."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import signal
from pathlib import Path

import pytest
from tests.unit.cli.conftest import POLICY

from d2f.cli import answer_file
from d2f.cli.generate import ANSWER_COLUMNS, BulkOptions
from d2f.cli.usage import UsageError
from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.evaluation.answering import Answering
from d2f.models.checkpoint import load_model
from d2f.testing import tiny_model, write_checkpoint
from d2f.training.sections import ColumnConfig, DataConfig
from d2f.training.sources import read_pairs

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}"
)
PROMPTS = ["1+1=", "Tom has 5 apples.", "x", "-5 + 3?", "7*6="]
COUNTS = ["num_tokens", "num_forwards", "finish_reason"]


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    path = write_checkpoint(tmp_path_factory.mktemp("chat"), "llada", policy=POLICY, tokenizer=True)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def source(tmp_path):
    return write(
        tmp_path / "prompts.jsonl", [{"id": i, "prompt": p} for i, p in enumerate(PROMPTS)]
    )


@pytest.fixture
def output(tmp_path):
    return tmp_path / "answers.jsonl"


@pytest.fixture
def bulk(d2f, folder, source, output):
    def run(*options, model=folder, source=source, output=output, limit=8):
        files = ("--input", source, "--output", output)
        common = ("--model", model, "--device", "cpu", "--max-new-tokens", limit)
        return d2f("generate", *files, *common, *options)

    return run


@pytest.fixture(scope="module")
def finished():
    """What a whole run has left, by name of the file."""
    return {}


@pytest.fixture
def whole(bulk, output, finished):
    """A finished run in this test's own folder, made once for all tests."""
    names = (output.name, f"{output.name}.settings")
    if not finished:
        bulk()
        finished.update({name: output.with_name(name).read_bytes() for name in names})
    for name in names:
        output.with_name(name).write_bytes(finished[name])
    return finished[output.name]


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------ answers


# In pages, without pages, and on a model of another kind; the engine's tests have all strategies.
@pytest.mark.parametrize("strategy", ["pipelined", "dual-cache", "autoregressive"])
def test_an_answer_is_the_one_that_the_prompt_gets_alone(
    bulk, d2f, folder, causal, output, strategy
):
    model = causal if strategy == "autoregressive" else folder
    options = ("--strategy", strategy, "--batch-size", 3, "--stop", "3")
    done = bulk(*options, model=model)
    assert (done.code, done.out) == (0, "")
    records = read(output)
    assert [record["row"] for record in records] == list(range(1, len(PROMPTS) + 1))
    alone = ("--model", model, "--device", "cpu", "--max-new-tokens", 8, "--json")
    for record in records[1:4:2]:
        single = d2f("generate", record["prompt"], *alone, "--strategy", strategy, "--stop", "3")
        expected = json.loads(single.out)
        assert record["response"] == expected["text"]
        assert [record[name] for name in COUNTS] == [expected[name] for name in COUNTS]


def test_samples_have_noise_of_their_own_that_neither_batch_nor_order_changes(
    bulk, d2f, folder, source, output, tmp_path
):
    write(source, [{"prompt": "x"}, {"prompt": "x"}])
    hot = ("--temperature", 2, "--n", 3, "--seed", 5)
    assert bulk(*hot, "--batch-size", 1).code == 0
    records = read(output)
    places = [(record["row"], record["sample"]) for record in records]
    assert places == list(itertools.product((1, 2), range(3)))
    assert set(records[0]) == {"prompt", "response", *ANSWER_COLUMNS} - {"messages"}
    assert len({record["seed"] for record in records}) == len(records)
    assert len({record["response"] for record in records}) == len(records)
    other = tmp_path / "other.jsonl"
    bulk(*hot, "--batch-size", 5, output=other)
    assert other.read_bytes() == output.read_bytes()
    last = records[-1]
    options = ("--temperature", 2, "--seed", last["seed"], "--max-new-tokens", 8)
    single = d2f("generate", last["prompt"], "--model", folder, "--device", "cpu", *options)
    assert single.out == last["response"] + "\n"


def test_the_summary(bulk, output):
    done = bulk("--json")
    summary, records = json.loads(done.out), read(output)
    tokens, forwards = (sum(r[name] for r in records) for name in COUNTS[:2])
    assert (summary["num_answers"], summary["num_new_answers"]) == (len(PROMPTS), len(PROMPTS))
    assert (summary["num_tokens"], summary["num_forwards"]) == (tokens, forwards)
    assert summary["tokens_per_forward"] == tokens / forwards
    assert summary["tokens_per_second"] == tokens / summary["seconds"]
    cut = sum(record["finish_reason"] == "length" for record in records)
    assert summary["length_share"] == cut / len(records)
    assert summary["num_bad_rows"] == 0
    again = json.loads(bulk("--json").out)
    assert again == summary | {"num_new_answers": 0, "seconds": 0.0, "tokens_per_second": None}
    assert f"5 answers, {tokens} tokens ({tokens / forwards:.2f} per forward)" in bulk().err


def test_progress_says_how_much_is_left(bulk, monkeypatch):
    monkeypatch.setattr("d2f.evaluation.eval_progress.PLAIN_SECONDS", 0.0)
    lines = [line for line in bulk("--batch-size", 1).err.splitlines() if "left" in line]
    assert [line.split()[1] for line in lines] == [f"{n}/5" for n in range(1, 6)]
    assert all("tokens/s" in line for line in lines)


def test_prompts_are_read_when_there_is_room_for_them():
    asked = []

    def make(index):
        asked.append(index)
        return Request(prompt_ids=[index % 90], max_new_tokens=2)

    answering = iter(Answering(Engine(tiny_model("llada")), itertools.count(), make, most=4))
    done = [answer.index for _ in range(3) for answer in next(answering)[0]]
    assert done
    assert len(asked) <= len(done) + 4


# -------------------------------------------------------------------------------------- rows


def test_the_columns_of_a_row_are_kept(bulk, source, output):
    odd = {"a": [1, {"b": None}], "line": "\u2028é", "broken": "\ud800", "id": 2**70}
    odd_numbers = {"prompt": "x", "response": "gold", **odd, "no_number": float("nan")}
    write(source, ["", odd_numbers, {"prompt": "y", "row": 7}])
    assert bulk().code == 0
    first, second = read_lines(output)
    assert {name: first[name] for name in odd} == odd
    assert first["no_number"] is None  # JSON has no nan
    assert (first["prompt"], first["input_response"], first["row"]) == ("x", "gold", 2)
    assert (second["input_row"], second["row"]) == (7, 3)
    again = output.with_name("again.jsonl")
    bulk(source=output, output=again)
    answered = read_lines(again)[0]
    assert answered["input_response"] == "gold"
    assert answered["input_input_response"] == first["response"]
    assert answered["response"] == first["response"]


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_columns_have_the_names_that_they_have_in_training(bulk, source, output):
    write(source, [{"question": "x", "answer": "gold"}])
    bulk("--column", "prompt=question", "--column", "response=answer")
    [record] = read(output)
    assert record["input_answer"] == "gold"
    config = ColumnConfig(prompt="question", response="answer")
    assert pairs(output, config) == [("x", record["answer"])]


def pairs(path, columns=None):
    config = DataConfig(
        kind="dataset", paths=(str(path),), sequence_length=64, columns=columns or ColumnConfig()
    )
    return [tuple(pair) for pair in read_pairs(config)]


def test_answers_are_training_data(output, whole):
    assert pairs(output) == [(r["prompt"], r["response"]) for r in read(output)]


def test_a_conversation_goes_on_with_the_answer(bulk, d2f, chatty, source, output):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    question = {"role": "user", "content": "1+1="}
    gold = {"role": "assistant", "content": "2"}
    write(source, [{"messages": [*turns, question]}, {"messages": [*turns, question, gold]}])
    assert bulk(model=chatty).code == 0
    first, second = read(output)
    text = "user:hi;assistant:yes?;user:1+1=;"
    options = ("--no-chat", "--device", "cpu", "--max-new-tokens", 8)
    expected = d2f("generate", text, "--model", chatty, *options).out[:-1]
    assert first["response"] == second["response"] == expected
    answer = {"role": "assistant", "content": expected}
    assert first["messages"] == second["messages"] == [*turns, question, answer]
    assert "input_messages" not in first
    assert second["input_messages"][-1] == gold
    known = [([*turns, question], expected)] * 2
    assert pairs(output, ColumnConfig(messages="messages")) == known


def test_conversations_of_other_words_and_system_messages(bulk, d2f, chatty, source, output):
    talk = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    write(source, [{"talk": talk, "sys": "be brief"}, {"talk": talk, "sys": None}])
    columns = ("messages=talk", "role=from", "content=value", "system=sys")
    options = [word for column in columns for word in ("--column", column)]
    assert bulk(*options, "--system", "be kind", model=chatty).code == 0
    common = ("--model", chatty, "--device", "cpu", "--max-new-tokens", 8, "--system")
    for record, system in zip(read(output), ("be brief", "be kind"), strict=True):
        assert record["response"] == d2f("generate", "x", *common, system).out[:-1]
        assert record["talk"][1] == {"from": "assistant", "value": record["response"]}


def test_a_prompt_may_be_raw(bulk, chatty, source, output):
    write(source, [{"prompt": "<|endoftext|>1"}])
    bulk("--no-chat", model=chatty)
    raw = output.read_bytes()
    bulk("--fresh", model=chatty)
    assert output.read_bytes() != raw


def test_a_list_of_rows(bulk, source, output, tmp_path, whole):
    other = tmp_path / "prompts.json"
    other.write_text(json.dumps(read(source)))
    assert bulk("--fresh", source=other).code == 0
    assert output.read_bytes() == whole


# ---------------------------------------------------------------------------------- bad input


BAD = {
    '{"prompt": "cut of': "not valid JSON",
    '"text"': "text, not an object with the columns 'prompt'",
    '{"text": "x"}': "no column 'prompt'",
    '{"prompt": " "}': "'prompt' is empty",
    '{"prompt": 5}': "'prompt' is a number, not text",
    '{"prompt": "no"}': "the chat template refuses the messages: no",
    '{"messages": []}': "'messages' is empty",
    json.dumps({"prompt": "long" * 200}): "the prompt and 8 new tokens are more than the model's "
    "512 positions",
}


def test_bad_rows_are_counted_and_end_nothing(bulk, chatty, source, output):
    write(source, [*BAD, {"prompt": "x"}, *BAD])
    done = bulk(model=chatty)
    assert done.code == 0
    assert [record["row"] for record in read(output)] == [len(BAD) + 1]
    assert f"16 of 17 rows are bad and have no answer: 2 × not valid JSON ({source}:1" in done.err
    summary = json.loads(bulk("--json", model=chatty).out)
    assert summary["num_bad_rows"] == 2 * len(BAD)
    assert summary["bad_rows"]["counts"] == dict.fromkeys(BAD.values(), 2)
    for line, reason in enumerate(BAD.values(), 1):
        rows = summary["bad_rows"]["first"][reason]
        assert rows == [f"{source}:{line}", f"{source}:{line + len(BAD) + 1}"]


def test_where_all_rows_are_bad_the_command_fails(bulk, chatty, source, output):
    write(source, [{"question": "x"}] * 2)
    done = bulk(model="/no/such/model")  # which is not looked for
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "none of 2 rows can be answered: 2 × no column 'prompt'" in done.err
    assert "The rows have the columns: question. Map them: --column prompt=NAME" in done.err
    write(source, [{"prompt": "no"}])
    done = bulk(model=chatty)
    assert done.code == 1
    assert "none of 1 row can be answered: 1 × the chat template refuses" in done.err


def test_a_row_that_fails_in_the_engine_is_counted(bulk, monkeypatch, output):
    step, calls = Engine.step, itertools.count()

    def fail(engine):
        if next(calls) in (0, 2):  # all at first, then the second of those that try again alone
            raise RuntimeError("no memory")
        return step(engine)

    monkeypatch.setattr(Engine, "step", fail)
    done = bulk("--confidence-threshold", 0)
    assert done.code == 0
    assert "1 of 5 rows are bad and have no answer: 1 × RuntimeError: no memory" in done.err
    assert len(read(output)) == 4
    monkeypatch.undo()
    assert "5 answers" in bulk("--confidence-threshold", 0).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stream"], "--stream: without effect with --input"),
        (["--n", 2], "--n 2: all the same at --temperature 0"),
        (["--column", "promt=x"], "unknown key 'promt'; did you mean 'prompt'?"),
        (["--column", "prompt"], "write it as WHAT=NAME"),
        (["--column", "response=row"], "another column of this name"),
        (["--column", "messages=m", "--column", "prompt=p"], "not both"),
        (["--chat"], "--chat: this model has no chat template"),
        (["--strategy", "autoregressive"], "not autoregressive"),
    ],
)
def test_wrong_options_are_refused_in_one_clear_line(bulk, options, message):
    done = bulk(*options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": Path("p")}, "--input needs --output"),
        ({"input": Path("p"), "output": Path("./p")}, "is the file with the prompts"),
        ({"input": Path("p"), "output": Path("-")}, "answers go to a file"),
        ({"prompt": "x", "input": Path("p")}, "a PROMPT and --input exclude each other"),
        ({"prompt": "x", "output": Path("a")}, "--output: without effect without --input"),
        ({"prompt": "x", "n": 1}, "--n: without effect without --input"),
        ({"prompt": "x", "batch_size": 2}, "--batch-size: without effect without --input"),
        ({"prompt": "x", "column": ["a=b"]}, "--column: without effect without --input"),
        ({"prompt": "x", "fresh": True}, "--fresh: without effect without --input"),
    ],
)
def test_options_that_belong_together(given, message):
    options = {name: value for name, value in given.items() if name != "prompt"}
    with pytest.raises(UsageError, match=re.escape(message)):
        BulkOptions(**options).source(given.get("prompt"), stream=False)


def test_a_second_name_of_the_prompts_is_no_output(bulk, source, output):
    os.link(source, output)
    before = source.read_bytes()
    assert "is the file with the prompts" in bulk("--fresh").err
    assert source.read_bytes() == before


def test_nothing_to_answer(d2f):
    done = d2f("generate", "--seed", 1)
    assert (done.code, done.out) == (2, "")
    assert "there is nothing to answer; give a PROMPT, or --input FILE" in done.err


def test_files_that_are_none(bulk, source, tmp_path):
    def error(**files):
        done = bulk(**files)
        assert (done.code, done.err.count("\n")) == (1, 1)
        return done.err

    assert "there is no file" in error(source=tmp_path / "no.jsonl")
    assert "is no file" in error(source=tmp_path)
    assert "has no rows" in error(source=write(tmp_path / "empty.jsonl", [""]))
    (tmp_path / "p.jsonl.gz").write_bytes(b"\x1f\x8b0")
    assert "is packed; unpack it first" in error(source=tmp_path / "p.jsonl.gz")
    assert "Is a directory" in error(output=tmp_path)
    assert "No such file or directory" in error(output=tmp_path / "no" / "a.jsonl")
    assert "it is no file" in error(output="/dev/null")


# ------------------------------------------------------------------------------------ going on


def stop_at(monkeypatch, number, how):
    step, calls = Engine.step, itertools.count()

    def stopping(engine):
        if next(calls) == number:
            how()
        return step(engine)

    monkeypatch.setattr(Engine, "step", stopping)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "how", [interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["ctrl-c", "sigterm"]
)
def test_a_run_that_was_stopped_goes_on(bulk, output, monkeypatch, whole, how):
    output.unlink()
    options = ("--batch-size", 2, "--json")
    before = signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 8, how)
    done = bulk(*options)
    assert signal.getsignal(signal.SIGTERM) == before
    num_answers = len(read(output))
    assert 0 < num_answers < len(PROMPTS)
    assert done.code == 130
    said = f"stopped; {num_answers} of 5 answers are in {output}; go on with the same command"
    assert done.err.splitlines()[-1] == said
    monkeypatch.undo()
    done = json.loads(bulk(*options).out)
    assert done["num_new_answers"] == len(PROMPTS) - num_answers
    assert output.read_bytes() == whole


def test_a_full_disk_loses_nothing(bulk, output, monkeypatch, whole):
    output.unlink()
    write_some, calls = os.write, itertools.count()

    def full(file, data):
        number = next(calls)
        if number == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_some(file, data[: len(data) // 2] if number == 3 else data)

    monkeypatch.setattr(answer_file.os, "write", full)
    done = bulk("--batch-size", 1)
    assert (done.code, len(read(output))) == (1, 3)
    assert done.err.splitlines()[-1] == (
        f"error: cannot write {output}: No space left on device; 3 answers are kept; make room, "
        "and go on with the same command"
    )
    monkeypatch.undo()
    bulk()
    assert output.read_bytes() == whole


def test_the_dtype_of_the_first_run_is_that_of_the_rest(bulk, output, whole, monkeypatch):
    file = output.with_name(f"{output.name}.settings")
    known = json.loads(file.read_text())
    assert (known["settings"]["dtype"], known["about"]["dtype"]) == (None, "float32")
    # As a shipped model may have it, whose dtype is measured in each run.
    known["about"]["dtype"] = "bfloat16"
    file.write_text(json.dumps(known))
    output.write_bytes(whole[:-9])
    dtypes = []

    def noted(*arguments, **options):
        dtypes.append(options["dtype"])
        return load_model(*arguments, **options)

    monkeypatch.setattr("d2f.models.checkpoint.load_model", noted)
    assert bulk().code == 0
    assert dtypes == ["bfloat16"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", 1], "seed was 0, now 1"),
        (["--system", "x"], 'system was null, now "x"'),
        (["--block-size", 4], 'policy was {}, now {"block_size": 4}'),
        (["--column", "response=text"], "columns was"),
        (["--temperature", 1, "--n", 2], "n was 1, now 2; temperature was 0.0, now 1.0"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(bulk, output, whole, options, message):
    done = bulk(*options)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert f"{output} has answers of other settings: {message}" in done.err
    assert "name another --output, or start afresh with --fresh" in done.err
    assert output.read_bytes() == whole


def test_answers_of_other_files_are_not_mixed(bulk, output, source, causal, whole):
    assert "model was" in bulk(model=causal).err
    write(source, [{"prompt": "another"}])
    assert "input was" in bulk().err
    assert output.read_bytes() == whole
    assert bulk("--fresh").code == 0
    assert [record["prompt"] for record in read(output)] == ["another"]
    output.with_name(output.name + ".settings").unlink()
    done = bulk()
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "answers.jsonl.settings, which would say how it came about, cannot be read" in done.err

"""`benchmarks/real_language_data.py`: rows of all kinds, and which users' turns are kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tests.unit.evaluation.harness_files import write_jsonl

from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
TEMPLATE = (
    "<s>system: You are a helpful AI.\n{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}"
    "</{{ m.role }}>{% endfor %}<assistant>"
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import real_language_data

    yield real_language_data
    for name in ("real_language_data", "chat_turns", "sql_values"):
        sys.modules.pop(name, None)


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_rows_of_sql_have_the_benchmarks_prompts(script, tmp_path, capsys):
    row = {"question": "Who ?", "sql": " SELECT A FROM T ", "columns": ["a", "b"]}
    named = {"question": "Is Zelda Quill in ?", "sql": 'SELECT A WHERE B = "Zelda Quill"'}
    for name in ("advising", "wikisql"):
        for split in ("train", "validation"):
            rows = [row] * 2 if name == "wikisql" else [named, row]
            write_jsonl(tmp_path / f"{name}.{split}.jsonl.gz", rows)
    script.main(["sql", "--data", str(tmp_path), "--output", str(tmp_path / "out")])
    assert read(tmp_path / "out" / "wikisql.train.jsonl")[0] == {
        "prompt": "Write SQL for a table with the columns a, b.\nWho ?",
        "response": "SELECT A FROM T",
    }
    counts = json.loads((tmp_path / "out" / "sql.json").read_text())
    assert counts == json.loads(capsys.readouterr().out)
    assert counts["advising.validation"] == 2
    assert (counts["advising.variants"], counts["wikisql.variants"], counts["seed"]) == (8, 0, 0)
    trained = read(tmp_path / "out" / "advising.train.jsonl")
    assert counts["advising.train"] == len(trained) == 10
    for made in trained[2:]:
        assert made["response"].split('"')[1] in made["prompt"]


def test_rows_of_gsm8k_are_apart(script, tmp_path, capsys):
    write_jsonl(
        tmp_path / "train.jsonl",
        [
            {
                "question": f"Al has {n} pens and {n + 31} {chr(77 + n)}s. How many?",
                "answer": f"{n}+{n + 31}=<<{n}+{n + 31}={2 * n + 31}>>{2 * n + 31}"
                f"\n#### {2 * n + 31}",
            }
            for n in range(20, 40)
        ],
    )
    arguments = ["gsm8k", "--data", str(tmp_path), "--output", str(tmp_path), "--workers", "1"]
    script.main([*arguments, "--seed", "3"])
    counts = json.loads(capsys.readouterr().out)
    files = {
        name: {row["prompt"] for row in read(tmp_path / f"gsm8k.{name}.jsonl")}
        for name in ("train", "originals", "kept_aside", "new_numbers")
    }
    assert {name: counts[name] for name in files} == {
        name: len(read(tmp_path / f"gsm8k.{name}.jsonl")) for name in files
    }
    assert files["originals"] < files["train"]
    assert not files["train"] & (files["kept_aside"] | files["new_numbers"])
    assert len(files["kept_aside"]) == 2
    assert counts["variants"] + counts["originals"] == counts["train"]
    assert (counts["seed"], counts["variants with faults"]) == (3, 0)
    [row, *_] = read(tmp_path / "gsm8k.train.jsonl")
    assert row["prompt"].startswith("Question: Al has")
    assert row["prompt"].endswith("\nAnswer:")
    assert "<<" not in row["response"]


def test_a_users_turn_opens_as_the_template_writes_it(script, tmp_path, capsys):
    write_tokenizer(tmp_path / "model", chat_template=TEMPLATE)
    script.main(["chat-prompts", "--model", str(tmp_path / "model"), "--output", str(tmp_path)])
    [row] = read(tmp_path / "turn_prompts.jsonl")
    assert row == {"prompt": "<s>system: You are a helpful AI.\n<user>"}
    assert json.loads(capsys.readouterr().out)["opening"] == row["prompt"]
    write_tokenizer(tmp_path / "plain")
    with pytest.raises(SystemExit, match="no chat template"):
        script.chat_turns.opening_of_user_turn(Tokenizer.load(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("How do I make a good cup of tea?", None),
        ("Can you help me plan a trip to Rome? I\u2019d like to see the old town.", None),
        ("Write a poem about the sea.", None),
        ("", "empty"),
        ("Thanks!", "too short"),
        ("what is the " * 120, "too long"),
        ("How do I <|im_start|> do it?", "special token"),
        ("You are a helpful AI assistant named SmolLM.", "an assistant's words"),
        ("Hello, how can I help you with this today?", "an assistant's words"),
        ("What is it?\nAnswer: it is a thing of the past.", "an assistant's words"),
        ("Resumen en castellano: ciudades grandes del norte", "not English"),
        ("\u4f60\u597d how are you, can you help me with this?", "not English"),
        ("{'a': 1, 'b': [2, 3]} == {'is': 4} || the", "not English"),
        ("what is it that " * 6, "goes in circles"),
    ],
)
def test_turns_that_are_not_fit_to_be_asked(script, text, reason):
    assert script.chat_turns.why_unfit(text.strip()) == reason


def test_turns_are_filtered_and_held_out(script, tmp_path, capsys):
    good = [
        "Can you tell me the best thing about tea, please?",
        "What should I know before I buy bread for my uncle Bob?",
        "Write a short poem about the old town where I was born.",
        "How do I teach my dog to sit when I tell him to?",
        "I have been asked to plan a party. Where do I begin?",
    ]
    rows = [{"response": turn, "finish_reason": "eos"} for turn in good]
    rows += [
        {"response": good[0].upper(), "finish_reason": "eos"},
        {"response": "Tell me how it is that I can", "finish_reason": "length"},
        {"response": None, "finish_reason": "eos"},
    ]
    write_jsonl(tmp_path / "turns.jsonl", rows)
    arguments = ["--turns", str(tmp_path / "turns.jsonl"), "--held-out", "2", "--seed", "5"]
    script.main(["chat-filter", *arguments, "--output", str(tmp_path)])
    counts = json.loads(capsys.readouterr().out)
    assert counts["dropped"] == {"near duplicate": 1, "not ended": 1, "empty": 1}
    assert (counts["sampled"], counts["chat.train"], counts["chat.held_out"]) == (8, 3, 2)
    turns = [read(tmp_path / f"chat.{name}.jsonl") for name in ("train", "held_out")]
    assert sorted(row["prompt"] for part in turns for row in part) == sorted(good)
    script.main(["chat-filter", *arguments, "--output", str(tmp_path / "again")])
    assert read(tmp_path / "again" / "chat.held_out.jsonl") == turns[1]


def test_questions_of_a_model_join_those_to_train_on(script, tmp_path, capsys):
    for split, question in (("train", "Who ?"), ("validation", "When ?"), ("test", "Where ?")):
        write_jsonl(tmp_path / f"advising.{split}.jsonl.gz", [{"question": question, "sql": "S"}])
    asked = [
        ("Why ?", "stop"), ("who ?", "stop"), ("Why ?", "stop"), (" WHEN ?", "stop"),
        ("Where ?", "stop"), ("How does", "length"), ("  ", "stop"),
    ]  # fmt: skip
    rows = [{"response": text, "finish_reason": reason} for text, reason in asked]
    write_jsonl(tmp_path / "asked.jsonl", rows)
    write_jsonl(tmp_path / "out" / "advising.train.jsonl", [{"prompt": "SQL\nWho ?"}])
    script.main(
        ["sql-questions", "--asked", str(tmp_path / "asked.jsonl"), "--data", str(tmp_path),
         "--output", str(tmp_path / "out")]
    )  # fmt: skip
    prompts = [row["prompt"] for row in read(tmp_path / "out" / "advising.prompts.jsonl")]
    assert [prompt.splitlines()[1] for prompt in prompts] == ["Who ?", "Why ?"]
    counts = json.loads(capsys.readouterr().out)
    assert counts["dropped"] == {"asked before": 2, "kept aside": 2, "not ended": 2}


def test_a_conversation_goes_on_with_a_second_turn(script, tmp_path):
    write_tokenizer(tmp_path / "model", chat_template=TEMPLATE)
    answers = [
        {"prompt": "Who are you ?", "response": "A bot.", "finish_reason": "stop", "row": 1},
        {"prompt": "Count to 9.", "response": "1 2 3", "finish_reason": "length", "row": 2},
    ]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    out = str(tmp_path / "out")
    script.main(
        ["chat-next", "--model", str(tmp_path / "model"), "--output", out,
         "--answers", str(tmp_path / "answers.jsonl")]
    )  # fmt: skip
    (row,) = read(tmp_path / "out" / "next_prompts.jsonl")
    assert row["prompt"].endswith("<user>Who are you ?</user><assistant>A bot.</assistant><user>")
    turns = ["And where do you come from?", "x"]
    write_jsonl(
        tmp_path / "turns.jsonl",
        [{**row, "response": turn, "finish_reason": "stop"} for turn in turns],
    )
    script.main(["chat-next-filter", "--turns", str(tmp_path / "turns.jsonl"), "--output", out])
    (row,) = read(tmp_path / "out" / "chat.next.jsonl")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user"]
    final = {"role": "assistant", "content": "From here."}
    write_jsonl(
        tmp_path / "second.jsonl",
        [
            {
                "messages": [*row["messages"], final],
                "response": "From here.",
                "finish_reason": "stop",
            }
        ],
    )
    script.main(
        ["own", "--answers", str(tmp_path / "answers.jsonl"), str(tmp_path / "second.jsonl"),
         "--name", "chat", "--output", out]
    )  # fmt: skip
    own = [row["messages"] for row in read(tmp_path / "out" / "chat.own.jsonl")]
    assert [len(messages) for messages in own] == [2, 4]
    assert all(messages[-1]["role"] == "assistant" for messages in own)
    assert json.loads((tmp_path / "out" / "own-chat.json").read_text())["not ended"] == 1


def test_answers_that_go_in_circles_can_be_left_out(script, tmp_path):
    texts = [
        "Rome has a forum, a river and seven hills. Take the bus to the old town.",
        "The old town is old. " * 8,
        "* Start with the basics:\n\n" * 20,
    ]
    rows = [{"prompt": "Rome?", "response": text, "finish_reason": "stop"} for text in texts]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    for more, kept in (((), 3), (("--no-circles",), 1)):
        script.main(
            ["own", "--answers", str(tmp_path / "answers.jsonl"), "--name", "chat",
             "--output", str(tmp_path), *more]
        )  # fmt: skip
        assert len(read(tmp_path / "chat.own.jsonl")) == kept
    assert json.loads((tmp_path / "own-chat.json").read_text())["go in circles"] == 2

"""Evaluations from end to end on tiny models: results, and what happens when they are cut short."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import replace

import pytest
from tests.unit.evaluation.eval_stand_ins import (
    ENVIRONMENT,
    TEMPLATE,
    Letters,
    Loader,
    make_evaluation,
)

from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.policy import changed_policy
from d2f.engine.request import Request
from d2f.errors import ConfigError
from d2f.evaluation import eval_score, eval_speed
from d2f.testing import tiny_model
from d2f.text import Tokenizer

KEYS = [
    "index", "id", "prompt_sha256", "gold_sha256", "num_prompt_tokens", "token_ids", "text",
    "answer", "correct", "reason", "metrics", "num_tokens", "num_decoded_tokens",
    "num_forwards", "num_prefill_forwards", "num_query_tokens", "seconds", "finish_reason", "error",
]  # fmt: skip
ROWS = ("pipelined", "vanilla", "autoregressive")


def read_records(folder, row="pipelined", name="problems.jsonl"):
    text = (folder / "out" / row / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_summary(folder, row="pipelined"):
    return json.loads((folder / "out" / row / "summary.json").read_text(encoding="utf-8"))


def timeless(value):
    """Without what differs from run to run."""
    if isinstance(value, dict):
        times = ("second", "millisecond", "environment")
        return {k: timeless(v) for k, v in value.items() if not any(t in k for t in times)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def by_index(records):
    return sorted((timeless(record) for record in records), key=lambda record: record["index"])


class Interrupting:
    """Interrupts as the row's so many-th answer is told."""

    def __init__(self, row, done):
        self.at = (row, done)

    def progress(self, row, done, total, text):
        if row == self.at[0] and done >= self.at[1]:
            raise KeyboardInterrupt

    def note(self, text):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the results of a whole run, and what the run returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, make_evaluation(folder, speed=True).run()


def test_a_run_writes_a_line_for_each_problem(finished):
    folder, _ = finished
    for row in ROWS:
        records = read_records(folder, row)
        assert [list(record) for record in records] == [KEYS] * 7
        assert sorted(record["index"] for record in records) == list(range(7))
    [first] = [record for record in read_records(folder) if record["index"] == 0]
    model, loader = tiny_model("llada", seed=3), Loader(folder / "tokenizer")
    prompt = loader.tokenizer.encode("Say 0, then stop.")
    assert first["prompt_sha256"] == hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
    engine = Engine(model, EngineConfig(max_batch_size=1))
    policy = changed_policy(model.spec, {"block_size": 8, "add_threshold": 0.2})
    [result] = engine.generate([Request(prompt_ids=prompt, max_new_tokens=12, policy=policy)])
    assert first["token_ids"] == result.token_ids
    assert first["text"] == loader.tokenizer.decode(result.token_ids)
    assert first["num_tokens"] == len(result.token_ids)
    assert first["num_forwards"] == result.num_forwards
    assert first["num_query_tokens"] == result.num_query_tokens
    assert first["correct"] == ("e" in first["text"])
    assert first["finish_reason"] == result.finish_reason
    assert first["error"] is None


def test_a_summary_says_all_that_is_needed_to_repeat_it(finished):
    folder, returned = finished
    summary = read_summary(folder)
    assert returned[0] == summary
    assert [row["row"] for row in returned] == list(ROWS)
    score = summary["score"]
    records = {record["index"]: record for record in read_records(folder)}
    assert score["correct"] == "".join(str(int(records[i]["correct"])) for i in range(7))
    assert score["num_correct"] == score["correct"].count("1")
    assert score["metrics"].keys() == {"has_e", "length"}
    assert score["metrics"]["has_e"] == pytest.approx(score["score"])
    speed = summary["speed"]
    assert (speed["num_problems"], speed["num_runs"], speed["batch_size"]) == (3, 2, 1)
    assert speed["tokens_per_second"]["lowest"] > 0
    assert speed["decode_tokens_per_second"]["median"] > 0
    assert read_summary(folder, "vanilla")["speed"]["decode_tokens_per_second"] is None
    assert summary["policy"]["add_threshold"] == 0.2
    assert read_summary(folder, "vanilla")["policy"] is None
    assert read_summary(folder, "vanilla")["options"] == {"num_steps": 6}
    assert summary["environment"] == ENVIRONMENT
    assert summary["recipe"]["rows"][0]["policy"] == {"block_size": 8, "add_threshold": 0.2}
    assert {
        "format": 1, "row": "pipelined", "method": "pipelined", "experiment": "methods",
        "family": "tiny", "test_set": "letters", "task": "letters", "simulated": None,
        "labels": {"add_threshold": 0.2}, "strategy": "pipelined", "max_new_tokens": 12,
        "num_fewshot": None, "stop": [], "chat_template": False, "grid": None,
        "recipe_file": "recipe.toml",
    }.items() <= summary.items()  # fmt: skip


def test_speed_has_a_line_for_each_problem_and_round(finished):
    folder, _ = finished
    for row in ROWS:
        lines = read_records(folder, row, "speed.jsonl")
        assert [(line["round"], line["index"]) for line in lines] == [
            (number, index) for number in range(2) for index in range(3)
        ]
        of = {record["index"]: record for record in read_records(folder, row)}
        for line in lines:
            assert line["num_tokens"] == of[line["index"]]["num_tokens"]
            assert line["correct"] == of[line["index"]]["correct"]
            assert line["decode_seconds"] <= line["seconds"]


def test_a_finished_run_measures_nothing_again(finished, monkeypatch):
    folder, returned = finished
    monkeypatch.setattr(eval_score, "Answering", None)
    monkeypatch.setattr(eval_speed, "take_turns", None)
    assert make_evaluation(folder, speed=True).run() == returned
    # A recipe that says other things about the same answers gets them, under their new names.
    summaries = make_evaluation(folder, "family=other", "rows.vanilla.label=V", speed=True).run()
    assert summaries[1]["label"] == "V"
    assert summaries[1]["score"] == returned[1]["score"]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_cut_at_any_byte_goes_on(finished, tmp_path, seed):
    folder, returned = finished
    draw = random.Random(seed)
    (tmp_path / "out").mkdir()
    for row in ROWS:
        source, target = folder / "out" / row, tmp_path / "out" / row
        target.mkdir()
        for name in ("settings.json", "problems.jsonl", "speed.jsonl"):
            content = (source / name).read_bytes()
            cut = len(content) if name == "settings.json" else draw.randrange(len(content))
            (target / name).write_bytes(content[:cut])
    kept = by_index(whole_lines(tmp_path / "out/pipelined/problems.jsonl"))
    summaries = make_evaluation(tmp_path, speed=True).run()
    for row in ROWS:
        assert by_index(read_records(tmp_path, row)) == by_index(read_records(folder, row))
        assert len(read_records(tmp_path, row, "speed.jsonl")) == 6
    # What was there stays where it was, its times too.
    assert by_index(read_records(tmp_path)[: len(kept)]) == kept
    for new, old in zip(summaries, returned, strict=True):
        new["recipe"]["output"] = old["recipe"]["output"]
        assert timeless(new) == timeless(old)


def whole_lines(path):
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


@pytest.mark.parametrize(("row", "done"), [("pipelined", 3), ("vanilla", 4), ("vanilla speed", 1)])
def test_an_interrupted_run_keeps_what_it_has(finished, tmp_path, row, done):
    evaluation = make_evaluation(tmp_path, speed=True)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(Interrupting(row, done))
    name = row.split()[0]
    if row == name:
        assert len(read_records(tmp_path, name)) >= done
        assert not (tmp_path / "out" / name / "summary.json").exists()
    else:
        # Rounds count where all rows have had their turn.
        assert len(read_records(tmp_path, "vanilla", "speed.jsonl")) == 3
    make_evaluation(tmp_path, speed=True).run()
    for name in ROWS:
        assert by_index(read_records(tmp_path, name)) == by_index(read_records(finished[0], name))
        assert len(read_records(tmp_path, name, "speed.jsonl")) == 6


def test_an_interrupt_while_judging_loses_no_answer(tmp_path):
    class Impatient(Letters):
        def judge(self, examples, texts):
            if len(self.judged) == 3:
                self.judged.append("interrupted")
                raise KeyboardInterrupt
            return super().judge(examples, texts)

    with pytest.raises(KeyboardInterrupt):
        make_evaluation(tmp_path, task=Impatient(7)).run()
    assert len(read_records(tmp_path)) >= 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("max_new_tokens=16", "max_new_tokens was 12, now 16"),
        ("rows.pipelined.policy.add_threshold=0.3", "policy was .*0.2.*now .*0.3"),
        ("rows.pipelined.temperature=1.0", "temperature was 0.0, now 1.0"),
        ("rows.vanilla.options.num_steps=7", "options was .*6.*now .*7"),
        ("score.batch_size=2", "batch_size was 3, now 2"),
        ("split=validation", 'split was "test", now "validation"'),
        ("seed=5", "problem_seed was 0, now 5"),
    ],
)
def test_results_of_other_settings_are_not_mixed(finished, override, words):
    folder, _ = finished
    with pytest.raises(ConfigError, match=f"{words}.*--fresh"):
        make_evaluation(folder, override, speed=True)


def test_results_of_other_prompts_and_models_are_not_mixed(finished):
    folder, _ = finished
    changed = Letters(7)
    changed._examples[4:] = Letters(prompts=["Say something else."] * 3)._examples
    with pytest.raises(ConfigError, match=r"another prompt of problem 4 .*--fresh"):
        make_evaluation(folder, task=changed)
    changed = Letters(7)
    changed._examples[4] = replace(changed._examples[4], response="another")
    with pytest.raises(ConfigError, match=r"another right answer to problem 4 .*--fresh"):
        make_evaluation(folder, task=changed)

    class Retrained(Loader):
        def __call__(self, name):
            loaded = super().__call__(name)
            loaded.description["sha256"] = "6" * 64
            return loaded

    with pytest.raises(ConfigError, match=r"model was .*555.*now .*666"):
        make_evaluation(folder, loader=Retrained(folder / "tokenizer"))


def test_results_without_settings_are_refused_and_fresh_forgets_them(tmp_path):
    make_evaluation(tmp_path, rows=["pipelined"]).run()
    (tmp_path / "out/pipelined/settings.json").unlink()
    with pytest.raises(ConfigError, match=r"no settings.json.*--fresh"):
        make_evaluation(tmp_path)
    [summary] = make_evaluation(tmp_path, "max_new_tokens=8", rows=["pipelined"], fresh=True).run()
    assert summary["max_new_tokens"] == 8
    assert len(read_records(tmp_path)) == 7
    (tmp_path / "out/pipelined/settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read as JSON.*--fresh"):
        make_evaluation(tmp_path)


def test_more_problems_are_added_and_fewer_are_taken(tmp_path):
    make_evaluation(tmp_path, "score.num_problems=3", rows=["pipelined"]).run()
    first = read_records(tmp_path)
    [summary] = make_evaluation(tmp_path, rows=["pipelined"]).run()
    assert read_records(tmp_path)[:3] == first
    assert summary["score"]["num_problems"] == 7
    [summary] = make_evaluation(tmp_path, "score.num_problems=2", rows=["pipelined"]).run()
    assert summary["score"]["num_problems"] == len(summary["score"]["correct"]) == 2


def test_only_the_rows_that_are_named_run_and_load(tmp_path):
    loader = Loader(tmp_path / "tokenizer")
    summaries = make_evaluation(tmp_path, loader=loader, rows=["autoregressive"]).run()
    assert [summary["row"] for summary in summaries] == ["autoregressive"]
    assert loader.loaded == ["base"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["autoregressive"]


def test_rows_that_were_timed_apart_are_timed_again_together(tmp_path):
    for name in ("pipelined", "vanilla"):
        make_evaluation(tmp_path, "speed.num_runs=1", speed=True, rows=[name]).run()
    before = read_records(tmp_path, "vanilla", "speed.jsonl")
    both = ["pipelined", "vanilla"]
    make_evaluation(tmp_path, "speed.num_runs=1", speed=True, rows=both).run()
    again = read_records(tmp_path, "vanilla", "speed.jsonl")
    assert before != again
    # And either alone is known from then on.
    make_evaluation(tmp_path, "speed.num_runs=1", speed=True, rows=["vanilla"]).run()
    assert read_records(tmp_path, "vanilla", "speed.jsonl") == again


def test_problems_that_fail_are_wrong_and_stop_nothing(tmp_path, monkeypatch):
    prompts = ["short", "x" * 600, "\ud800", "explode", "short too", "explode alone"]
    real = Engine.step

    def step(engine):
        for task in list(engine._tasks.values()):
            text = loader.tokenizer.decode(task.asked.prompt)
            if text == "explode alone" or (text == "explode" and len(engine._tasks) > 1):
                raise MemoryError("out of memory")
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    loader = Loader(tmp_path / "tokenizer")
    task = Letters(prompts=prompts)
    [summary] = make_evaluation(
        tmp_path, "speed={num_problems=6,num_runs=1}", task=task, loader=loader, rows=["pipelined"]
    ).run()
    records = by_index(read_records(tmp_path))
    errors = [record["error"] for record in records]
    assert "exceed the model's 512 positions" in errors[1]
    assert "not valid Unicode" in errors[2]
    assert errors[5] == "MemoryError: out of memory"
    assert errors[0] is errors[3] is errors[4] is None
    assert [record["correct"] for record in records if record["error"]] == [False] * 3
    assert summary["score"]["num_errors"] == 3
    assert summary["score"]["num_problems"] == 6
    assert summary["speed"]["num_problems"] == 3
    assert {line["index"] for line in read_records(tmp_path, name="speed.jsonl")} == {0, 3, 4}


def test_a_row_that_answers_nothing_has_no_speed(tmp_path):
    task = Letters(prompts=["x" * 600, "y" * 600])
    summaries = [
        make_evaluation(
            tmp_path, "speed={num_problems=2,num_runs=1}", task=task, rows=["pipelined"]
        ).run()[0]
        for _ in range(2)
    ]
    assert summaries[0]["speed"] is None
    assert summaries[0]["score"]["num_errors"] == 2
    assert summaries[0] == summaries[1]


def test_what_follows_a_stop_string_is_not_judged(tmp_path):
    free = make_evaluation(tmp_path, rows=["pipelined"]).run()
    texts = {record["index"]: record["text"] for record in read_records(tmp_path)}
    stop = texts[0][2:4]
    folder = tmp_path / "stopped"
    folder.mkdir()
    task = Letters(7, stop=(stop,))
    [summary] = make_evaluation(folder, task=task, rows=["pipelined"]).run()
    records = {record["index"]: record for record in read_records(folder)}
    assert records[0]["text"] == texts[0].split(stop)[0]
    assert records[0]["finish_reason"] == "stop"
    assert records[0]["num_tokens"] == len(records[0]["token_ids"]) < 12
    assert all(stop not in record["text"] for record in records.values())
    assert ("p0", records[0]["text"]) in task.judged
    assert summary["stop"] == [stop]
    assert summary["score"]["mean_tokens"] < free[0]["score"]["mean_tokens"]


class SpecialLoader(Loader):
    """Its tokenizer has a special token, of this id, that answers hold."""

    def __init__(self, folder, token):
        super().__init__(folder)
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text())
        vocab = content["model"]["vocab"]
        [letter] = [text for text, number in vocab.items() if number == token]
        vocab["<|im_end|>"] = vocab.pop(letter)
        like = content["added_tokens"][0]
        content["added_tokens"].append(like | {"id": token, "content": "<|im_end|>"})
        content["added_tokens"].sort(key=lambda added: added["id"])
        file.write_text(json.dumps(content))
        self.tokenizer = Tokenizer.load(folder)


@pytest.mark.parametrize("row", ["pipelined", "vanilla", "autoregressive"])
def test_a_stop_may_hold_a_special_token(tmp_path, row):
    """lm-eval's gsm8k stops at `<|im_end|>`."""
    no_ends = [f"models.{name}.replace_eos=true" for name in ("student", "base")]
    make_evaluation(tmp_path, *no_ends, rows=[row]).run()
    free = by_index(read_records(tmp_path, row))[0]
    ids = free["token_ids"]
    taken = Loader(tmp_path / "free").tokenizer.encode("Say 0, then stop.")
    place = next(n for n in range(3, len(ids)) if ids[n] not in [*taken, *ids[:n]] and ids[n] < 94)
    before = free["text"][:place]
    for stop, kept in (("<|im_end|>", before), (before[-2:] + "<|im_end|>", before[:-2])):
        folder = tmp_path / str(len(stop))
        folder.mkdir()
        loader = SpecialLoader(folder / "tokenizer", ids[place])
        task = Letters(7, stop=("Question:", stop))
        make_evaluation(folder, *no_ends, task=task, loader=loader, rows=[row]).run()
        record = by_index(read_records(folder, row))[0]
        assert record["token_ids"] == ids[: place + 1]
        assert record["num_tokens"] == place + 1
        assert (record["text"], record["finish_reason"]) == (kept, "stop")


def test_rows_and_models_may_name_ends(tmp_path):
    make_evaluation(tmp_path, "models.student.replace_eos=true", rows=["pipelined"]).run()
    free = by_index(read_records(tmp_path))[0]
    end = next(n for n in range(3, 12) if free["token_ids"][n] not in free["token_ids"][:n])
    token, letter = free["token_ids"][end], free["text"][end]
    for number, overrides in enumerate(
        (
            [f"models.student.eos=[{token}]", "models.student.replace_eos=true"],
            [f"models.student.eos=[{json.dumps(letter)}]"],
            [f"rows.pipelined.eos=[{token}]", "rows.pipelined.replace_eos=true"],
            ["models.student.eos=[5, 7]", f"rows.pipelined.eos=[{token}]"],
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        [summary] = make_evaluation(folder, *overrides, rows=["pipelined"]).run()
        record = by_index(read_records(folder))[0]
        assert record["token_ids"] == free["token_ids"][: end + 1]
        assert record["text"] == free["text"][:end]
        assert record["finish_reason"] == "eos"
        own = [] if "replace_eos" in overrides[-1] else [95]
        assert summary["eos_token_ids"] == [*own, token]
    with pytest.raises(ConfigError, match=r"row pipelined: eos 'ab' is not one token"):
        make_evaluation(tmp_path / "0", 'rows.pipelined.eos=["ab"]', rows=["pipelined"])


def test_gold_is_the_longest_answer_rounded_up_to_a_block(tmp_path):
    [summary] = make_evaluation(
        tmp_path, "max_new_tokens=gold", task=Letters(40), rows=["pipelined"]
    ).run()
    assert summary["max_new_tokens"] == 64
    with pytest.raises(ConfigError, match=r"row pipelined: .*letters has no gold answers"):
        make_evaluation(tmp_path, "max_new_tokens=gold", task=Letters(responses=False))


def test_prompts_follow_the_chat_template(tmp_path):
    loader = Loader(tmp_path / "chat", chat_template=TEMPLATE)
    row = make_evaluation(tmp_path, loader=loader)._rows[0]
    assert loader.tokenizer.decode(row.request(0).prompt_ids) == "<Say 0, then stop.>"
    task = Letters(1)
    task._examples[0] = type(task._examples[0])(
        id="p0", prompt="", messages=({"role": "user", "content": "Q"},) * 2
    )
    row = make_evaluation(tmp_path, task=task, loader=loader)._rows[0]
    assert loader.tokenizer.decode(row.request(0).prompt_ids) == "<Q><Q>"
    without = make_evaluation(tmp_path, "models.student.chat_template=false", loader=loader)
    prompt = without._rows[0].request(0).prompt_ids
    assert loader.tokenizer.decode(prompt) == "Say 0, then stop."
    with pytest.raises(ConfigError, match="row pipelined: model student has no chat template"):
        make_evaluation(tmp_path, "models.student.chat_template=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rows.autoregressive.strategy=serial", "row autoregressive: .* is autoregressive"),
        ("rows.vanilla.options={num_steps=1, block_length=4}", "row vanilla: .*num_steps"),
        ("rows.vanilla.max_new_tokens=512", "row vanilla: .*positions"),
    ],
)
def test_rows_that_their_model_cannot_do_are_refused_before_any_answer(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        make_evaluation(tmp_path, override)
    assert not (tmp_path / "out").exists()


def test_a_task_without_problems_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no problems"):
        make_evaluation(tmp_path, task=Letters(0))


def test_speed_in_batches(tmp_path):
    overrides = ("speed={num_problems=5,num_runs=2,batch_size=4}", "rows.vanilla.speed=false")
    overrides += ("rows.autoregressive.speed_batch_size=1", "rows.autoregressive.score=false")
    summaries = {s["row"]: s for s in make_evaluation(tmp_path, *overrides).run()}
    assert summaries["vanilla"]["speed"] is None
    assert summaries["autoregressive"]["score"] is None
    assert summaries["autoregressive"]["speed"]["batch_size"] == 1
    lines = read_records(tmp_path, name="speed.jsonl")
    assert len(lines) == 10
    assert len({line["seconds"] for line in lines}) == 2
    speed = summaries["pipelined"]["speed"]
    assert (speed["batch_size"], speed["num_problems"]) == (4, 5)
    total = {number: sum(x["seconds"] for x in lines if x["round"] == number) for number in (0, 1)}
    assert speed["seconds_per_problem"]["lowest"] == pytest.approx(min(total.values()) / 5)


def test_sampling_is_by_problem(tmp_path):
    task = Letters(prompts=["Say the same."] * 4)
    override = ("rows.pipelined.temperature=1.5", "score={num_problems=4,batch_size=1}")
    make_evaluation(tmp_path, *override, task=task, rows=["pipelined"]).run()
    records = read_records(tmp_path)
    assert len({record["text"] for record in records}) == 4
    assert [record["index"] for record in records] == [0, 1, 2, 3]


def test_an_output_in_a_files_place_is_refused_before_a_model_is_loaded(tmp_path):
    loader = Loader(tmp_path / "tokenizer")
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="out cannot be a folder"):
        make_evaluation(tmp_path, loader=loader)
    assert loader.loaded == []


def test_another_batch_size_of_the_speed_is_measured(tmp_path):
    make_evaluation(tmp_path, speed=True).run()
    make_evaluation(tmp_path, "speed.batch_size=2", speed=True).run()
    assert read_summary(tmp_path)["speed"]["batch_size"] == 2


def test_a_round_that_was_cut_short_does_not_count(tmp_path):
    make_evaluation(tmp_path, speed=True).run()
    file = tmp_path / "out" / "pipelined" / "speed.jsonl"
    cut = file.read_bytes().splitlines(keepends=True)[:-1]
    file.write_bytes(b"".join(cut))
    [summary, *_] = make_evaluation(tmp_path, "speed.num_runs=1", speed=True).run()
    assert summary["speed"]["num_runs"] == 1

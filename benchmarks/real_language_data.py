"""Write training data of real language: questions to SQL, GSM8K with new numbers, chat.

    python benchmarks/real_language_data.py sql --data DATA --output OUT
    python benchmarks/real_language_data.py gsm8k --data DATA --output OUT --seed 0
    python benchmarks/real_language_data.py sql-questions --asked ASKED --data DATA --output OUT
    python benchmarks/real_language_data.py chat-prompts --model MODEL --output OUT
    python benchmarks/real_language_data.py chat-filter --turns TURNS --output OUT
    python benchmarks/real_language_data.py chat-next --model MODEL --answers ANSWERS --output OUT
    python benchmarks/real_language_data.py chat-next-filter --turns TURNS --output OUT
    python benchmarks/real_language_data.py own --answers ANSWERS … --name NAME --output OUT

DATA is the folder that `d2f eval --data` takes. Each command writes JSON lines with `prompt` and
`response` (prompts in the form of the benchmarks) and a file with counts and seeds. Some commands
prepare or read texts that a model writes: `chat-prompts` and `chat-next` write the prompts from
which it samples a user's first and second turn; `sql-questions` reads questions sampled from a
model trained on `advising.questions.jsonl`; `own` reads a model's answers. `d2f generate` samples
them:

    d2f generate --model MODEL --input OUT/turn_prompts.jsonl --output TURNS \\
        --no-chat --n 6000 --temperature 1 --top-p 0.95 --max-new-tokens 128

`benchmarks/real_language.py` runs the whole.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import chat_turns
import sql_values
from number_faults import find_faults

from d2f.errors import D2FError
from d2f.evaluation.benchmark_files import read_split
from d2f.evaluation.text2sql import TEXT_TO_SQL, sql_prompt
from d2f.problems.number_variants import Collection, Variant, make_variants, strip_annotations
from d2f.problems.number_variants.variants import MOST_VARIANTS
from d2f.problems.number_variants.worked_problem import annotate

Row = Mapping[str, Any]
Counts = dict[str, Any]


def write_rows(file: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines, whole or not at all; return their number."""
    part = file.with_name(f"{file.name}.part")
    count = 0
    with part.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    part.replace(file)
    return count


def read_rows(file: Path) -> list[Row]:
    """Return the objects of a file of JSON lines."""
    rows: list[Row] = []
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(json.loads(line))
                    if not isinstance(rows[-1], dict):
                        raise SystemExit(f"{file}:{number}: expected a JSON object")
    except ValueError as error:
        raise SystemExit(f"{file}:{number}: not valid JSON: {error}") from None
    except OSError as error:
        raise SystemExit(f"cannot read {file}: {error.strerror}") from None
    return rows


def write_sql(options: argparse.Namespace) -> Counts:
    """Write training rows of both collections, with variants, and validation rows."""
    counts: Counts = {"seed": options.seed}
    for name in TEXT_TO_SQL:
        for split in ("train", "validation"):
            rows = [row for _, row in read_split(name, split, options.data)]
            if split == "train":
                made = list(sql_values.variants(rows, SQL_VARIANTS[name], options.seed))
                counts[f"{name}.variants"] = len(made)
                rows += made
            counts[f"{name}.{split}"] = write_rows(
                options.output / f"{name}.{split}.jsonl",
                ({"prompt": sql_prompt(name, row), "response": row["sql"].strip()} for row in rows),
            )
    questions = (
        {"prompt": ASK, "response": row["question"].strip()}
        for _, row in read_split("advising", "train", options.data)
    )
    counts["advising.questions"] = write_rows(
        options.output / "advising.questions.jsonl", questions
    )
    write_rows(options.output / "advising.ask.jsonl", [{"prompt": ASK}])
    return counts


ASK = "Ask a question about the course database."
"""Prompt of a model that writes questions."""
SQL_VARIANTS = {"advising": 8, "wikisql": 2}
"""Most variants of a question, with other names and numbers: more where there are few questions."""


def write_sql_questions(options: argparse.Namespace) -> Counts:
    """Write the prompts of Advising: those of the training rows, and questions of a model."""
    rows = read_rows(options.asked)
    known, unseen = (
        {
            row["question"].strip().casefold()
            for split in splits
            for _, row in read_split("advising", split, options.data)
        }
        for splits in (("train",), ("validation", "test"))
    )
    prompts = [row["prompt"] for row in read_rows(options.output / "advising.train.jsonl")]
    dropped: Counter[str] = Counter()
    for row in rows:
        question = str(row["response"]).strip()
        key = question.casefold()
        if row["finish_reason"] == "length" or not question:
            dropped["not ended"] += 1
        elif key in known:
            dropped["asked before"] += 1
        elif key in unseen:
            dropped["kept aside"] += 1
        else:
            known.add(key)
            prompts.append(sql_prompt("advising", {"question": question}))
    count = write_rows(
        options.output / "advising.prompts.jsonl", ({"prompt": prompt} for prompt in prompts)
    )
    return {"advising.prompts": count, "sampled": len(rows), "dropped": dict(dropped)}


def write_gsm8k(options: argparse.Namespace) -> Counts:
    """Write training rows (originals, variants), problems kept aside, and the second test set."""
    problems = [
        Variant(question=row["question"], answer=row["answer"])
        for _, row in read_split("gsm8k", "train", options.data)
    ]
    collection = Collection(problems=problems, seed=options.seed)
    known = collection.to_train_on()
    workers = options.workers or os.cpu_count() or 1
    make = partial(_made, options.seed)
    if workers == 1:
        made = [make(problem) for problem in known]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            made = list(pool.map(make, known, chunksize=64))
    new = collection.known_with_new_numbers()
    taken = {problem.question for problem in new}
    training = {
        variant.question: variant
        for problem, (variants, _) in zip(known, made, strict=True)
        for variant in (problem, *variants[1:])
        if variant.question not in taken
    }
    files = {
        "train": training.values(),
        "originals": known,
        "kept_aside": collection.kept_aside(),
        "new_numbers": new,
    }
    counts: Counts = {
        name: write_rows(options.output / f"gsm8k.{name}.jsonl", map(_grade_school_row, variants))
        for name, variants in files.items()
    }
    return counts | {
        "seed": options.seed,
        "problems": len(problems),
        "problems that can be varied": sum(bool(variants) for variants, _ in made),
        "left out as like kept-aside ones": len(problems) - len(known) - counts["kept_aside"],
        "variants": len(training) - len(known),
        "variants with faults": sum(faults for _, faults in made),
    }


def _made(seed: int, problem: Variant) -> tuple[list[Variant], int]:
    """Return a problem's variants and the number of those to train on that have faults.

    The first variant belongs to the test set of known problems with new numbers.
    """
    made = make_variants(problem.question, problem.answer, seed=seed, most=MOST_VARIANTS + 1)
    original = Variant(question=problem.question, answer=annotate(problem.answer))
    return made, sum(bool(find_faults(original, variant)) for variant in made[1:])


def _grade_school_row(problem: Variant) -> Row:
    return {
        # As lm-eval's task gsm8k writes it without examples.
        "prompt": f"Question: {problem.question}\nAnswer:",
        "response": strip_annotations(problem.answer),
    }


def write_chat_prompts(options: argparse.Namespace) -> Counts:
    """Write the prompt from which a model samples users' turns, as one row."""
    from d2f.text import Tokenizer

    opening = chat_turns.opening_of_user_turn(Tokenizer.load(options.model))
    rows: list[Row] = [{"prompt": opening}]
    return {
        "turn_prompts": write_rows(options.output / "turn_prompts.jsonl", rows),
        "opening": opening,
    }


def write_chat_turns(options: argparse.Namespace) -> Counts:
    """Write the turns that pass the filter, in two files: to train on and held out."""
    rows = read_rows(options.turns)
    kept, dropped = chat_turns.filter_turns(rows, column=options.column)
    train, held_out = chat_turns.split_turns(kept, num_held_out=options.held_out, seed=options.seed)
    counts: Counts = {
        f"chat.{name}": write_rows(
            options.output / f"chat.{name}.jsonl", ({"prompt": t} for t in turns)
        )
        for name, turns in (("train", train), ("held_out", held_out))
    }
    return counts | {"seed": options.seed, "sampled": len(rows), "dropped": dropped}


def write_chat_next(options: argparse.Namespace) -> Counts:
    """Write the prompts from which a model samples the user's reply to each of its answers."""
    from d2f.text import Tokenizer

    tokenizer = Tokenizer.load(options.model)
    rows = [row for row in read_rows(options.answers) if _ended(row)]
    conversations = [
        [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows[: options.most]
    ]
    prompts = (
        {"prompt": chat_turns.opening_of_user_turn(tokenizer, said), "messages": said}
        for said in conversations
    )
    return {"next_prompts": write_rows(options.output / "next_prompts.jsonl", prompts)}


def write_chat_next_turns(options: argparse.Namespace) -> Counts:
    """Write conversations that end with a user's second turn which passes the filter."""
    dropped: Counter[str] = Counter()
    conversations: list[Row] = []
    for row in read_rows(options.turns):
        text, reason = chat_turns.read_turn(row)
        if reason is None:
            turn = {"role": "user", "content": text}
            conversations.append({"messages": [*row["messages"], turn]})
        else:
            dropped[reason] += 1
    count = write_rows(options.output / "chat.next.jsonl", conversations)
    return {"chat.next": count, "dropped": dict(dropped.most_common())}


def write_own(options: argparse.Namespace) -> Counts:
    """Write a model's finished answers as training rows."""
    rows = [row for file in options.answers for row in read_rows(file)]
    kept = ended = [row for row in rows if _ended(row)]
    if options.no_circles:
        kept = [row for row in ended if not chat_turns.goes_in_circles(str(row["response"]))]
    own = (
        {
            "messages": row["messages"]
            if "messages" in row
            else [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in kept
    )
    count = write_rows(options.output / f"{options.name}.own.jsonl", own)
    circles = {"go in circles": len(ended) - count} if options.no_circles else {}
    return {f"{options.name}.own": count, "not ended": len(rows) - len(ended), **circles}


def _ended(row: Row) -> bool:
    return row["finish_reason"] != "length" and bool(str(row["response"]).strip())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, does: Callable[[argparse.Namespace], Counts], about: str) -> Any:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--output", type=Path, required=True, help="folder to write to")
        command.set_defaults(does=does)
        return command

    sql = add("sql", write_sql, "rows of Advising and WikiSQL")
    gsm8k = add("gsm8k", write_gsm8k, "rows of GSM8K, with variants of other numbers")
    asked = add("sql-questions", write_sql_questions, "Advising's questions and a model's own")
    asked.add_argument("--asked", type=Path, required=True, help="what d2f generate wrote")
    for command in (sql, gsm8k, asked):
        command.add_argument("--data", required=True, help="folder of the public files")
    gsm8k.add_argument("--workers", type=int, help="processes; the rows are the same with any")
    prompts = add("chat-prompts", write_chat_prompts, "what a model writes users' turns from")
    prompts.add_argument("--model", required=True, help="folder or hub id with a chat template")
    chat = add("chat-filter", write_chat_turns, "sampled users' turns that are fit to be asked")
    chat.add_argument("--turns", type=Path, required=True, help="what d2f generate wrote")
    chat.add_argument("--column", default="response", help="the column of the turns")
    chat.add_argument("--held-out", type=int, default=200, help="turns that are not trained on")
    after = add("chat-next", write_chat_next, "what a model writes users' second turns from")
    after.add_argument("--model", required=True, help="folder or hub id with a chat template")
    after.add_argument("--answers", type=Path, required=True, help="answers to the first turns")
    after.add_argument("--most", type=int, default=5000, help="conversations that go on")
    second = add("chat-next-filter", write_chat_next_turns, "second turns that are fit to be asked")
    second.add_argument("--turns", type=Path, required=True, help="what d2f generate wrote")
    own = add("own", write_own, "a model's own answers, as conversations to train on")
    own.add_argument("--answers", type=Path, nargs="+", required=True, help="of d2f generate")
    own.add_argument("--name", required=True, help="of the file: NAME.own.jsonl")
    own.add_argument(
        "--no-circles", action="store_true", help="leave out answers that repeat themselves"
    )
    for command in (sql, gsm8k, chat):
        command.add_argument("--seed", type=int, default=0, help="of what is drawn and kept aside")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        counts = options.does(options)
    except D2FError as error:
        raise SystemExit(str(error)) from None
    text = json.dumps(counts, indent=1, ensure_ascii=False)
    name = "-".join((options.command, *([options.name] if "name" in options else [])))
    (options.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

"""Training data of real language: questions to SQL, GSM8K with new numbers, prompts for chat.

    python benchmarks/real_language_data.py sql --data DATA --output OUT
    python benchmarks/real_language_data.py gsm8k --data DATA --output OUT --seed 0
    python benchmarks/real_language_data.py chat-prompts --model MODEL --output OUT
    python benchmarks/real_language_data.py chat-filter --turns OUT/turns.jsonl --output OUT

DATA is the folder that `d2f eval --data` takes. Each command writes JSON lines with `prompt` and
`response` (prompts as the benchmarks put them) and a file NAME.json with counts and seeds. Between
the two commands for chat, the model writes the user's turns itself:

    d2f generate --model MODEL --input OUT/turn_prompts.jsonl --output OUT/turns.jsonl \\
        --no-chat --n 6000 --temperature 1 --top-p 0.95 --max-new-tokens 128
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import chat_turns

from d2f.errors import D2FError
from d2f.evaluation.benchmark_files import read_split
from d2f.problems.grade_school import grade_school_prompt
from d2f.problems.number_variants import Collection, Made, Variant, strip_annotations
from d2f.problems.number_variants.annotate import annotate
from d2f.problems.number_variants.faults import find_faults
from d2f.problems.text2sql import TEXT_TO_SQL, sql_prompt

Row = Mapping[str, Any]
Counts = dict[str, Any]


def write_rows(file: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines, whole or not at all; gives their number."""
    part = file.with_name(f"{file.name}.part")
    count = 0
    with part.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    part.replace(file)
    return count


def read_rows(file: Path) -> list[Row]:
    """The objects of a file of JSON lines."""
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
    """Training and validation rows of both collections."""
    counts: Counts = {}
    for name in TEXT_TO_SQL:
        for split in ("train", "validation"):
            rows = [row for _, row in read_split(name, split, options.data)]
            counts[f"{name}.{split}"] = write_rows(
                options.output / f"{name}.{split}.jsonl",
                ({"prompt": sql_prompt(name, row), "response": row["sql"].strip()} for row in rows),
            )
    return counts


def write_gsm8k(options: argparse.Namespace) -> Counts:
    """Training rows (originals and variants), the kept-aside problems and the second test set."""
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
        for one, _ in made
        for variant in (one.original, *one.training)
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
        "problems that can be varied": sum(one.new_numbers is not None for one, _ in made),
        "left out as like kept-aside ones": len(problems) - len(known) - counts["kept_aside"],
        "variants": len(training) - len(known),
        "variants with faults": sum(faults for _, faults in made),
    }


def _made(seed: int, problem: Variant) -> tuple[Made, int]:
    """A problem's variants, and how many of them the checker finds fault with."""
    made = Collection(problems=(), seed=seed).make(problem)
    original = Variant(question=problem.question, answer=annotate(problem.answer))
    return made, sum(bool(find_faults(original, variant)) for variant in made.training)


def _grade_school_row(problem: Variant) -> Row:
    return {
        "prompt": grade_school_prompt(problem.question),
        "response": strip_annotations(problem.answer),
    }


def write_chat_prompts(options: argparse.Namespace) -> Counts:
    """What the model goes on from to write users' turns: a row to be answered many times."""
    from d2f.text import Tokenizer

    opening = chat_turns.opening_of_user_turn(Tokenizer.load(options.model))
    rows: list[Row] = [{"prompt": opening}]
    return {
        "turn_prompts": write_rows(options.output / "turn_prompts.jsonl", rows),
        "opening": opening,
    }


def write_chat_turns(options: argparse.Namespace) -> Counts:
    """The turns that are fit to be asked, in two files: to train on and held out."""
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, does: Callable[[argparse.Namespace], Counts], about: str) -> Any:
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--output", type=Path, required=True, help="folder to write to")
        command.set_defaults(does=does)
        return command

    sql = add("sql", write_sql, "rows of Advising and WikiSQL")
    gsm8k = add("gsm8k", write_gsm8k, "rows of GSM8K, with variants of other numbers")
    for command in (sql, gsm8k):
        command.add_argument("--data", required=True, help="folder of the public files")
    gsm8k.add_argument("--workers", type=int, help="processes; the rows are the same with any")
    prompts = add("chat-prompts", write_chat_prompts, "what a model writes users' turns from")
    prompts.add_argument("--model", required=True, help="folder or hub id with a chat template")
    chat = add("chat-filter", write_chat_turns, "sampled users' turns that are fit to be asked")
    chat.add_argument("--turns", type=Path, required=True, help="what d2f generate wrote")
    chat.add_argument("--column", default="response", help="the column of the turns")
    chat.add_argument("--held-out", type=int, default=200, help="turns that are not trained on")
    for command in (gsm8k, chat):
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
    (options.output / f"{options.command}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

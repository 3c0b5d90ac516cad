"""Load lm-eval's benchmarks as tasks, with the official prompts, stops, filters and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, counted
from d2f.evaluation.harness_scoring import CodeScorer, MathScorer, cut, score_texts, stop_strings
from d2f.evaluation.harness_source import (
    DEFINITIONS,
    build_part,
    find_lm_eval,
    part_of_rows,
    quiet,
    read_definitions,
)
from d2f.evaluation.task import CLEANED_TASKS, Example, Task, Verdict
from d2f.problems.number_variants import Collection, Variant, strip_annotations
from d2f.problems.number_variants.variants import NUM_KNOWN

HARNESS_TASKS = tuple(DEFINITIONS)
GSM8K_VARIANTS = "gsm8k-variants"
FEWSHOT_SEED = 1234
"""Seed with which lm-eval draws the examples of few-shot prompts, unless told otherwise."""
_VALIDATION: Mapping[str, str] = {
    "gsm8k": "train",
    "gsm8k_cot": "train",
    "minerva_math": "train",
    "mbpp": "validation",
}
"""The split to choose settings on; the other tasks have none."""
_GOLD: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "gsm8k": lambda doc: str(doc["answer"]),
    "gsm8k_cot": lambda doc: str(doc["answer"]),
    GSM8K_VARIANTS: lambda doc: str(doc["answer"]),
    "minerva_math": lambda doc: str(doc["solution"]),
    "minerva_math500": lambda doc: str(doc["solution"]),
    "humaneval": lambda doc: str(doc["canonical_solution"]),
    "mbpp": lambda doc: f"{doc['code']}\n[DONE]",
}
Scorer = Callable[[Any, Sequence[Any], Sequence[str]], list[Verdict]]
"""(lm-eval's task, problems, texts) to verdicts."""


def load_harness_task(
    name: str,
    *,
    num_examples: int | None = None,
    split: str = "test",
    data: str | Path | None = None,
    offline: bool = False,
    num_fewshot: int | None = None,
    clean_up: str = "ours",
) -> Task:
    """Load one of lm-eval's benchmarks, one of `HARNESS_TASKS`; arguments as in `load_task`.

    Raises:
        ConfigError: lm-eval is missing, a file is missing or broken, the hub does not give the
            data, there is no such split, or there are not so many examples for the prompt.

    Example:
        `load_harness_task("gsm8k", data="data", num_examples=100)`
    """
    code_scorer = CodeScorer(clean_up) if name in CLEANED_TASKS else None
    definitions = read_definitions(name, code_scorer)
    for definition in definitions:
        if split == "validation":
            if name not in _VALIDATION:
                raise ConfigError(
                    f"the task {name} has no validation problems; choose settings on "
                    f"one that has: {', '.join(_VALIDATION)}"
                )
            definition["test_split"] = _VALIDATION[name]
        if num_fewshot == 0:
            # So that nobody asks for a split that is not used.
            definition.update(num_fewshot=0, fewshot_split=None, training_split=None)
    if data is not None:
        # All subjects share the one file and, but for the data, the one definition.
        del definitions[1:]
    parts = [build_part(name, definition, data, offline) for definition in definitions]
    shots = _num_shots(name, parts[0], num_fewshot)
    scorer: Scorer = code_scorer or score_texts
    if name.startswith("minerva"):
        scorer = MathScorer(find_lm_eval(name) / "tasks" / "minerva_math" / "utils.py")
    return _task(name, parts, shots, num_examples, scorer)


def _task(
    name: str, parts: Sequence[Any], num_fewshot: int, num_examples: int | None, score: Scorer
) -> Task:
    """Make a task of lm-eval's parts.

    The stop strings are the definition's, but for HumanEval none, as in the paper's scripts: models
    that chat answer with fenced blocks, which those strings would cut to pieces.
    """
    stop = () if name == "humaneval" else stop_strings(parts[0])
    examples: list[Example] = []
    with quiet():
        for number, part in enumerate(parts):
            room = len(part.task_docs)
            if num_examples is not None:
                room = min(room, num_examples - len(examples))
            docs = [part.task_docs[i] for i in range(room)]
            plain, chats = (_contexts(part, docs, num_fewshot, chat=chat) for chat in (False, True))
            examples += [
                Example(
                    id=str(doc.get("task_id") or doc.get("unique_id") or len(examples) + i),
                    prompt=prompt,
                    messages=tuple(messages),
                    response=_GOLD[name](doc),
                    source=(number, doc),
                )
                for i, (doc, prompt, messages) in enumerate(zip(docs, plain, chats, strict=True))
            ]

    def mark(examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        """Mark answers as lm-eval does, cut at the stop strings wherever they were not yet."""
        verdicts: dict[int, Verdict] = {}
        for number, part in enumerate(parts):
            here = [i for i, example in enumerate(examples) if example.source[0] == number]
            docs = [examples[i].source[1] for i in here]
            with quiet():
                marked = score(part, docs, [cut(texts[i], stop) for i in here])
            verdicts.update(zip(here, marked, strict=True))
        return [verdicts[i] for i in range(len(examples))]

    return Task(name=name, problems=examples, mark=mark, stop=stop, num_fewshot=num_fewshot)


def _contexts(part: Any, docs: Sequence[Any], num_fewshot: int, *, chat: bool) -> list[Any]:
    # Examples are drawn anew for each problem, one after the other from one stream.
    part.set_fewshot_seed(FEWSHOT_SEED)
    form: dict[str, Any] = {"gen_prefix": None}
    if chat:
        form |= {
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "chat_template": lambda messages, add_generation_prompt: messages,
        }
    return [part.fewshot_context(doc, num_fewshot, **form) for doc in docs]


def _num_shots(name: str, part: Any, wanted: int | None) -> int:
    official: int = part.config.num_fewshot or 0
    if wanted is None:
        return official
    if official == 0 and wanted > 0:
        raise ConfigError(
            f"the task {name} has no examples for its prompt; leave num_fewshot out, or say 0"
        )
    # One more where the problem itself may be among them.
    own = part.fewshot_cfg.split is not None and part.fewshot_cfg.split == part.config.test_split
    most = len(part.sampler.df) - own if wanted else 0
    if wanted > most:
        raise ConfigError(
            f"num_fewshot {wanted}: the task {name} has {counted(most, 'example')} for its prompt"
        )
    return wanted


def load_gsm8k_variants(
    *,
    num_examples: int | None = None,
    seed: int = 0,
    split: str = "test",
    data: str | Path | None = None,
    offline: bool = False,
) -> Task:
    """Load a part of GSM8K's training problems, put and judged as lm-eval's gsm8k without examples.

    The split "test" has 1,000 known problems with numbers that no training row has, and
    "validation" the 500 problems that neither training rows nor variants are made of. `seed` must
    be that of the training data; the other arguments are those of `load_task`.

    Raises:
        ConfigError: lm-eval is missing, or the training problems cannot be had.

    Example:
        `load_gsm8k_variants(data="data", split="validation", num_examples=100)`
    """
    [definition] = read_definitions("gsm8k")
    definition |= {
        "test_split": "train", "num_fewshot": 0, "fewshot_split": None, "training_split": None,
    }  # fmt: skip
    docs = build_part("gsm8k", definition, data, offline).task_docs
    collection = Collection(
        problems=[Variant(question=doc["question"], answer=doc["answer"]) for doc in docs],
        seed=seed,
    )
    if split == "validation":
        chosen = collection.kept_aside()[:num_examples]
    else:
        chosen = collection.known_with_new_numbers(min(num_examples or NUM_KNOWN, NUM_KNOWN))
    rows = [
        (
            f"{GSM8K_VARIANTS}:{number}",
            {"question": problem.question, "answer": strip_annotations(problem.answer)},
        )
        for number, problem in enumerate(chosen)
    ]
    part = part_of_rows(definition, {"train": rows})
    return _task(GSM8K_VARIANTS, [part], 0, num_examples, score_texts)

"""GSM8K's training problems as two benchmarks: known ones with new numbers, and kept-aside ones."""

from __future__ import annotations

from pathlib import Path

from d2f.evaluation.harness import HarnessTask
from d2f.evaluation.harness_answers import TextScorer
from d2f.evaluation.harness_definitions import read_definitions
from d2f.evaluation.harness_parts import build_part, part_of_rows
from d2f.problems.number_variants import Collection, Variant, strip_annotations
from d2f.problems.number_variants.collection import NUM_KNOWN

GSM8K_VARIANTS = "gsm8k-variants"


def load_gsm8k_variants(
    *,
    num_examples: int | None = None,
    seed: int = 0,
    split: str = "test",
    data: str | Path | None = None,
    offline: bool = False,
) -> HarnessTask:
    """Load a part of GSM8K's training problems, put and judged as lm-eval's gsm8k without examples.

    Args:
        num_examples: The first so many problems; None, or more than there are: all.
        seed: That of the training data, or the parts are others than those left out of it.
        split: "test": 1,000 known problems with numbers that no training row has; "validation":
            the 500 problems that neither training rows nor variants are made of, to choose
            settings on.
        data: A folder of the public files; None: from the hub.
        offline: Ask no network.

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
    return HarnessTask(
        GSM8K_VARIANTS,
        [part],
        num_fewshot=0,
        num_examples=num_examples,
        scorer=TextScorer("flexible-extract"),
    )

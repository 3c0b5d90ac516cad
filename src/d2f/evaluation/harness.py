"""lm-eval's benchmarks as tasks: the official prompts, stop strings, filters and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from d2f.errors import ConfigError, counted
from d2f.evaluation.code_scoring import CodeEval, CodeScorer
from d2f.evaluation.harness_answers import TextScorer, cut, stop_strings
from d2f.evaluation.harness_definitions import (
    CODE_TASKS,
    DEFINITIONS,
    find_lm_eval,
    quiet,
    read_definitions,
)
from d2f.evaluation.harness_parts import build_part
from d2f.evaluation.math_scoring import MathScorer
from d2f.evaluation.task import Example, Verdict

HARNESS_TASKS = tuple(DEFINITIONS)
FEWSHOT_SEED = 1234
"""With which lm-eval draws the examples of few-shot prompts, unless told otherwise."""
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
    "gsm8k-variants": lambda doc: str(doc["answer"]),
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
) -> HarnessTask:
    """Load one of lm-eval's benchmarks.

    Args:
        name: One of `HARNESS_TASKS`.
        num_examples: The first so many problems; None, or more than there are: all.
        split: "test", or "validation": other problems, to choose settings on.
        data: A folder of the public files (`benchmark_files.FILES`); None: from the hub.
        offline: Ask no network: what the hub's cache has will do.
        num_fewshot: Examples in the prompt; None: as many as the benchmark demands.
        clean_up: How a program is found in an answer; "ours" or "paper" (`CodeScorer`).

    Raises:
        ConfigError: lm-eval is missing, a file is missing or broken, the hub does not give the
            data, there is no such split, or there are not so many examples for the prompt.

    Example:
        `load_harness_task("gsm8k", data="data", num_examples=100)`
    """
    code_eval = CodeEval() if name in CODE_TASKS else None
    definitions = read_definitions(name, code_eval)
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
    return HarnessTask(
        name,
        parts,
        num_fewshot=shots,
        num_examples=num_examples,
        scorer=_scorer(name, code_eval, clean_up),
    )


class HarnessTask:
    """One of lm-eval's benchmarks.

    `stop` is the definition's, but for HumanEval none, as in the paper's scripts: models that chat
    answer with fenced blocks, which those strings would cut to pieces.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Any],
        *,
        num_fewshot: int,
        num_examples: int | None,
        scorer: Scorer,
    ) -> None:
        self._name = name
        self._parts = parts
        self._num_fewshot = num_fewshot
        self._num_examples = num_examples
        self._score = scorer
        self._examples: list[Example] | None = None

    @property
    def name(self) -> str:
        """As lm-eval names it."""
        return self._name

    @property
    def num_fewshot(self) -> int:
        """Examples in each prompt."""
        return self._num_fewshot

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        if self._name == "humaneval":
            return ()
        return stop_strings(self._parts[0])

    def examples(self) -> Sequence[Example]:
        """The problems, in the data's order."""
        if self._examples is None:
            self._examples = []
            with quiet():
                for number, part in enumerate(self._parts):
                    self._examples += self._examples_of(number, part)
        return self._examples

    def judge(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        """Mark answers as lm-eval does, cut at the stop strings wherever they were not yet."""
        verdicts: dict[int, Verdict] = {}
        for number, part in enumerate(self._parts):
            here = [i for i, example in enumerate(examples) if example.source[0] == number]
            docs = [examples[i].source[1] for i in here]
            with quiet():
                marked = self._score(part, docs, [cut(texts[i], self.stop) for i in here])
            verdicts.update(zip(here, marked, strict=True))
        return [verdicts[i] for i in range(len(examples))]

    def _examples_of(self, number: int, part: Any) -> list[Example]:
        assert self._examples is not None
        room = len(part.task_docs)
        if self._num_examples is not None:
            room = min(room, self._num_examples - len(self._examples))
        docs = [part.task_docs[i] for i in range(room)]
        plain, chats = (self._contexts(part, docs, chat=chat) for chat in (False, True))
        return [
            Example(
                id=_id(doc, len(self._examples) + i),
                prompt=prompt,
                messages=tuple(messages),
                response=_GOLD[self._name](doc),
                source=(number, doc),
            )
            for i, (doc, prompt, messages) in enumerate(zip(docs, plain, chats, strict=True))
        ]

    def _contexts(self, part: Any, docs: Sequence[Any], *, chat: bool) -> list[Any]:
        # Examples are drawn anew for each problem, one after the other from one stream.
        part.set_fewshot_seed(FEWSHOT_SEED)
        form: dict[str, Any] = {"gen_prefix": None}
        if chat:
            form |= {
                "apply_chat_template": True,
                "fewshot_as_multiturn": True,
                "chat_template": lambda messages, add_generation_prompt: messages,
            }
        return [part.fewshot_context(doc, self._num_fewshot, **form) for doc in docs]


def _id(doc: Mapping[str, Any], number: int) -> str:
    for column in ("task_id", "unique_id"):
        if doc.get(column) is not None:
            return str(doc[column])
    return str(number)


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


def _scorer(name: str, code_eval: CodeEval | None, clean_up: str) -> Scorer:
    if code_eval is not None:
        return CodeScorer(code_eval, clean_up=clean_up)
    if name.startswith("gsm8k"):
        return TextScorer("flexible-extract")
    return MathScorer(find_lm_eval(name) / "tasks" / "minerva_math" / "utils.py")

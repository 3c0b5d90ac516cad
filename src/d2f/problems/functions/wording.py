"""Wordings: describe a pipeline in an English sentence."""

from __future__ import annotations

from random import Random

from d2f.problems.functions.pipeline import Pipeline, choose, write_argument

_FIRST: dict[str, dict[str, tuple[str, ...]]] = {
    "ints": {
        "them": ("the numbers in {p}", "the elements of {p}"),
        "each": ("each number in {p}", "every element of {p}"),
    },
    "strs": {
        "them": ("the words in {p}", "the strings in {p}"),
        "each": ("each word in {p}", "every string in {p}"),
    },
    "int": {"it": ("{p}", "the number {p}")},
    "str": {"it": ("{p}", "the string {p}")},
}
_LATER: dict[str, dict[str, tuple[str, ...]]] = {
    "ints": {"them": ("the numbers", "these numbers"), "each": ("each number", "every number")},
    "strs": {"them": ("the words", "these words"), "each": ("each word", "every word")},
    "int": {"it": ("it", "that number", "the result")},
    "str": {"it": ("it", "that string", "the result")},
}
_ENDS = {
    "ints": ("the list", "the result"),
    "strs": ("the list", "the result"),
    "int": ("the number", "the result"),
    "str": ("the string", "the result"),
}
_NOUNS = {
    "the": ("take", "compute", "find"),
    "how": ("determine", "find"),
    "what": ("determine", "find"),
    "whether": ("determine", "find"),
    "a": ("make", "form"),
    '"': ("make", "form"),
}


def third_person(clause: str) -> str:
    """Put the verb that a clause begins with into the third person.

    Example:
        >>> third_person("multiply it by 3"), third_person("reverse it"), third_person("do it")
        ('multiplies it by 3', 'reverses it', 'does it')
    """
    verb, space, rest = clause.partition(" ")
    if verb.endswith("y") and verb[-2] not in "aeou":
        verb = verb[:-1] + "ies"
    elif verb.endswith(("s", "x", "ch", "sh", "o")):
        verb += "es"
    else:
        verb += "s"
    return verb + space + rest


def _clauses(rng: Random, pipeline: Pipeline) -> list[str]:
    """Return imperative clauses, one or two for each step; the last returns the result."""
    first = pipeline.parameters[0]
    clauses: list[str] = []
    last = len(pipeline.steps) - 1
    for i, step in enumerate(pipeline.steps):
        operation = step.operation
        words = (_LATER if i else _FIRST)[operation.takes]
        slots = {name: choose(rng, texts) for name, texts in words.items()}
        text = choose(rng, operation.texts).format(**slots, k=write_argument(step))
        if i == 0:
            # If another parameter has the same type, the text must name the first one.
            kinds = {s.operation.argument for s in pipeline.steps if s.parameter}
            twins = any(kind is not None and kind.kind == operation.takes for kind in kinds)
            if twins and "{p}" not in text:
                clauses.append(f"start with {first}")
            text = text.replace("{p}", first)
        verbs = _NOUNS.get('"' if text.startswith('"') else text.partition(" ")[0])
        if verbs is None:
            clauses.append(text)
            if i == last:
                clauses.append(f"return {choose(rng, _ENDS[operation.gives])}")
        else:
            clauses.append(f"{'return' if i == last else choose(rng, verbs)} {text}")
    return clauses


def _join(rng: Random, clauses: list[str]) -> str:
    if len(clauses) == 1:
        return clauses[0]
    if rng.random() < 0.4:
        return ", then ".join(clauses)
    if len(clauses) == 2:
        return " and ".join(clauses)
    return ", ".join(clauses[:-1]) + ", and " + clauses[-1]


def describe(rng: Random, pipeline: Pipeline) -> str:
    """Return a sentence with the function's name, its parameters and its operations.

    Example:
        >>> from d2f.problems.functions.operation import OPERATIONS
        >>> from d2f.problems.functions.pipeline import Step
        >>> pipeline = Pipeline([Step(OPERATIONS["int.squared"])], "f", ["n"])
        >>> describe(Random(0), pipeline)
        'Write f(n) to return the square of the number n.'
    """
    call = f"{pipeline.name}({', '.join(pipeline.parameters)})"
    clauses = _clauses(rng, pipeline)
    form = rng.random()
    if form < 0.4:
        clauses = [third_person(clause) for clause in clauses]
        return f"Write a function {call} that {_join(rng, clauses)}."
    if form < 0.7:
        return f"Write {call} to {_join(rng, clauses)}."
    if rng.random() < 0.5:
        sentences = [clause[0].upper() + clause[1:] for clause in clauses]
        return f"Write a function {call}. {'. '.join(sentences)}."
    text = _join(rng, clauses)
    return f"Write a function {call}. {text[0].upper()}{text[1:]}."

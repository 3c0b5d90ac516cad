"""Find the program in an answer to HumanEval as the authors of D2F do before they score.

Of prompt and fenced code, the longest run of lines that Python parses; of that, the imports and
whatever the wanted function leads to. They parse every run of their first 100 lines. Here a run
that fails is shortened to the line that Python complains of, so a few parses do.

For figures beside the paper's; `code_answer` judges better. No function here raises for any text.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import accumulate

from d2f.evaluation.code_statements import (
    names_in,
    parse_or_refuse,
    reached,
    source_of,
    split_lines,
)

_MAX_LINES = 100
_MAX_PARSED_LINES = 100_000
"""Lines given to the parser in all; a text made to be slow ends the search here."""


def extract_code(text: str) -> str:
    r"""Take the text of an answer's first fence that says `python`, else all text up to a fence.

    Example:
        >>> extract_code("Here you are:\n```python\nx = 1\n```\nGood luck!")
        'x = 1\n'
    """
    return text.split("```python\n", 1)[-1].split("```")[0]


def sanitize(code: str, entry_point: str) -> str:
    r"""Take the part of a text that defines a function.

    Returns:
        Of the longest parseable run of lines: the imports, then the functions, classes and
        variables that `entry_point` leads to, in their order. A function counts only if it returns
        something, and of several of a name the first that counts: so a prompt's stub gives way to
        the answer. Empty, or imports alone, if there is no such function.

    Example:
        >>> print(sanitize("Sure!\nimport math\ndef f(x):\n    return x\nprint(f(1))", "f"))
        import math
        def f(x):
            return x
    """
    lines = _longest_run(split_lines(code))
    tree = parse_or_refuse(lines)
    if not isinstance(tree, ast.Module):
        return ""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        for name in _defined_names(node):
            definitions.setdefault(name, node)
    links = {name: names_in(node) for name, node in definitions.items()}
    wanted = {definitions.get(name) for name in reached({entry_point}, links)}
    encoded = [line.encode() for line in lines]
    kept = [node for node in tree.body if node in wanted]
    return "\n".join(source_of(node, encoded) for node in [*imports, *kept])


def paper_solution(prompt: str, text: str, entry_point: str) -> str:
    r"""Find the program in an answer, without the tests.

    Example:
        >>> print(paper_solution("", "```python\ndef f(x):\n    return x\n```", "f"))
        def f(x):
            return x
    """
    code = f"{prompt}\n{extract_code(text)}".replace("\t", "    ").strip()
    return sanitize("\n".join(split_lines(code)[:_MAX_LINES]), entry_point)


def _longest_run(lines: Sequence[str]) -> Sequence[str]:
    """Find the run of lines that parses with the most lines that are not blank; the first wins."""
    best: Sequence[str] = []
    sizes = list(accumulate((bool(line.strip()) for line in lines), initial=0))
    best_size, budget = 0, _MAX_PARSED_LINES
    inside: set[int] = set()
    for start, first in enumerate(lines):
        # A program starts at the left. One that starts at a statement of an earlier run ends where
        # that run ends.
        if not first.strip() or first[0] in " \t\f" or start in inside:
            continue
        stop = len(lines)
        while sizes[stop] - sizes[start] > best_size and budget > 0:
            budget -= stop - start
            tree = parse_or_refuse(lines[start:stop])
            if isinstance(tree, ast.Module):
                best, best_size = lines[start:stop], sizes[stop] - sizes[start]
                inside = {start + node.lineno - 1 for node in tree.body}
                break
            stop = start + tree.line
    return best


def _defined_names(node: ast.stmt) -> list[str]:
    """Give the names that a statement defines, if its kind is kept."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        returns = any(isinstance(inner, ast.Return) for inner in ast.walk(node))
        return [node.name] if returns else []
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    parts = (part for target in targets for part in ast.walk(target))
    names = (part for part in parts if isinstance(part, ast.Name))
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]

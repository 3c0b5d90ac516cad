"""Find the program in an answer to HumanEval as the authors of D2F do before they score.

Of prompt and fenced code, the longest run of lines that Python parses; of that, the imports and
whatever the wanted function leads to. They parse every run of their first 100 lines. Here a run
that fails is shortened to the line that Python complains of, so a few parses do.

For figures beside the paper's; `code_answer` judges better. No function here raises for any text.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from d2f.evaluation.code_parsing import is_readable, parse_or_refuse, source_of, split_lines
from d2f.evaluation.code_statements import reached

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
    wanted = _reachable(entry_point, definitions)
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


def _longest_run(lines: Sequence[str]) -> list[str]:
    """Find the run of lines that parses with the most lines that are not blank; the first wins."""
    best: list[str] = []
    best_size = 0
    budget = _MAX_PARSED_LINES
    for piece in _readable_pieces(lines):
        sizes = [0]
        for line in piece:
            sizes.append(sizes[-1] + bool(line.strip()))
        inside: set[int] = set()
        for start, first in enumerate(piece):
            # A program starts at the left. One that starts at a statement of an earlier run ends
            # where that run ends.
            if not first.strip() or first[0] in " \t\f" or start in inside:
                continue
            stop = len(piece)
            while sizes[stop] - sizes[start] > best_size and budget > 0:
                budget -= stop - start
                tree = parse_or_refuse(piece[start:stop])
                if isinstance(tree, ast.Module):
                    best, best_size = list(piece[start:stop]), sizes[stop] - sizes[start]
                    inside = {start + node.lineno - 1 for node in tree.body}
                    break
                stop = start + tree.line
    return best


def _readable_pieces(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split lines at those that no program can hold."""
    start = 0
    for index, line in enumerate(lines):
        if not is_readable(line):
            yield lines[start:index]
            start = index + 1
    yield lines[start:]


def _defined_names(node: ast.stmt) -> list[str]:
    """Give the names that a statement defines, if its kind is kept."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        returns = any(isinstance(inner, ast.Return) for inner in ast.walk(node))
        return [node.name] if returns else []
    if isinstance(node, ast.Assign):
        targets: list[ast.expr] = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return []
    inner = (part for target in targets for part in ast.walk(target))
    stored = (part for part in inner if isinstance(part, ast.Name))
    return [part.id for part in stored if isinstance(part.ctx, ast.Store)]


def _reachable(entry_point: str, definitions: Mapping[str, ast.stmt]) -> set[ast.stmt]:
    """Find the definitions that a name leads to, its own among them."""
    links = {
        name: {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        for name, node in definitions.items()
    }
    names = reached({entry_point}, links)
    return {node for name, node in definitions.items() if name in names}

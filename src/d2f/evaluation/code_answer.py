"""The program in a model's answer: out of its fence, freed from prose, cut to what is needed.

In effect this is what the authors of D2F do before they score HumanEval: of prompt and fenced code,
the longest run of lines that Python parses; of that, the imports and whatever the wanted function
leads to. They look at 100 lines and parse every run of them. Here a run that fails is shortened to
the line that Python complains of, so a few parses do, and more lines can be looked at.

No function here raises for any text.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence

_MAX_CHARACTERS = 100_000
"""Of a longer text only the start is looked at; the longest answers have some 4,000."""
_MAX_LINES = 2_000
_MAX_PARSED_LINES = 100_000
"""Lines given to the parser in all; a text made to be slow ends the search here."""

_PYTHON_FENCE = re.compile(r"```[ \t]*(?:python3?|py)\b[^\n]*\n?", re.IGNORECASE)
_FENCE = re.compile(r"```[^\n`]*\n?")
_CLOSING_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)


def extract_code(text: str) -> str:
    r"""The code in an answer.

    Args:
        text: What the model wrote.

    Returns:
        The text of the first fence that says it is Python, else of the first fence, else all of
        it. A fence that is not closed lasts to the end. A lone fence with nothing behind it closes
        what the prompt opened: the text before it.

    Example:
        >>> extract_code("Here you are:\n```python\nx = 1\n```\nGood luck!")
        'x = 1\n'
        >>> extract_code("    return x\n```\n")
        '    return x\n'
    """
    opening = _PYTHON_FENCE.search(text) or _FENCE.search(text)
    if opening is None:
        return text
    body = text[opening.end() :]
    if not body.strip():
        return text[: opening.start()]
    closing = _CLOSING_FENCE.search(body)
    end = closing.start() if closing else body.find("```")
    return body if end < 0 else body[:end]


def sanitize(code: str, entry_point: str) -> str:
    r"""The part of a text that defines a function.

    Args:
        code: Python among other things, such as prose before and behind it.
        entry_point: Name of the wanted function.

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
    lines = _longest_run(_lines(code))
    tree = _parse(lines)
    if tree is None:
        return ""
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        for name in _defined_names(node):
            definitions.setdefault(name, node)
    wanted = _reachable(entry_point, definitions)
    encoded = [line.encode() for line in lines]
    kept = [node for node in tree.body if node in wanted]
    return "\n".join(_source(node, encoded) for node in [*imports, *kept])


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    r"""The program that tells whether an answer to a HumanEval problem is right.

    Args:
        prompt: The problem: imports and a function's head with its docstring.
        completion: What the model wrote behind it: the function's body, or an answer with the whole
            function in a fence.
        test: The problem's tests, a function `check`.
        entry_point: Name of the wanted function.

    Returns:
        A program that runs to its end if the answer passes. A continuation that parses is taken as
        it is, up to a fence; of anything else, `sanitize` of prompt and code.

    Example:
        >>> print(humaneval_program("def f(x):\n", "    return x", "def check(f): ...", "f"))
        def f(x):
            return x
        def check(f): ...
        check(f)
    """
    head, fence, _ = completion.partition("```")
    # Before a fence stands prose, or, if it is indented, the body of the function.
    plain = not fence or head.lstrip("\n")[:1] in (" ", "\t")
    solution = prompt + head
    if not plain or _parse(_lines(solution)) is None:
        solution = sanitize(f"{prompt}\n{extract_code(completion)}", entry_point)
    return f"{solution}\n{test}\ncheck({entry_point})"


def _lines(text: str) -> list[str]:
    """Lines as Python counts them; `splitlines` knows more ends of lines than Python."""
    text = text[:_MAX_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")[:_MAX_LINES]


def _parse(lines: Sequence[str]) -> ast.Module | None:
    tree = _parse_or_line(lines)
    return tree if isinstance(tree, ast.Module) else None


def _parse_or_line(lines: Sequence[str]) -> ast.Module | int:
    """The parsed lines, or how many of them may parse: those before the one that is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            return ast.parse("\n".join(lines))
    except SyntaxError as error:
        # At the end of the text Python may name a line behind it.
        return min(max((error.lineno or 1) - 1, 0), len(lines) - 1)
    except (ValueError, MemoryError, RecursionError, OverflowError, SystemError):
        return len(lines) // 2  # too deep, and nobody says where


def _longest_run(lines: Sequence[str]) -> list[str]:
    """The run of lines that parses with the most lines that are not blank; the first of equals."""
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
                tree = _parse_or_line(piece[start:stop])
                if isinstance(tree, ast.Module):
                    best, best_size = list(piece[start:stop]), sizes[stop] - sizes[start]
                    inside = {start + node.lineno - 1 for node in tree.body}
                    break
                stop = start + tree
    return best


def _readable_pieces(lines: Sequence[str]) -> Iterator[Sequence[str]]:
    """The runs of lines between those that no program can hold."""
    start = 0
    for index, line in enumerate(lines):
        if not _readable(line):
            yield lines[start:index]
            start = index + 1
    yield lines[start:]


def _readable(line: str) -> bool:
    try:
        return b"\0" not in line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _defined_names(node: ast.stmt) -> list[str]:
    """The names that a statement defines, if it is one of those that are kept."""
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


def _reachable(entry_point: str, definitions: dict[str, ast.stmt]) -> set[ast.stmt]:
    """The definitions that a name leads to, its own among them."""
    found: set[ast.stmt] = set()
    names = [entry_point]
    while names:
        node = definitions.pop(names.pop(), None)
        if node is not None and node not in found:
            found.add(node)
            names += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return found


def _source(node: ast.stmt, lines: Sequence[bytes]) -> str:
    """The text of a statement at the left margin, with its decorators; offsets count bytes."""
    decorators = getattr(node, "decorator_list", [])
    first = min(part.lineno for part in [node, *decorators]) - 1
    last = (node.end_lineno or node.lineno) - 1
    rows = list(lines[first : last + 1])
    rows[-1] = rows[-1][: node.end_col_offset]
    if not decorators:
        rows[0] = rows[0][node.col_offset :]
    return b"\n".join(rows).decode()

"""Find the program in a model's answer: what Python would execute of prompt and answer.

An answer is the prompt's continuation, or a conversation with code in fences or without any. Python
would execute all of its code in order, so that helpers count, whatever they are, and the later of
two functions of a name. What only shows or tries the function is left out (`code_slice`): it asks
for input, or fails.

Where it is not plain which text is code, there are several readings, the most literal one first:
the first that has the wanted functions and all that they use is taken. No reading is ever run to
find that out, so nothing here knows whether an answer is right.

No function here raises for any text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from d2f.evaluation.code_parsing import (
    MAX_CHARACTERS,
    Search,
    find_statements,
    names_read,
    parse_or_refuse,
    split_lines,
)
from d2f.evaluation.code_readings import Piece, moved, readings
from d2f.evaluation.code_slice import missing_names, needed_statements, undefined_names
from d2f.evaluation.code_statements import Statement

_END_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>[ \t]*$", re.MULTILINE)
"""As `<|im_end|>`; some write it with the wide bars of Chinese."""
_LAST_TOKENS = ("</s>", "<s>", "<eos>", "<pad>", "<end_of_turn>")
"""Those that may stand in a program too, so they count at the very end alone."""


def read_answer(text: str, wanted: Sequence[str], prompt: str = "") -> str:
    r"""Find the program in an answer.

    Args:
        text: What the model wrote.
        wanted: Names that the tests use: of the functions to write, and of what the prompt gives.
        prompt: Python that the answer may continue or build on; empty if the prompt is none.

    Returns:
        What of prompt and answer the wanted names need. If that is not there, what there is of it.

    Example:
        >>> print(read_answer("Sure!\n```python\ndef f(x):\n    return x\nprint(f(1))\n```", ["f"]))
        def f(x):
            return x
    """
    search = Search()
    best: tuple[tuple[int, int, int], list[Statement]] | None = None
    for pieces in readings(split_lines(_without_end_tokens(text)), prompt, search):
        statements = _statements(pieces, wanted, prompt, search)
        kept = needed_statements(statements, wanted)
        undefined = undefined_names(kept, wanted)
        strays = sum(statement.is_stray for statement in statements)
        fault = len(undefined), strays, len(missing_names(kept, wanted) - undefined)
        if best is None or fault < best[0]:
            best = fault, kept
        if not any(best[0]) or search.is_over:
            break
    kept = best[1] if best else []
    first = [s.source for s in kept if s.is_future]
    return "\n".join([*first, *(s.source for s in kept if not s.is_future)])


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    r"""Make the program that tells whether an answer to a HumanEval problem is right.

    Args:
        prompt: The problem: imports, perhaps helpers, and a function's head with its docstring.
        completion: What the model wrote behind it: the function's body, or an answer of any form
            with the whole function.
        test: The problem's tests, a function `check`.
        entry_point: Name of the wanted function.

    Returns:
        A program that runs to its end if the answer passes. A continuation that is nothing but
        definitions is taken as it is.

    Example:
        >>> print(humaneval_program("def f(x):\n", "    return x", "def check(f): ...", "f"))
        def f(x):
            return x
        def check(f): ...
        check(f)
    """
    solution = prompt + completion
    if not _is_plain(solution, entry_point):
        wanted = dict.fromkeys([entry_point, *names_read(test)])
        solution = read_answer(completion, list(wanted), prompt)
    return f"{solution}\n{test}\ncheck({entry_point})"


def mbpp_solution(text: str, tests: str, setup: str = "") -> str:
    r"""Find the program in an answer to an MBPP problem, without the tests.

    Example:
        >>> print(mbpp_solution("Here:\n```\ndef f(x):\n    return x\n```", "assert f(1) == 1"))
        def f(x):
            return x
    """
    wanted = names_read(f"{setup}\n{tests}") or names_read(tests, without=frozenset())
    solution = read_answer(text, wanted)
    return f"{solution}\n{setup}" if setup.strip() else solution


def _without_end_tokens(text: str) -> str:
    """Cut a text at the token with which a model ends its turn."""
    text = text[:MAX_CHARACTERS].removeprefix("\ufeff")
    found = _END_TOKEN.search(text)
    while found is not None and not text[: found.start()].strip():
        text = text[found.end() :]
        found = _END_TOKEN.search(text)
    text = text if found is None else text[: found.start()]
    while (bare := text.rstrip()).endswith(_LAST_TOKENS):
        text = bare[: bare.rindex("<")]
    return text


def _is_plain(source: str, entry_point: str) -> bool:
    """Tell whether a program only defines things, with Python's own library alone."""
    tree = parse_or_refuse(split_lines(source))
    if not isinstance(tree, ast.Module) or len(source) > MAX_CHARACTERS:
        return False
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return names.count(entry_point) == 1 and all(_only_defines(node) for node in tree.body)


def _only_defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return Statement(node, "").is_standard
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.FunctionDef) and not node.decorator_list


def _statements(
    pieces: Sequence[Piece], wanted: Sequence[str], prompt: str, search: Search
) -> list[Statement]:
    """Find all statements of a prompt and a reading of its answer."""
    given = split_lines(prompt.rstrip(" \t"))
    if not given[-1]:
        given.pop()
    answered: list[Statement] = []
    for number, piece in enumerate(pieces):
        whole = search.find(moved(piece, 0).lines, closed=piece.closed)
        if piece.indent > 0 and given and not _defines(whole, wanted):
            whole = search.find([*given, *piece.lines], closed=piece.closed)
        elif number == 0:
            answered += search.find(given, closed=True)
        answered += whole
    return answered + _from_classes(answered, wanted)


def _defines(statements: Sequence[Statement], wanted: Sequence[str]) -> bool:
    """Tell whether an indented text is a whole program and no function's body."""
    returns = any(isinstance(statement.node, ast.Return) for statement in statements)
    wants = any(s.is_definition and s.binds.intersection(wanted) for s in statements)
    return wants and not returns


def _from_classes(statements: Sequence[Statement], wanted: Sequence[str]) -> list[Statement]:
    """Take wanted functions out of the class in which an answer has them: `f = Solution().f`."""
    found = []
    for name in sorted(undefined_names(statements, wanted)):
        for statement in reversed(statements):
            owner = _owner(statement.node, name)
            if owner is not None:
                found += find_statements([f"{name} = {owner}.{name}"])
                break
    return found


def _owner(node: ast.stmt, name: str) -> str | None:
    """Give the expression whose attribute a function is, if a class defines it."""
    if not isinstance(node, ast.ClassDef):
        return None
    for part in node.body:
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name:
            arguments = [argument.arg for argument in part.args.args]
            bound = arguments[:1] in (["self"], ["cls"]) or part.decorator_list
            return f"{node.name}()" if bound else node.name
    return None

"""Find the program in a model's answer: what Python would execute of prompt and answer.

An answer is the prompt's continuation, or a conversation with code in fences or without any. Python
would execute all of its code in order, so that helpers count, whatever they are, and the later of
two functions of a name. Left out is what nobody needs: checks, examples, what asks for input or
prints, a `main` and its call.

Where it is not plain which text is code, there are several readings, the most literal one first:
the first that has the wanted functions and all that they use is taken. No reading is ever run to
find that out, so nothing here knows whether an answer is right.

No function here raises for any text.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence, Set

from d2f.evaluation.code_readings import Reading, readings
from d2f.evaluation.code_statements import (
    BUILTINS,
    MAX_CHARACTERS,
    Search,
    Statement,
    names_read,
    parse_or_refuse,
    reached,
    split_lines,
)

_END_TOKEN = re.compile(r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>[ \t]*$", re.MULTILINE)
"""A special token such as `<|im_end|>`; some models write it with the wide bars of Chinese."""
_LAST_TOKENS = ("</s>", "<s>", "<eos>", "<pad>", "<end_of_turn>")
"""Special tokens that may stand in a program too, so they count at the very end alone."""
_LOOKUPS = frozenset(("eval", "exec", "globals", "vars"))


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
        kept = _needed_statements(statements, set(wanted))
        undefined = _undefined_names(kept, wanted)
        strays = sum(statement.is_stray for statement in statements)
        fault = len(undefined), strays, len(_missing_names(kept, wanted) - undefined)
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
    pieces: Reading, wanted: Sequence[str], prompt: str, search: Search
) -> list[Statement]:
    """Find all statements of a prompt and a reading of its answer."""
    given = split_lines(prompt.rstrip(" \t"))
    if not given[-1]:
        given.pop()
    answered: list[Statement] = []
    for number, piece in enumerate(pieces):
        whole = search.find(piece.moved(0).lines, closed=piece.closed)
        if piece.indent > 0 and given and not _defines(whole, wanted):
            whole = search.find([*given, *piece.lines], closed=piece.closed)
        elif number == 0:
            answered += search.find(given)
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
    for name in sorted(_undefined_names(statements, wanted)):
        for statement in reversed(statements):
            owner = _owner(statement.node, name)
            if owner is not None:
                found += Search().find([f"{name} = {owner}.{name}"])
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


def _needed_statements(statements: Sequence[Statement], wanted: Set[str]) -> list[Statement]:
    """Select the statements that the wanted names need, in order.

    A statement stays if it gives a needed name a value, or may change what such a name stands for;
    and then what it uses is needed too.
    """
    statements = list(_without_stubs(statements))
    examples = {statement for statement in statements if statement.is_example(wanted)}
    elsewhere = {name for s in statements if not s.is_import for name in s.binds}
    defined = {name for s in statements if s.is_definition for name in s.binds & elsewhere}
    standard = {name for s in statements if s.is_standard for name in s.binds}
    bound = (i for i, s in enumerate(statements) if s.binds & wanted and s not in examples)
    last = max(bound, default=0)
    changes = _changes(statements, wanted)
    waiting: dict[int, Set[str]] = {}
    for index, statement in enumerate(statements):
        names = statement.binds
        if statement.is_import and not statement.is_standard:
            names -= elsewhere  # the answer itself, imported by its example
        if index > last and not statement.is_definition:
            names -= BUILTINS  # an example's variable
        if statement not in examples:
            waiting[index] = names | changes[index]
    # Each name that is needed, up to which statement: what comes later changes nothing for one
    # that reads it when it runs.
    needed = dict.fromkeys(wanted, len(statements))
    kept: list[int] = []
    while True:
        more = [
            index
            for index, names in waiting.items()
            if statements[index].is_always_needed(standard)
            or any(index < needed.get(name, 0) for name in names)
        ]
        if not more:
            return [statements[index] for index in sorted(kept)]
        kept += more
        for index in more:
            del waiting[index]
            statement = statements[index]
            # What looks names up when it runs may look up any of them.
            any_name = defined if statement.reads & _LOOKUPS else frozenset()
            for name in statement.reads | any_name:
                later = name in statement.reads_later or name not in statement.reads
                needed[name] = max(len(statements) if later else index, needed.get(name, 0))


def _changes(statements: Sequence[Statement], wanted: Set[str]) -> list[Set[str]]:
    """Names whose objects each statement may change, itself or by functions that it uses.

    An example may use any function that is wanted, and changes nothing by that. What asks for
    input is an example, too.
    """
    variables = {name for s in statements if not s.is_definition for name in s.binds}
    own = {name for s in statements if not s.is_import for name in s.binds}
    uses: dict[str, set[str]] = {}
    copies: dict[str, set[str]] = {}
    stored: dict[str, set[str]] = {}
    for statement in statements:
        for name in statement.binds if not statement.is_definition else ():
            copies.setdefault(name, set()).update(statement.copies)
        for name in statement.binds - wanted if not statement.is_import else ():
            if statement.is_definition:
                uses.setdefault(name, set()).update(statement.reads)
                stored.setdefault(name, set()).update(statement.stores)
    changes: list[Set[str]] = []
    for statement in statements:
        names = reached(statement.runs, uses)
        found = set().union(*(stored.get(name, ()) for name in names))
        if statement.is_definition:  # its decorators may make it known to others
            found |= names & own
        else:
            found |= statement.stores
            found |= names & variables - wanted if "input" not in names else set()
        changes.append(found | (reached(found, copies) & variables - wanted))
    return changes


def _missing_names(kept: Sequence[Statement], wanted: Iterable[str]) -> set[str]:
    """List the names that the statements and their callers use, and that have no value."""
    if any("*" in statement.source and statement.is_import for statement in kept):
        return set()
    bound = {name for statement in kept for name in statement.binds | statement.stores}
    return {name for s in kept for name in s.reads}.union(wanted) - bound - BUILTINS


def _undefined_names(kept: Sequence[Statement], wanted: Iterable[str]) -> set[str]:
    """List the wanted names that have no value, or name a function that is not written yet."""
    last = {name: statement for statement in kept for name in statement.binds}
    return {name for name in wanted if name not in last or last[name].is_stub}


def _without_stubs(statements: Sequence[Statement]) -> Iterator[Statement]:
    """Drop functions that end unfinished or do nothing where a whole one came before."""
    written: set[str] = set()
    for statement in statements:
        if not statement.is_stub:
            written |= statement.binds
        elif statement.binds & written:
            continue
        yield statement

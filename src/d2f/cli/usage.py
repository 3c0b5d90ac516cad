"""Usage errors: wrong use of the command line, as opposed to failures of a right one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from typer.core import TyperCommand

from d2f.errors import ConfigError, RequestError
from d2f.shipped.recipes import find_recipe

T = TypeVar("T")

_OPTION = re.compile(r"-[A-Za-z]|--[A-Za-z][\w-]*(=.*)?", re.DOTALL)


class UsageError(ConfigError):
    """An option, its value, or a combination of options is wrong: exit code 2.

    A bad file, folder or prompt is not a usage error and ends with exit code 1.
    """


class Command(TyperCommand):
    """A command that refuses `nan` and `inf`, which pass the limits of options."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                option = next(p.opts[0] for p in self.params if p.name == name)
                raise UsageError(f"{option} is {value}; it must be a finite number")
        return super().invoke(ctx)


class PromptCommand(Command):
    """A command whose prompt may begin with a dash, such as `-5 + 3?`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move words that begin with a dash and are not options behind a `--`."""
        flags = (o for o in self.params if getattr(o, "is_flag", True))
        plain = {name for option in flags for name in (*option.opts, *option.secondary_opts)}
        return super().parse_args(ctx, _prompts_last(args, plain))


def _prompts_last(args: Iterable[str], flags: set[str]) -> list[str]:
    """Return the words of a command line with those behind a `--` that only look like options.

    Example:
        >>> _prompts_last(["-5 + 3?", "--seed", "-1", "--json"], {"--json"})
        ['--seed', '-1', '--json', '--', '-5 + 3?']
    """
    words, options, prompts = iter(args), list[str](), list[str]()
    for word in words:
        if word == "--":
            prompts += words
        elif word.startswith("-") and word != "-" and not _OPTION.fullmatch(word):
            prompts.append(word)
        else:
            options.append(word)
            if word.startswith("--") and "=" not in word and word not in flags:
                options += islice(words, 1)
    return [*options, "--", *prompts] if prompts else options


@contextmanager
def usage() -> Iterator[None]:
    """Context that turns errors into usage errors, since the values come from the command line.

    Example:
        >>> with usage():
        ...     raise ConfigError("block_size is 0; it must be a whole number of at least 1")
        Traceback (most recent call last):
        ...
        d2f.cli.usage.UsageError: block_size is 0; it must be a whole number of at least 1
    """
    try:
        yield
    except (ConfigError, RequestError) as error:
        raise UsageError(str(error)) from error


def check_command(recipe: Path, command: str) -> None:
    """Refuse a shipped recipe that belongs to another command.

    Example:
        >>> check_command(Path("tiny_cpu_student"), "train")
    """
    shipped = None if recipe.exists() else find_recipe(recipe)
    if shipped is not None and shipped.command != command:
        raise UsageError(f"{recipe} is a recipe of d2f {shipped.command}, not of d2f {command}")


def load_with(
    load: Callable[[Path, Sequence[str]], T], recipe: Path, overrides: Sequence[str]
) -> T:
    """Load a recipe; an error in an override is a usage error, one in the file is not."""
    try:
        return load(recipe, overrides)
    except ConfigError as error:
        if overrides:
            load(recipe, [])  # fails, too, if it is the file that is wrong
            raise UsageError(str(error)) from error
        raise

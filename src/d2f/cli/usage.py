"""Wrong use of the command line, as opposed to what fails although it was used right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from d2f.errors import ConfigError, RequestError
from d2f.shipped.recipes import find_recipe

T = TypeVar("T")


class UsageError(ConfigError):
    """An option, its value, or a combination of options is wrong: exit code 2.

    What is wrong with a file, a folder or a prompt is no wrong use, and ends with exit code 1.
    """


@contextmanager
def usage() -> Iterator[None]:
    """Within it, what is refused are the values that were typed.

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
    """Refuse a recipe that comes with the package and is another command's.

    Raises:
        UsageError: It is.

    Example:
        >>> check_command(Path("tiny_cpu_student"), "train")
    """
    shipped = None if recipe.exists() else find_recipe(recipe)
    if shipped is not None and shipped.command != command:
        raise UsageError(f"{recipe} is a recipe of d2f {shipped.command}, not of d2f {command}")


def load_with(
    load: Callable[[Path, Sequence[str]], T], recipe: Path, overrides: Sequence[str]
) -> T:
    """What a recipe says with some settings replaced, which were typed, while the file was not.

    Args:
        load: Reads a recipe with overrides.
        recipe: The file.
        overrides: As `d2f.recipe.apply_override` takes them.

    Raises:
        UsageError: The recipe is right without the overrides, and not with them.
        ConfigError: The recipe itself is missing or wrong.
    """
    try:
        return load(recipe, overrides)
    except ConfigError as error:
        if not overrides or not _loads(load, recipe):
            raise
        raise UsageError(str(error)) from error


def _loads(load: Callable[[Path, Sequence[str]], T], recipe: Path) -> bool:
    try:
        load(recipe, [])
    except ConfigError:
        return False
    return True

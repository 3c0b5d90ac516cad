"""The recipes that come with the package: files of a checkout's `recipes/`, or of a wheel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_IN_WHEEL = _PACKAGE / "recipes"
_IN_CHECKOUT = _PACKAGE.parents[1] / "recipes"
_EVAL = "eval/"


@dataclass(frozen=True, kw_only=True)
class ShippedRecipe:
    """One recipe."""

    name: str
    """As one types it: `tiny_cpu_student`, `eval/word_problems`."""
    path: Path

    @property
    def command(self) -> str:
        """The command that runs it."""
        return "eval" if self.name.startswith(_EVAL) else "train"

    def about(self) -> str:
        """The first sentence of the comment that it begins with."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        text = " ".join(lines)
        sentence, full_stop, _ = text.partition(". ")
        return sentence + full_stop.strip()


def shipped_recipes() -> list[ShippedRecipe]:
    """All of them, those of `d2f train` first.

    Example:
        >>> [recipe.name for recipe in shipped_recipes() if "word_problems" in recipe.name][0]
        'eval/word_problems'
    """
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
    found = [
        ShippedRecipe(name=path.relative_to(folder).with_suffix("").as_posix(), path=path)
        for path in folder.rglob("*.toml")
    ]
    return sorted(found, key=lambda recipe: (recipe.command == "eval", recipe.name))


def find_recipe(text: str | Path) -> ShippedRecipe | None:
    """The shipped recipe of a name, which may be written like its file; None if there is none.

    Example:
        >>> find_recipe("word_problems").name, find_recipe("recipes/eval/functions.toml").name
        ('eval/word_problems', 'eval/functions')
    """
    name = Path(text).as_posix().removeprefix("recipes/").removesuffix(".toml")
    by_name = {recipe.name: recipe for recipe in shipped_recipes()}
    return by_name.get(name) or by_name.get(_EVAL + name)

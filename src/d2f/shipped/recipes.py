"""Shipped recipes: the files of a checkout's folder `recipes/`, which a wheel contains too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_IN_WHEEL = _PACKAGE / "recipes"
_IN_CHECKOUT = _PACKAGE.parents[1] / "recipes"
_EVAL = "eval/"


@dataclass(frozen=True, kw_only=True)
class ShippedRecipe:
    """A recipe file that comes with the package."""

    name: str
    """Name as a command takes it, such as `tiny_cpu_student` or `eval/word_problems`."""
    path: Path

    @property
    def command(self) -> str:
        """Name of the command that runs the recipe, `train` or `eval`."""
        return "eval" if self.name.startswith(_EVAL) else "train"

    def about(self) -> str:
        """Return the first sentence of the comment at the top of the file."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        text = " ".join(lines)
        sentence, full_stop, _ = text.partition(". ")
        return sentence + full_stop.strip()


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all shipped recipes, those of `d2f train` first.

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
    """Return the shipped recipe with a name or file name; None if there is none.

    Example:
        >>> find_recipe("word_problems").name, find_recipe("recipes/eval/functions.toml").name
        ('eval/word_problems', 'eval/functions')
    """
    name = Path(text).as_posix().removeprefix("recipes/").removesuffix(".toml")
    by_name = {recipe.name: recipe for recipe in shipped_recipes()}
    return by_name.get(name) or by_name.get(_EVAL + name)

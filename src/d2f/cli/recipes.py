"""`d2f recipes`: list and copy the recipes that come with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from d2f.cli.console import log
from d2f.cli.usage import Command, UsageError
from d2f.errors import D2FError, counted, unknown_name
from d2f.shipped.recipes import ShippedRecipe, find_recipe, shipped_recipes

recipes_app = typer.Typer(invoke_without_command=True)


@recipes_app.callback()
def list_command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """List the recipes that come with d2f, for `d2f train` and `d2f eval`, which take their names.

    Example:  d2f recipes
    """
    if context.invoked_subcommand is not None:
        return
    recipes = shipped_recipes()
    if as_json:
        facts = [
            {"name": r.name, "command": r.command, "path": str(r.path), "about": r.about()}
            for r in recipes
        ]
        typer.echo(json.dumps(facts))
        return
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        typer.echo(f"d2f {recipe.command:5} {recipe.name:{width}}  {recipe.about()}")
    log.print("copy one to change it:  d2f recipes copy NAME", style="dim")


@recipes_app.command("copy", cls=Command)
def copy_command(
    names: Annotated[list[str], typer.Argument(help="Recipes, as `d2f recipes` lists them.")],
    to: Annotated[Path, typer.Option(help="Folder to copy to.", file_okay=False)] = Path(),
) -> None:
    """Copy recipes into a folder, to be changed there.

    Example:  d2f recipes copy tiny_cpu_autoregressive eval/word_problems --to my-recipes
    """
    copies = {to / recipe.path.name: recipe for recipe in map(_named, names)}
    taken = [str(target) for target in copies if target.exists()]
    if taken:
        are = "is" if len(taken) == 1 else "are"
        raise D2FError(f"{', '.join(taken)} {are} there already; choose another folder with --to")
    to.mkdir(parents=True, exist_ok=True)
    for target, recipe in copies.items():
        target.write_bytes(recipe.path.read_bytes())
        typer.echo(target)
    log.print(f"{counted(len(copies), 'recipe')} copied", style="dim")


def _named(name: str) -> ShippedRecipe:
    recipe = find_recipe(name)
    if recipe is None:
        raise UsageError(unknown_name("recipe", name, [r.name for r in shipped_recipes()]))
    return recipe

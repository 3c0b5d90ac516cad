"""The files around the code agree with it and with each other."""

import re
import tomllib
from pathlib import Path

import pytest

import d2f
from d2f.evaluation.eval_recipe import load_eval_recipe
from d2f.training.config import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("**/*.toml"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_SHIPPED_BYTES = 36_000_000

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_parses(path):
    load = load_eval_recipe if path.parent.name == "eval" else load_recipe
    assert load(path) is not None


def test_version_is_the_same_everywhere():
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert d2f.__version__ == version
    assert re.search(rf"^## \[{re.escape(version)}\]", read("CHANGELOG.md"), re.MULTILINE)


def test_ci_runs_what_contributors_run():
    commands = [line for line in read(".ci/run").splitlines() if line.startswith("make")]
    assert commands == ["make check test kernels"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert not missing


def test_every_decision_is_listed():
    listed = set(LINK.findall(read("docs/adr/README.md")))
    assert listed == {path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md")}


def test_shipped_models_stay_small():
    shipped = (ROOT / "src/d2f/shipped").rglob("*")
    assert sum(path.stat().st_size for path in shipped if path.is_file()) <= MAX_SHIPPED_BYTES

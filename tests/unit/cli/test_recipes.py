"""`d2f recipes`, and recipes and models by their names wherever d2f is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from d2f.hub import resolve_folder
from d2f.models.checkpoint import load_model
from d2f.recipe import read_recipe
from d2f.shipped import MODELS, shipped_model
from d2f.shipped.recipes import find_recipe, shipped_recipes
from d2f.text import Tokenizer

ROOT = Path(__file__).parents[3]
FILES = sorted(path.relative_to(ROOT / "recipes") for path in ROOT.glob("recipes/**/*.toml"))


def test_all_recipes_are_listed(d2f):
    names = [file.with_suffix("").as_posix() for file in FILES]
    assert sorted(recipe.name for recipe in shipped_recipes()) == sorted(names)
    lines = d2f("recipes").out.splitlines()
    listed = json.loads(d2f("recipes", "--json").out)
    assert [line.split()[1:3] for line in lines] == [[r["command"], r["name"]] for r in listed]
    for recipe in listed:
        table = tomllib.loads(Path(recipe["path"]).read_text("utf-8"))
        assert ("stage" in table) == (recipe["command"] == "train")
        assert len(recipe["about"]) > 20


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_recipe_is_found_by_each_of_its_names(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = tomllib.loads((ROOT / "recipes" / file).read_text("utf-8"))
    full = file.with_suffix("").as_posix()
    short = file.stem if file.parent.name in ("", "eval") else full  # others share last names
    for name in (f"recipes/{file}", str(file), full, short):
        assert read_recipe(name) == expected
    mine = Path(short)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine = 1")
    assert read_recipe(short) == {"mine": 1}


def test_recipes_are_copied_and_nothing_is_overwritten(d2f, tmp_path):
    done = d2f("recipes", "copy", "tiny_cpu_student", "word_problems", "--to", tmp_path / "mine")
    copies = [tmp_path / "mine" / f"{name}.toml" for name in ("tiny_cpu_student", "word_problems")]
    assert (done.code, done.out.split()) == (0, list(map(str, copies)))
    for copy, name in zip(copies, ("tiny_cpu_student", "eval/word_problems"), strict=True):
        assert copy.read_bytes() == find_recipe(name).path.read_bytes()
    copies[1].write_text("changed")
    copies[0].unlink()
    again = d2f("recipes", "copy", "tiny_cpu_student", "word_problems", "--to", tmp_path / "mine")
    assert (again.code, again.out) == (1, "")
    assert f"{copies[1]} is there already" in again.err
    assert (copies[0].exists(), copies[1].read_text()) == (False, "changed")
    unknown = d2f("recipes", "copy", "tiny_cpu_studnt")
    assert (unknown.code, "did you mean 'tiny_cpu_student'" in unknown.err) == (2, True)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_has_a_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    named = f"shipped:{name}"
    assert resolve_folder(named) == shipped_model(name)
    assert Tokenizer.load(named).fingerprint() == Tokenizer.load(shipped_model(name)).fingerprint()
    assert load_model(named, device="cpu").spec == load_model(shipped_model(name)).spec


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "1 + 1?", "--model", "shipped:student", "--max-new-tokens", 4],
        ["inspect", "shipped:teacher"],
        ["chat", "--model", "shipped:student", "--max-new-tokens", 4],
        ["train", "tiny_cpu_student", "--dry-run", "--set", "model.init=shipped:teacher"],
    ],
)
def test_commands_take_the_name_of_a_shipped_model(d2f, arguments):
    assert d2f(*arguments, stdin="1 + 1?\n").code == 0
    wrong = [
        str(word).replace("student", "studnt").replace("teacher", "techer") for word in arguments
    ]
    wrong[1] = wrong[1].replace("studnt", "student")
    done = d2f(*wrong, stdin="1 + 1?\n")
    assert (done.code, "did you mean" in done.err) == (1, True)


def test_the_wheel_has_all_recipes_and_finds_them(tmp_path, monkeypatch):
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    monkeypatch.chdir(ROOT)
    name = build.build_wheel(str(tmp_path))
    site = tmp_path / "site"
    zipfile.ZipFile(tmp_path / name).extractall(site)
    assert (
        sorted(p.relative_to(site / "d2f/recipes") for p in site.glob("d2f/recipes/**/*.toml"))
        == FILES
    )
    done = subprocess.run(
        [sys.executable, "-m", "d2f", "recipes", "--json"],
        env=os.environ | {"PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [Path(recipe["path"]) for recipe in json.loads(done.stdout)]
    assert len(paths) == len(FILES)
    assert all(path.is_relative_to(site) for path in paths)

"""A wrong value of an option ends with exit code 2, of every option of every command.

An option that is added later is tried too, by its type, unless it is listed here as one that takes
any text, or with values that it does not take.
"""

from __future__ import annotations

import typing

import pytest
import typer

from d2f.cli.main import app
from d2f.cli.usage import UsageError, load_with, usage
from d2f.decoding.strategies import STRATEGIES
from d2f.errors import ConfigError, RequestError

RECIPE = "tiny_cpu_autoregressive"
ARGUMENTS = {
    "generate": ["x"],
    "train": [RECIPE],
    "eval": ["word_problems"],
    "inspect": ["/no/such/model"],
    "report": ["/no/such/folder"],
    "recipes copy": ["nothing"],
}
WRONG = {int: ["-7"], float: ["-7", "nan"]}
"""Values that no option of a type takes, but for those below."""
OTHERWISE = {
    ("generate", "--seed"): ["nine", "1.5", str(2**63)],
    ("generate", "--temperature"): ["-7", "nan", "inf", "nine"],
    ("chat", "--seed"): ["nine", str(2**63)],
    "--strategy": ["pipelind", ""],
    "--confidence": ["margn"],
    "--device": ["nowhere", "cuda:99", ""],
    "--dtype": ["float31", "int8"],
    "--backend": ["tritn"],
    "--shape": ["llada-9b"],
    "--stop": [""],
    "--eos": ["two tokens", "99999999"],
    "--cors-origin": ["nothing", "https://x/path"],
    "--batch": ["0", "1,x", ""],
    "--window": ["0", "x"],
    "--kv-length": ["-1", "1.5"],
    "--micro-batch": ["0", "x"],
    "--checkpointing": ["perhaps"],
    "--sharding": ["half"],
    "--gpu": ["H10"],
    "--set": ["nothing", "=1", "no_such_key=1"],
    "--rows": ["pipelind", ""],
    "--race-model": ["teacher", "=x", "x="],
    "--column": ["prompt", "promt=x"],
    ("generate", "--algorithm"): ["entropi"],
    ("demo", "--plot"): ["race.xyz"],
}
"""… and those of options that take some texts and not others."""
NEEDS = {
    **{
        f"--{option.replace('_', '-')}": ["--strategy", strategy.name]
        for strategy in STRATEGIES.values()
        for option in strategy.option_kinds
    },
    "--eps": ["--strategy", "vanilla", "--algorithm", "entropy"],
    "--gpu": ["--dry-run"],
    "--processes": ["--dry-run"],
}
"""Without which an option has no effect, and is refused for that."""
ANY_TEXT = {
    "--model", "--adapter", "--system", "--host", "--api-key", "--name", "--data", "--output",
    "--json", "--plot", "--trace", "--record-trace", "--to", "--baseline", "--input",
}  # fmt: skip
"""Folders, files and names: what is wrong with them is not how the command was used."""


def commands(command=None, path=()):
    command = command or typer.main.get_command(app)
    children = getattr(command, "commands", {})
    if path and not children:
        yield " ".join(path), command
    for name, child in children.items():
        yield from commands(child, (*path, name))


def kind(command, option):
    """The type of an option's value."""
    hint = typing.get_type_hints(command.callback)[option.name]
    return next((one for one in (int, float) if one in (hint, *typing.get_args(hint))), str)


def cases():
    for path, command in commands():
        for option in command.params:
            name = option.opts[-1]
            if option.param_type_name == "argument" or option.is_flag or name == "--help":
                continue
            values = OTHERWISE.get((path, name)) or OTHERWISE.get(name)
            if values is None and name not in ANY_TEXT:
                values = WRONG[kind(command, option)]
            for value in values or ():
                yield pytest.param(path, name, value, id=f"{path}-{name}={value}")


def stop(*_arguments, **_settings):
    raise AssertionError("it began")


@pytest.fixture(autouse=True)
def nothing_begins(monkeypatch, tmp_path):
    """No command may get as far as reading weights, starting a server or training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("d2f.models.checkpoint.load_model", stop)
    monkeypatch.setattr("d2f.models.presets.random_model", stop)
    monkeypatch.setattr("d2f.evaluation.rates.measure_rates", stop)
    monkeypatch.setattr("d2f.training.run.train", stop)


@pytest.mark.parametrize(("path", "option", "value"), list(cases()))
def test_a_wrong_value_is_wrong_use(d2f, path, option, value):
    needs = NEEDS.get(option, [])
    done = d2f(*path.split(), *ARGUMENTS.get(path, []), *needs, f"{option}={value}")
    assert (done.code, done.out) == (2, ""), done.err
    assert "Traceback" not in done.err
    assert "began" not in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--stream", "--json"],
        ["generate", "x", "--strategy", "serial", "--add-threshold", "0.5"],
        ["generate", "x", "--system", "y", "--no-chat"],
        ["train", RECIPE, "--gpu", "H100"],
        ["bench", "step", "--shape", "llada-8b", "--model", "x"],
        ["bench", "step", "--layers", "1"],
        ["bench", "race", "--accept", "1"],
        ["bench", "race", "--shape", "llada-8b"],
        ["bench", "race", "--model", "x"],
        ["bench", "train", "--lora", "4", "--full"],
        ["serve", "--host", "0.0.0.0"],
    ],
)
def test_options_that_do_not_go_together_are_wrong_use(d2f, arguments):
    done = d2f(*arguments)
    assert (done.code, done.out) == (2, ""), done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--model", "/no/such"],
        ["generate", "x", "--model", "shipped:techer"],
        ["inspect", "/no/such"],
        ["train", "no-such.toml"],
        ["train", "no-such.toml", "--set", "steps=1"],
        ["eval", "no-such.toml"],
        ["report", "/no/such"],
        ["bench", "race", "--json", "/no/such/folder/race.json"],
    ],
)
def test_a_wrong_file_is_no_wrong_use(d2f, arguments):
    done = d2f(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), done.err


def test_what_is_wrong_in_a_recipe_is_not_what_was_typed(tmp_path):
    def load(recipe, overrides):
        if "bad" in (*overrides, recipe.read_text()):
            raise ConfigError("bad")
        return "loaded"

    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("good")
    bad.write_text("bad")
    assert load_with(load, good, ["fine"]) == "loaded"
    with pytest.raises(UsageError):
        load_with(load, good, ["bad"])
    for overrides in ([], ["fine"], ["bad"]):
        with pytest.raises(ConfigError) as found:
            load_with(load, bad, overrides)
        assert not isinstance(found.value, UsageError)


@pytest.mark.parametrize("error", [ConfigError("no"), RequestError("no")])
def test_values_that_were_typed(error):
    with pytest.raises(UsageError, match="no"), usage():
        raise error


@pytest.mark.parametrize(
    ("command", "recipe", "other"),
    [("train", "word_problems", "eval"), ("eval", "recipes/tiny_cpu_student.toml", "train")],
)
def test_a_recipe_of_another_command_is_wrong_use(d2f, command, recipe, other):
    done = d2f(command, recipe)
    assert done.code == 2
    assert f"{recipe} is a recipe of d2f {other}, not of d2f {command}" in done.err


def test_a_misspelt_recipe_is_told_the_nearest(d2f):
    done = d2f("train", "tiny_cpu_studnt")
    assert done.code == 1
    assert "did you mean tiny_cpu_student?" in done.err

"""Public names are there for users, and importing them is cheap and complete."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import d2f

PUBLIC = {
    "BlockLayout",
    "D2FError",
    "DecodingPolicy",
    "Engine",
    "EngineConfig",
    "GenerationResult",
    "Request",
    "__version__",
    "distillation_loss",
    "generate_ids",
    "load_model",
}

PACKAGE = Path(d2f.__file__).parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages([str(PACKAGE)], prefix="d2f.")
    if module.name != "d2f.__main__"
)


def test_public_names_are_pinned():
    assert set(d2f.__all__) == PUBLIC
    assert len(d2f.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_exists_and_says_what_it_is(name):
    value = getattr(d2f, name)
    if name != "__version__":
        assert value.__doc__, f"d2f.{name} has no docstring"
        assert value.__module__.startswith("d2f.")
    assert name in dir(d2f)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = d2f.no_such_name


@pytest.mark.parametrize("module", MODULES)
def test_every_module_imports_and_says_what_it_is(module):
    if module.startswith("d2f.ops.triton."):
        pytest.importorskip("triton")
    assert importlib.import_module(module).__doc__, f"{module} has no docstring"


def test_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", ["d2f", "d2f.cli.main"])
def test_start_is_light(module):
    """`d2f --help` must not wait for what it does not use."""
    heavy = ("torch", "transformers", "matplotlib", "numpy")
    code = f"import sys, {module}; print(*[n for n in {heavy} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    assert run.stdout.split() == []

"""Imports go one way.

`lint-imports` checks the same contract in `make check`, and indirect imports besides. This test
reads the source alone, so it needs no tool and says at once which line is wrong.
"""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "d2f"

LAYERS = (
    ("testing",),
    ("cli",),
    ("training", "evaluation", "serving"),
    ("engine",),
    ("decoding",),
    ("models",),
    ("ops", "diffusion"),
    ("text", "problems"),
    ("chat_template", "text_stream", "tokenizer_files"),
    ("hub", "provenance", "recipe"),
    ("gguf",),
    ("shipped",),
    ("errors",),
)
"""From the top: each may import what stands below it; siblings do not know each other."""

FORBIDDEN = {
    "training": {"engine", "decoding"},
    "evaluation": {"decoding", "models", "diffusion"},
    "serving": {"decoding", "models", "diffusion"},
}
"""What a package may not import although it stands below."""
TYPES = {("evaluation", "d2f.models.transformer")}
"""But for the type that an engine takes."""

HEIGHT = {name: -row for row, names in enumerate(LAYERS) for name in names}


def layer_of(module: str) -> str:
    """`d2f.models.cache` -> `models`; the package itself -> ``."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything of d2f that a file imports, wherever in the file."""
    inside = path.relative_to(SOURCE.parent).with_suffix("").parts
    package = inside[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            # `from d2f import errors` names a module, `from d2f.errors import X` does not.
            names = [f"d2f.{alias.name}" for alias in node.names] if base == "d2f" else [base]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == "d2f":
                yield node.lineno, name


def violations(path: Path) -> Iterator[str]:
    importer = layer_of(".".join(path.relative_to(SOURCE.parent).with_suffix("").parts))
    if importer in ("__init__", "__main__"):
        return
    for line, name in imports_of(path):
        imported = layer_of(name)
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if imported == importer or imported == "__version__":
            continue
        if imported not in HEIGHT:
            # The package itself is the face for users; inside, say where a thing comes from.
            yield f"{where}: import from the module that defines it"
        elif HEIGHT[imported] >= HEIGHT[importer]:
            yield f"{where}: {importer} stands below or beside {imported}"
        elif imported in FORBIDDEN.get(importer, ()) and (importer, name) not in TYPES:
            yield f"{where}: {importer} must not know {imported}"


def test_every_module_has_a_layer():
    children = {p.stem for p in SOURCE.glob("*.py")}
    children |= {p.name for p in SOURCE.iterdir() if (p / "__init__.py").exists()}
    assert children - {"__init__", "__main__"} <= set(HEIGHT)


@pytest.mark.parametrize("layer", HEIGHT)
def test_imports_go_one_way(layer):
    paths = [SOURCE / f"{layer}.py", *sorted((SOURCE / layer).rglob("*.py"))]
    found = [text for path in paths if path.exists() for text in violations(path)]
    assert not found, "\n".join(found)


def test_import_linter_checks_the_same_contract():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers, *forbidden = config["tool"]["importlinter"]["contracts"]
    rows = [tuple(part.strip(" ()") for part in row.split("|")) for row in layers["layers"]]
    assert tuple(rows) == LAYERS
    assert layers["exhaustive"]
    assert {
        layer_of(contract["source_modules"][0]): set(map(layer_of, contract["forbidden_modules"]))
        for contract in forbidden
    } == FORBIDDEN

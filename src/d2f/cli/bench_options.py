"""Options and checks that the `d2f bench` commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d2f.cli.usage import UsageError, usage

if TYPE_CHECKING:
    from d2f.models.transformer import Transformer

PageSizeOption = Annotated[int, typer.Option(help="Positions of a page.", min=1)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, …")]
DtypeOption = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: faster.")]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write all numbers to this file.", dir_okay=False)
]


def numbers(text: str) -> list[int]:
    """Parse a list such as `1,4,16`; each number must be at least 1.

    Example:
        >>> numbers("1,4")
        [1, 4]
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise typer.BadParameter(f"'{text}' is no list of whole numbers of at least 1, as 1,4,16")
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Source:
    """The options of what is measured: a shape with random weights, or a model."""

    shape: Annotated[
        str | None,
        typer.Option(
            help="llada-8b, dream-7b, llama-3-8b, qwen2.5-7b or qwen3-8b, with random weights."
        ),
    ] = None
    model: Annotated[str | None, typer.Option(help="Or a model: folder, hub id or GGUF file.")] = (
        None
    )
    layers: Annotated[
        int | None, typer.Option(help="Layers of the shape, where all are too many.", min=1)
    ] = None

    def __post_init__(self) -> None:
        if self.shape is not None and self.model is not None:
            raise UsageError("--shape and --model exclude each other")
        if self.layers is not None and self.shape is None:
            raise UsageError("--layers: only a --shape can be cut")

    @property
    def shipped(self) -> bool:
        """Whether nothing was chosen, so that the shipped student is measured."""
        return self.shape is None and self.model is None

    def load(self, device: str, dtype: str) -> tuple[Transformer, str]:
        """Return the model, by default the shipped student, and its name for results."""
        from d2f.models.checkpoint import load_model
        from d2f.models.presets import preset_spec, random_model
        from d2f.shipped import shipped_model

        if self.shape is not None:
            with usage():
                spec = preset_spec(self.shape, num_layers=self.layers)
            return random_model(spec, device=device, dtype=dtype), self.shape
        name = self.model or str(shipped_model("student"))
        return load_model(name, device=device, dtype=dtype), source_label(name)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The options of where and how a model computes."""

    backend: Annotated[str, typer.Option(help="torch, triton or auto.")] = "auto"
    device: DeviceOption = None
    dtype: DtypeOption = None

    def chosen(self) -> tuple[str, str]:
        """Return the device, which must have the backend, and the dtype."""
        from d2f.cli.device import choose_device, choose_dtype
        from d2f.ops.backend import select_backend

        device = choose_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        with usage():
            select_backend(self.backend, device)
        return device, dtype


def source_label(source: str) -> str:
    """Return a model's name for results; a shipped model has its name instead of its path.

    Example:
        >>> source_label("org/model"), source_label("shipped:student")
        ('org/model', 'shipped student')
    """
    from d2f.shipped import named_folder, shipped_model

    source = str(named_folder(source) or source)
    name = Path(source).name
    return f"shipped {name}" if Path(source) == shipped_model("student").parent / name else source


def describe_model(model: Transformer, name: str, random: bool) -> dict[str, object]:
    """Return the facts of the measured model for a result file."""
    spec = model.spec
    return {
        "name": name,
        "random_weights": random,
        "architecture": spec.architecture.name,
        "num_layers": spec.num_layers,
        "num_parameters": spec.num_parameters,
    }

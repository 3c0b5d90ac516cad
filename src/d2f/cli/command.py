"""The base class of all commands of `d2f`."""

from __future__ import annotations

import math
from typing import Any

from typer.core import TyperCommand

from d2f.cli.usage import UsageError


class Command(TyperCommand):
    """A command that refuses `nan` and `inf`, which pass the limits of options."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            UsageError: The value of an option is not finite.
        """
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                option = next(p.opts[0] for p in self.params if p.name == name)
                raise UsageError(f"{option} is {value}; it must be a finite number")
        return super().invoke(ctx)

"""The part of `d2f inspect` for adapters: facts from an adapter's headers, without its base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from d2f.errors import counted


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Return the facts of an adapter as plain values.

    Raises:
        CheckpointError: The adapter is missing, broken or not LoRA.

    Example:
        >>> from d2f.testing import write_adapter
        >>> import tempfile
        >>> inspect_adapter(write_adapter(tempfile.mkdtemp(), "llama"))["r"]
        4
    """
    from d2f.hub import resolve_folder
    from d2f.models.lora_folder import adapter_entries, adapter_headers
    from d2f.models.storage import read_max_new_tokens, read_policy

    folder = resolve_folder(path)
    values, declared = adapter_entries(folder)
    stored = adapter_headers(folder, declared)
    targets = values.get("target_modules")
    halves = {name: tensor for name, tensor in stored.items() if ".lora_" in name}
    weights = {name: tensor for name, tensor in halves.items() if not name.endswith(".scale")}
    modules = {name.rpartition(".lora_")[0] for name in weights}
    policy = read_policy(folder)
    files = sorted({tensor.file for tensor in stored.values()})
    return {
        "path": str(path),
        "base_model": values.get("base_model_name_or_path") or None,
        "base_type": None if declared is None else declared.base_type,
        "checks_base": declared is not None and declared.fingerprint is not None,
        "mask_token_id": None if declared is None else declared.mask_token_id,
        "r": values.get("r", 8),
        "alpha": values.get("lora_alpha", 8),
        "use_rslora": bool(values.get("use_rslora")),
        "targets": [str(one) for one in (targets if isinstance(targets, list) else [targets])],
        "modules": len(modules),
        "parameters": sum(math.prod(tensor.shape) for tensor in weights.values()),
        "dtype": ", ".join(sorted({_DTYPES.get(t.kind, t.kind) for t in weights.values()})),
        "bytes": sum(file.stat().st_size for file in files),
        "distilled": None if declared is None else declared.distilled,
        "recommended_policy": None if policy is None else policy.to_dict(),
        "max_new_tokens": read_max_new_tokens(folder),
    }


_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8"}


def adapter_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of a report; the lines that do not also belong to a model come first."""
    known = "its weights" if report["checks_base"] else "its name only"
    base = f"{report['base_model'] or 'not named'}, known by {known}"
    mask = report["mask_token_id"]
    read = f"{report['base_type']}, " if report["base_type"] else ""
    diffusion = f"as a diffusion model with mask token {mask}"
    limit = report["max_new_tokens"]
    unset = "none; decoded by vanilla" if report["distilled"] is False else "none"
    scale = ", scaled by 1 / sqrt(r)" if report["use_rslora"] else ""
    return [
        (
            "adapter",
            f"LoRA r={report['r']}, alpha={report['alpha']}{scale} on "
            f"{', '.join(report['targets'])} ({counted(report['modules'], 'module')}, "
            f"{counted(report['parameters'], 'parameter', ',')})",
        ),
        ("stored as", f"{report['dtype']}, {human(report['bytes'])}"),
        ("base", base),
        ("base is read", f"{read}{'as it is' if mask is None else diffusion}"),
        ("policy", pairs(report["recommended_policy"] or {}) or unset),
        (
            "answers",
            "length not named" if limit is None else f"at most {counted(limit, 'new token')}",
        ),
    ]


def pairs(values: dict[str, Any]) -> str:
    """Return names and values in one line, without unset values."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, []))


def human(count: float) -> str:
    """Return a number of bytes as a text in a suitable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError

"""`d2f inspect`: report the facts of a checkpoint from its headers, without loading weights."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d2f.errors import CheckpointError, counted

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec
    from d2f.models.storage import StoredTensor

_BRIEF = 4  # lines about an adapter beside its model, whose own lines have the other facts
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I8": "int8"}
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
    "head_dim", "max_positions", "tie_embeddings",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "chat_template.jinja")


def inspect_command(
    model: Annotated[
        str, typer.Argument(help="Model: folder, hub id or GGUF file; or an adapter's folder.")
    ],
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id of a LoRA adapter for it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: architecture, sizes, token ids, adapter, policy, memory needed.

    No weight is loaded, so this takes no memory; keys and shapes are checked all the same. Where
    only the tokenizer is broken, the report says so and the exit status is 1. Of an adapter by
    itself: base, rank, targets, bytes, how the base is read, policy.

    Example: d2f inspect ./my-model --adapter ./my-adapter
    """
    from d2f.hub import resolve_folder
    from d2f.models.lora_config import is_adapter

    alone = adapter is None and is_adapter(resolve_folder(model, weights=False))
    report = inspect_adapter(model) if alone else inspect_model(model, adapter)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for line in adapter_lines(report) if alone else _lines(report):
            table.add_row(*line)
        Console().print(table)
    if not alone and report["tokenizer"] and report["tokenizer"]["error"]:
        raise typer.Exit(1)


def inspect_model(path: str | Path, adapter: str | Path | None = None) -> dict[str, Any]:
    """Return the facts of a checkpoint and, if given, of an adapter for it, as plain values.

    Of a hub id only the small files are fetched; `dtype` and `files` are None unless its weights
    are in the local cache. `gguf_blocks` counts tensors, numbers and bytes by block type and is
    None unless the model is a GGUF file. `tokenizer` is None for a folder without one, with which
    ids can still be decoded; its `error` says why a tokenizer cannot be used.

    Example:
        >>> from d2f.testing import write_checkpoint
        >>> import tempfile
        >>> inspect_model(write_checkpoint(tempfile.mkdtemp(), "llada"))["architecture"]
        'llada'
    """
    from d2f.engine.policy import default_limit, default_strategy
    from d2f.hub import expanded, resolve_folder
    from d2f.models.checkpoint import match_headers, read_spec
    from d2f.models.ends import find_ends
    from d2f.models.imported import block_counts
    from d2f.models.lora_folder import with_adapter

    folder = resolve_folder(path, weights=False)
    base = spec = read_spec(folder)
    # A local path must hold the weights; of a hub id they may not be fetched yet.
    local = expanded(path).exists()
    stored = match_headers(folder, base) if local or any(folder.glob("*.safetensors")) else None
    adapted = None
    if adapter is not None:
        adapter_folder = resolve_folder(adapter)
        adapted = _adapter(str(adapter), adapter_folder, base)
        spec = with_adapter(spec, adapter_folder)
    ends = [end for end in find_ends(folder, base) if end.id != spec.mask_token_id]
    policy = spec.recommended_policy
    return {
        "path": str(path),
        "architecture": spec.architecture.name,
        "decodes": "autoregressively" if spec.architecture.causal else "by diffusion",
        "parameters": spec.num_parameters,
        "dtype": None if stored is None else _dtypes(stored),
        "sizes": {name: getattr(spec, name) for name in _SIZES},
        "token_ids": {
            "mask": spec.mask_token_id,
            "eos": list(spec.eos_token_ids),
            "bos": spec.bos_token_id,
            "pad": spec.pad_token_id,
        },
        "tokenizer": _tokenizer(folder),
        "ends": [asdict(end) | {"sources": list(end.sources)} for end in ends],
        "adapter": adapted,
        "strategy": default_strategy(spec),
        "max_new_tokens": default_limit(spec),
        "recommended_policy": None if policy is None else policy.to_dict(),
        "memory": {
            "weights_bf16_bytes": 2 * spec.num_parameters,
            "weights_fp32_bytes": 4 * spec.num_parameters,
            "kv_bf16_bytes_per_token": spec.kv_bytes_per_token,
            "kv_bf16_bytes_at_max_positions": spec.kv_bytes_per_token * spec.max_positions,
        },
        "files": None if stored is None else _files(stored),
        "gguf_blocks": block_counts(stored or {}) or None,
    }


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    from d2f.chat_template import check_chat_template
    from d2f.text import Tokenizer

    if not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
        return None
    template = None
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.chat_template is not None:
            check_chat_template(tokenizer.chat_template)
            template = {"leaves_out": list(tokenizer.left_out)}
    except CheckpointError as error:
        return {"num_tokens": None, "chat_template": None, "error": str(error)}
    return {"num_tokens": tokenizer.vocab_size, "chat_template": template, "error": None}


def inspect_adapter(path: str | Path) -> dict[str, Any]:
    """Return the facts of an adapter as plain values.

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
        "base_type": None if declared is None else declared.base.model_type,
        "checks_base": declared is not None and declared.base.fingerprint is not None,
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


def _adapter(name: str, folder: Path, base: ModelSpec) -> dict[str, Any]:
    from d2f.models.lora_folder import read_adapter

    found = read_adapter(folder, base)  # refuses an adapter that does not fit
    parts = [published.rsplit(".", 1)[-1] for published in found.targets]
    # The adapter may name its targets by an expression; these are the modules that it matches.
    return inspect_adapter(name) | {"targets": sorted(set(parts)), "modules": len(parts)}


def _dtypes(stored: dict[str, StoredTensor]) -> str:
    """The dtypes of the tensors, beginning with that of most numbers."""
    count: Counter[str] = Counter()
    for tensor in stored.values():
        count[str(tensor.dtype)] += tensor.num_bytes // tensor.dtype.itemsize
    return ", ".join(name.removeprefix("torch.") for name, _ in count.most_common())


def _files(stored: dict[str, StoredTensor]) -> list[dict[str, Any]]:
    count = Counter(tensor.file for tensor in stored.values())
    return [
        {"name": file.name, "bytes": file.stat().st_size, "tensors": number}
        for file, number in sorted(count.items())
    ]


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    sizes, memory, adapter = report["sizes"], report["memory"], report["adapter"]
    lines = [
        ("architecture", f"{report['architecture']}, decodes {report['decodes']}"),
        ("parameters", f"{report['parameters']:,} ({report['dtype'] or 'weights not fetched'})"),
        ("layers", f"{sizes['num_layers']} of width {sizes['hidden_size']:,}"),
        ("feed-forward", f"width {sizes['intermediate_size']:,}"),
        ("heads", f"{sizes['num_heads']}, {sizes['num_kv_heads']} of keys and values"),
        ("vocabulary", f"{sizes['vocab_size']:,}{', tied' if sizes['tie_embeddings'] else ''}"),
        ("positions", f"{sizes['max_positions']:,}"),
        ("token ids", _pairs(report["token_ids"])),
        ("tokenizer", _tokenizer_line(report["tokenizer"], sizes["vocab_size"])),
        *(("ends at" if n == 0 else "", _end(end)) for n, end in enumerate(report["ends"])),
        ("policy", _pairs(report["recommended_policy"] or {}) or "none; the defaults apply"),
        (
            "decoded by",
            f"{report['strategy']}, at most {counted(report['max_new_tokens'], 'new token')}",
        ),
        *([("adapter", "none")] if adapter is None else adapter_lines(adapter)[:_BRIEF]),
        (
            "weights",
            f"{_human(memory['weights_bf16_bytes'])} in bf16, "
            f"{_human(memory['weights_fp32_bytes'])} in fp32",
        ),
        (
            "KV cache",
            f"{_human(memory['kv_bf16_bytes_per_token'])} per token in bf16, "
            f"{_human(memory['kv_bf16_bytes_at_max_positions'])} for all positions",
        ),
    ]
    for file in report["files"] or []:
        size = _human(file["bytes"])
        lines.append(("file", f"{file['name']}, {size}, {counted(file['tensors'], 'tensor')}"))
    blocks = (report["gguf_blocks"] or {}).items()
    for number, (name, count) in enumerate(blocks):
        tensors = f"{counted(count['tensors'], 'tensor')} of {count['numbers']:,} numbers"
        lines.append(("" if number else "blocks", f"{name}, {_human(count['bytes'])}, {tensors}"))
    return lines


def _tokenizer_line(tokenizer: dict[str, Any] | None, vocab_size: int) -> str:
    if tokenizer is None:
        return "none"
    if tokenizer["error"]:
        return f"cannot be used: {tokenizer['error']}"
    number, template = tokenizer["num_tokens"], tokenizer["chat_template"]
    line = f"{counted(number, 'token', ',')}, {'no' if template is None else 'a'} chat template"
    if template and template["leaves_out"]:
        words = {"system": "system messages", "history": "all before the user's last message"}
        line += f", which leaves out {' and '.join(words[name] for name in template['leaves_out'])}"
    more = number - vocab_size
    return f"{line}; the model does not know {more:,} of them" if more > 0 else line


def _end(end: dict[str, Any]) -> str:
    text = "" if end["text"] is None else f" {end['text']!r}"
    row = "" if end["has_row"] else "; left out: the model has no row for it"
    return f"{end['id']}{text} ({', '.join(end['sources'])}{row})"


def adapter_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines of a report; the lines that do not also belong to a model come first."""
    known = "its weights" if report["checks_base"] else "its name only"
    mask, limit = report["mask_token_id"], report["max_new_tokens"]
    read = f"{report['base_type']}, " if report["base_type"] else ""
    diffusion = f"as a diffusion model with mask token {mask}"
    unset = "none; decoded by vanilla" if report["distilled"] is False else "none"
    scale = ", scaled by 1 / sqrt(r)" if report["use_rslora"] else ""
    return [
        (
            "adapter",
            f"LoRA r={report['r']}, alpha={report['alpha']}{scale} on "
            f"{', '.join(report['targets'])} ({counted(report['modules'], 'module')}, "
            f"{counted(report['parameters'], 'parameter', ',')})",
        ),
        ("stored as", f"{report['dtype']}, {_human(report['bytes'])}"),
        ("base", f"{report['base_model'] or 'not named'}, known by {known}"),
        ("base is read", f"{read}{'as it is' if mask is None else diffusion}"),
        ("policy", _pairs(report["recommended_policy"] or {}) or unset),
        (
            "answers",
            "length not named" if limit is None else f"at most {counted(limit, 'new token')}",
        ),
    ]


def _pairs(values: dict[str, Any]) -> str:
    """Return names and values in one line, without unset values."""
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, []))


def _human(count: float) -> str:
    """A number of bytes in a suitable unit."""
    if count < 1024:
        return f"{count:,.0f} B"
    power = min((int(count).bit_length() - 1) // 10, 3)
    return f"{count / 1024**power:,.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"

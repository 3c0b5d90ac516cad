"""The README.md of a trained model or adapter, with what the run knows and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.diffusion.policy import DecodingPolicy
from d2f.hub import is_hub_id
from d2f.models.spec import ModelSpec
from d2f.shipped import PREFIX
from d2f.training.config import TrainConfig, to_table

_STAGES = {
    "autoregressive": "trained autoregressively",
    "masked-diffusion": "trained as a masked diffusion model",
    "d2f": "distilled by discrete diffusion forcing (D2F)",
}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """The facts of a run that its card tells."""

    steps: int
    data: Mapping[str, Any]
    """Counts of the samples, as training_summary.json has them."""
    loss: float | None = None
    """The loss of the last line of the log."""
    evaluation: Mapping[str, Any] | None = None
    """The line of the evaluation of this model."""


def model_card(
    config: TrainConfig, spec: ModelSpec, policy: DecodingPolicy | None, facts: CardFacts
) -> str:
    """Write the card, with the front matter that the hub reads. It names no folder of this machine.

    `spec` and `policy` are those of the trained model.
    """
    base = _base(config)
    blocks = [
        _front_matter(config, spec, base),
        f"# {_kind(config, spec)}, {_STAGES[config.stage]}",
        _origin(config, base),
        "## How to load it",
        *(_loading_adapter if config.lora else _loading_model)(config, spec, base or "BASE_MODEL"),
        "## Training",
        _training(config, facts),
    ]
    if facts.evaluation is not None:
        settings = config.evaluate
        task = (settings.task or "held-out samples") if settings else None
        blocks += ["## Evaluation", _evaluation(facts.evaluation, task)]
    if policy is not None:
        blocks += ["## Decoding policy", _json(policy.to_dict())]
    blocks += ["## Recipe", _json(_recipe(config))]
    return "\n\n".join(blocks) + "\n"


def _front_matter(config: TrainConfig, spec: ModelSpec, base: str | None) -> str:
    adapter = config.lora is not None
    library = "transformers" if spec.architecture.in_transformers else "d2f"
    if adapter and config.model.adapter_dtype != "int8":
        library = "peft"
    tags = ["d2f", spec.architecture.name.lower(), config.stage]
    tags += [] if spec.architecture.causal else ["diffusion"]
    tags += ["lora"] if adapter else []
    relation = f"base_model_relation: {'adapter' if adapter else 'finetune'}"
    known = [f"base_model: {base}", relation] if base else []
    # A tag twice is refused by the hub.
    listed = [f"- {tag}" for tag in dict.fromkeys(tags)]
    return "\n".join(["---", *known, f"library_name: {library}", "tags:", *listed, "---"])


def _base(config: TrainConfig) -> str | None:
    """The hub id of the weights that the run started from, if they have one."""
    if config.model.base_name is not None:
        return config.model.base_name
    init = config.model.init
    if init is None or not is_hub_id(init) or Path(init).exists():
        return None
    # A file, and a folder of an earlier run, look like an id; they may be gone.
    return None if init.startswith("runs/") or init.lower().endswith(".gguf") else init


def _kind(config: TrainConfig, spec: ModelSpec) -> str:
    size = f"{spec.num_parameters / 1e6:,.1f}M parameters"
    if config.lora is None:
        return f"{spec.architecture.name} of {size}"
    name = spec.read_from or spec.architecture.name
    read = ", read as a diffusion model" if spec.read_from else ""
    return f"LoRA adapter (r = {config.lora.r}) for a {name} of {size}{read}"


def _origin(config: TrainConfig, base: str | None) -> str:
    if base:
        return f"Trained from `{base}`."
    if config.model.init is None:
        return "Trained from random weights."
    if config.model.init.startswith(PREFIX):
        return f"Trained from `{config.model.init}`, which comes with d2f."
    return "Trained from weights in a local folder, which this card does not know by a public name."


def _loading_model(config: TrainConfig, spec: ModelSpec, base: str) -> Iterable[str]:
    yield _code("bash", "d2f generate --model THIS_FOLDER 'a prompt'")
    if spec.architecture.in_transformers:
        yield _code(
            "python",
            "from transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        )


def _loading_adapter(config: TrainConfig, spec: ModelSpec, base: str) -> Iterable[str]:
    """Blocks that say how an adapter is loaded, by PEFT, too, where PEFT can read it."""
    yield _code("bash", f"d2f generate --model {base} --adapter THIS_FOLDER 'a prompt'")
    yield _code("python", f'import d2f\n\nmodel = d2f.load_model("{base}", adapter="THIS_FOLDER")')
    if spec.read_from is not None:
        yield (
            f"The base model is the autoregressive checkpoint as it is published; the adapter "
            f"makes it a diffusion model with the mask token {spec.mask_token_id}. Another base, "
            "such as another fine-tune of the same shape, is refused; the same one in other "
            "precisions is not."
        )
    if config.model.adapter_dtype == "int8":
        yield (
            "The adapter is stored in 8 bits, which PEFT does not read. To write it in PEFT's "
            "format, load it with `merge_adapter=False` and call `d2f.models.lora.save_adapter("
            f'model, FOLDER, base_model="{base}", dtype="float32")`.'
        )
    elif spec.read_from is not None:
        yield "The files are in PEFT's format; decoding as trained needs d2f."
    else:
        loader, more, note = "AutoModelForCausalLM", "", ""
        if not spec.architecture.in_transformers:
            loader, more = "AutoModel", ", trust_remote_code=True"
            note = " (the base model's own code may be needed there; decoding as trained needs d2f)"
        yield f"The adapter is in PEFT's format{note}:"
        yield _code(
            "python",
            f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
            f'base = {loader}.from_pretrained("{base}"{more})\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        )


def _training(config: TrainConfig, facts: CardFacts) -> str:
    data = facts.data

    def number(name: str, *, even_none: bool = True) -> str | None:
        return f"{data[name]:,}" if data.get(name) or (name in data and even_none) else None

    return _table(
        {
            "stage": config.stage,
            "steps": f"{facts.steps:,}",
            "sequences of an update": f"{config.batch_size:,}",
            "tokens of a sequence": f"{config.data.sequence_length:,}",
            "peak learning rate": f"{config.optimizer.lr:g}",
            "seed": str(config.seed),
            "samples trained on": number("used"),
            "samples dropped as over-long": number("dropped"),
            "samples truncated": number("truncated"),
            "samples held out": number("held_out", even_none=False),
            "bad rows left out": number("bad_rows", even_none=False),
            "last loss of the log": None if facts.loss is None else f"{facts.loss:.6g}",
        }
    )


def _evaluation(record: Mapping[str, Any], task: str | None) -> str:
    rate, error = record.get("tokens_per_forward"), record.get("standard_error")
    length = record.get("mean_tokens")
    return _table(
        {
            "problems": f"{record.get('num_problems', '')} of {task}",
            "step": str(record["step"]),
            "score": f"{record['score']:.1%}",
            "standard error": None if error is None else f"{error:.1%}",
            "tokens per forward": None if rate is None else f"{rate:.2f}",
            "mean tokens of an answer": None if length is None else str(length),
        }
    )


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that made the model, without folders."""
    table = to_table(config)
    del table["output"], table["data"]["cache"], table["data"]["num_workers"]
    kept = {name: value for name, value in table.items() if value is not None and value != {}}
    return {name: _without_folders(value) for name, value in kept.items()}


def _without_folders(value: Any) -> Any:
    """Paths keep their last part; hub ids and all else stay."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and re.match(r"[/~\\]|\.\.?/|.:\\", value):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


def _table(rows: Mapping[str, str | None]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _json(value: Mapping[str, Any]) -> str:
    return _code("json", json.dumps(value, indent=1, ensure_ascii=False))


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"

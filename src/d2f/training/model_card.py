"""The README.md of a trained model or adapter: what the run knows, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
# What transformers can load without code of others.
_KNOWN_TO_TRANSFORMERS = ("llama", "qwen2")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells of a run."""

    steps: int
    data: Mapping[str, Any]
    """Counts of the samples, as training_summary.json has them."""
    loss: float | None = None
    """Of the last line of the log."""
    evaluation: Mapping[str, Any] | None = None
    """The line of the evaluation of this model, or of the run's best."""
    task: str | None = None
    """What was evaluated."""


def model_card(
    config: TrainConfig, spec: ModelSpec, policy: DecodingPolicy | None, facts: CardFacts
) -> str:
    """The card, with the front matter that the hub reads. It names no folder of this machine.

    Args:
        config: The recipe.
        spec: Of the trained model.
        policy: That the model carries.
        facts: What came of the run.
    """
    blocks = [
        _front_matter(config, spec),
        f"# {_kind(config, spec)}, {_STAGES[config.stage]}",
        _origin(config),
        "## How to load it",
        _loading(config, spec),
        "## Training",
        _training(config, facts),
    ]
    if facts.evaluation is not None:
        blocks += ["## Evaluation", _evaluation(facts)]
    if policy is not None:
        blocks += ["## Decoding policy", _json(policy.to_dict())]
    recipe = {
        name: value for name, value in _recipe(config).items() if value is not None and value != {}
    }
    blocks += ["## Recipe", _json(recipe)]
    return "\n\n".join(blocks) + "\n"


def _front_matter(config: TrainConfig, spec: ModelSpec) -> str:
    lines = ["---"]
    if _base(config):
        lines.append(f"base_model: {_base(config)}")
        lines.append(f"base_model_relation: {'finetune' if config.lora is None else 'adapter'}")
    if config.lora is not None and config.model.adapter_dtype != "int8":
        lines.append("library_name: peft")
    elif spec.architecture.name in _KNOWN_TO_TRANSFORMERS:
        lines.append("library_name: transformers")
    else:
        lines.append("library_name: d2f")
    tags = ["d2f", spec.architecture.name.lower(), config.stage]
    if not spec.architecture.causal:
        tags.append("diffusion")
    if config.lora is not None:
        tags.append("lora")
    # A tag twice is refused by the hub.
    lines += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags)), "---"]
    return "\n".join(lines)


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
    if config.lora is not None:
        name = spec.read_from or spec.architecture.name
        read = ", read as a diffusion model" if spec.read_from else ""
        return f"LoRA adapter (r = {config.lora.r}) for a {name} of {size}{read}"
    return f"{spec.architecture.name} of {size}"


def _origin(config: TrainConfig) -> str:
    base = _base(config)
    if base:
        return f"Trained from `{base}`."
    if config.model.init is None:
        return "Trained from random weights."
    if config.model.init.startswith(PREFIX):
        return f"Trained from `{config.model.init}`, which comes with d2f."
    return "Trained from weights in a local folder, which this card does not know by a public name."


def _loading(config: TrainConfig, spec: ModelSpec) -> str:
    base = _base(config) or "BASE_MODEL"
    if config.lora is None:
        text = _code("bash", "d2f generate --model THIS_FOLDER 'a prompt'")
        if spec.architecture.name in _KNOWN_TO_TRANSFORMERS:
            text += "\n\n" + _code(
                "python",
                "from transformers import AutoModelForCausalLM\n\n"
                'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            )
        return text
    return _code("bash", f"d2f generate --model {base} --adapter THIS_FOLDER 'a prompt'") + (
        "\n\n" + _python(config, spec, base)
    )


def _python(config: TrainConfig, spec: ModelSpec, base: str) -> str:
    """How an adapter is loaded in Python, by PEFT where PEFT can read it."""
    ours = _code("python", f'import d2f\n\nmodel = d2f.load_model("{base}", adapter="THIS_FOLDER")')
    if spec.read_from is not None:
        ours += (
            f"\n\nThe base model is the autoregressive checkpoint as it is published; the adapter "
            f"makes it a diffusion model with the mask token {spec.mask_token_id}. Another base, "
            "such as another fine-tune of the same shape, is refused; the same one in other "
            "precisions is not."
        )
    if config.model.adapter_dtype == "int8":
        return ours + (
            "\n\nThe adapter is stored in 8 bits, which PEFT does not read. To write it in PEFT's "
            "format, load it with `merge_adapter=False` and call `d2f.models.lora.save_adapter("
            f'model, FOLDER, base_model="{base}", dtype="float32")`.'
        )
    if spec.read_from is not None:
        return ours + "\n\nThe files are in PEFT's format; decoding as trained needs d2f."
    if spec.architecture.name in _KNOWN_TO_TRANSFORMERS:
        code = (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
        )
        return f"{ours}\n\nThe adapter is in PEFT's format:\n\n{_code('python', code)}"
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModel\n\n"
        f'base = AutoModel.from_pretrained("{base}", trust_remote_code=True)\n'
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")'
    )
    return (
        f"{ours}\n\nThe adapter is in PEFT's format (the base model's own code may "
        f"be needed there; decoding as trained needs d2f):\n\n{_code('python', code)}"
    )


def _training(config: TrainConfig, facts: CardFacts) -> str:
    data = facts.data
    rows = [
        ("stage", config.stage),
        ("steps", f"{facts.steps:,}"),
        ("sequences of an update", f"{config.batch_size:,}"),
        ("tokens of a sequence", f"{config.data.sequence_length:,}"),
        ("peak learning rate", f"{config.optimizer.lr:g}"),
        ("seed", str(config.seed)),
        ("samples trained on", f"{data['used']:,}" if "used" in data else None),
        ("samples dropped as over-long", f"{data['dropped']:,}" if "dropped" in data else None),
        ("samples truncated", f"{data['truncated']:,}" if "truncated" in data else None),
        ("samples held out", f"{data['held_out']:,}" if data.get("held_out") else None),
        ("bad rows left out", f"{data['bad_rows']:,}" if data.get("bad_rows") else None),
        ("last loss of the log", f"{facts.loss:.6g}" if facts.loss is not None else None),
    ]
    return _table(rows)


def _evaluation(facts: CardFacts) -> str:
    record = facts.evaluation or {}
    rate = record.get("tokens_per_forward")
    rows = [
        ("problems", f"{record.get('num_problems', '')} of {facts.task}"),
        ("step", str(record["step"])),
        ("score", f"{record['score']:.1%}"),
        (
            "standard error",
            f"{record['standard_error']:.1%}" if "standard_error" in record else None,
        ),
        ("tokens per forward", f"{rate:.2f}" if rate is not None else None),
        (
            "mean tokens of an answer",
            str(record["mean_tokens"]) if "mean_tokens" in record else None,
        ),
    ]
    return _table(rows)


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """The settings that made the model, without folders."""
    table = to_table(config)
    del table["output"]
    table["data"] = {k: v for k, v in table["data"].items() if k not in ("cache", "num_workers")}
    return {name: _without_folders(value) for name, value in table.items()}


def _without_folders(value: Any) -> Any:
    """Paths keep their last part; hub ids and all else stay."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and (
        value.startswith(("/", "~", "\\", "./", "../")) or value[1:3] == ":\\"
    ):
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


def _table(rows: list[tuple[str, str | None]]) -> str:
    lines = ["| | |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows if value is not None])


def _json(value: Mapping[str, Any]) -> str:
    return _code("json", json.dumps(value, indent=1, ensure_ascii=False))


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"

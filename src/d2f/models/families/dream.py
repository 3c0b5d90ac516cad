"""Dream: diffusion models made of Qwen2, and autoregressive models that are read as one."""

from __future__ import annotations

from dataclasses import replace

from d2f.errors import ConfigError
from d2f.models import hugging_face
from d2f.models.families.qwen2 import QWEN2_7B
from d2f.models.spec import Architecture, Family, ModelSpec

ARCHITECTURE = Architecture(
    name="Dream",
    class_name="DreamModel",
    shifted=True,
    causal=False,
    qkv_bias=True,
    sampler="entropy",
    names=hugging_face.NAMES,
    in_transformers=False,
)
FAMILY = Family(
    architecture=ARCHITECTURE,
    read=hugging_face.read,
    write=hugging_face.write,
    # Sizes have no default: those of the authors' class are of no model that they published.
    defaults=hugging_face.DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    presets={"dream-7b": replace(QWEN2_7B, architecture=ARCHITECTURE, mask_token_id=151666)},
)


def read_as_diffusion(spec: ModelSpec, mask_token_id: int) -> ModelSpec:
    """The spec of an autoregressive model that is read as a diffusion model (see `as_diffusion`).

    Raises:
        ConfigError: The model is a diffusion model already, or its vocabulary does not hold
            `mask_token_id`.
    """
    if not spec.architecture.causal:
        raise ConfigError(f"{spec.architecture.name} is a diffusion model already")
    if not 0 <= mask_token_id < spec.vocab_size:
        raise ConfigError(
            f"mask_token_id is {mask_token_id}; the vocabulary holds ids 0 to {spec.vocab_size - 1}"
        )
    return replace(
        spec,
        architecture=ARCHITECTURE,
        mask_token_id=mask_token_id,
        eos_token_ids=tuple(token for token in spec.eos_token_ids if token != mask_token_id),
        qkv_bias=True,
        recommended_policy=None,
        recommended_max_new_tokens=None,
        read_from=spec.architecture.name,
    )

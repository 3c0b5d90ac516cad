"""Llama: autoregressive models without biases."""

from __future__ import annotations

from d2f.models import hugging_face
from d2f.models.spec import Architecture, Family, ModelSpec

ARCHITECTURE = Architecture(
    name="llama",
    class_name="LlamaForCausalLM",
    shifted=True,
    causal=True,
    names=hugging_face.NAMES,
    in_transformers=True,
)


FAMILY = Family(
    architecture=ARCHITECTURE,
    # transformers' class knows no sliding windows, whatever a config says.
    read=lambda config, *more: hugging_face.read({**config, "use_sliding_window": False}, *more),
    write=hugging_face.write,
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults=hugging_face.DEFAULTS
    | hugging_face.SIZES
    | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    presets={
        "llama-3-8b": ModelSpec(
            architecture=ARCHITECTURE,
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=5e5,
            norm_eps=1e-5,
            max_positions=8192,
            eos_token_ids=(128001,),
            bos_token_id=128000,
        )
    },
)

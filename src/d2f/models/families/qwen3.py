"""Qwen3: autoregressive models with normalised heads of queries and keys, and without biases."""

from __future__ import annotations

from d2f.models import hugging_face
from d2f.models.spec import Architecture, Family, ModelSpec

ARCHITECTURE = Architecture(
    name="qwen3",
    class_name="Qwen3ForCausalLM",
    shifted=True,
    causal=True,
    qk_norm=True,
    names=hugging_face.NAMES,
    in_transformers=True,
)


FAMILY = Family(
    architecture=ARCHITECTURE,
    read=hugging_face.read,
    write=hugging_face.write,
    fixed={"attention_bias": False},
    defaults=hugging_face.DEFAULTS
    | hugging_face.SIZES
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
    },
    presets={
        "qwen3-8b": ModelSpec(
            architecture=ARCHITECTURE,
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rope_theta=1e6,
            norm_eps=1e-6,
            max_positions=40960,
            qk_norm=True,
            eos_token_ids=(151645,),
            bos_token_id=151643,
        )
    },
)

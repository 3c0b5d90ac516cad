"""Qwen2 and Qwen2.5: autoregressive models with biases on queries, keys and values."""

from __future__ import annotations

from d2f.models import hugging_face
from d2f.models.spec import Architecture, Family, ModelSpec

ARCHITECTURE = Architecture(
    name="qwen2",
    class_name="Qwen2ForCausalLM",
    shifted=True,
    causal=True,
    qkv_bias=True,
    names=hugging_face.NAMES,
    in_transformers=True,
)
QWEN2_7B = ModelSpec(
    architecture=ARCHITECTURE,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_positions=131072,
    qkv_bias=True,
    eos_token_ids=(151643,),
    pad_token_id=151643,
)
FAMILY = Family(
    architecture=ARCHITECTURE,
    read=hugging_face.read,
    write=hugging_face.write,
    defaults=hugging_face.DEFAULTS
    | hugging_face.SIZES
    | {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
    },
    presets={"qwen2.5-7b": QWEN2_7B},
)

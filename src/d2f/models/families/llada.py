"""LLaDA: a diffusion model whose files follow its authors' code."""

from __future__ import annotations

from typing import Any

from d2f.models.hugging_face import Config, token_ids, write_common
from d2f.models.spec import Architecture, Family, ModelSpec

_NAMES = {
    "embed": "model.transformer.wte",
    "layers.{i}.attention_norm": "model.transformer.blocks.{i}.attn_norm",
    "layers.{i}.qkv.q_proj": "model.transformer.blocks.{i}.q_proj",
    "layers.{i}.qkv.k_proj": "model.transformer.blocks.{i}.k_proj",
    "layers.{i}.qkv.v_proj": "model.transformer.blocks.{i}.v_proj",
    "layers.{i}.o_proj": "model.transformer.blocks.{i}.attn_out",
    "layers.{i}.mlp_norm": "model.transformer.blocks.{i}.ff_norm",
    "layers.{i}.gate_up.gate_proj": "model.transformer.blocks.{i}.ff_proj",
    "layers.{i}.gate_up.up_proj": "model.transformer.blocks.{i}.up_proj",
    "layers.{i}.down_proj": "model.transformer.blocks.{i}.ff_out",
    "norm": "model.transformer.ln_f",
    # One level up from the blocks, yet of the same last name as their down projection.
    "lm_head": "model.transformer.ff_out",
}
ARCHITECTURE = Architecture(
    name="llada",
    class_name="LLaDAModelLM",
    shifted=False,
    causal=False,
    rope_full_precision=True,
    qkv_bias=None,
    lora_targets=("q_proj", "k_proj", "v_proj", "attn_out"),
    sampler="low_confidence",
    names=_NAMES,
    in_transformers=False,
)
_FIXED = {
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "include_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_with_affine": True,
}
"""Settings of the authors' code that have one value here."""


def _read(config: Config, architecture: Architecture, where: str) -> ModelSpec:
    width, heads = config["d_model"], config["n_heads"]
    kv_heads = config.get("n_kv_heads")
    if kv_heads is None:
        kv_heads = 1 if config.get("multi_query_attention") else heads
    return ModelSpec(
        architecture=architecture,
        # The rows of the embedding may exceed the tokenizer's vocabulary.
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=width,
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * width,
        num_layers=config["n_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        max_positions=config["max_sequence_length"],
        qkv_bias=bool(config.get("include_qkv_bias")),
        tie_embeddings=bool(config.get("weight_tying")),
        **token_ids(config),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    return write_common(spec) | {
        "d_model": spec.hidden_size,
        "mlp_hidden_size": spec.intermediate_size,
        "n_layers": spec.num_layers,
        "n_heads": spec.num_heads,
        "n_kv_heads": spec.num_kv_heads,
        "max_sequence_length": spec.max_positions,
        "embedding_size": spec.vocab_size,
        "weight_tying": spec.tie_embeddings,
        "include_qkv_bias": spec.qkv_bias,
        **_FIXED,
    }


FAMILY = Family(
    architecture=ARCHITECTURE,
    read=_read,
    write=_write,
    fixed=_FIXED,
    # Sizes have no default: those of the authors' class are of no model that they published.
    defaults={
        "mlp_ratio": 4,
        "max_sequence_length": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": True,
    },
    presets={
        "llada-8b": ModelSpec(
            architecture=ARCHITECTURE,
            vocab_size=126464,
            hidden_size=4096,
            intermediate_size=12288,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rope_theta=5e5,
            norm_eps=1e-5,
            max_positions=4096,
            mask_token_id=126336,
            eos_token_ids=(126081,),
            bos_token_id=126080,
            pad_token_id=126081,
        )
    },
)

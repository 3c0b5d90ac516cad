"""GGUF files as llama.cpp's converter writes them, from models and tokenizers of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import transformers
from tests.unit.transformers_models import random_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where the scales of a block lie, which random bytes must not make infinite.
HALF_SCALES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


def tiny(family, **options):
    """A model of transformers whose biases and norms are not trivial."""
    return random_model(family, SIZES | options)


def gguf_name(name):
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, i, part = module.split(".", 3)
        return f"blk.{i}.{NAMES[part]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def in_pairs(values, heads):
    """Rows of queries or keys in the order of the Llama layout: both of a rotated pair together."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def blocks(values, kind, seed):
    """Values as blocks; types that the package cannot write get random bytes."""
    known = gguf.GGMLQuantizationType[kind]
    if kind not in HALF_SCALES:
        return gguf.quantize(values, known)
    size, num_bytes = gguf.GGML_QUANT_SIZES[known]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (values.size // size, num_bytes), dtype=np.uint8)
    for at in HALF_SCALES[kind]:
        scale = rng.uniform(1e-5, 1e-4, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw.reshape(values.shape[0], -1)


def write_gguf(
    file, model=None, *, kinds=("F32",), layout=None, metadata=None, tensors=None, **options
):
    """Write a file; matrices take their block types from `kinds`, one after the other.

    `metadata` replaces entries, or drops those that are None; `tensors` adds some, as float32.
    """
    config = model.config if model is not None else transformers.LlamaConfig(**SIZES)
    arch = layout or {"llama": "llama", "qwen2": "qwen2"}[config.model_type]
    entries = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        f"{arch}.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    writer = gguf.GGUFWriter(file, arch, **options)
    for name, value in (entries | (metadata or {})).items():
        if value is not None:
            add(writer, name, value)
    turn = 0
    for name, parameter in ({} if model is None else dict(model.named_parameters())).items():
        values = parameter.detach().numpy()
        if arch == "llama" and "q_proj" in name:
            values = in_pairs(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = in_pairs(values, config.num_key_value_heads)
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
            continue
        kind = kinds[turn % len(kinds)]
        turn += 1
        known = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(gguf_name(name), blocks(values, kind, turn), raw_dtype=known)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(file)


def add(writer, name, value):
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(name, value)


def vocabulary(tokenizer, kind, pre=None, **more):
    """The metadata of a tokenizer of the package tokenizers, as the converter writes them."""
    whole = json.loads(tokenizer.to_str())
    added = {token["content"]: token for token in whole["added_tokens"]}
    by_id = sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda one: one[1])
    types = [(3 if added[t]["special"] else 4) if t in added else 1 for t, _ in by_id]
    entries = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": [text for text, _ in by_id],
        "tokenizer.ggml.token_type": types,
    }
    if kind == "gpt2":
        merges = whole["model"]["merges"]
        entries["tokenizer.ggml.merges"] = [" ".join(pair) for pair in merges]
    return entries | ({} if pre is None else {"tokenizer.ggml.pre": pre}) | more

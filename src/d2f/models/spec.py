"""The description of a model: sizes, token ids and the facts of its architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from d2f.diffusion.policy import DecodingPolicy
from d2f.models.adapter_base import Fingerprint


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The facts of a family of hub checkpoints that code elsewhere depends on."""

    name: str
    """`model_type` of its config.json."""
    class_name: str
    """First entry of `architectures` in its config.json."""
    shifted: bool
    """The hidden state at position p predicts the token at p + 1 (all but LLaDA)."""
    causal: bool
    """Attention is causal: an autoregressive model."""
    rope_full_precision: bool = False
    """Queries and keys are rotated in fp32 whatever the model's dtype (LLaDA)."""
    qkv_bias: bool | None = False
    """Queries, keys and values have biases (Dream, Qwen2); None: the config says."""
    qk_norm: bool = False
    """The heads of queries and keys are normalised before they are rotated (Qwen3)."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Published names of the four attention projections, which LoRA adapts by default."""
    sampler: str | None = None
    """Algorithm of `vanilla` by which its authors decode it; None: it is autoregressive."""
    names: Mapping[str, str]
    """Our module name -> published module name; `{i}` stands for the layer."""
    in_transformers: bool
    """transformers itself has the class: no code of others is needed to load a model there."""

    def fits(self, spec: ModelSpec) -> int:
        """Rate how well its layers' parts are those of a spec; norms count more than biases."""
        return 2 * (self.qk_norm == spec.qk_norm) + (self.qkv_bias == spec.qkv_bias)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Sizes, token ids and recommended policy of one model.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> tiny_spec("llada").mask_token_id
        94
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    max_positions: int
    """Longest sequence, prompt and response together."""
    rope_scaling: Mapping[str, Any] | None = None
    """The llama3 scaling of rotary frequencies; None: unscaled."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """The heads of queries and keys are normalised before they are rotated."""
    tie_embeddings: bool = False
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Each ends an answer (`d2f.models.ends`). The first pads and ends what is trained on."""
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    recommended_policy: DecodingPolicy | None = None
    """The decoding policy that the checkpoint carries, if any."""
    recommended_max_new_tokens: int | None = None
    """The response length that the checkpoint's generation_config.json names, if any."""
    # How a model came about, not what it is.
    distilled: bool = field(default=True, compare=False)
    """Whether it was trained to be decoded in blocks. False: a diffusion model's checkpoint without
    a decoding policy; of a model that was made here nobody asks."""
    read_from: str | None = field(default=None, compare=False)
    """`model_type` of the autoregressive checkpoint whose weights are read as a diffusion model's;
    None: they are what config.json says."""
    adapter_base: Fingerprint | None = field(default=None, compare=False)
    """Fingerprint of an adapter's base model, which tells it from others; None without adapter."""

    @property
    def num_parameters(self) -> int:
        """Weights of the model, without adapters."""
        width, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        query = self.num_heads * self.head_dim
        attention = 2 * width * query + 2 * width * kv + self.qkv_bias * (query + 2 * kv)
        norms = 2 * width + self.qk_norm * 2 * self.head_dim
        layer = attention + 3 * width * self.intermediate_size + norms
        tables = (1 if self.tie_embeddings else 2) * self.vocab_size * width
        return self.num_layers * layer + tables + width

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers in bf16; twice that in fp32."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


def published_modules(spec: ModelSpec) -> dict[str, str]:
    """Published module name -> ours, for every module that holds weights.

    Example:
        >>> from d2f.testing import tiny_spec
        >>> published_modules(tiny_spec("llada"))["model.transformer.blocks.1.attn_out"]
        'layers.1.o_proj'
    """
    absent = {"lm_head"} if spec.tie_embeddings else set()
    absent |= set() if spec.qk_norm else {"layers.{i}.qkv.q_norm", "layers.{i}.qkv.k_norm"}
    modules = {}
    for ours, published in spec.architecture.names.items():
        if ours in absent:
            continue
        count = spec.num_layers if "{i}" in ours else 1
        for i in range(count):
            modules[published.replace("{i}", str(i))] = ours.replace("{i}", str(i))
    return modules


@dataclass(frozen=True, kw_only=True)
class Family:
    """The way in which the checkpoints of an architecture are read and written.

    Example:
        >>> from d2f.models.families import FAMILIES
        >>> list(FAMILIES["llama"].presets)
        ['llama-3-8b']
    """

    architecture: Architecture
    read: Callable[[Mapping[str, Any], Architecture, str], ModelSpec]
    """(config, architecture, where): the spec of a config.json to which `defaults` were added;
    `where` names it in errors."""
    write: Callable[[ModelSpec], dict[str, Any]]
    """(spec): the config.json with which the hub's own code reads the model."""
    defaults: Mapping[str, Any]
    """Values that the published class takes for entries that a config.json lacks. Token ids are not
    among them: transformers' Llama has some, but what it generates does not end there."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Entries of a config.json that have one value here; others are refused."""
    presets: Mapping[str, ModelSpec]
    """Sizes and token ids of published models, by the names of shapes."""

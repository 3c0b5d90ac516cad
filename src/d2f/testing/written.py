"""Tiny checkpoints, adapters and tokenizers on disk, as the hub publishes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from d2f.diffusion.policy import DecodingPolicy
from d2f.models.checkpoint import save_model
from d2f.models.lora import LoraConfig, save_adapter
from d2f.models.lora_config import DECLARATION_FILE
from d2f.testing.tiny import EOS_TOKEN_ID, MASK_TOKEN_ID, tiny_adapter, tiny_model

MASK_TOKEN, EOS_TOKEN = "<|mask|>", "<|endoftext|>"
# One id per character: newline, then space to '|'.
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("|") + 1))


def write_checkpoint(
    folder: str | Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int | None = None,
    policy: DecodingPolicy | None = None,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write `tiny_model(model_type, seed)` as a checkpoint and return its folder.

    Example:
        >>> import tempfile
        >>> (write_checkpoint(tempfile.mkdtemp(), "llada") / "model.safetensors").exists()
        True
    """
    model = tiny_model(model_type, seed, **overrides).to(dtype)
    model.spec = replace(model.spec, recommended_policy=policy)
    save_model(model, folder, max_shard_bytes=max_shard_bytes)
    if tokenizer:
        write_tokenizer(folder)
    return Path(folder)


def write_adapter(
    folder: str | Path,
    model_type: str,
    *,
    seed: int = 0,
    config: LoraConfig | None = None,
    policy: DecodingPolicy | None = None,
) -> Path:
    """Write the adapter of `tiny_adapter` for a tiny model and return its folder.

    It is as PEFT writes one: nothing in it tells its base from others of the same shape.
    """
    model = tiny_model(model_type)
    model.spec = replace(model.spec, recommended_policy=policy)
    tiny_adapter(model, seed, config=config)
    save_adapter(model, folder)
    (Path(folder) / DECLARATION_FILE).unlink()
    return Path(folder)


def write_tokenizer(folder: str | Path, *, chat_template: str | None = None) -> Path:
    """Write a tokenizer of 94 single characters and the tiny models' two special tokens.

    Characters that it does not know, such as `~` or `é`, are dropped.

    Example:
        >>> import tempfile
        >>> from d2f.text import Tokenizer
        >>> Tokenizer.load(write_tokenizer(tempfile.mkdtemp())).encode(" a")
        [1, 66]
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {byte_level.pre_tokenize_str(c)[0][0]: i for i, c in enumerate(CHARACTERS)}
    built = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = byte_level
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(t, special=True) for t in (MASK_TOKEN, EOS_TOKEN)])
    assert built.token_to_id(MASK_TOKEN) == MASK_TOKEN_ID
    assert built.token_to_id(EOS_TOKEN) == EOS_TOKEN_ID
    built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "mask_token": MASK_TOKEN,
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder

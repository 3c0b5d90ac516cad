"""Tiny models, checkpoints and tokenizers, for the tests of d2f and of what builds on it."""

from d2f.testing.tiny import tiny_adapter, tiny_config, tiny_model, tiny_spec
from d2f.testing.written import write_adapter, write_checkpoint, write_tokenizer

__all__ = [
    "tiny_adapter",
    "tiny_config",
    "tiny_model",
    "tiny_spec",
    "write_adapter",
    "write_checkpoint",
    "write_tokenizer",
]

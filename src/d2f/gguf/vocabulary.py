"""Write tokenizer.json and tokenizer_config.json from the vocabulary in a GGUF.

The token ids must equal those of the tokenizer with which a model was published. transformers reads
these vocabularies too, but differs from that in places: it does not split the digits of `smollm`,
does not compose characters for `qwen2`, and cuts texts for `llama` as its Llama class does, not as
SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2f.errors import CheckpointError, unknown_name
from d2f.gguf.config import token_id
from d2f.gguf.container import Container
from d2f.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
"""Values of `tokenizer.ggml.token_type` for tokens that are not ordinary text."""
_ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # spelt so by the format
    "pad_token": "padding",
    "cls_token": "cls",
    "mask_token": "mask",
}
"""Name in tokenizer_config.json -> name in a GGUF."""
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""Ids of a SentencePiece vocabulary if the GGUF does not name them."""
_SPACE = "▁"
_LLAMA3_MARK = "<|begin_of_text|>"
REMEDY = (
    "import the file (d2f import FILE.gguf FOLDER) and put the tokenizer.json of the original "
    "model into the folder"
)


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    container: Container
    tokens: Sequence[str]
    types: Sequence[int]
    """Type of each token; empty if the GGUF does not give types."""

    def of_type(self, *wanted: int) -> set[str]:
        return {t for t, kind in zip(self.tokens, self.types, strict=False) if kind in wanted}

    def ids(self) -> dict[str, int]:
        """Return text -> id without tokens that only pad the embedding, as the hub's files do."""
        unused = self.of_type(_UNUSED)
        return {text: i for i, text in enumerate(self.tokens) if text not in unused}

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.container.file}{what}; {REMEDY}")


def has_tokenizer(container: Container) -> bool:
    """Return whether a GGUF holds tokens."""
    return bool(container.metadata.get("tokenizer.ggml.tokens"))


def tokenizer_files(container: Container) -> dict[str, str]:
    """Return the texts of the tokenizer's files by name: tokenizer.json, config, chat template.

    Raises:
        CheckpointError: The kind of vocabulary is unknown, or a part of it is missing.
    """
    from tokenizers import AddedToken, processors

    metadata = container.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = _Vocabulary(
        container=container, tokens=tokens, types=metadata.get("tokenizer.ggml.token_type", [])
    )
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise vocabulary.error(f": {unknown_name('tokenizer kind', kind, makers)}")
    backend, adds_bos = makers[kind](vocabulary)
    fallback = _SENTENCEPIECE_IDS if kind == "llama" else {}
    ids = {}
    for name, role in _ROLES.items():
        number = token_id(container, role)
        number = fallback.get(role) if number is None else number
        if number is not None and 0 <= number < len(tokens):
            ids[name] = number
    named = {name: tokens[number] for name, number in ids.items()}
    # Encoding finds the added tokens in a text before it cuts the text.
    special = vocabulary.of_type(_UNKNOWN, _CONTROL) | set(named.values())
    added = special | vocabulary.of_type(_USER_DEFINED)
    backend.add_tokens(
        [
            AddedToken(text, special=text in special, normalized=False)
            for text in vocabulary.ids()
            if text in added
        ]
    )
    bos = named.get("bos_token")
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and bos is not None
    if adds_bos:
        # Only other readers of the files need this: the config says the same.
        backend.post_processor = processors.TemplateProcessing(
            single="BOS $A",
            pair="BOS $A $B:0",
            special_tokens=[{"id": "BOS", "ids": [ids["bos_token"]], "tokens": [bos]}],
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos}
    config |= {"clean_up_tokenization_spaces": False, **named}
    files = {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    template = metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if template else {})


def _byte_level(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """Return a tokenizer without added tokens, and whether a text begins with BOS by default."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    rule = _rule(vocabulary)
    merges = _given_merges(vocabulary)
    if merges is None:
        raise vocabulary.error(": the tokenizer lacks tokenizer.ggml.merges")
    backend = Tokenizer(
        models.BPE(vocab=vocabulary.ids(), merges=merges, ignore_merges=rule.ignores_merges)
    )
    if rule.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = rule.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.adds_bos


def _rule(vocabulary: _Vocabulary) -> PreTokenizer:
    metadata = vocabulary.container.metadata
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:  # old files
        name = "llama-bpe" if _LLAMA3_MARK in vocabulary.tokens else "default"
        name = "qwen2" if metadata["general.architecture"] == "qwen2" else name
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error(f": {unknown_name('tokenizer.ggml.pre', name, PRE_TOKENIZERS)}")
    return PRE_TOKENIZERS[name]


def _given_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]] | None:
    merges = vocabulary.container.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    known = vocabulary.ids()
    # A token may begin with a space, so a space at its first character divides no merge.
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    strange = [pair for pair in pairs if not known.keys() >= {*pair, "".join(pair)}]
    if len(pairs) < len(merges) or strange:
        joins = (
            f"joins {strange[0]!r}, and one of these or their sum is no token"
            if strange
            else "has one part only"
        )
        raise vocabulary.error(f" is damaged: an entry of tokenizer.ggml.merges {joins}")
    return pairs


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    """Return a tokenizer without added tokens; by default a text begins with BOS."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, unknown = vocabulary.tokens, token_id(vocabulary.container, "unknown") or 0
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids(),
            merges=_given_merges(vocabulary) or _merges(vocabulary),
            unk_token=tokens[unknown] if 0 <= unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = vocabulary.container.metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend, True


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, ordered by the joined token's score."""
    scores = vocabulary.container.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise vocabulary.error(": the tokenizer lacks tokenizer.ggml.scores")
    vocab = vocabulary.ids()
    for text in vocabulary.of_type(_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE):
        vocab.pop(text, None)
    found = [
        (-scores[number], -at, at - len(token), token[:at], token[at:])
        for token, number in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(found, key=lambda merge: merge[:3])]

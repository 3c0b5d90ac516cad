"""Write tokenizer.json and tokenizer_config.json from the vocabulary in a GGUF.

The token ids must equal those of the tokenizer with which a model was published. transformers reads
these vocabularies too, but differs from that in places: it does not split the digits of `smollm`,
does not compose characters for `qwen2`, and cuts texts for `llama` as its Llama class does, not as
SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.errors import CheckpointError, unknown_name
from d2f.gguf.config import token_id
from d2f.gguf.container import Container
from d2f.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer, byte_level

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
_WITHOUT_NAME = {"qwen2": "qwen2"}
"""Layout -> its pre-tokenizer, for old files that do not name one."""
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


def has_tokenizer(container: Container) -> bool:
    """Return whether a GGUF holds tokens."""
    return bool(container.metadata.get("tokenizer.ggml.tokens"))


def tokenizer_files(container: Container) -> dict[str, str]:
    """Return the texts of the tokenizer's files by name: tokenizer.json, config, chat template.

    Raises:
        CheckpointError: The kind of vocabulary is unknown, or a part of it is missing.
    """
    file, metadata = container.file, container.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = _Vocabulary(
        container=container, tokens=tokens, types=metadata.get("tokenizer.ggml.token_type", [])
    )
    kind = metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise CheckpointError(f"{file}: {unknown_name('tokenizer kind', kind, makers)}; {REMEDY}")
    adds_bos, parts = makers[kind](vocabulary)
    ids = {name: token_id(container, role) for name, role in _ROLES.items()}
    if kind == "llama":
        for name, role in _ROLES.items():
            ids[name] = _SENTENCEPIECE_IDS.get(role) if ids[name] is None else ids[name]
    named = {
        name: tokens[number]
        for name, number in ids.items()
        if number is not None and 0 <= number < len(tokens)
    }
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in named
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, named.values()),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(named["bos_token"], ids) if adds_bos else None,
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(adds_bos)}
    config |= {"clean_up_tokenization_spaces": False, **named}
    files = {
        "tokenizer.json": json.dumps(whole | parts, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
    }
    template = metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template} if template else {})


def _added_tokens(vocabulary: _Vocabulary, named: Iterable[str]) -> list[dict[str, Any]]:
    """Return the added tokens, which encoding finds in a text before it cuts the text."""
    special = vocabulary.of_type(_UNKNOWN, _CONTROL) | set(named)
    added = special | vocabulary.of_type(_USER_DEFINED)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": text, **flags, "special": text in special}
        for text, i in vocabulary.ids().items()
        if text in added
    ]


def _post_processor(bos: str, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the step that puts BOS before a text; only other readers of the files need it."""
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [ids["bos_token"]], "tokens": [bos]}},
    }


def _model(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], **more: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    } | more


def _byte_level(vocabulary: _Vocabulary) -> tuple[bool, dict[str, Any]]:
    """Return parts of tokenizer.json, and whether a text begins with BOS by default."""
    rule = _rule(vocabulary)
    merges = _given_merges(vocabulary)
    if merges is None:
        raise CheckpointError(
            f"{vocabulary.container.file}: the tokenizer lacks tokenizer.ggml.merges; {REMEDY}"
        )
    return rule.adds_bos, {
        "normalizer": rule.normalizer(),
        "pre_tokenizer": rule.pre_tokenizer(),
        "decoder": byte_level(use_regex=True),
        "model": _model(vocabulary.ids(), merges, ignore_merges=rule.ignores_merges),
    }


def _rule(vocabulary: _Vocabulary) -> PreTokenizer:
    metadata = vocabulary.container.metadata
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        fallback = "llama-bpe" if _LLAMA3_MARK in vocabulary.tokens else "default"
        name = _WITHOUT_NAME.get(metadata["general.architecture"], fallback)
    if name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{vocabulary.container.file}: "
            f"{unknown_name('tokenizer.ggml.pre', name, PRE_TOKENIZERS)}; {REMEDY}"
        )
    return PRE_TOKENIZERS[name]


def _given_merges(vocabulary: _Vocabulary) -> list[tuple[str, str]] | None:
    metadata, known = vocabulary.container.metadata, vocabulary.ids()
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    # A token may begin with a space, so a space at its first character divides no merge.
    pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
    strange = [pair for pair in pairs if not known.keys() >= {*pair, "".join(pair)}]
    if len(pairs) < len(merges) or strange:
        joins = (
            f"joins {strange[0]!r}, and one of these or their sum is no token" if strange else ""
        )
        raise CheckpointError(
            f"{vocabulary.container.file} is damaged: an entry of tokenizer.ggml.merges "
            f"{joins or 'has one part only'}; {REMEDY}"
        )
    return pairs


def _sentencepiece(vocabulary: _Vocabulary) -> tuple[bool, dict[str, Any]]:
    metadata = vocabulary.container.metadata
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    vocab, unknown = vocabulary.ids(), token_id(vocabulary.container, "unknown") or 0
    model = _model(
        vocab,
        _given_merges(vocabulary) or _merges(vocabulary),
        unk_token=vocabulary.tokens[unknown] if 0 <= unknown < len(vocabulary.tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    return True, {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "decoder": {"type": "Sequence", "decoders": [*decoders, *strip]},
        "model": model,
    }


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Return all pairs of tokens that join to a token, ordered by the joined token's score."""
    scores = vocabulary.container.metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(vocabulary.tokens):
        raise CheckpointError(
            f"{vocabulary.container.file}: the tokenizer lacks tokenizer.ggml.scores; {REMEDY}"
        )
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

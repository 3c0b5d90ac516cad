"""The tokens that end an answer, and where a checkpoint says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2f.errors import CheckpointError, D2FError
from d2f.models.spec import ModelSpec
from d2f.models.storage import read_json
from d2f.text import Tokenizer

_CONFIGS = ("config.json", "generation_config.json")
_ANSWER_PADDING = "<|dlm_pad|>"
"""DiffuCoder fills what is left behind an answer with it; its authors' scripts cut there."""
_ANSWER = "The answer of the assistant."
_QUESTION = {"role": "user", "content": "The question of the user."}
_TURNS = [_QUESTION, {"role": "assistant", "content": _ANSWER}]
_CONVERSATIONS = (
    _TURNS,
    # Some templates want to be told who the assistant is.
    [{"role": "system", "content": "The task of the assistant."}, *_TURNS],
    # Others close a turn only where another one follows, as those of Qwen1.5.
    [*_TURNS, _QUESTION],
)


@dataclass(frozen=True, kw_only=True)
class EndToken:
    """A token that ends an answer."""

    id: int
    text: str | None
    """Text of the token; None where no tokenizer knows it."""
    sources: tuple[str, ...]
    """Sources that name the token: `config.json`, `generation_config.json`, `tokenizer's EOS`,
    `padding`."""
    has_row: bool = True
    """False: the model's vocabulary ends before it, so no answer can hold it."""


def find_ends(folder: Path, spec: ModelSpec) -> list[EndToken]:
    """All tokens that end an answer of the model in a folder, those of config.json first.

    They are `eos_token_id` of config.json and of generation_config.json, the tokenizer's EOS, the
    token with which the chat template closes an assistant's turn and, of diffusion models, the
    padding: they are trained to decode it behind the answer, where an autoregressive model has no
    positions. The mask token never ends an answer. A tokenizer need not be there; one that cannot
    be read names no ends. Raises `CheckpointError` if one of the two configs is broken.

    Example:
        >>> from d2f.testing import tiny_spec, write_checkpoint
        >>> import tempfile
        >>> folder = write_checkpoint(tempfile.mkdtemp(), "qwen2", tokenizer=True)
        >>> [end] = find_ends(folder, tiny_spec("qwen2"))
        >>> end.id, end.text, end.sources
        (95, '<|endoftext|>', ('config.json', "tokenizer's EOS"))
    """
    tokenizer = None
    with suppress(D2FError):
        tokenizer = Tokenizer.load(folder)
    masks = {spec.mask_token_id, None if tokenizer is None else tokenizer.mask_token_id}
    sources: dict[int, dict[str, None]] = {}
    for token, source in _named(folder, spec, tokenizer):
        if token not in masks:
            sources.setdefault(token, {})[source] = None
    ends = []
    for token, names in sources.items():
        text = None
        if tokenizer is not None and 0 <= token < tokenizer.vocab_size:
            text = tokenizer.decode([token], skip_special_tokens=False)
        has_row = 0 <= token < spec.vocab_size
        ends.append(EndToken(id=token, text=text, sources=tuple(names), has_row=has_row))
    return ends


def _named(folder: Path, spec: ModelSpec, tokenizer: Tokenizer | None) -> Iterator[tuple[int, str]]:
    """Tokens with what names them; several sources may name one."""
    for name in _CONFIGS:
        file = folder / name
        if file.exists():
            yield from ((token, name) for token in _ids(read_json(file), file))
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id, "tokenizer's EOS"
        closing = _closing_token(tokenizer)
        if closing is not None:
            yield closing, "chat template"
    if not spec.architecture.causal:
        yield from ((token, "padding") for token in _padding(spec, tokenizer))


def _ids(config: Mapping[str, Any], file: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"{file}: eos_token_id is {value!r}; {token!r} is no token id")
    return ids


def _closing_token(tokenizer: Tokenizer) -> int | None:
    """The added token that follows an assistant's words in a rendered conversation."""
    if tokenizer.chat_template is None:
        return None
    added = tokenizer.added_tokens
    for conversation in _CONVERSATIONS:
        try:
            text = tokenizer.render_chat(conversation)
        except D2FError:
            continue
        _, answer, behind = text.rpartition(_ANSWER)
        for token in tokenizer.encode(behind) if answer else ():
            # Some tokenizers add runs of spaces to their vocabulary.
            if added.get(token, "").strip():
                return token
    return None


def _padding(spec: ModelSpec, tokenizer: Tokenizer | None) -> Iterator[int]:
    """Find the token that a diffusion model decodes behind its answers.

    A token that has another use, as BOS or for the unknown, is no sign of an end.
    """
    others = {spec.bos_token_id}
    named = [spec.pad_token_id]
    if tokenizer is not None:
        others |= {tokenizer.bos_token_id, tokenizer.unk_token_id}
        named += [tokenizer.pad_token_id, tokenizer.token_id(_ANSWER_PADDING)]
    yield from (token for token in named if token is not None and token not in others)

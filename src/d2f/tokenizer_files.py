"""Tokenizer files: read those of a folder as transformers 5 reads them.

Up to five files list tokens that were added to a vocabulary. Those of tokenizer.json always count.
Those of `added_tokens_decoder` in tokenizer_config.json count too; if that entry is missing, those
of added_tokens.json do, and special_tokens_map.json wins over tokenizer_config.json. A special
token that is named and listed nowhere gets the next free id.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from d2f.errors import CheckpointError
from d2f.gguf import NO_TOKENIZER
from d2f.gguf.pretokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

_Token: TypeAlias = "str | AddedToken"
"""A token: its text, or its text with flags."""
_CONFIG_FILE = "tokenizer_config.json"
_ADDED_FILE = "added_tokens.json"
_MAP_FILE = "special_tokens_map.json"
_NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
# Tokenizer classes whose vocab.json and merges.txt hold Qwen2's byte-level BPE.
_QWEN2_CLASSES = ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN2_TOKENS = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """A tokenizer with all its added tokens, and the other facts of its files."""

    backend: Backend
    config: Mapping[str, Any]
    """The content of tokenizer_config.json."""
    special: Mapping[str, str]
    """Special tokens by their names in the files, such as `eos_token`."""
    hidden: frozenset[str]
    """Texts of the tokens that decoding without special tokens leaves out."""


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read the tokenizer of a folder.

    tokenizer.json is read if it exists, else vocab.json and merges.txt (Qwen2 and Dream).

    Raises:
        CheckpointError: The folder holds no tokenizer; the tokenizer is broken or of an unsupported
            kind; or a token would not get the id that the files give it.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> files = read_tokenizer(write_tokenizer(tempfile.mkdtemp()))
        >>> files.special["mask_token"], sorted(files.hidden)
        ('<|mask|>', ['<|endoftext|>', '<|mask|>'])
    """
    # Imported here: most of the package's imports need no tokenizer.
    from tokenizers import AddedToken

    config = _read_object(folder / _CONFIG_FILE)
    backend = _read_backend(folder, config)
    given = backend.get_added_tokens_decoder()
    whole = (folder / "tokenizer.json").exists()
    is_qwen2 = not whole or config.get("tokenizer_class") in _QWEN2_CLASSES
    named, extra = _special_values(folder, config)
    defaults: dict[str, Any] = dict(_QWEN2_TOKENS) if is_qwen2 else {}
    if backend.padding is not None:
        defaults["pad_token"] = backend.padding["pad_token"]
    named = defaults | named
    # A token of added_tokens.json is special if tokenizer_config.json names it as a text; one
    # written as a table there does not make it special.
    values = [*(named.get(name) for name in _NAMES), *extra]
    texts = {str(value) for value in values if not isinstance(value, Mapping)}
    listed = _listed_tokens(folder, config, texts)
    special = {
        name: token
        for name in dict.fromkeys([*_NAMES, *named])
        if (token := _token(named.get(name))) is not None
    }
    unnamed = [token for value in extra if (token := _token(value)) is not None]
    known = {t.content for t in listed.values() if backend.token_to_id(t.content) is not None}
    numbered = listed if _lists_tokens(config) else listed | given
    flagged = {token.content: token for token in numbered.values()}
    special = {
        name: flagged.get(str(token), token) if name in _NAMES else token
        for name, token in special.items()
    }
    added = _tokens_to_add(given, numbered, special, unnamed)
    backend.add_tokens(added)
    if is_qwen2:
        # transformers' class for Qwen2 does this last: these tokens are special whatever files say.
        again = [AddedToken(str(token), special=True) for token in [*special.values(), *unnamed]]
        backend.add_tokens(again)
        added += again
    _check_ids(folder, config, backend, listed, allowed=known if whole else set())
    return TokenizerFiles(
        backend=backend,
        config=config,
        special={name: str(token) for name, token in special.items()},
        hidden=frozenset(token.content for token in [*given.values(), *added] if token.special),
    )


def _special_values(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return the special tokens that the files give, by name, and those without a name."""
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    first = [name for name in named if name not in _NAMES and isinstance(named[name], str)]
    before = {name: named.pop(name) for name in first}  # the map file does not change these
    extra = config.get("extra_special_tokens")
    extra = extra or config.get("additional_special_tokens", extra)
    if isinstance(extra, Mapping):  # a table gives these tokens names too
        before |= extra
        extra = None
    if not _lists_tokens(config):
        in_map = _read_object(folder / _MAP_FILE)
        more = in_map.pop("extra_special_tokens", None)
        named |= {
            name: _token(value, special=True)
            for name, value in in_map.items()
            if name.endswith("_token")
        }
        if isinstance(more, Mapping):
            before |= more
            extra = None
        elif more:
            extra = [*(extra or []), *(_token(value, special=True) for value in more)]
        if extra is None:
            extra = in_map.get("additional_special_tokens")
    return named | before, list(extra or [])


def _listed_tokens(
    folder: Path, config: Mapping[str, Any], special: set[str]
) -> dict[int, AddedToken]:
    """Return the added tokens by the ids that a file beside the vocabulary gives them."""
    if _lists_tokens(config):
        file, listed = folder / _CONFIG_FILE, config["added_tokens_decoder"]
    else:
        file = folder / _ADDED_FILE
        listed = {
            number: {"content": text, "special": text in special, "normalized": text not in special}
            for text, number in _read_object(file).items()
        }
    try:
        return {int(number): _flagged(token) for number, token in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{file}: the added tokens are no table of ids and tokens; take the file from where "
            "the model was published"
        ) from None


def _tokens_to_add(
    given: Mapping[int, AddedToken],
    numbered: Mapping[int, AddedToken],
    special: Mapping[str, _Token],
    extra: Iterable[_Token],
) -> list[AddedToken]:
    """Return the tokens to add: those with ids in order, then special ones not yet known."""
    tokens: list[_Token] = [token for _, token in sorted(numbered.items())]
    texts = {token.content for token in given.values()} | {str(token) for token in tokens}
    for token in [*special.values(), *extra]:
        if str(token) not in texts and token not in tokens:
            tokens.append(token)
    names = {str(token) for token in special.values()}
    added = [_flagged(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in added:
        token.special = token.special or token.content in names
    return added


def _check_ids(
    folder: Path,
    config: Mapping[str, Any],
    backend: Backend,
    listed: Mapping[int, AddedToken],
    *,
    allowed: set[str],
) -> None:
    """Refuse an added token whose id in the vocabulary differs from the id that its list gives.

    Tokens in `allowed`, those of tokenizer.json itself, may differ. transformers would silently
    use the wrong id.
    """
    for number, token in listed.items():
        got = backend.token_to_id(token.content)
        if got != number and token.content not in allowed:
            file = folder / (_CONFIG_FILE if _lists_tokens(config) else _ADDED_FILE)
            raise CheckpointError(
                f"{file}: the added token {token.content!r} should have id {number}, but the "
                f"vocabulary leaves {got} for it; the files belong to different tokenizers"
            )


def _lists_tokens(config: Mapping[str, Any]) -> bool:
    return config.get("added_tokens_decoder") is not None


def _token(value: Any, **more: bool) -> _Token | None:
    """Return the special token that a file writes as a text or as a table; None otherwise."""
    from tokenizers import AddedToken

    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        return _flagged(value, **more)
    return value if isinstance(value, str | AddedToken) else None


def _flagged(token: str | Mapping[str, Any], **more: bool) -> AddedToken:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, **more)
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return AddedToken(token["content"], **flags | more)


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file; an empty one if the file does not exist."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a JSON object")
    return content


def _read_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    try:
        if file.exists():
            return Backend.from_file(str(file))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            file = folder / "vocab.json"
            return _qwen2_backend(folder, config)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} is no tokenizer that can be read: {error}") from None
    if (folder / NO_TOKENIZER).exists():
        raise CheckpointError((folder / NO_TOKENIZER).read_text(encoding="utf-8"))
    raise CheckpointError(
        f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt. "
        "Give a folder that has one, or save it with transformers as tokenizer.json"
    )


def _qwen2_backend(folder: Path, config: Mapping[str, Any]) -> Backend:
    """Build Qwen2's byte-level BPE from vocab.json and merges.txt, without added tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    kind = config.get("tokenizer_class", _QWEN2_CLASSES[0])
    if kind not in _QWEN2_CLASSES:
        raise CheckpointError(
            f"{folder / _CONFIG_FILE}: vocab.json and merges.txt of a {kind} cannot be read, only "
            f"those of {', '.join(_QWEN2_CLASSES)}; save the tokenizer with transformers as "
            "tokenizer.json"
        )
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = Backend(models.BPE.from_file(*files))
    backend.normalizer = normalizers.NFC()
    prefix = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = PRE_TOKENIZERS["qwen2"].pre_tokenizer(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    return backend

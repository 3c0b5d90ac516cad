"""The tokens that end an answer, as somebody chooses them for a model."""

from __future__ import annotations

from collections.abc import Sequence

from d2f.errors import ConfigError
from d2f.models.spec import ModelSpec
from d2f.text import Tokenizer


def choose_ends(
    named: Sequence[int | str], tokenizer: Tokenizer, spec: ModelSpec, *, replace: bool = False
) -> tuple[int, ...]:
    """The model's own ends and those that somebody names beside them, or these alone.

    Args:
        named: Ids, or texts of single tokens.
        tokenizer: Knows the texts.
        spec: The model's.
        replace: Leave the model's own ends out.

    Raises:
        ConfigError: An id has no row in the vocabulary, or a text is not one token.

    Example:
        >>> from d2f.testing import tiny_spec, write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> choose_ends(["a", 7], tokenizer, tiny_spec("Dream"))
        (95, 66, 7)
    """
    own = () if replace else spec.eos_token_ids
    return tuple(dict.fromkeys((*own, *(_chosen(token, tokenizer, spec) for token in named))))


def _chosen(named: int | str, tokenizer: Tokenizer, spec: ModelSpec) -> int:
    token = named
    if isinstance(token, str):
        ids = tokenizer.encode(token)
        exact = tokenizer.token_id(token)
        if exact is None and len(ids) == 1 and tokenizer.decode(ids) == token:
            [exact] = ids
        if exact is None:
            raise ConfigError(
                f"eos {named!r} is not one token but {len(ids)}: only a single token ends an "
                "answer; use a stop string for a longer text, or give the id of a token"
            )
        token = exact
    if isinstance(token, bool) or not 0 <= token < spec.vocab_size:
        raise ConfigError(f"eos {named!r}: the vocabulary holds ids 0 to {spec.vocab_size - 1}")
    if token == spec.mask_token_id:
        raise ConfigError(f"eos {named!r} is the mask token, which no answer holds")
    return token

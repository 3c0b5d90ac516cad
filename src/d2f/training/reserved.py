"""Texts of mask and end tokens, which no text of a data set may hold.

A tokenizer cannot tell `<|endoftext|>` that somebody wrote from the token itself, so the model
would be taught to end, or to write masks, in the midst of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2f.text import Tokenizer
from d2f.training.bad_rows import BadRow
from d2f.training.pairs import Pair

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """What a model's mask and end tokens are written as."""

    masks: tuple[str, ...]
    ends: tuple[str, ...]
    """Paddings and the added tokens of `data.response_suffix` are among them."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, spec: ModelSpec | None = None, suffix: str = "") -> Reserved:
        """Those of a tokenizer, of the model that it belongs to, and of a recipe's suffix.

        Example:
            >>> from tempfile import mkdtemp
            >>> from d2f.testing import write_tokenizer
            >>> Reserved.of(Tokenizer.load(write_tokenizer(mkdtemp())))
            Reserved(masks=('<|mask|>',), ends=('<|endoftext|>',))
        """
        masks, ends = {tokenizer.mask_token_id}, {tokenizer.eos_token_id}
        if spec is not None:
            masks.add(spec.mask_token_id)
            ends |= {spec.pad_token_id, *spec.eos_token_ids}
        if suffix:
            ends |= set(tokenizer.encode(suffix))
        return cls(masks=_texts(tokenizer, masks), ends=_texts(tokenizer, ends - masks))

    def check(self, pair: Pair, *, written: bool) -> None:
        """Refuse a pair that holds one of them.

        Args:
            pair: A row's texts, before the chat template.
            written: No template will write the prompt, so ends of turns in it are meant.

        Raises:
            BadRow: One is written out in the prompt or in the response.
        """
        prompt = self.masks if written else self.masks + self.ends
        for text in pair.texts(response=False):
            _refuse(text, prompt, "prompt")
        _refuse(pair.response, self.masks + self.ends, "response")


def _texts(tokenizer: Tokenizer, ids: Iterable[int | None]) -> tuple[str, ...]:
    """What those of these tokens are written as that are kept whole wherever they stand."""
    added = tokenizer.added_tokens
    texts = {added[i] for i in ids if i is not None and i in added}
    # Some tokenizers add spaces and ends of lines to their vocabulary.
    return tuple(sorted(text for text in texts if text.strip()))


def _refuse(text: str, reserved: tuple[str, ...], where: str) -> None:
    for token in reserved:
        if token in text:
            raise BadRow(
                f"the {where} has '{token}' written out, which the model reads as a mask or an "
                "end; take it out"
            )

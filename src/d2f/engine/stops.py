"""Stop strings: this module finds where one ends a response, special tokens included."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from typing import Any

from d2f.errors import RequestError


def with_special_tokens(stop: Sequence[str], special_tokens: Collection[str]) -> tuple[str, ...]:
    """Return those of the stop strings that hold the text of a special token.

    Example:
        >>> with_special_tokens(["Question:", "<|im_end|>", "."], {"<|im_end|>", "<|mask|>"})
        ('<|im_end|>',)
    """
    return tuple(text for text in stop if any(token in text for token in special_tokens))


class StopStrings:
    """Texts that end a response.

    A stop string is looked for in the text that people see. One that holds a special token is also
    looked for in the text with special tokens shown, since the first never holds it. The search
    takes for granted that a longer response has a longer text, as all tokenizers of language models
    do.

    Args:
        stop: The texts.
        tokenizer: With `decode(token_ids)`. If it has `special_tokens`, a collection of texts that
            `decode` leaves out, then also `decode(token_ids, skip_special_tokens=False)`.

    Each method raises `RequestError` where the tokenizer cannot decode the tokens.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> from d2f.text import Tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> stops = StopStrings(["b<|endoftext|>"], tokenizer)
        >>> stops.num_tokens([66, 67, 95, 68]), stops.cut_text([66, 67, 95, 68])
        (3, 'a')
    """

    def __init__(self, stop: Sequence[str], tokenizer: Any) -> None:
        self._stop = tuple(stop)
        self._special = with_special_tokens(stop, getattr(tokenizer, "special_tokens", ()))
        self._tokenizer = tokenizer

    def found(self, token_ids: Sequence[int]) -> bool:
        """Whether a response holds one."""
        if not self._stop:
            return False
        text = self._visible(token_ids)
        if any(stop in text for stop in self._stop):
            return True
        if not self._special:
            return False
        text = self._shown(token_ids)
        return any(stop in text for stop in self._special)

    def num_tokens(self, token_ids: Sequence[int]) -> int | None:
        """The fewest tokens of a response that hold one; None: it holds none."""
        if not self.found(token_ids):
            return None
        return bisect.bisect_left(
            range(len(token_ids)), True, key=lambda count: self.found(token_ids[:count])
        )

    def cut_text(self, token_ids: Sequence[int]) -> str:
        """Return the part of a response that people see: up to the first stop string in it."""
        text = self._visible(token_ids)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if self._special:
            shown = self._shown(token_ids)
            starts = [at for stop in self._special if (at := shown.find(stop)) >= 0]
            ends += [self._visible_length(token_ids, start) for start in starts]
        return text[: min(ends, default=len(text))]

    def text_before(self, token_ids: Sequence[int], length: int) -> str:
        """Return what people see of the first `length` characters with special tokens shown."""
        return self._visible(token_ids)[: self._visible_length(token_ids, length)]

    def _visible_length(self, token_ids: Sequence[int], length: int) -> int:
        """Count what people see of the first `length` characters with special tokens shown."""
        # The token that holds the next character; of its own text the part before that is kept.
        count = bisect.bisect_right(
            range(len(token_ids) + 1), length, key=lambda some: len(self._shown(token_ids[:some]))
        )
        before, upto = (len(self._visible(token_ids[:some])) for some in (count - 1, count))
        behind = len(self._shown(token_ids[:count])) - length
        return max(upto - behind, before)

    def _visible(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids)

    def _shown(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], **options: bool) -> str:
        try:
            return self._tokenizer.decode(token_ids, **options)
        except Exception as error:
            # The tokenizer is the caller's; other requests have nothing to do with its errors.
            raise RequestError(f"the tokenizer could not decode the response ({error!r})") from None

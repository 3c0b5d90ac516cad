"""Stop strings with special tokens in them, looked for in a response as it grows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from d2f.text import Tokenizer


class SpecialStops:
    """Finds stop strings in the text with special tokens shown, token by token.

    Args:
        tokenizer: The model's.
        stop: Texts that end the response.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> stops = SpecialStops(tokenizer, ["b<|endoftext|>"])
        >>> stops.add(66, 1), stops.add(67, 2), stops.num_certain, stops.add(95, 2)
        (None, None, 1, 1)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=False)
        self._stop = tuple(stop)
        self._shown = ""
        self._shown_lengths: list[int] = []
        """Characters that are shown, after each token."""
        self._seen_lengths: list[int] = []
        """Characters that people certainly see, after each token."""

    def add(self, token_id: int, num_seen: int) -> int | None:
        """Take a token; where in the shown text a stop string begins that is complete now, if any.

        Args:
            token_id: The next one of the response.
            num_seen: Characters that people certainly see, this token's among them.
        """
        return self._grow(self._stream.push([token_id]), num_seen)

    def close(self, num_seen: int) -> int | None:
        """The same for what a response that is over leaves unfinished."""
        return self._grow(self._stream.close(), num_seen)

    @property
    def num_certain(self) -> int:
        """How much of what people see is no part of a stop string that may yet be completed."""
        longest = max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(self._shown) + 1))
                if self._shown.endswith(stop[:length])
            ),
            default=0,
        )
        return self._seen_before(len(self._shown) - longest)

    def _grow(self, text: str, num_seen: int) -> int | None:
        before, self._shown = len(self._shown), self._shown + text
        self._shown_lengths.append(len(self._shown))
        self._seen_lengths.append(num_seen)
        starts = [
            start
            for stop in self._stop
            if (start := self._shown.find(stop, max(before - len(stop) + 1, 0))) >= 0
        ]
        return min(starts, default=None)

    def _seen_before(self, shown: int) -> int:
        """How much people certainly see of the first `shown` characters."""
        index = bisect.bisect_right(self._shown_lengths, shown)
        if index == len(self._shown_lengths):
            return self._seen_lengths[-1] if index else 0
        before = self._seen_lengths[index - 1] if index else 0
        behind = self._shown_lengths[index] - shown
        return max(self._seen_lengths[index] - behind, before)

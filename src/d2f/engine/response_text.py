"""The text of a response as it grows: what no later token changes, cut at stop strings."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from d2f.decoding.alternatives import Alternatives
from d2f.engine.stops import StopStrings, with_special_tokens
from d2f.text import Tokenizer

_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot write."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the text with the probability with which it was accepted."""

    text: str
    logprob: float
    offset: int
    """The character of the response where the token's text begins."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Text and logarithm of the most probable tokens in its place."""


def logprob_of(probability: float | None) -> float:
    """The logarithm that the protocol reports of a probability.

    Example:
        >>> logprob_of(1.0), logprob_of(0.0)
        (0.0, -9999.0)
    """
    return max(math.log(probability), _LEAST_LOGPROB) if probability else _LEAST_LOGPROB


class TokenTexts:
    """The texts of single tokens, remembered.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> TokenTexts(Tokenizer.load(write_tokenizer(tempfile.mkdtemp())))[66]
        'a'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Special tokens are shown by name: a person who watches wants to see where the end is. A
        # token keeps its leading space, since it is shown behind others.
        self._text = functools.lru_cache(maxsize=65536)(
            lambda token: tokenizer.decode_after([token], skip_special_tokens=False)
        )

    def __getitem__(self, token_id: int) -> str:
        return self._text(token_id)


class ResponseText:
    """Turns committed tokens into text that no later token changes.

    Text that may be the beginning of a stop string is held back. Text from a stop string on is cut;
    of several stop strings the one that is complete first counts. A stop string that holds a
    special token, or an EOS, is found although neither is part of the text. The text does not
    depend on the portions in which the tokens come.

    Args:
        tokenizer: The model's.
        eos_token_ids: Tokens that are not part of the text.
        stop: Texts that end the response.
        texts: The texts of tokens, if `logprobs` are wanted.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> text = ResponseText(tokenizer, stop=["cd"])
        >>> text.grow([66, 67, 68]), text.grow([66, 67, 68, 69]), text.end([66, 67, 68, 69])
        ('ab', '', '')
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        texts: TokenTexts | None = None,
    ) -> None:
        self._stream = tokenizer.stream()
        self._eos = frozenset(eos_token_ids)
        self._stop = tuple(stop)
        ends = (tokenizer.decode([token], skip_special_tokens=False) for token in self._eos)
        unseen = tokenizer.special_tokens.union(text for text in ends if text)
        special = with_special_tokens(stop, unseen)
        self._special = _SpecialStops(tokenizer, special) if special else None
        self._found = StopStrings(special, tokenizer)
        self._texts = texts
        self._num_seen = 0
        self._held = ""
        """Text that is certain but was not returned yet."""
        self._num_given = 0
        self._num_text = 0
        """Characters of the text so far, with those behind a stop string."""
        self._stopped = False
        self._starts: list[tuple[int, int]] = []
        """Tokens that `logprobs` has not reported: the id, and where the text begins."""
        self._num_reported = 0

    def grow(self, token_ids: Sequence[int]) -> str:
        """Take all tokens committed so far; returns the text that is new."""
        self._take(token_ids)
        keep = 0
        if not self._stopped:
            keep = _num_begun(self._held, self._stop)
            if self._special is not None:
                keep = max(keep, self._num_text - self._special.num_certain)
        return self._give(len(self._held) - keep)

    def end(self, token_ids: Sequence[int]) -> str:
        """Take the whole response; returns the rest of the text."""
        self._take(token_ids)
        if not self._stopped:
            self._add(self._stream.close())
            if self._special is not None:
                start = self._special.close(self._num_text)
                if start is not None:
                    self._cut(token_ids, start)
        return self._give(len(self._held))

    def logprobs(
        self,
        probabilities: Sequence[float | None],
        alternatives: Sequence[Alternatives] = (),
        *,
        ended: bool = False,
    ) -> list[TokenLogprob]:
        """The tokens whose text began to be returned since the last call.

        Args:
            probabilities: Those of the response's tokens from the first on.
            alternatives: The alternatives to the same tokens, if they are wanted.
            ended: Report also tokens without text at the end of a response that no stop string cut.
        """
        assert self._texts is not None
        shown = []
        while self._starts:
            token, offset = self._starts[0]
            if offset >= self._num_given and not (ended and not self._stopped):
                break
            del self._starts[0]
            logprob = logprob_of(probabilities[self._num_reported])
            others = alternatives[self._num_reported] if alternatives else ()
            # One token has one logarithm, though two kernels may have computed it.
            top = [
                (self._texts[one], logprob if one == token else logprob_of(p)) for one, p in others
            ]
            shown.append(TokenLogprob(self._texts[token], logprob, offset, tuple(top)))
            self._num_reported += 1
        return shown

    def _take(self, token_ids: Sequence[int]) -> None:
        first, self._num_seen = self._num_seen, max(self._num_seen, len(token_ids))
        fresh = token_ids[first:]
        if self._texts is None and self._special is None:
            seen = [token for token in fresh if token not in self._eos]
            if seen and not self._stopped:
                self._add(self._stream.push(seen))
            return
        for count, token in enumerate(fresh, first + 1):
            if self._stopped:
                return
            if token not in self._eos:
                self._take_one(token)
            if self._special is not None:
                start = self._special.add(token, self._num_text)
                if start is not None:
                    self._cut(token_ids[:count], start)

    def _take_one(self, token: int) -> None:
        text = self._stream.push([token])
        if self._texts is not None:
            start = self._num_given + len(self._held) + _num_broken(text, self._texts[token])
            self._starts.append((token, start))
        self._add(text)

    def _add(self, text: str) -> None:
        """Hold a text, cut at the stop string that is complete first."""
        before, self._held = len(self._held), self._held + text
        self._num_text += len(text)
        ends = _stops(self._held, self._stop, before)
        if ends:
            self._held = self._held[: min(ends)[1]]
            self._stopped = True

    def _cut(self, token_ids: Sequence[int], start: int) -> None:
        """End the text where a stop string was found in the text with special tokens shown."""
        # Decoded anew: the stream may keep back a byte that a later token could have gone on with.
        held = self._found.text_before(token_ids, start)[self._num_given :]
        self._held = min(self._held, held, key=len) if self._stopped else held
        self._stopped = True

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._num_given += length
        return text


class _SpecialStops:
    """Finds stop strings in the text with special tokens shown, token by token.

    Args:
        tokenizer: The model's.
        stop: Texts that end the response.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> stops = _SpecialStops(tokenizer, ["b<|endoftext|>"])
        >>> stops.add(66, 1), stops.add(67, 2), stops.num_certain, stops.add(95, 2)
        (None, None, 1, 1)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream(skip_special_tokens=False)
        self._stop = tuple(stop)
        self._shown = ""
        self._shown_lengths: list[int] = []
        """Characters of the text with special tokens shown, after each token."""
        self._seen_lengths: list[int] = []
        """Characters of the text without them that are certain, after each token."""

    def add(self, token_id: int, num_seen: int) -> int | None:
        """Take a token; returns where in the shown text a stop string begins that is complete now.

        Args:
            token_id: The next one of the response.
            num_seen: Characters of the text that are certain, this token's among them.
        """
        return self._grow(self._stream.push([token_id]), num_seen)

    def close(self, num_seen: int) -> int | None:
        """Do the same with what a response that is over leaves unfinished."""
        return self._grow(self._stream.close(), num_seen)

    @property
    def num_certain(self) -> int:
        """Characters of the text that are no part of a stop string that may yet be completed."""
        shown = len(self._shown) - _num_begun(self._shown, self._stop)
        index = bisect.bisect_right(self._shown_lengths, shown)
        if index == len(self._shown_lengths):
            return self._seen_lengths[-1] if index else 0
        before = self._seen_lengths[index - 1] if index else 0
        behind = self._shown_lengths[index] - shown
        return max(self._seen_lengths[index] - behind, before)

    def _grow(self, text: str, num_seen: int) -> int | None:
        before, self._shown = len(self._shown), self._shown + text
        self._shown_lengths.append(len(self._shown))
        self._seen_lengths.append(num_seen)
        return min((start for _, start in _stops(self._shown, self._stop, before)), default=None)


def _stops(text: str, stop: Sequence[str], before: int) -> list[tuple[int, int]]:
    """End and start of each stop string that is complete in a text, but not in its beginning.

    Example:
        >>> _stops("abcd", ["bc", "d", "x"], before=2)
        [(3, 1), (4, 3)]
    """
    starts = [(one, text.find(one, max(before - len(one) + 1, 0))) for one in stop]
    return [(start + len(one), start) for one, start in starts if start >= 0]


def _num_begun(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that may turn out to begin a stop string.

    Example:
        >>> _num_begun("abc", ["cd", "bcd", "x"])
        2
    """
    return max(
        (
            length
            for one in stop
            for length in range(1, min(len(one), len(text) + 1))
            if text.endswith(one[:length])
        ),
        default=0,
    )


def _num_broken(text: str, own: str) -> int:
    r"""Characters before a token's own text that tokens before it left unfinished for good.

    Example:
        >>> _num_broken("\ufffd a", " a"), _num_broken(" a", "a")
        (1, 0)
    """
    before = text.removesuffix(own)
    return len(before) if before and own and not before.strip("\ufffd") else 0

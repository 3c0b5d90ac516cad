"""One response as it grows: text that is certain, cut at stop strings."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from d2f.engine.request import Alternatives
from d2f.engine.stops import StopStrings, with_special_tokens
from d2f.serving.special_stops import SpecialStops
from d2f.text import Tokenizer

_LEAST_LOGPROB = -9999.0
"""Of a probability of 0, whose logarithm JSON cannot say."""
_FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the text with the probability with which it was accepted."""

    text: str
    logprob: float
    offset: int
    """Where its text begins in the response, in characters."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """The most probable tokens in its place: text and logarithm."""


def logprob_of(probability: float | None) -> float:
    """The logarithm that the protocol reports.

    Example:
        >>> logprob_of(1.0), logprob_of(0.0)
        (0.0, -9999.0)
    """
    return max(math.log(probability), _LEAST_LOGPROB) if probability else _LEAST_LOGPROB


class TokenTexts:
    """The text of single tokens, remembered.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> TokenTexts(Tokenizer.load(write_tokenizer(tempfile.mkdtemp())))[66]
        'a'
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Special tokens are shown by name: a person who watches wants to see where the end is. A
        # token keeps its space, for it is shown behind others.
        self._text = functools.lru_cache(maxsize=65536)(
            lambda token: tokenizer.decode_after([token], skip_special_tokens=False)
        )

    def __getitem__(self, token_id: int) -> str:
        return self._text(token_id)


class Choice:
    """Turns committed tokens into text that no later token changes.

    What may be the beginning of a stop string is held back. Text from a stop string on is cut; of
    several the one that is complete first counts. One that holds a special token, or an EOS, is
    found although neither is part of the text. What comes out does not depend on the portions in
    which tokens come in.

    Args:
        tokenizer: The model's.
        eos_token_ids: Tokens that are not part of the text.
        stop: Texts that end the response.
        texts: Texts of tokens, if `logprobs` are wanted.

    Example:
        >>> from d2f.testing import write_tokenizer
        >>> import tempfile
        >>> tokenizer = Tokenizer.load(write_tokenizer(tempfile.mkdtemp()))
        >>> choice = Choice(tokenizer, stop=["cd"])
        >>> choice.grow([66, 67, 68]), choice.grow([66, 67, 68, 69]), choice.end([66, 67, 68, 69])
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
        self._special = SpecialStops(tokenizer, special) if special else None
        self._found = StopStrings(special, tokenizer)
        self._texts = texts
        self._num_seen = 0
        self._held = ""
        """Text that is certain but not given out."""
        self._num_given = 0
        self._num_text = 0
        """Characters of the text so far, those behind a stop string among them."""
        self._stopped = False
        self._starts: list[tuple[int, int]] = []
        """Tokens that were not reported: id, and where their text begins."""
        self._num_reported = 0

    def grow(self, token_ids: Sequence[int]) -> str:
        """Take the tokens committed so far, all of them; returns the text that is new."""
        self._take(token_ids)
        keep = 0 if self._stopped else self._held_back()
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
        """The tokens whose text began to be given out since the last call.

        Args:
            probabilities: Of the response's tokens from the first on.
            alternatives: Likewise, if they are wanted.
            ended: Also tokens without text at the end of a response that no stop string cut.
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
        ends = []
        for stop in self._stop:
            start = self._held.find(stop, max(before - len(stop) + 1, 0))
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self._held = self._held[: min(ends)[1]]
            self._stopped = True

    def _cut(self, token_ids: Sequence[int], start: int) -> None:
        """Let the text end where a stop string was found in the text with special tokens shown."""
        # Decoded anew: the stream may keep back a byte that a later token could have gone on with.
        held = self._found.text_before(token_ids, start)[self._num_given :]
        self._held = min(self._held, held, key=len) if self._stopped else held
        self._stopped = True

    def _held_back(self) -> int:
        """Characters at the end that may turn out to begin a stop string."""
        if self._special is None:
            return self._num_beginning()
        return max(self._num_beginning(), self._num_text - self._special.num_certain)

    def _num_beginning(self) -> int:
        """The same for stop strings without special tokens."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._num_given += length
        return text


def _num_broken(text: str, own: str) -> int:
    r"""Characters before a token's own text that tokens before it left unfinished for good.

    Example:
        >>> _num_broken("\ufffd a", " a"), _num_broken(" a", "a")
        (1, 0)
    """
    before = text.removesuffix(own)
    return len(before) if before and own and not before.strip("\ufffd") else 0


def finish_reason(engine_reason: str) -> str:
    """The protocol's word for the engine's.

    Example:
        >>> finish_reason("eos")
        'stop'
    """
    return _FINISH_REASONS[engine_reason]

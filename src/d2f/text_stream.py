"""Incremental decoding: text pieces of a growing list of tokens, which join to the whole text.

A tokenizer's decoder takes all tokens at once, and the text of one may depend on others: the first
loses its space, several bytes make one character. So each kind of decoder that language models have
today has a step here that takes tokens as they come, holds back text that a later token may still
change, and never looks at a token twice. Another decoder gets all its tokens at the end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.decoders import Decoder

_HALF = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TIDYINGS = (
    *((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't")),
    *((" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")),
)


def tidy(text: str) -> str:
    """Remove spaces before punctuation, as `clean_up_tokenization_spaces` does.

    Example:
        >>> tidy("do n't , please !")
        "don't, please!"
    """
    for untidy, tidied in _TIDYINGS:
        text = text.replace(untidy, tidied)
    return text


class TextStream:
    """Decodes token ids that arrive piece by piece, and never cuts inside a character.

    The texts that `push` and `close` return join to the text of all ids decoded at once. The cost
    of a push grows with the ids pushed, not with the text before them.

    Args:
        decoder: The tokenizer's decoder; None if it has none.
        token: Gives the token of an id; None for tokens that are not shown.
        tidies: Whether the decoded text goes through `tidy`.
        follows: Whether other text stands before this one. Then no token here is the first one,
            whose space some decoders remove.

    Example:
        >>> from tokenizers.decoders import Metaspace
        >>> stream = TextStream(Metaspace(), ["▁a", "▁b", "c"].__getitem__)
        >>> stream.push([0]), stream.push([1, 2]), stream.close()
        ('a', ' bc', '')
    """

    def __init__(
        self,
        decoder: Decoder | None,
        token: Callable[[int], str | None],
        *,
        tidies: bool = False,
        follows: bool = False,
    ) -> None:
        self._token = token
        # A letter stands for the text before: it passes the steps and is not returned.
        self._before = ["a"] if follows else []
        self._num_before = len(_finished(_steps_of(decoder), self._before))
        self._steps = _steps_of(decoder)
        if tidies:
            self._steps += [_Replaced(*tidying) for tidying in _TIDYINGS]
        self._num_halves = 0
        """Replacement characters (U+FFFD) at the end of the text so far."""

    def push(self, ids: Iterable[int]) -> str:
        """Add ids and return the text that later ids can no longer change."""
        pieces = [token for i in ids if (token := self._token(i)) is not None]
        pieces, self._before = [*self._before, *pieces], []
        for step in self._steps:
            pieces = step.feed(pieces)
        text = self._without_before("".join(pieces))
        certain = text.rstrip(_HALF)
        halves, self._num_halves = self._num_halves, len(text) - len(certain)
        if certain:
            return _HALF * halves + certain
        self._num_halves += halves
        return ""

    def close(self) -> str:
        """Return the text held back so far; no ids may be pushed after this."""
        rest = _HALF * self._num_halves + self._without_before(_finished(self._steps, []))
        self._steps, self._num_halves = [], 0
        return rest

    def _without_before(self, text: str) -> str:
        cut = min(self._num_before, len(text))
        self._num_before -= cut
        return text[cut:]


class _Step:
    """A stage of decoding: takes pieces (tokens, later texts) and returns those it is sure of."""

    def feed(self, pieces: list[str]) -> list[str]:
        raise NotImplementedError

    def end(self) -> list[str]:
        """Return what is still held; nothing may be fed after this."""
        return []


def _finished(steps: Iterable[_Step], pieces: list[str]) -> str:
    """Run the last pieces through the steps, and let each step return what it holds."""
    for step in steps:
        pieces = [*step.feed(pieces), *step.end()]
    return "".join(pieces)


def _steps_of(decoder: Decoder | None) -> list[_Step]:
    if decoder is None:  # then the library joins tokens with spaces
        return [_Each(" ".join, first_differs=True)]
    kinds = _flat(json.loads(decoder.__getstate__()))
    steps: list[_Step] = []
    joined = False  # whether the steps so far have joined the tokens to one text
    for number, kind in enumerate(kinds):
        if kind["type"] == "Fuse":
            joined = True
            continue
        step = _text_step(kind) if joined else _token_step(kind)
        if step is None:
            return [*steps, _Held(_decode_of(*kinds[number:]), joined=joined)]
        joined = joined or kind["type"] == "ByteLevel"
        steps.append(step)
    return steps


def _flat(kind: dict[str, Any]) -> list[dict[str, Any]]:
    if kind["type"] != "Sequence":
        return [kind]
    return [inner for part in kind["decoders"] for inner in _flat(part)]


def _decode_of(*kinds: dict[str, Any]) -> Callable[[Sequence[str]], str]:
    from tokenizers.decoders import Sequence as Decoders

    decoder = Decoders([])
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": kinds}).encode())
    return decoder.decode


def _token_step(kind: dict[str, Any]) -> _Step | None:
    """Return the step of a decoder that works on single tokens."""
    match kind["type"]:
        case "Replace" | "Strip":
            return _Each(_decode_of(kind))
        case "Metaspace" | "WordPiece":
            return _Each(_decode_of(kind), first_differs=True)
        case "ByteLevel":
            return _ByteLevel()
        case "ByteFallback":
            return _ByteRuns()
    return None


def _text_step(kind: dict[str, Any]) -> _Step | None:
    """Return the step of a decoder that works on the joined text of the tokens."""
    if kind["type"] == "Strip" and kind["stop"] == 0:
        return _StrippedStart(kind["content"], kind["start"])
    if kind["type"] == "Replace" and kind["pattern"].get("String"):
        return _Replaced(kind["pattern"]["String"], kind["content"])
    return None


class _Each(_Step):
    """Decodes each token by itself; the first one may be treated differently."""

    def __init__(
        self, decode: Callable[[Sequence[str]], str], *, first_differs: bool = False
    ) -> None:
        self._decode = decode
        self._first_differs = first_differs
        self._before: list[str] = []

    def feed(self, pieces: list[str]) -> list[str]:
        texts = []
        for token in pieces:
            texts.append(self._decode([*self._before, token]))
            if self._first_differs:
                self._before = [""]  # a token without text
        return texts


class _ByteRuns(_Step):
    """Decodes runs of byte tokens such as `<0x0A>`; each byte of an invalid run becomes U+FFFD."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, pieces: list[str]) -> list[str]:
        texts = []
        for token in pieces:
            byte = _BYTE_TOKEN.fullmatch(token)
            if byte:
                self._run.append(int(byte[1], 16))
            else:
                texts += [*self.end(), token]
        return texts

    def end(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [_HALF] * len(run)


class _ByteLevel(_Step):
    """Decodes byte-level BPE: each character of a token stands for a byte of UTF-8 text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, pieces: list[str]) -> list[str]:
        return [self._decoder.decode(b"".join(_bytes_of(token) for token in pieces))]

    def end(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes map to themselves, the others from 256 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()


def _bytes_of(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:  # an added token, whose text stands for itself
        return token.encode()


class _StrippedStart(_Step):
    """Removes up to `most` copies of a character from the start of the text."""

    def __init__(self, character: str, most: int) -> None:
        self._character, self._left = character, most

    def feed(self, pieces: list[str]) -> list[str]:
        text = "".join(pieces)
        while self._left and text:
            found = text.startswith(self._character)
            text = text[found:]
            self._left = self._left - 1 if found else 0
        return [text]


class _Replaced(_Step):
    """Replaces a pattern; holds back an end of the text that may begin the pattern."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content
        self._held = ""

    def feed(self, pieces: list[str]) -> list[str]:
        *parts, rest = (self._held + "".join(pieces)).split(self._pattern)
        longest = min(len(rest), len(self._pattern) - 1)
        lengths = (n for n in range(longest, 0, -1) if rest.endswith(self._pattern[:n]))
        cut = len(rest) - next(lengths, 0)
        self._held = rest[cut:]
        return [self._content.join([*parts, rest[:cut]])]

    def end(self) -> list[str]:
        return [self._held]


class _Held(_Step):
    """Holds all tokens back and decodes them at the end."""

    def __init__(self, decode: Callable[[Sequence[str]], str], *, joined: bool) -> None:
        self._decode = decode
        self._joined = joined
        self._held: list[str] = []

    def feed(self, pieces: list[str]) -> list[str]:
        self._held += pieces
        return []

    def end(self) -> list[str]:
        if not self._held:  # the library fails when it strips the end of an empty list
            return []
        return [self._decode(["".join(self._held)] if self._joined else self._held)]

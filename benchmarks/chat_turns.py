"""Filter the user turns that a model wrote, for use as prompts of its student's training data.

A turn is dropped for the first of these reasons: it did not come to an end, is empty, too short or
too long, contains a special token or the template's own system message, is not English, repeats
itself, or is nearly the same as an earlier turn.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2f.text import Tokenizer

_PLACE = "PLACEOFTHEUSERSTURN"
_SPECIAL = re.compile(r"<\|[^|>]*\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|\[/?INST\]", re.IGNORECASE)
_SYSTEM = re.compile(
    r"you are (?:a |an )?(?:helpful|useful|friendly) (?:ai |virtual )?(?:assistant|bot|chatbot)"
    r"|\b(?:as an ai|named smollm|trained by hugging ?face|how (?:can|may) i (?:help|assist) you"
    r"|what can i do for you)\b|^(?:a|answer|assistant|chatbot|response)\b[^\n]{0,20}:",
    re.IGNORECASE | re.MULTILINE,
)
"""Beginnings of turns that repeat the system message or speak as an assistant."""
_COMMON = frozenset(
    """a about am an and any are as at be been but by can could did do does each for from get give
    had has have he help her his how i if in into is it its like make me more my need not of on one
    or our out please she should so some than that the their them there these they this to up us use
    want was we were what when where which who why will with would write you your""".split()
)
_QUOTES = "\u2018\u2019\u201c\u201d\u2013\u2014\u2026"
"""Curly quotes and dashes: characters outside ASCII that English texts have."""
_LEAST_WORDS, _MOST_WORDS, _MOST_LETTERS = 3, 100, 700
_LEAST_COMMON = 0.2
"""Least share of very common English words in a turn."""
_MOST_OTHER = 0.05
"""Largest share of characters outside ASCII in a turn."""
_MOST_REPEATED = 0.3
"""Largest share of runs of four words that occur earlier in the same turn."""
_LEAST_ZIPPED = 0.3
"""Least ratio of a long turn's compressed size to its size."""
_NEAR = 0.6
"""Share of common word pairs from which on two turns count as nearly the same."""


def opening_of_user_turn(tokenizer: Tokenizer, said: Sequence[Mapping[str, str]] = ()) -> str:
    """Render a conversation by the chat template, up to where the user's next message begins.

    Args:
        tokenizer: The model's tokenizer.
        said: The messages so far.

    Raises:
        SystemExit: The tokenizer has no chat template, or the template drops the user's message.
    """
    if tokenizer.chat_template is None:
        raise SystemExit("the model has no chat template, so it knows no user's turn")
    messages = [*said, {"role": "user", "content": _PLACE}]
    text, place, _ = tokenizer.render_chat(messages).partition(_PLACE)
    if not place:
        raise SystemExit("the chat template changes the user's words, so its turn is not found")
    return text


def filter_turns(
    rows: Sequence[Mapping[str, Any]], column: str = "response"
) -> tuple[list[str], dict[str, int]]:
    """Return the turns to keep, in order, and the number of dropped ones by reason."""
    dropped: Counter[str] = Counter()
    fit: list[str] = []
    for row in rows:
        text, reason = read_turn(row, column)
        if reason is None:
            fit.append(text)
        else:
            dropped[reason] += 1
    kept = _without_near(fit)
    dropped["near duplicate"] = len(fit) - len(kept)
    return kept, {reason: count for reason, count in dropped.most_common() if count}


def read_turn(row: Mapping[str, Any], column: str = "response") -> tuple[str, str | None]:
    """Return a sampled turn, and the first reason to drop it; None if there is none."""
    text = str(row.get(column) or "").strip()
    return text, "not ended" if row.get("finish_reason") == "length" else why_unfit(text)


def why_unfit(text: str) -> str | None:
    """Return the first reason to drop a turn; None if there is none."""
    words = _words(text)
    if not text:
        return "empty"
    if _SPECIAL.search(text):
        return "special token"
    if len(words) < _LEAST_WORDS:
        return "too short"
    if len(words) > _MOST_WORDS or len(text) > _MOST_LETTERS:
        return "too long"
    if _SYSTEM.search(text):
        return "an assistant's words"
    if not _looks_english(text, words):
        return "not English"
    return "goes in circles" if goes_in_circles(text) else None


def split_turns(
    turns: Sequence[str], *, num_held_out: int, seed: int
) -> tuple[list[str], list[str]]:
    """Split turns into those to train on and `num_held_out` others, but at most half."""
    count = min(num_held_out, len(turns) // 2)
    chosen = set(random.Random(seed).sample(range(len(turns)), count))
    return (
        [turn for number, turn in enumerate(turns) if number not in chosen],
        [turn for number, turn in enumerate(turns) if number in chosen],
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?|\d+", text.lower())


def _looks_english(text: str, words: Sequence[str]) -> bool:
    common = sum(word in _COMMON for word in words) / len(words)
    other = sum(ord(letter) > 127 and letter not in _QUOTES for letter in text) / len(text)
    letters = sum(letter.isalpha() or letter.isspace() for letter in text) / len(text)
    if any(letter.isalpha() and letter > "\u024f" for letter in text):
        return False  # a letter of another alphabet
    return common >= _LEAST_COMMON and other <= _MOST_OTHER and letters >= 0.7


def goes_in_circles(text: str) -> bool:
    """Return whether a text repeats itself, as small models do when they decode greedily."""
    words = _words(text)
    runs = Counter(zip(*(words[i:] for i in range(4)), strict=False))
    repeated = sum(runs.values()) - len(runs)
    if runs and repeated / sum(runs.values()) > _MOST_REPEATED:
        return True
    if len(words) >= 8 and max(Counter(words).values()) / len(words) > 0.4:
        return True
    raw = text.encode()
    return len(raw) > 200 and len(zlib.compress(raw)) / len(raw) < _LEAST_ZIPPED


def _without_near(turns: Sequence[str]) -> list[str]:
    """Return the turns without those that are nearly the same as an earlier one.

    Two turns that have a share of `_NEAR` of their word pairs in common also share one of their
    rarest pairs, so only turns that share such a pair are compared.
    """
    pairs_of = [
        frozenset(" ".join(pair) for pair in itertools.pairwise(_words(turn))) for turn in turns
    ]
    count = Counter(itertools.chain.from_iterable(pairs_of))
    kept: list[str] = []
    shown: dict[str, list[frozenset[str]]] = {}
    for turn, pairs in zip(turns, pairs_of, strict=True):
        by_rarity = sorted(pairs, key=lambda pair: (count[pair], pair))
        rarest = by_rarity[: len(pairs) - math.ceil(_NEAR * len(pairs)) + 1]
        near = {other for pair in rarest for other in shown.get(pair, [])}
        if any(len(pairs & other) >= _NEAR * len(pairs | other) for other in near):
            continue
        kept.append(turn)
        for pair in rarest:
            shown.setdefault(pair, []).append(pairs)
    return kept

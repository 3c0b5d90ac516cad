"""Stop strings with special tokens: the same end as a search token by token, on every path."""

import functools
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.engine.response_text import ResponseText, TokenTexts
from d2f.engine.stops import StopStrings
from d2f.testing import tiny_model
from d2f.text import Tokenizer
from d2f.tokenizer_files import TokenizerFiles

WORDS = ["a", "b", "<", "|", "im", ">", "ab", "▁a", "x|", "<0xE2>", "<0x82>", "<0xAC>"]
SPECIAL = ["<|x|>", "</s>", "<|im_end|>"]
VISIBLE = "<tool>"
"""Kept whole like those, but part of the text."""
DECODERS = {
    "plain": decoders.Fuse(),
    "words": decoders.WordPiece(prefix="##", cleanup=False),
    # As Llama-2's.
    "metaspace": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
}


@functools.cache
def make_tokenizer(kind):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Backend(models.WordLevel(vocabulary, unk_token="a"))
    backend.decoder = DECODERS[kind]
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    backend.add_tokens([AddedToken(VISIBLE, special=False)])
    files = TokenizerFiles(backend=backend, config={}, special={}, hidden=frozenset(SPECIAL))
    return Tokenizer(files, None)


EOS = len(WORDS) + 2
IDS = st.lists(st.integers(0, len(WORDS) + len(SPECIAL)), max_size=12)
PARTS = st.sampled_from(["a", "b", "|", " ", *SPECIAL, VISIBLE])
STOPS = st.lists(
    st.lists(PARTS, min_size=1, max_size=3).map("".join), min_size=1, max_size=3
)  # fmt: skip


def holds_special(stop):
    return any(token in stop for token in SPECIAL)


def shows(tokenizer, ids, stops):
    """Whether people see a stop string, or would if special tokens were shown."""
    seen, shown = tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False)
    return any(stop in seen or (holds_special(stop) and stop in shown) for stop in stops)


def ends_slowly(tokenizer, ids, stops):
    """Token by token."""
    counts = range(len(ids) + 1)
    return next((count for count in counts if shows(tokenizer, ids[:count], stops)), None)


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(ids=IDS, stops=STOPS)
def test_the_end_is_where_a_search_token_by_token_ends(kind, ids, stops):
    tokenizer = make_tokenizer(kind)
    assert StopStrings(stops, tokenizer).num_tokens(ids) == ends_slowly(tokenizer, ids, stops)


def cut_slowly(tokenizer, ids, stops):
    """What people see before the first stop, letter by letter, of the plain decoder."""
    letters = [
        (letter, tokenizer.decode([token]) != "")
        for token in ids
        for letter in tokenizer.decode([token], skip_special_tokens=False)
    ]
    shown = "".join(letter for letter, _ in letters)
    seen_at = [place for place, (_, seen) in enumerate(letters) if seen]
    seen = "".join(shown[place] for place in seen_at)
    cuts = [seen.index(stop) for stop in stops if stop in seen]
    for stop in stops:
        if holds_special(stop) and stop in shown:
            cuts.append(sum(place < shown.index(stop) for place in seen_at))
    return seen[: min(cuts, default=len(seen))]


@settings(max_examples=150, deadline=None)
@given(ids=IDS, stops=STOPS)
def test_the_text_ends_before_what_begins_first(ids, stops):
    tokenizer = make_tokenizer("plain")
    assert StopStrings(stops, tokenizer).cut_text(ids) == cut_slowly(tokenizer, ids, stops)


@settings(max_examples=200, deadline=None)
@given(
    ids=IDS,
    stops=STOPS,
    piece=st.tuples(st.integers(0, 30), st.integers(1, 16)),
    cuts=st.just(range(13)) | st.lists(st.integers(0, 12), max_size=5),
    logprobs=st.booleans(),
    eos=st.sampled_from([(), (EOS,), (EOS, EOS - 1)]),
)
def test_a_stream_shows_nothing_of_a_stop(ids, stops, piece, cuts, logprobs, eos):
    """As the engine hands it out: up to an EOS, or the token that completes a stop string."""
    tokenizer = make_tokenizer("plain")
    # A stop that does come, most often.
    come = tokenizer.decode(ids, skip_special_tokens=False)[piece[0] : sum(piece)]
    stops = [*stops, come] if come and holds_special(come) else stops
    ids = ids[: next((place + 1 for place, token in enumerate(ids) if token in eos), len(ids))]
    ids = ids[: ends_slowly(tokenizer, ids, stops)]
    expected = cut_slowly(tokenizer, ids, stops)
    texts = TokenTexts(tokenizer) if logprobs else None
    choice, shown = ResponseText(tokenizer, eos_token_ids=eos, stop=stops, texts=texts), ""
    for cut in sorted(cuts):
        shown += choice.grow(ids[: min(cut, len(ids))])
        assert expected.startswith(shown)
    assert shown + choice.end(ids) == expected


@pytest.mark.parametrize("kind", DECODERS)
@settings(max_examples=60, deadline=None)
@given(
    ids=IDS,
    stops=STOPS,
    piece=st.tuples(st.integers(0, 30), st.integers(1, 16)),
    cuts=st.just(range(13)) | st.lists(st.integers(0, 12), max_size=5),
)
def test_a_stream_is_the_text_that_the_engine_cuts(kind, ids, stops, piece, cuts):
    """Also where the decoder keeps back bytes that a later token could go on with."""
    tokenizer = make_tokenizer(kind)
    come = tokenizer.decode(ids, skip_special_tokens=False)[piece[0] : sum(piece)]
    stops = [*stops, come] if holds_special(come) else stops
    found = StopStrings(stops, tokenizer)
    ids = ids[: found.num_tokens(ids)]
    choice, shown = ResponseText(tokenizer, stop=stops), ""
    for cut in sorted(cuts):
        shown += choice.grow(ids[: min(cut, len(ids))])
    assert shown + choice.end(ids) == found.cut_text(ids)


def test_a_character_of_bytes_before_a_stop_is_shown():
    choice = ResponseText(make_tokenizer("metaspace"), stop=["</s>"])
    ids = [WORDS.index(token) for token in ("a", "<0xE2>", "<0x82>", "<0xAC>")] + [EOS - 1]
    assert choice.grow(ids[:4]) == "a"
    assert choice.end(ids) == "€"


def test_what_follows_a_special_token_that_begins_a_stop_is_held_back():
    choice = ResponseText(make_tokenizer("plain"), stop=["<|x|>ab</s>"])
    ids = [1, EOS - 2, 0, 1, EOS - 1]
    shown = [choice.grow(ids[:count]) for count in range(1, 5)]
    assert shown == ["b", "", "", ""]
    assert choice.end(ids) == ""
    assert choice.grow(ids[:4]) == ""


def test_an_ordinary_word_that_ends_an_answer_completes_a_stop():
    """The text does not have it, and nothing of the stop string before it."""
    tokenizer = make_tokenizer("plain")
    ids = [0, 1, 4]
    choice = ResponseText(tokenizer, eos_token_ids=[4], stop=["bim"])
    assert [choice.grow(ids[:n]) for n in (1, 2)] + [choice.end(ids)] == ["a", "", ""]


class Letters:
    """Ids as letters of their own, some of which are special: `decode` leaves those out."""

    def __init__(self, special):
        self._special = {token: f"<{token}>" for token in special}
        self.special_tokens = frozenset(self._special.values())

    def decode(self, ids, *, skip_special_tokens=True):
        special = dict.fromkeys(self._special, "") if skip_special_tokens else self._special
        return "".join(special.get(token, chr(0x100 + token)) for token in ids)


STRATEGIES = ["pipelined", "serial", "autoregressive", "vanilla", "prefix-cache", "dllm-cache"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_at_a_special_token(strategy):
    model = tiny_model("qwen2" if strategy == "autoregressive" else "Dream", seed=3)
    request = {"prompt_ids": [1, 2, 3], "max_new_tokens": 24, "strategy": strategy}
    [free] = Engine(model).generate([Request(**request, eos_token_id=())])
    ids = free.token_ids
    place = next(n for n in range(3, 24) if ids[n] not in ids[:n])
    special = ids[place]
    tokenizer = Letters([special])
    before = tokenizer.decode(ids[place - 2 : place])
    engine = Engine(model, tokenizer=tokenizer)
    for stop, kept in ((f"<{special}>", place), (f"{before}<{special}>", place - 2)):
        # Whether it is an EOS beside or not.
        for eos in ((), (special,)):
            [result] = engine.generate([Request(**request, stop=[stop], eos_token_id=eos)])
            assert result.token_ids == ids[: place + 1]
            assert result.finish_reason == "stop"
            text = StopStrings([stop], tokenizer).cut_text(result.token_ids)
            assert text == tokenizer.decode(ids[:kept])


def test_a_tokenizer_that_knows_no_special_tokens_is_asked_as_before():
    """The engine takes any object with `decode`."""
    plain = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    stops = StopStrings(["b<|im_end|>", "c"], plain)
    assert stops.num_tokens([97, 98, 99, 100]) == 3
    assert stops.cut_text([97, 98, 99, 100]) == "ab"

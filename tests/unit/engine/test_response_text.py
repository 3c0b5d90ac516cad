"""Text that is certain, whatever the portions in which its tokens are committed."""

import functools
import math
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.serving.running import tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from d2f.engine.response_text import ResponseText, TokenTexts, logprob_of
from d2f.shipped import shipped_model
from d2f.testing.tiny import EOS_TOKEN_ID
from d2f.text import Tokenizer

LETTERS = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def portions(ids, cuts):
    """What is committed at each step: more and more."""
    return [ids[:cut] for cut in sorted({min(cut, len(ids)) for cut in cuts})]


def cut_slowly(text, stops):
    """Letter by letter: the text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(LETTERS, STOPS, st.lists(st.integers(0, 12), max_size=5))
def test_text_does_not_depend_on_the_portions(text, stops, cuts):
    ids = tokenizer().encode(text)
    choice, shown = ResponseText(tokenizer(), stop=stops), ""
    expected = cut_slowly(text, stops)
    for committed in portions(ids, cuts):
        shown += choice.grow(committed)
        assert expected.startswith(shown)
    assert shown + choice.end(ids) == expected


@given(LETTERS, STOPS, st.lists(st.integers(0, 12), max_size=5))
def test_logprobs_do_not_depend_on_the_portions(text, stops, cuts):
    ids = tokenizer().encode(text)
    probabilities = [1 / (index + 2) for index in range(len(ids))]

    def tokens_of(cuts):
        choice = ResponseText(tokenizer(), stop=stops, texts=TokenTexts(tokenizer()))
        found = []
        for committed in portions(ids, cuts):
            choice.grow(committed)
            found += choice.logprobs(probabilities)
        choice.end(ids)
        return found + choice.logprobs(probabilities, ended=True)

    found = tokens_of(cuts)
    assert found == tokens_of([])
    assert "".join(token.text for token in found) == cut_slowly(text, stops)
    assert [token.offset for token in found] == list(range(len(found)))
    assert [token.logprob for token in found] == [
        math.log(value) for value in probabilities[: len(found)]
    ]


@given(
    st.lists(st.integers(0, 7), max_size=20),
    st.lists(st.integers(0, 4), max_size=8),
    st.booleans(),
)
def test_what_is_sent_is_the_decoded_whole(ids, cuts, with_logprobs):
    """For a decoder that takes the first space and puts bytes together, as Llama 2's does."""
    tokenizer = llama_tokenizer()
    choice = ResponseText(tokenizer, texts=TokenTexts(tokenizer) if with_logprobs else None)
    seen, pieces = 0, []
    for cut in cuts:
        seen += cut
        pieces.append(choice.grow(ids[:seen]))
    assert "".join([*pieces, choice.end(ids)]) == tokenizer.decode(ids)


def test_a_token_is_shown_with_its_space():
    texts = TokenTexts(llama_tokenizer())
    assert [texts[i] for i in (0, 1, 2, 7)] == [" a", "b", " ", "</s>"]


@functools.cache
def llama_tokenizer():
    tokens = ["▁a", "b", "▁", "<0xE2>", "<0x82>", "<0xAC>", "<0x41>"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, "b"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        return Tokenizer.load(folder)


def test_eos_is_no_text():
    ids = [*tokenizer().encode("ab"), EOS_TOKEN_ID]
    choice = ResponseText(tokenizer(), eos_token_ids=[EOS_TOKEN_ID], texts=TokenTexts(tokenizer()))
    assert choice.end(ids) == "ab"
    assert [token.text for token in choice.logprobs([1.0, 1.0, 1.0], ended=True)] == ["a", "b"]


def test_no_half_character():
    shipped = Tokenizer.load(shipped_model())
    ids = shipped.encode("5 € for 2")
    choice = ResponseText(shipped)
    shown = [choice.grow(ids[:count]) for count in range(len(ids))] + [choice.end(ids)]
    assert "".join(shown) == "5 € for 2"
    assert not any("\ufffd" in text for text in shown)
    cut = shipped.encode("€")[:-1]
    choice = ResponseText(shipped)
    assert (choice.grow(cut), "\ufffd" in choice.end(cut)) == ("", True)


def test_a_token_behind_half_a_character_begins_behind_it():
    shipped = Tokenizer.load(shipped_model())
    half, word = shipped.encode("€")[:1], shipped.encode(" more")
    choice = ResponseText(shipped, texts=TokenTexts(shipped))
    text = choice.end(half + word)
    tokens = choice.logprobs([1.0] * (1 + len(word)), ended=True)
    assert text == "\ufffd more"
    assert "".join(text[token.offset] + token.text[1:] for token in tokens) == text
    assert tokens[1].offset == 1


@pytest.mark.parametrize(("probability", "logprob"), [(1.0, 0.0), (0.0, -9999.0), (None, -9999.0)])
def test_logprob_is_a_number_in_json(probability, logprob):
    assert logprob_of(probability) == logprob

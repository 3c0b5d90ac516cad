"""The text of blocks is the text of their tokens, whoever decodes it and wherever a block ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from d2f.cli.live import render_blocks
from d2f.decoding.batch import BlockState, BlockView
from d2f.text import Tokenizer
from d2f.tokenizer_files import TokenizerFiles

WORDS = ["the", "n", "ot", "▁is", "▁not", "▁", "##ed", "Ġis", "Ġn", "Ã", "©", "Ċ", "."]
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "word piece": decoders.WordPiece(),
    "llama 2": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
}


def tokenizer_of(decoder: str) -> Tokenizer:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    backend.decoder = DECODERS[decoder]
    files = TokenizerFiles(backend=backend, config={}, special={}, hidden=frozenset())
    return Tokenizer(files, None)


def blocks_of(tokens: list[int | None], size: int) -> list[BlockView]:
    parts = [tuple(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [
        BlockView(state=BlockState.CACHED, token_ids=part, probabilities=(1.0,) * len(part))
        for part in parts
    ]


@pytest.mark.parametrize("decoder", DECODERS)
@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=12), size=st.integers(1, 5)
)
def test_blocks_join_as_the_whole_does(decoder, ids, size):
    tokenizer = tokenizer_of(decoder)
    whole = tokenizer.decode(ids, skip_special_tokens=False).replace("\n", "⏎")
    assert render_blocks(blocks_of(ids, size), tokenizer).plain == whole


@pytest.mark.parametrize("decoder", DECODERS)
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.none() | st.integers(0, len(WORDS) - 1), min_size=1, max_size=12),
    size=st.integers(1, 5),
)
def test_a_seam_changes_nothing_beside_gaps_either(decoder, tokens, size):
    tokenizer = tokenizer_of(decoder)
    one = render_blocks(blocks_of(tokens, len(tokens)), tokenizer).plain
    several = render_blocks(blocks_of(tokens, size), tokenizer)
    named = render_blocks(blocks_of(tokens, size), tokenizer, named=True).plain
    apart = render_blocks(blocks_of(tokens, size), tokenizer, named=True, apart=True).plain
    assert several.plain == one == named.replace("[cached]", "")
    assert apart == named.replace("[cached]", "\n[cached] ").removeprefix("\n")
    assert one.count("·") == tokens.count(None)


def test_tokens_behind_a_gap_are_decoded():
    tokens = [WORDS.index(word) for word in ("the", "Ġis", "Ã", "©", "Ċ")]
    tokens[1:1] = [None]
    for size in (1, 2, 3, 9):
        text = render_blocks(blocks_of(tokens, size), tokenizer_of("byte level")).plain
        assert text == "the· isé⏎"


@pytest.mark.parametrize("decoder", ["metaspace", "llama 2"])
def test_a_word_behind_a_gap_keeps_its_space(decoder):
    tokens = [WORDS.index("the"), None, WORDS.index("▁not")]
    assert render_blocks(blocks_of(tokens, 2), tokenizer_of(decoder)).plain == "the· not"

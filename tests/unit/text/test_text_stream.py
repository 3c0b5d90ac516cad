"""A stream's pieces, joined, are the decoded whole, whatever the decoder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models
from tokenizers import Tokenizer as Backend

from d2f.text import Tokenizer

TOKENS = [
    *["▁a", "▁", "▁▁", "▁é", "a", "b", "##b", "##ing", "c</w>", "</w>", "Ġa", "Ã", "©", "ðŁ", "Ļ"],
    *["<0xE2>", "<0x82>", "<0xAC>", "<0xFF>", "<0x20>", "<0x41>", "<0x4>", "<0xC3>", "<0xA9>"],
    *[" ", "  ", " a", "b ", ".", " .", ",", "n't", "'", "s", "'s", "|", "<pad>", "\ufffd", "日"],
]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]
PLAIN = ["<think>", " <t> ", "é▁"]
IDS = st.lists(st.integers(0, len(TOKENS) + len(SPECIAL) + len(PLAIN)), max_size=24)

LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "none": None,
    "byte-level": decoders.ByteLevel(),
    "wordpiece": decoders.WordPiece(),
    "wordpiece without cleanup": decoders.WordPiece(cleanup=False),
    "metaspace always": decoders.Metaspace(prepend_scheme="always"),
    "metaspace first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "byte fallback": decoders.ByteFallback(),
    "fuse": decoders.Fuse(),
    "replace": decoders.Replace("a", "bb"),
    "replace by regex": decoders.Replace(Regex("[ab]+"), "x"),
    "strip": decoders.Strip(" ", 1, 0),
    "llama-2": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "three spaces less": decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)]),
    "fallback, then metaspace": decoders.Sequence([LLAMA[1], decoders.Metaspace()]),
    "metaspace, then strip": decoders.Sequence([decoders.Metaspace(), decoders.Strip(" ", 1, 0)]),
    "nested": decoders.Sequence(
        [decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()]), decoders.Fuse()]
    ),
    "ctc, then bpe": decoders.Sequence([decoders.CTC(), decoders.BPEDecoder()]),
    "replaced in the whole": decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("aba", "x"), decoders.Replace(" .", ".")]
    ),
    "regex in the whole": decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(Regex(r"\s+$"), "")]
    ),
    "metaspace of the whole": decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
}


def write_tokenizer(folder, decoder, **config):
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, "a"))
    if decoder is not None:
        backend.decoder = decoder
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(token) for token in PLAIN])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def pieces_of(tokenizer, ids, cuts, skip):
    stream, pieces, start = tokenizer.stream(skip_special_tokens=skip), [], 0
    for cut in cuts:
        pieces.append(stream.push(ids[start : start + cut]))
        start += cut
    return [*pieces, stream.push(ids[start:])], stream.close()


@pytest.mark.parametrize("tidies", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_pieces_are_the_whole(tmp_path_factory, name, tidies):
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = write_tokenizer(folder, DECODERS[name], clean_up_tokenization_spaces=tidies)

    @given(ids=IDS, cuts=st.lists(st.integers(0, 4), max_size=12), skip=st.booleans())
    @settings(max_examples=25, deadline=None, database=None)
    def holds(ids, cuts, skip):
        pieces, rest = pieces_of(tokenizer, ids, cuts, skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)
        assert not any(piece.endswith("\ufffd") for piece in pieces)

    holds()


def ids_of(*tokens):
    return [[*TOKENS, *SPECIAL, *PLAIN].index(token) for token in tokens]


@pytest.mark.parametrize(
    ("name", "tokens", "pieces"),
    [
        ("llama-2", ["<s>", "▁a", "▁a", "b"], ["", "a", " a", "b"]),
        ("llama-2", ["▁", "▁", "a"], ["", " ", "a"]),
        ("llama-2", ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "b"], ["a", "", "", "", "€b"]),
        ("metaspace always", ["</s>", "▁a", "</s>", "▁a"], ["", "a", "", " a"]),
        ("wordpiece", ["a", "</s>", "b", "##ing", ","], ["a", "", " b", "ing", ","]),
        ("byte-level", ["Ã", "©", "Ġa"], ["", "é", " a"]),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(tmp_path, name, tokens, pieces):
    stream = write_tokenizer(tmp_path, DECODERS[name]).stream()
    assert [stream.push([i]) for i in ids_of(*tokens)] == pieces


def test_a_decoder_that_strips_the_end(tmp_path):
    """The library strips the end of a text, but not of an empty one."""
    ends = decoders.Sequence([decoders.Fuse(), decoders.Strip("b", 0, 1)])
    tokenizer = write_tokenizer(tmp_path, ends)
    assert pieces_of(tokenizer, ids_of("a", "b", "b"), [1, 1], True) == (["", "", ""], "ab")


def test_a_push_looks_at_its_own_tokens_alone(tmp_path):
    tokenizer = write_tokenizer(tmp_path, DECODERS["llama-2"])
    stream, asked = tokenizer.stream(), []
    token = stream._token
    stream._token = lambda i: asked.append(i) or token(i)
    ids = ids_of("▁a", "b", "<0xE2>") * 50
    for i in ids:
        stream.push([i])
    stream.close()
    assert asked == ids
    assert stream.close() == ""


@pytest.mark.parametrize("name", sorted(DECODERS.keys() - {"regex in the whole"}))
def test_text_behind_other_text(tmp_path, name):
    tokenizer = write_tokenizer(tmp_path, DECODERS[name])
    for ids in [ids_of("Ġa", "b"), ids_of("▁a", "</s>", "##b"), ids_of("c</w>"), []]:
        whole = tokenizer.decode([*ids_of("s"), *ids])
        assert "s" + tokenizer.decode_after(ids) == whole


def test_what_a_token_alone_would_lose_stays_behind_others(tmp_path):
    tokenizer = write_tokenizer(tmp_path, DECODERS["llama-2"])
    ids = ids_of("▁a", "</s>")
    assert (tokenizer.decode(ids), tokenizer.decode_after(ids)) == ("a", " a")
    assert tokenizer.decode_after(ids, skip_special_tokens=False) == " a</s>"

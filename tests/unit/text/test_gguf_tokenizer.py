"""Tokenizers from GGUF files give the ids of the tokenizers that they were made from."""

from __future__ import annotations

import json
from functools import cache

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.gguf_files import vocabulary, write_gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from d2f.errors import CheckpointError
from d2f.text import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool_call>", "   "]
TEXTS = [
    "It's 2026: they've paid 12,345.67 dollars for 3 cafés, naïve as we'll be.",
    "def f(x):\n    return x ** 2  # squares\n\n\nprint(f(100))\t\r\n",
    "Zürich, Ångström, 東京 is a city; привет мир! ¿Qué? 100% <html> a_b_c",
    "THE END. It'S NOT, HE'LL say 007 and 1st 2nd 3rd 1000000 times....",
] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def byte_level(use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def cut(pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])


# As the tokenizer.json of the models has it after which the kinds are named.
PUBLISHED = {
    "gpt-2": (byte_level(), None, False),
    "default": (byte_level(), None, False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
        None,
        False,
    ),
    "qwen2": (cut(QWEN2), normalizers.NFC(), False),
    "llama-bpe": (cut(LLAMA3), None, True),
}
ADDED = [AddedToken(text, special=True, normalized=False) for text in SPECIAL]
ADDED += [AddedToken(text, special=False, normalized=False) for text in USER_DEFINED]


@cache
def original(pre):
    """A byte-level tokenizer of some hundred tokens with the rules of a published one."""
    pre_tokenizer, normalizer, ignores_merges = PUBLISHED[pre]
    backend = Backend(models.BPE(ignore_merges=ignores_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    whole = json.loads(backend.to_str())
    if ignores_merges:  # a token that no merge leads to
        whole["model"]["vocab"]["Ġzygote"] = len(whole["model"]["vocab"])
    backend = Backend.from_str(json.dumps(whole))
    backend.add_tokens(ADDED)
    return backend


@cache
def sentencepiece():
    """A tokenizer as the Llama 2 models have it, in which every pair of letters is a merge."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz.,<>!0123456789é"]
    pieces += [a + b for a in "▁the" for b in "▁thean"] + ["▁th", "▁the", "▁▁▁▁", "the", "and"]
    pieces += ["an", "th", "▁an", "▁and", "nd"]
    pieces = list(dict.fromkeys(pieces))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces]
    # What is merged first has the best score, as SentencePiece numbers its merges.
    merged = sorted((p for p in pieces if len(p) > 1), key=lambda p: (len(p), p))
    scores = {piece: -float(rank) for rank, piece in enumerate(merged)}
    vocab = {text: i for i, text in enumerate(tokens)}
    merges = [
        (piece[:at], piece[at:])
        for piece in merged
        for at in range(len(piece) - 1, 0, -1)
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    types = dict.fromkeys(bytes_, 6) | {"<unk>": 2}
    entries = vocabulary(backend, "llama", "default")
    entries["tokenizer.ggml.token_type"] = [
        types.get(text, kind)
        for text, kind in zip(
            entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"], strict=True
        )
    ]
    entries["tokenizer.ggml.scores"] = [
        scores.get(text, -1000.0) for text in entries["tokenizer.ggml.tokens"]
    ]
    return backend, entries


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Reads the tokenizer of a file with some metadata; each file is written once."""
    folder, known = tmp_path_factory.mktemp("gguf"), {}

    def make(name, entries):
        if name not in known:
            file = write_gguf(folder / f"{name}.gguf", tensors=EMBEDDING, metadata=entries)
            known[name] = Tokenizer.load(file)
        return known[name]

    return make


EMBEDDING = {"token_embd.weight": [[0.0] * 32] * 2} | {
    f"blk.{i}.attn_norm.weight": [0.0] * 32 for i in range(2)
}
PARTS = st.one_of(
    st.text(max_size=8),
    st.text(alphabet="0123456789.,-", max_size=8),
    st.text(alphabet=" \t\n\r\u00a0\u3000", max_size=6),
    st.sampled_from(["it's", "HE'LL", " the", " zygote", "é", "e\u0301", "東京", "🙂", "th"]),
    st.sampled_from(SPECIAL + USER_DEFINED),
)
ANY_TEXT = st.lists(PARTS, max_size=8).map("".join)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_kinds_give_the_ids_of_the_original(read, pre):
    theirs, ours = original(pre), read(pre, vocabulary(original(pre), "gpt2", pre))
    assert ours.vocab_size == theirs.get_vocab_size()

    @settings(max_examples=60, deadline=None)
    @given(text=ANY_TEXT)
    def check(text):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected

    check()


def test_sentencepiece_gives_the_ids_of_the_original(read):
    theirs, entries = sentencepiece()
    ours = read("llama", entries)

    @settings(max_examples=100, deadline=None)
    @given(text=st.lists(st.one_of(PARTS, st.text(alphabet=" thean", max_size=9))).map("".join))
    def check(text):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)

    check()


def test_transformers_own_classes_give_the_same_ids(read):
    """Those that have the rules of a kind built in."""
    for pre, kind in (("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")):
        model = json.loads(original(pre).to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        theirs = getattr(transformers, kind)(vocab=model["vocab"], merges=merges)
        ours = read(pre, vocabulary(original(pre), "gpt2", pre))
        for text in (text for text in TEXTS if "   " not in text):  # which is a token of ours
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_digits_of_smollm_are_single_tokens(read):
    ours = read("smollm", vocabulary(original("smollm"), "gpt2", "smollm"))
    assert [ours.decode([i]) for i in ours.encode("12345")] == list("12345")


IDS = {
    "tokenizer.ggml.bos_token_id": SPECIAL.index("<s>"),
    "tokenizer.ggml.eos_token_id": SPECIAL.index("</s>"),
    "tokenizer.ggml.padding_token_id": SPECIAL.index("<|im_end|>"),
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_roles_and_flags(read):
    entries = vocabulary(original("gpt-2"), "gpt2", "gpt-2", **IDS)
    ours = read("roles", entries | {"tokenizer.chat_template": "{{ bos_token }}x{{ eos_token }}"})
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (
        1,
        2,
        4,
        0,
    )
    assert ours.special_tokens == set(SPECIAL)
    assert ours.render_chat([{"role": "user", "content": "a"}]) == "<s>x</s>"
    ids = ours.encode("<tool_call>a</s>")
    assert ours.decode(ids) == "<tool_call>a"
    assert ours.decode(ids, skip_special_tokens=False) == "<tool_call>a</s>"


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("llama", None, True),
        ("llama", False, False),
    ],
)
def test_bos_begins_a_prompt_as_the_file_says(read, pre, flag, begins):
    entries = sentencepiece()[1] if pre == "llama" else vocabulary(original(pre), "gpt2", pre)
    ours = read(f"{pre}-{flag}", entries | IDS | {"tokenizer.ggml.add_bos_token": flag})
    assert (ours.encode_prompt("a")[0] == 1) == begins


def test_files_from_before_the_names_of_kinds(tmp_path):
    entries = vocabulary(original("qwen2"), "gpt2", **IDS)
    for layout, pre in (("qwen2", "qwen2"), ("llama", "gpt-2")):
        file = write_gguf(
            tmp_path / f"{layout}.gguf", layout=layout, tensors=EMBEDDING, metadata=entries
        )
        named = write_gguf(
            tmp_path / f"{layout}-named.gguf",
            layout=layout,
            tensors=EMBEDDING,
            metadata=entries | {"tokenizer.ggml.pre": pre},
        )
        for text in TEXTS:
            assert Tokenizer.load(file).encode(text) == Tokenizer.load(named).encode(text)


def test_rows_without_a_token_are_no_tokens(read):
    entries = vocabulary(original("gpt-2"), "gpt2", "gpt-2")
    count = len(entries["tokenizer.ggml.tokens"])
    entries["tokenizer.ggml.tokens"] += ["[PAD0]", "[PAD1]"]
    entries["tokenizer.ggml.token_type"] += [5, 5]
    assert read("padded", entries).vocab_size == count


REFUSED = {
    "kind": ({"tokenizer.ggml.model": "t5"}, "unknown tokenizer kind 't5'", "Known: gpt2, llama"),
    "pre": ({"tokenizer.ggml.pre": "smolml"}, "did you mean 'smollm'?", "d2f import"),
    "merges": ({"tokenizer.ggml.merges": None}, "lacks tokenizer.ggml.merges"),
    "broken merge": ({"tokenizer.ggml.merges": ["ab"]}, "one part only"),
    "scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "ggml.scores"),
    "none": ({"tokenizer.ggml.tokens": None}, "holds no tokenizer", "tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_known_tokenizer_is_refused_by_name(tmp_path, case):
    change, *parts = REFUSED[case]
    entries = vocabulary(original("gpt-2"), "gpt2", "gpt-2") | change
    file = write_gguf(tmp_path / "m.gguf", tensors=EMBEDDING, metadata=entries)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.load(file)
    assert all(part in str(error.value) for part in ("m.gguf", *parts)), str(error.value)

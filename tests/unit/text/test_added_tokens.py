"""Tokens that files add to a vocabulary: ids and text as transformers has them."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from d2f.errors import CheckpointError
from d2f.text import Tokenizer

POOL = ["<|im_end|>", "<|mask|>", "<think>", "tool", " p ", "É", "<s>", "<|endoftext|>", "[M]"]
TEXT = "a<s>b <think> c tools tool<|mask|>É é[M]  p q <|im_end|>\n<|endoftext|> tool p tool"
NAMES = ["bos_token", "eos_token", "unk_token", "pad_token", "mask_token", "image_token"]
FLAGS = ["lstrip", "rstrip", "single_word", "normalized", "special"]


def base(normalizer=None):
    backend = Backend.from_str(trained())
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


@functools.cache
def trained():
    """A byte-level BPE that has `<s>` in its vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        show_progress=False,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["tool tools think mask and end"], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = []
    return json.dumps(content)


FLAT = st.fixed_dictionaries({}, optional={flag: st.booleans() for flag in FLAGS})
TABLE = st.builds(
    lambda text, flags: {"__type": "AddedToken", "content": text, **flags},
    st.sampled_from(POOL),
    FLAT,
)
TOKEN = st.one_of(st.sampled_from(POOL), TABLE)
LIST = st.lists(TOKEN, max_size=3, unique_by=str)
NAMED = st.dictionaries(st.sampled_from(NAMES), TOKEN, max_size=3)
EXTRA = st.one_of(
    st.just({}),
    st.builds(lambda tokens: {"additional_special_tokens": tokens}, LIST),
    st.builds(lambda tokens: {"extra_special_tokens": tokens}, LIST),
    st.builds(
        lambda tokens: {"extra_special_tokens": tokens},
        st.dictionaries(st.sampled_from(["image_token", "think_token"]), st.sampled_from(POOL)),
    ),
)
FLAGGED = st.dictionaries(st.sampled_from(POOL), FLAT, max_size=4)


@st.composite
def folders(draw, whole):
    """The files of a tokenizer, by name; ids in them are those that are free."""
    files = {}
    backend = base(draw(st.sampled_from([None, normalizers.NFC(), normalizers.Lowercase()])))
    if whole:
        backend.add_tokens([AddedToken(text, **flags) for text, flags in draw(FLAGGED).items()])
        files["tokenizer.json"] = backend
    config = draw(NAMED) | draw(EXTRA)
    classes = ["TokenizersBackend", "PreTrainedTokenizerFast"] if whole else ["Qwen2Tokenizer"]
    kind = draw(st.sampled_from([None, *classes]))
    if kind is None:
        files["config.json"] = {} if whole else {"model_type": "qwen2"}
    else:
        config["tokenizer_class"] = kind
    first = backend.get_vocab_size()
    more = {}
    for text, flags in draw(FLAGGED).items():
        there = backend.token_to_id(text)
        number = there if there is not None else first + len([n for n in more if n >= first])
        more[number] = {"content": text, **flags}
    match draw(st.sampled_from(["decoder", "added", "none"])):
        case "decoder":
            config["added_tokens_decoder"] = {str(number): token for number, token in more.items()}
        case "added":
            files["added_tokens.json"] = {t["content"]: number for number, t in more.items()}
    if draw(st.booleans()):
        mapped = draw(NAMED) | draw(EXTRA)
        for token in mapped.values():
            if isinstance(token, dict):
                token.pop("__type", None)
        files["special_tokens_map.json"] = mapped
    files["tokenizer_config.json"] = config
    return files


def write(folder, files):
    folder = Path(folder)
    for name, content in files.items():
        written = content.to_str() if isinstance(content, Backend) else json.dumps(content)
        (folder / name).write_text(written)
    if "tokenizer.json" not in files:
        base().model.save(str(folder))
    return folder


def assert_equal(folder):
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ids = theirs(TEXT, add_special_tokens=False)["input_ids"]
    except Exception:  # it accepts less than we do
        assume(False)
    ours = Tokenizer.load(folder)
    assert ours.encode(TEXT) == ids
    assert ours.vocab_size == len(theirs)
    every = [*ids, *range(len(theirs))]
    for skip in (True, False):
        assert ours.decode(every, skip_special_tokens=skip) == theirs.decode(
            every, skip_special_tokens=skip
        )
        stream = ours.stream(skip_special_tokens=skip)
        pieces = [stream.push([i]) for i in every]
        assert "".join(pieces) + stream.close() == ours.decode(every, skip_special_tokens=skip)
    assert (ours.bos_token_id, ours.eos_token_id, ours.mask_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.mask_token_id,
    )
    assert dict(ours._special) == theirs.special_tokens_map


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [True, False], ids=["tokenizer.json", "vocab.json"])
def test_parity_with_transformers(whole):
    @given(files=folders(whole))
    @settings(max_examples=40, deadline=None, database=None)
    def holds(files):
        with tempfile.TemporaryDirectory() as folder:
            assert_equal(write(folder, files))

    holds()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_a_qwen2_class_beside_tokenizer_json(tmp_path, kind, listed):
    backend = base(normalizers.NFC())
    backend.add_tokens([AddedToken("<think>"), AddedToken("<|im_end|>", lstrip=True)])
    config = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "mask_token": "<|mask|>"}
    if listed:
        tokens = [{"content": text} for text in ("<think>", "<|im_end|>", "[M]", "tool")]
        config["added_tokens_decoder"] = dict(enumerate(tokens[:3], backend.get_vocab_size() - 2))
        config["added_tokens_decoder"][backend.token_to_id("tool")] = tokens[3]
    assert_equal(write(tmp_path, {"tokenizer.json": backend, "tokenizer_config.json": config}))


def test_ids_of_added_tokens_beside_two_files(tmp_path):
    first = base().get_vocab_size()
    added = {"<think>": first, "[M]": first + 1, "<|im_end|>": first + 2}
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    write(tmp_path, {"added_tokens.json": added, "tokenizer_config.json": config})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("[M]<|im_end|><think>") == [first + 1, first + 2, first]
    assert tokenizer.eos_token_id == first + 2
    assert tokenizer.decode([first, first + 2]) == "<think>"


@pytest.mark.parametrize(
    "named",
    [
        {"mask_token": "<|mask|>"},
        {"mask_token": {"content": "<|mask|>", "lstrip": False}},
        {"mask_token": "<|mask|>", "additional_special_tokens": ["<|mask|>"]},
        {"extra_special_tokens": {"mask_token": "<|mask|>"}},
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_token_that_is_only_named_is_one_token(tmp_path, file, named):
    backend = base()
    tokenizer = Tokenizer.load(write(tmp_path, {"tokenizer.json": backend, file: named}))
    mask = backend.get_vocab_size()
    assert tokenizer.encode("<|mask|>") == [mask] == [tokenizer.mask_token_id]
    assert tokenizer.decode([mask]) == ""
    assert tokenizer.decode([mask], skip_special_tokens=False) == "<|mask|>"


def test_a_token_is_special_if_the_config_alone_says_so(tmp_path):
    backend = base()
    backend.add_tokens(["<think>"])
    token = backend.token_to_id("<think>")
    config = {"added_tokens_decoder": {str(token): {"content": "<think>", "special": True}}}
    files = {"tokenizer.json": backend, "tokenizer_config.json": config}
    tokenizer = Tokenizer.load(write(tmp_path, files))
    assert tokenizer.decode([token]) == tokenizer.stream().push([token]) == ""


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("listed_in", ["added_tokens.json", "tokenizer_config.json"])
def test_an_id_that_cannot_be_given_is_refused(tmp_path, whole, listed_in):
    """transformers goes on and gives the token the next free id, for which no model was trained."""
    wrong = base().get_vocab_size() + 3
    content = {"<think>": wrong}
    if listed_in == "tokenizer_config.json":
        content = {"added_tokens_decoder": {str(wrong): {"content": "<think>"}}}
    files = {listed_in: content} | ({"tokenizer.json": base()} if whole else {})
    with pytest.raises(CheckpointError, match=rf"{listed_in}: .*'<think>' should have id {wrong}"):
        Tokenizer.load(write(tmp_path, files))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": ["<think>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<think>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"270": {"special": True}}}),
        ("added_tokens.json", {"<think>": None}),
    ],
)
def test_lists_of_another_shape_are_refused(tmp_path, file, content):
    with pytest.raises(CheckpointError, match=rf"{file}: the added tokens are no table"):
        Tokenizer.load(write(tmp_path, {"tokenizer.json": base(), file: content}))

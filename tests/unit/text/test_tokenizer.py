"""Text and ids, in parity with transformers on tokenizers that are trained here."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2f.errors import CheckpointError, RequestError
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

CORPUS = [
    "Tom has 12 apples and buys 3 more. How many apples does he have?",
    "It's 4 o'clock; she'll pay $5.50 for café au lait, naïve résumé 日本語 🙂🙂",
    "def f(x):\n    return x + 1\n\n\tdone   \r\n",
] * 4
TEXTS = [
    *CORPUS[:3],
    "",
    " ",
    "a",
    "I'M HERE, 1234567 — ok?\n\n  e\u0301 <|endoftext|> x<|mask|>y",
    "🙂é",
]
LLADA_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHATS = [
    [{"role": "user", "content": "  What is 2+2? 🙂 "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "1+1?"},
    ],
]


def train(special):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return backend


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """tokenizer.json and a template that writes the BOS itself."""
    folder = tmp_path_factory.mktemp("llada")
    special = ["<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>"]
    train([*special, "<|eot_id|>", "<|mask|>"]).save(str(folder / "tokenizer.json"))
    write_config(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|startoftext|>",
        eos_token={"content": "<|endoftext|>", "__type": "AddedToken"},
        add_bos_token=False,
        chat_template=LLADA_TEMPLATE,
    )
    return folder


@pytest.fixture(scope="module")
def llada_tokenizer(llada):
    return Tokenizer.load(llada)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """vocab.json, merges.txt and added tokens, as Dream publishes them."""
    folder = tmp_path_factory.mktemp("qwen2")
    backend = train([])
    backend.model.save(str(folder))
    first = backend.get_vocab_size()
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    write_config(
        folder,
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder={
            str(first + i): {"content": token, "special": True, **plain}
            for i, token in enumerate(added)
        },
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<|beginoftext|>",
        mask_token="<|mask|>",
        chat_template=CHATML,
    )
    return folder


@pytest.fixture(scope="module", params=["llada", "qwen2"])
def pair(request):
    """Our tokenizer and transformers' of the same folder."""
    # Here: it takes seconds.
    import transformers

    folder = request.getfixturevalue(request.param)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return Tokenizer.load(folder), theirs


@pytest.mark.filterwarnings("ignore")
def test_parity_of_ids_and_text(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            their_text = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == their_text
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("messages", CHATS)
def test_parity_of_chat_templates(pair, messages):
    ours, theirs = pair
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode_chat(messages) == theirs(text, add_special_tokens=False)["input_ids"]


def test_prompts_use_the_template_unless_told_otherwise(llada):
    tokenizer = Tokenizer.load(llada)
    chat = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.encode_prompt("Hi") == tokenizer.encode_prompt("Hi", chat=True) == chat
    assert tokenizer.encode_prompt("Hi", chat=False) == tokenizer.encode("Hi")


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("processed", [False, True])
def test_exactly_one_bos(llada, tmp_path, writes, add_bos_token, processed):
    """Template, config and post-processing may each ask for it; together they get one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    backend = Backend.from_file(str(llada / "tokenizer.json"))
    bos = backend.token_to_id("<|startoftext|>")
    if processed:
        backend.post_processor = processors.TemplateProcessing(
            single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", bos)]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    template = "{{ bos_token }}" if writes else ""
    config = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    write_config(
        tmp_path,
        bos_token="<|startoftext|>",
        chat_template=template + "{{ messages[0].content }}",
        **config,
    )
    tokenizer = Tokenizer.load(tmp_path)
    begins = add_bos_token if add_bos_token is not None else processed
    body = tokenizer.encode("Hi")
    assert bos not in body
    assert tokenizer.encode_prompt("Hi") == [bos] * (writes or begins) + body
    assert tokenizer.encode_prompt("Hi", chat=False) == [bos] * begins + body
    twice = tokenizer.encode_prompt("<|startoftext|><|startoftext|>Hi", chat=False)
    assert twice == [bos, *body]


def test_template_file_and_named_templates(llada, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llada / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "d"}]
    write_config(tmp_path, chat_template=named)
    assert Tokenizer.load(tmp_path).chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(tmp_path).chat_template == "file"


def test_special_tokens_map_is_read(llada, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((llada / "tokenizer.json").read_bytes())
    mapped = {"eos_token": {"content": "<|endoftext|>"}, "mask_token": "<|mask|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_token_id == tokenizer.encode("<|endoftext|>")[0]
    assert tokenizer.mask_token_id == tokenizer.encode("<|mask|>")[0]
    assert tokenizer.bos_token_id is None


def test_stored_truncation_and_padding_do_not_apply(llada, tmp_path):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(llada / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == Tokenizer.load(llada).encode(TEXTS[0])


def test_a_dream_folder_needs_no_code(qwen2, tmp_path):
    for file in qwen2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((qwen2 / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    write_config(tmp_path, **config | {"tokenizer_class": "DreamTokenizer", "auto_map": auto_map})
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('ran')")
    dream, plain = Tokenizer.load(tmp_path), Tokenizer.load(qwen2)
    assert [dream.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]


# --------------------------------------------------------------------------------- streaming


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_streamed_text_is_the_whole_text(llada_tokenizer, data):
    tokenizer = llada_tokenizer
    if data.draw(st.booleans()):
        ids = tokenizer.encode(data.draw(st.text(max_size=20)))
    else:  # bytes that need not be UTF-8
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    stream, pieces, start = tokenizer.stream(), [], 0
    steps = data.draw(st.lists(st.integers(0, 3), max_size=40))
    for step in [*steps, len(ids)]:
        pieces.append(stream.push(ids[start : start + step]))
        start += step
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    assert "".join(pieces) + stream.close() == tokenizer.decode(ids)


def test_no_half_characters(llada, llada_tokenizer):
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers

    backend = Backend.from_file(str(llada / "tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # One token per byte: two of the first character, four of the second.
    ids = [backend.token_to_id(byte) for byte in byte_level.pre_tokenize_str("é🙂")[0][0]]
    stream = llada_tokenizer.stream()
    assert [stream.push([i]) for i in ids] == ["", "é", "", "", "", "🙂"]
    stream = llada_tokenizer.stream()
    assert [stream.push([i]) for i in ids[:4]] == ["", "é", "", ""]
    assert stream.close() == "\ufffd"


def test_special_tokens_show_only_when_asked(llada):
    tokenizer = Tokenizer.load(llada)
    ids = tokenizer.encode("a<|endoftext|>")
    assert tokenizer.stream().push(ids) == "a"
    assert tokenizer.stream(skip_special_tokens=False).push(ids) == "a<|endoftext|>"


def test_unknown_ids_give_nothing(llada):
    tokenizer = Tokenizer.load(llada)
    assert tokenizer.decode([10**6, *tokenizer.encode("a")]) == "a"


# ------------------------------------------------------------------------------- wrong inputs


def test_missing_and_broken_files(tmp_path, llada):
    with pytest.raises(CheckpointError, match="there is no folder"):
        Tokenizer.load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no tokenizer: neither"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((llada / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json cannot be read as JSON"):
        Tokenizer.load(tmp_path)


def test_other_tokenizers_of_two_files(tmp_path, qwen2):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((qwen2 / name).read_bytes())
    write_config(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(CheckpointError, match="of a GPT2Tokenizer cannot be read"):
        Tokenizer.load(tmp_path)
    added = {"9000": {"content": "<|x|>", "special": True}}
    write_config(tmp_path, tokenizer_class="DreamTokenizer", added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=r"'<\|x\|>' should have id 9000"):
        Tokenizer.load(tmp_path)


def test_chat_refusals(tmp_path, qwen2):
    plain = Tokenizer.load(write_tokenizer(tmp_path))
    with pytest.raises(RequestError, match="has no chat template"):
        plain.encode_prompt("Hi", chat=True)
    assert plain.encode_prompt("Hi") == plain.encode("Hi")
    tokenizer = Tokenizer.load(qwen2)
    with pytest.raises(RequestError, match="needs 'role' and 'content'"):
        tokenizer.encode_chat([{"role": "user"}])
    with pytest.raises(RequestError, match="refuses the messages: unknown role tool"):
        tokenizer.encode_chat([{"role": "tool", "content": ""}])
    with pytest.raises(RequestError, match="cannot render"):
        tokenizer.encode_chat([])


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% if %}", CheckpointError),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", RequestError),
        ("{{ messages.append(1) }}", RequestError),
        ("{{ 1 / 0 }}", RequestError),
    ],
)
def test_templates_are_sandboxed(tmp_path, template, error):
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(error, match="the chat template"):
        tokenizer.encode_prompt("Hi")

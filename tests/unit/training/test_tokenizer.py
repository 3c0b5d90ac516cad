import json

import pytest

from d2f.errors import RequestError
from d2f.shipped import MODELS, shipped_model
from d2f.text import Tokenizer
from d2f.training.assemble import tokenizer_folder
from d2f.training.config import load_recipe
from d2f.training.sources import encode_prompt
from d2f.training.tokenizer import QUESTION_TEMPLATE, SPECIAL_TOKENS, train_tokenizer

TEXTS = ["Ann has 12 apples.", "Bob has 345 apples and 12 pears.\n#### 357"] * 5


def test_digits_stand_alone_and_special_ids_come_first(tmp_path):
    tokenizer = Tokenizer.load(train_tokenizer(TEXTS, tmp_path, vocab_size=300))
    assert 260 < tokenizer.vocab_size <= 300
    assert [tokenizer.encode(token) for token in SPECIAL_TOKENS] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    digits = [tokenizer.encode(digit)[0] for digit in "345"]
    assert tokenizer.encode("345") == digits
    text = "Zoë has 9 apples.\n#### 9"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_is_bos_question_answer(tmp_path):
    tokenizer = Tokenizer.load(train_tokenizer(TEXTS, tmp_path, vocab_size=300))
    assert tokenizer.encode_prompt("Ann?") == [1, *tokenizer.encode("Ann?"), 3]


def test_same_texts_same_files(tmp_path):
    first, second = (train_tokenizer(TEXTS, tmp_path / n, vocab_size=300) for n in "ab")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_transformers_reads_it_alike(tmp_path):
    from transformers import PreTrainedTokenizerFast

    folder = train_tokenizer(TEXTS, tmp_path, vocab_size=300)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.load(folder)
    message = [{"role": "user", "content": "Ann has 12?"}]
    ids = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode_prompt("Ann has 12?")
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id) == (0, 0, 2)


QUESTION = {"role": "user", "content": "Tom has 5 apples. How many has he?"}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def said(role, text="x 3"):
    return {"role": role, "content": text}


CONVERSATIONS = [
    [SYSTEM, QUESTION],
    [said("developer"), QUESTION],
    [*EARLIER, QUESTION],
    [SYSTEM, *EARLIER, QUESTION],
    [said("user"), QUESTION],
    [*EARLIER, *EARLIER, SYSTEM, QUESTION],
    [said("assistant"), QUESTION],
    [*EARLIER, said("tool"), QUESTION],
    [QUESTION, SYSTEM],
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return train_tokenizer(TEXTS, folder, vocab_size=300, single_questions=True)


@pytest.mark.parametrize("name", [*MODELS, "trained"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_models_of_single_questions_are_given_the_last_one(single, name, messages):
    from transformers import PreTrainedTokenizerFast

    folder = single if name == "trained" else shipped_model(name)
    ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    ids = ours.encode_prompt(QUESTION["content"])
    assert ids == [1, *ours.encode(QUESTION["content"]), 3]
    assert ours.encode_chat(messages) == ids
    assert theirs.apply_chat_template(messages, return_dict=False) == ids


def test_an_answer_behind_the_question_stays(single):
    tokenizer = Tokenizer.load(single)
    told = tokenizer.encode_chat([SYSTEM, QUESTION, said("assistant", "5")])
    assert told == [*tokenizer.encode_chat([QUESTION]), *tokenizer.encode("5"), 0]
    for messages in ([SYSTEM], [said("assistant")]):
        with pytest.raises(RequestError, match="answers a message of the user, and there is none"):
            tokenizer.encode_chat(messages)


def test_the_shipped_template_is_that_of_the_recipes():
    for name in MODELS:
        text = (shipped_model(name) / "tokenizer_config.json").read_text()
        assert json.loads(text)["chat_template"] == QUESTION_TEMPLATE


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [("{}", ("system", "history")), ("{messages='m'}", ()), ("{system='s'}", ())],
)
def test_a_recipes_tokenizer_takes_what_its_data_hold(tmp_path, columns, left_out):
    row = {"prompt": "a", "response": "b", "s": "c"}
    row["m"] = [said("user"), said("assistant")]
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"stage='autoregressive'\noutput='{tmp_path}/out'\nsteps=1\nbatch_size=1\n"
        "model={config={}}\noptimizer={lr=1e-3}\ntokenizer={vocab_size=260}\n"
        f"[data]\nkind='jsonl'\npaths=['{tmp_path}/a.jsonl']\nsequence_length=9\n"
        f"columns={columns}\n"
    )
    assert Tokenizer.load(tokenizer_folder(load_recipe(recipe))).left_out == left_out


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", ()),
        ("{{ messages[-1]['content'] }}", ("system", "history")),
        (
            "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + '|' }}{% endfor %}",
            ("system",),
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{{ messages[-1]['content'] }}",
            ("history",),
        ),
        (None, ()),
    ],
)
def test_what_a_template_leaves_out_is_found_by_trying(tmp_path, template, left_out):
    from d2f.testing import write_tokenizer

    tokenizer = Tokenizer.load(write_tokenizer(tmp_path, chat_template=template))
    assert tokenizer.left_out == left_out


def test_training_drops_no_message_silently(single, tmp_path):
    tokenizer = Tokenizer.load(single)
    assert encode_prompt(tokenizer, [QUESTION]) == tokenizer.encode_chat([QUESTION])
    with pytest.raises(RequestError, match="leaves out a system message"):
        encode_prompt(tokenizer, [SYSTEM, QUESTION])
    with pytest.raises(RequestError, match="leaves out what was said before"):
        encode_prompt(tokenizer, [*EARLIER, QUESTION])
    whole = Tokenizer.load(train_tokenizer(TEXTS, tmp_path, vocab_size=300))
    messages = [SYSTEM, *EARLIER, QUESTION]
    assert encode_prompt(whole, messages) == whole.encode_chat(messages)

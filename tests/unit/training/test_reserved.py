"""Mask and end tokens that somebody wrote into a training text never become real ones."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tests.unit.training.tiny_run import Notes, make_config
from tokenizers import AddedToken

from d2f.errors import TrainingError
from d2f.models.checkpoint import read_spec
from d2f.testing import write_checkpoint, write_tokenizer
from d2f.text import Tokenizer
from d2f.tokenizer_files import TokenizerFiles
from d2f.training.pairs import BadRow, Pair, Reserved
from d2f.training.run import train
from d2f.training.sections import ColumnConfig, DataConfig, ModelConfig
from d2f.training.sources import cached_data, encode_data

MASK, END = "<|mask|>", "<|endoftext|>"
MASK_ID, END_ID = 94, 95
TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + eos_token }}"
    "{% endfor %}a:"
)


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "plain"))


@pytest.fixture
def chatty(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "chatty", chat_template=TEMPLATE))


def settings(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"kind": "jsonl", "sequence_length": 64, "cache": False} | options
    return DataConfig(paths=(str(path),), **options)


def row(prompt="1+1=", response="2"):
    return {"prompt": prompt, "response": response}


@pytest.mark.parametrize("token", [MASK, END])
@pytest.mark.parametrize("form", ["{}", "a{}", "{}a", "a {} b", "a{0}{0}b", "a\n{}"])
@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_row_with_a_token_written_out_is_bad(tmp_path, chatty, place, form, token):
    notes = []
    config = settings(tmp_path, [row(), row(**{place: form.format(token)}), row()])
    data = encode_data(config, chatty, tmp_path, notes.append)
    assert len(data.prompt_lengths) == 2
    ((reason, rows),) = data.bad_rows.first.items()
    assert reason.startswith(f"the {place} has '{token}' written out")
    assert rows == [f"{config.paths[0]}:2"]
    assert notes[0].startswith("1 of 3 rows are bad and left out")
    assert MASK_ID not in data.tokens
    # Those of the template are real: one for each prompt.
    assert data.tokens.tolist().count(END_ID) == 2
    with pytest.raises(TrainingError, match=r"rows\.jsonl:2: the .* written out"):
        encode_data(replace(config, bad_rows="refuse"), chatty, tmp_path)


@pytest.mark.parametrize("place", range(4))
def test_every_message_of_a_conversation_is_looked_at(tmp_path, chatty, place):
    texts = ["Be brief.", "a", "b", "c"]
    texts[place] += END
    roles = ["user", "assistant", "user", "assistant"]
    if place == 0:
        roles[0] = "system"
        roles[1:3] = ["user", "user"]
    chat = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    config = settings(tmp_path, [{"chat": chat}], columns=ColumnConfig(messages="chat"))
    with pytest.raises(TrainingError, match=r"none of 1 row.* has '<\|endoftext\|>' written out"):
        encode_data(config, chatty, tmp_path)


def test_what_looks_like_a_token_is_text(tmp_path, chatty):
    rows = [row("<|mask|", "<mask> | endoftext |> <|eos|>"), row("mask", "<|eos|")]
    data = encode_data(settings(tmp_path, rows), chatty, tmp_path)
    assert data.bad_rows.count == 0
    assert MASK_ID not in data.tokens


@pytest.mark.parametrize("chat_template", [None, False])
def test_only_a_prompt_that_no_template_writes_may_hold_ends(
    tmp_path, tokenizer, chatty, chat_template
):
    own = tokenizer if chat_template is None else chatty
    config = settings(
        tmp_path,
        [row(f"u:1+1={END}a:"), row(f"u:{MASK}"), row(response=f"2{END}")],
        chat_template=chat_template,
    )
    data = encode_data(config, own, tmp_path)
    assert data.tokens.tolist() == own.encode(f"u:1+1={END}a:2")
    assert data.bad_rows.count == 2


def test_the_suffix_is_real_and_what_it_writes_is_reserved(tmp_path, tokenizer):
    config = settings(tmp_path, [row(), row(response=f"2{END}")], response_suffix=f"!{END}")
    data = encode_data(config, tokenizer, tmp_path)
    assert data.tokens.tolist() == tokenizer.encode(f"1+1=2!{END}")
    assert Reserved.of(tokenizer, suffix="!").ends == (END,)
    assert Reserved.of(tokenizer, suffix=MASK) == Reserved.of(tokenizer)


def nameless(tokenizer):
    """The same tokens, none of which is named as mask or end."""
    hidden = tokenizer.special_tokens
    files = TokenizerFiles(backend=tokenizer._backend, config={}, special={}, hidden=hidden)
    return Tokenizer(files, None)


def test_ids_of_the_model_are_reserved_too(tmp_path, tokenizer):
    spec = read_spec(write_checkpoint(tmp_path / "model", "Dream"))
    plain = nameless(tokenizer)
    assert Reserved.of(plain) == Reserved(masks=(), ends=())
    assert Reserved.of(plain, spec) == Reserved(masks=(MASK,), ends=(END,))
    # An ordinary piece of text, and an id that the tokenizer does not know.
    for padding in (None, -1):
        odd = replace(spec, eos_token_ids=(5, 3000), mask_token_id=4, pad_token_id=padding)
        assert Reserved.of(plain, odd) == Reserved(masks=(), ends=())


@pytest.mark.parametrize(("text", "kept"), [("</turn>", ("</turn>",)), ("\n", ())])
def test_an_end_that_is_added_but_not_special_is_reserved(tmp_path, tokenizer, text, kept):
    spec = read_spec(write_checkpoint(tmp_path / "model", "Dream"))
    tokenizer._backend.add_tokens([AddedToken(text, special=False, normalized=False)])
    ends = (tokenizer.token_id(text),)
    reserved = Reserved.of(tokenizer, replace(spec, eos_token_ids=ends, pad_token_id=None))
    assert set(reserved.ends) == {END, *kept}


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["a", " ", "<|", "|>", "mask", "endoftext", MASK, END, "\n"]), max_size=6
    ),
    st.lists(st.sampled_from(["b", "<|", "|>", "mask", "endoftext", MASK, END]), max_size=6),
)
def test_what_passes_holds_no_real_token(tokenizer, prompt, response):
    pair = Pair("".join(prompt), "".join(response))
    ids = set(tokenizer.encode(pair.prompt) + tokenizer.encode(pair.response))
    try:
        Reserved.of(tokenizer).check(pair, written=False)
    except BadRow:
        assert ids & {MASK_ID, END_ID}
    else:
        assert not ids & {MASK_ID, END_ID}


def test_another_choice_of_tokens_is_another_cache(tmp_path, tokenizer):
    config = settings(tmp_path, [row()], cache=str(tmp_path / "cache"))
    spec = read_spec(write_checkpoint(tmp_path / "model", "Dream"))
    bare = nameless(tokenizer)
    encode_data(config, bare, tmp_path)
    assert cached_data(config, bare) is not None
    assert cached_data(config, bare, spec) is None
    encode_data(config, bare, tmp_path, spec=spec)
    assert cached_data(config, bare, spec) is not None


def test_a_run_counts_them(tmp_path):
    write_tokenizer(write_checkpoint(tmp_path / "model", "Dream"))
    config = make_config(
        tmp_path / "run",
        "d2f",
        steps=1,
        data=settings(tmp_path, [row()] * 8 + [row(response=f"{MASK}2")]),
        model=ModelConfig(init=str(tmp_path / "model")),
    )
    reporter = Notes()
    train(config, device="cpu", reporter=reporter)
    assert any("1 of 9 rows are bad" in note for note in reporter.notes)
    summary = json.loads((tmp_path / "run" / "training_summary.json").read_text())
    assert summary["data"]["bad_rows"] == 1

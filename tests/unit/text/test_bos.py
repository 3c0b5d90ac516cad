"""Prompts that begin with the tokenizer's BOS, or do not: as asked, and never with two."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f.errors import CheckpointError
from d2f.testing import write_tokenizer
from d2f.testing.written import EOS_TOKEN
from d2f.text import Tokenizer

BOS = EOS_TOKEN
"""The tiny tokenizer has no other token to begin with; Qwen's kind does the same."""
WRITTEN = {
    None: 0,
    "<{{ messages[0].content }}>": 0,
    "{{ bos_token }}{{ messages[0].content }}": 1,
    "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}": 2,
}
"""Chat templates, and how many BOS each writes."""


def load(folder, template, **config):
    write_tokenizer(folder, chat_template=template)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("template", WRITTEN)
@pytest.mark.parametrize("rule", [None, True, False])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(own=st.integers(0, 2), text=st.text("ab c", max_size=4))
def test_a_prompt_begins_as_asked(tmp_path, template, rule, own, text):
    tokenizer = load(tmp_path, template, bos_token=BOS, add_bos_token=rule)
    bos = tokenizer.bos_token_id
    brings_one = WRITTEN[template] > 0 or (own > 0 and template is None)
    for add in (True, False):
        ids = tokenizer.with_bos(add).encode_prompt(BOS * own + text)
        assert (ids[:1] == [bos]) == (add or brings_one)
        assert ids[:2] != [bos, bos]
        assert tokenizer.with_bos(add).bos_token_id == bos
    # The tokenizer itself stays as it is, and has the rule's prompts.
    ids = tokenizer.encode_prompt(BOS * own + text)
    assert ids == tokenizer.with_bos(bool(rule)).encode_prompt(BOS * own + text)


def test_conversations_begin_as_asked_too(tmp_path):
    tokenizer = load(tmp_path, "<{{ messages[0].content }}>", bos_token=BOS)
    messages = [{"role": "user", "content": "a"}]
    plain = tokenizer.encode("<a>")
    assert tokenizer.with_bos(True).encode_chat(messages) == [tokenizer.bos_token_id, *plain]
    assert tokenizer.with_bos(False).encode_chat(messages) == plain


def test_a_tokenizer_without_bos_cannot_begin_with_one(tmp_path):
    tokenizer = load(tmp_path, None)
    with pytest.raises(CheckpointError, match="no BOS"):
        tokenizer.with_bos(True)
    assert tokenizer.with_bos(False).encode_prompt("a") == tokenizer.encode("a")


def test_tokenizers_that_begin_differently_have_different_fingerprints(tmp_path):
    tokenizer = load(tmp_path, None, bos_token=BOS)
    assert tokenizer.with_bos(True).fingerprint() != tokenizer.with_bos(False).fingerprint()

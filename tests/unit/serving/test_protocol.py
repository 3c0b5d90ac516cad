"""Bodies: what is taken, what is refused and in which words."""

import json

import pytest
from pydantic import ValidationError

from d2f.errors import ConfigError
from d2f.serving.errors import ApiError
from d2f.serving.gateway import parse_json
from d2f.serving.protocol import ChatBody, CompletionBody, parse_body
from d2f.serving.settings import ServeSettings

SAID = {"messages": [{"role": "user", "content": "1+1="}]}


def refusal(value, kind=CompletionBody):
    with pytest.raises(ApiError) as refused:
        parse_body(kind, value)
    assert refused.value.status == 400
    json.loads(refused.value.body())
    return refused.value


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[]], [[]]),
    ],
)
def test_prompts_of_each_form(prompt, parsed):
    assert parse_body(CompletionBody, {"prompt": prompt}).prompt == parsed


@pytest.mark.parametrize(
    "prompt", [[], None, 1, [1, "a"], [[1], "a"], [True], [-1], [1.0], [2**31], {}, [[[1]]], [None]]
)
def test_prompts_of_no_form(prompt):
    assert refusal({"prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("value", "param", "words"),
    [
        ({"max_tokns": 4}, "max_tokns", "did you mean 'max_tokens'?"),
        ({"policy": {"block_sze": 4}}, "policy.block_sze", "did you mean 'block_size'?"),
        ({"stream_options": {"usage": True}}, "stream_options.usage", "Known: include_provisional"),
        ({"zebra": 1}, "zebra", "Known: early_stop, logprobs, max_completion_tokens"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"temperature": True}, "temperature", "True"),
        ({"n": 0}, "n", "n is 0"),
        ({"n": "2"}, "n", "n is '2'"),
        ({"max_tokens": 10**40}, "max_tokens", "max_tokens is 1000"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
        ({"stop": ""}, "stop", "stop is ''"),
        ({"stop": ["a"] * 17}, "stop", "16"),
        ({"stop": "a" * 300}, "stop", "256"),
        ({"policy": {"confidence": "hunch"}}, "policy.confidence", "'hunch'"),
        ({"policy": {"add_threshold": 1.5}}, "policy.add_threshold", "1.5"),
        ({"options": {"num_steps": [1]}}, "options.num_steps", "[1]"),
        ({"stream": 1}, "stream", "stream is 1"),
        ({"echo": True}, "echo", "echo is not supported here; leave it out"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"frequency_penalty": False}, "frequency_penalty", "not supported"),
    ],
)
def test_refused_by_name(value, param, words):
    refused = refusal({"prompt": "a"} | value)
    assert refused.param == param
    assert words in refused.message


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages.0.name"),
        ({"messages": [*SAID["messages"], 5]}, "messages.1"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "messages.0."),
        (SAID | {"tools": [{"type": "function"}]}, "tools"),
        (SAID | {"top_logprobs": 3}, "top_logprobs"),
        (SAID | {"logprobs": 1}, "logprobs"),
        (SAID | {"response_format": {"type": "json_object"}}, "response_format"),
        (SAID | {"prompt": "a"}, "prompt"),
    ],
)
def test_chats_are_refused_by_name(value, param):
    assert refusal(value, ChatBody).param.startswith(param)


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_fields_that_change_nothing_are_taken(kind):
    least = SAID if kind is ChatBody else {"prompt": "a"}
    plain = parse_body(kind, least)
    for name, accepted in kind.neutral.items():
        for value in accepted:
            assert parse_body(kind, least | {name: value}) == plain
    nulls = dict.fromkeys(set(kind.model_fields) - set(least))
    assert parse_body(kind, least | nulls) == plain


def test_of_many_wrong_messages_the_first_is_enough():
    with pytest.raises(ValidationError) as refused:
        ChatBody.model_validate({"messages": [1] * 100})
    assert refused.value.error_count() == 1
    assert refusal({"messages": [*SAID["messages"], 1, 2]}, ChatBody).param == "messages.1"


def test_what_the_client_gave_back_is_a_message():
    message = {
        "role": "assistant",
        "content": [{"type": "text", "text": "2"}, {"type": "text", "text": "3"}],
        **dict.fromkeys(("refusal", "audio", "function_call", "tool_calls", "annotations")),
    }
    assert parse_body(ChatBody, {"messages": [message]}).messages[0].text == "23"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "line 1"),
        (b"{", "line 1, column 2"),
        (b"[]", "not an object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digit"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        ("\ufeff{}".encode(), "BOM"),
    ],
)
def test_malformed_json_is_refused_in_words(content, words):
    with pytest.raises(ApiError) as refused:
        parse_json(content)
    assert refused.value.status == 400
    assert words in refused.value.message


def test_escaped_pairs_are_characters():
    assert parse_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": ""},
        {"host": "example.org"},
        {"host": "0.0.0.0", "api_key": ""},
        {"api_key": "two words"},
        {"port": 70000},
        {"port": True},
        {"port": "8000"},
        {"max_waiting": 1.5},
        {"drain_seconds": "1"},
        {"max_waiting": None},
        {"drain_seconds": float("nan")},
        {"max_waiting": 0},
        {"max_tokens": 0},
        {"request_timeout": -1.0},
        {"request_timeout": float("nan")},
        {"drain_seconds": float("inf")},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[0] + "|key"):
        ServeSettings(**settings)


def test_a_key_is_never_shown():
    with pytest.raises(ConfigError) as refused:
        ServeSettings(api_key="so secret")
    assert "so secret" not in str(refused.value)


def test_others_may_be_served_with_a_key():
    assert ServeSettings(host="0.0.0.0", api_key="k").host == "0.0.0.0"


def test_settings_do_not_show_their_key():
    assert "s3cret" not in repr(ServeSettings(api_key="s3cret"))

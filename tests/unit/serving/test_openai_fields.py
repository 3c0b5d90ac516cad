"""Every parameter that OpenAI's client knows: taken, or refused by its name."""

from __future__ import annotations

import pytest
from openai.types import completion_create_params
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionAssistantMessageParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)

from d2f.serving.errors import ApiError
from d2f.serving.protocol import ChatBody, CompletionBody, parse_body

CHAT = {"messages": [{"role": "user", "content": "1+1="}]}
TEXT = {"prompt": "1+1="}
KINDS = [
    (ChatBody, CHAT, chat_create_params.CompletionCreateParamsBase),
    (CompletionBody, TEXT, completion_create_params.CompletionCreateParamsBase),
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

NEUTRAL = {
    "audio": [],
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0, 0.0, -0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}, {"50256": 0}, {"1": 0.0, "2": 0}],
    "logprobs": [],
    "max_completion_tokens": [16],
    "max_tokens": [16],
    "metadata": [{}, {"session": "a", "user": "b"}],
    "modalities": [["text"]],
    "model": ["tiny"],
    "moderation": [],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "presence_penalty": [0, 0.0],
    "prompt_cache_key": ["", "key"],
    "prompt_cache_options": [{}, {"mode": "implicit", "ttl": "30m"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["user-5"],
    "seed": [0, 5],
    "service_tier": ["auto", "default"],
    "stop": ["\n", ["a", "b"], []],
    "store": [False],
    "stream_options": [{}, {"include_obfuscation": False}, {"include_usage": True}],
    "suffix": [""],
    "temperature": [0, 1, 2.0],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "top_p": [1, 0.5],
    "user": ["somebody"],
    "verbosity": ["medium"],
    "web_search_options": [],
}
"""Beside null, which each of them takes."""

REFUSED = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "best_of": [2],
    "echo": [True],
    "frequency_penalty": [0.5, -2],
    "function_call": [{"name": "add"}],
    "functions": [[{"name": "add"}]],
    "logit_bias": [{"5": 1}, {"5": 0, "6": -100}],
    "modalities": [["audio"], ["text", "audio"]],
    "moderation": [{"model": "omni"}],
    "prediction": [{"type": "content", "content": "a"}],
    "presence_penalty": [1.5],
    "reasoning_effort": ["low", "high"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "service_tier": ["flex", "priority"],
    "store": [True],
    "stream_options": [{"include_obfuscation": True}],
    "suffix": ["."],
    "tool_choice": ["required", {"type": "function", "function": {"name": "add"}}],
    "tools": [[TOOL]],
    "verbosity": ["low", "high"],
    "web_search_options": [{}, {"search_context_size": "low"}],
}
"""What asks for something that is not done here."""


def cases(table):
    return [
        pytest.param(kind, least, name, value, id=f"{kind.__name__}-{name}-{value}")
        for kind, least, params in KINDS
        for name in params.__annotations__
        if name not in least
        for value in table(name)
    ]


def test_the_tables_know_every_parameter():
    names = {name for _, least, params in KINDS for name in params.__annotations__}
    assert names - {"messages", "prompt"} == NEUTRAL.keys()
    neutral = ChatBody.neutral.keys() | CompletionBody.neutral.keys()
    # Whether tools may be called side by side says nothing where none are.
    assert REFUSED.keys() == neutral - {"parallel_tool_calls"} | {"stream_options"}


@pytest.mark.parametrize(
    ("kind", "least", "name", "value"), cases(lambda name: [None, *NEUTRAL[name]])
)
def test_taken_as_documented(kind, least, name, value):
    body = parse_body(kind, least | {name: value})
    if name in kind.neutral:
        assert body == parse_body(kind, least)
    elif name == "stream_options" and value is not None:
        assert body.stream_options.include_usage is value.get("include_usage")
    else:
        assert getattr(body, name) == value


@pytest.mark.parametrize(
    ("kind", "least", "name", "value"), cases(lambda name: REFUSED.get(name, []))
)
def test_refused_by_name(kind, least, name, value):
    with pytest.raises(ApiError) as refused:
        parse_body(kind, least | {name: value})
    assert refused.value.status == 400
    assert refused.value.code == "unsupported_parameter"
    assert refused.value.param.partition(".")[0] == name
    assert name in refused.value.message


def test_all_neutral_values_at_once():
    for kind, least, params in KINDS:
        asked = {n: NEUTRAL[n][-1] for n in params.__annotations__ if NEUTRAL.get(n)}
        assert parse_body(kind, least | asked).max_tokens == 16


@pytest.mark.parametrize(
    ("choice", "offered"), [("tool_choice", "tools"), ("function_call", "functions")]
)
def test_tools_that_may_not_be_called_change_nothing(choice, offered):
    offer = {offered: [TOOL if offered == "tools" else TOOL["function"]]}
    assert parse_body(ChatBody, CHAT | offer | {choice: "none"}) == parse_body(ChatBody, CHAT)
    with pytest.raises(ApiError, match=f"{offered} is not supported"):
        parse_body(ChatBody, CHAT | offer | {choice: "auto"})


@pytest.mark.parametrize(("n", "best_of", "taken"), [(3, 3, True), (3, 1, True), (2, 4, False)])
def test_the_best_n_of_n_are_all(n, best_of, taken):
    asked = TEXT | {"n": n, "best_of": best_of}
    if taken:
        assert parse_body(CompletionBody, asked).n == n
    else:
        with pytest.raises(ApiError, match="best_of"):
            parse_body(CompletionBody, asked)


def test_every_option_of_a_stream_is_known():
    assert set(ChatCompletionStreamOptionsParam.__annotations__) == {
        "include_usage",
        "include_obfuscation",
    }


MESSAGES = {
    "system": ChatCompletionSystemMessageParam,
    "developer": ChatCompletionDeveloperMessageParam,
    "user": ChatCompletionUserMessageParam,
    "assistant": ChatCompletionAssistantMessageParam,
}
NEUTRAL_OF_MESSAGES = {
    "name": ["Ann"],
    "refusal": [None],
    "audio": [None],
    "function_call": [None],
    "tool_calls": [None, []],
}


@pytest.mark.parametrize("role", MESSAGES)
def test_messages_of_each_role(role):
    plain = {"role": role, "content": "a"}
    [message] = parse_body(ChatBody, {"messages": [plain]}).messages
    expected = "system" if role == "developer" else role
    assert message.for_template() == {"role": expected, "content": "a"}
    names = MESSAGES[role].__annotations__.keys() - plain
    assert names <= NEUTRAL_OF_MESSAGES.keys()
    for name in names:
        for value in NEUTRAL_OF_MESSAGES[name]:
            [same] = parse_body(ChatBody, {"messages": [plain | {name: value}]}).messages
            told = {"name": value} if name == "name" else {}
            assert same.for_template() == message.for_template() | told


@pytest.mark.parametrize(
    "more",
    [
        {"cache_control": {"type": "ephemeral"}},
        {"prompt_cache_breakpoint": {"mode": "explicit"}},
        {"annotations": [], "id": "part-1", "index": 0},
    ],
)
@pytest.mark.parametrize("role", MESSAGES)
def test_text_parts_with_more_in_them(role, more):
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="} | more]
    [message] = parse_body(ChatBody, {"messages": [{"role": role, "content": parts}]}).messages
    assert message.text == "1+1="


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_assistant_may_have_said_nothing(content):
    said = [*CHAT["messages"], {"role": "assistant", **content}, *CHAT["messages"]]
    assert [m.text for m in parse_body(ChatBody, {"messages": said}).messages] == [
        "1+1=",
        "",
        "1+1=",
    ]
    with pytest.raises(ApiError, match=r"messages\.0\.content"):
        parse_body(ChatBody, {"messages": [{"role": "user", **content, "content": None}]})


@pytest.mark.parametrize("exclude", [{}, {"exclude_none": True}, {"exclude_unset": True}])
def test_what_the_client_made_of_an_answer_can_be_sent_back(exclude):
    answer = ChatCompletion.model_validate(
        {
            "id": "a",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "logprobs": None,
                    "message": {"role": "assistant", "content": "2", "refusal": None},
                }
            ],
        }
    )
    message = answer.choices[0].message.model_dump(**exclude)
    said = parse_body(ChatBody, {"messages": [*CHAT["messages"], message]}).messages[1]
    assert said.for_template() == {"role": "assistant", "content": "2"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "x"}, "messages.0.role"),
        ({"role": "function", "content": "4", "name": "add"}, "messages.0.role"),
        (
            {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]},
            "messages.0.tool_calls",
        ),
        ({"role": "assistant", "content": "a", "refusal": "no"}, "messages.0.refusal"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content.0.type",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            "messages.0.content.1.type",
        ),
    ],
)
def test_messages_of_other_kinds_are_refused_by_name(message, param):
    with pytest.raises(ApiError) as refused:
        parse_body(ChatBody, {"messages": [message]})
    assert refused.value.param == param
    assert param in refused.value.message


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"top_logprobs": 3}, "needs logprobs: true"),
        ({"top_logprobs": 3, "logprobs": False}, "needs logprobs: true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs is 21"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs is -1"),
    ],
)
def test_how_many_top_logprobs_there_may_be(asked, words):
    with pytest.raises(ApiError, match=words):
        parse_body(ChatBody, CHAT | asked)
    assert parse_body(ChatBody, CHAT | {"logprobs": True, "top_logprobs": 20}).top_logprobs == 20

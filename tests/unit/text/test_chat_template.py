"""Chat templates, rendered as transformers renders them."""

from __future__ import annotations

import datetime
import json
import types
from collections import OrderedDict
from enum import StrEnum

import pytest

import d2f.chat_template
from d2f.chat_template import check_chat_template, read_chat_template, render_chat
from d2f.errors import CheckpointError, RequestError
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""
QWEN3 = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning_content = reasoning_content.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>' }}
        {{- '\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}"""
GENERATION = """{% for m in messages %}
  {% if m.role == 'assistant' %}
    {% generation %}{% set seen = m.content %}{{ seen }}{{ eos_token }}{% endgeneration %}{{ seen }}
  {% else %}
    {{ m.role }}: {{ m.content }}
  {% endif %}
{% endfor %}
{%- generation -%} end {%- endgeneration -%}
"""
LOOPS = """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ m.content }}{% if 'stop' in m.content|string %}{% break %}
{% endif %}{% endfor %}"""
TEMPLATES = {
    "llama-3": LLAMA3,
    "mistral": MISTRAL,
    "qwen-3": QWEN3,
    "generation": GENERATION,
    "loops": LOOPS,
    "date": "{{ strftime_now('%Y-%m-%d %A, %j of %Y %%') }}",
    "no date": "{{ strftime_now() }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "json's options": "{{ messages|tojson(ensure_ascii=True, separators=(',', ':')) }}"
    "{{ messages|tojson(sort_keys=true) }}"
    "{{ messages | tojson(false, 1, none, true) }}{{ messages | tojson(indent='--') }}",
    "json of html": "{{ '<a href=\"x\">&\\'é</a>' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "macro": "{% macro turn(m, end='\\n') %}[{{ m.role }}]{{ m.content }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='') }}{% endfor %}",
    "call": "{% macro box() %}<{{ caller() }}>{% endmacro %}"
    "{% call box() %}{{ messages[0].content }}{% endcall %}",
    "dictionary": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages[0]|dictsort }}{{ dict(a=1, **messages[0]).keys()|list }}{{ dict.fromkeys('ab') }}",
    "namespace": "{% set ns = namespace(n=0, self='x') %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.self }}",
    "private namespace": "{% set ns = namespace(_n=0) %}{{ ns._n }}",
    "private namespace, later": "{% set ns = namespace(n=0) %}{% set ns.__x = 1 %}{{ ns.n }}",
    "strings": "{{ messages[0].content.strip().upper().split(' ')[0].replace('H', 'J') }}"
    "{{ messages[-1].content[:3] ~ messages|length }}{{ '%s-%d' % ('a', 3) }}{{ 'x'.join('ab') }}",
    "whitespace": "  {% if true %}\n  a  \n  {%- endif %}\n\n{{ '\\n' }}"
    "  {# c #}\n\tb\n  {%+ if 1 %}c{% endif +%}\n\n",
    "filters": "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'eq', "
    "'user')|list|length }}{{ messages[0].content|e }}{{ none }}{{ true }}{{ 1.0 }}{{ [1, 'é'] }}",
    "missing": "{{ messages[0].nothing }}{{ tools }}{{ documents }}{{ unknown }}{{ pad_token }}",
    "missing within missing": "{{ messages[0].nothing.deep }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ mask_token }}|{{ image_token }}|"
    "{{ additional_special_tokens }}|{{ sep_token }}",
    "tests": "{{ messages[0].content is string }}{{ messages[0] is mapping }}{{ tools is none }}"
    "{{ messages is sequence }}{{ x is defined }}{{ 3 is divisibleby 3 }}",
    "thoughts": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|"
    "{{ m.reasoning }}|{{ m.keys()|list }};{% endfor %}",
    "refusal": "{{ raise_exception('no') }}",
    "changed": "{{ messages.append(1) }}",
    "inner": "{{ messages.__class__.__mro__ }}",
    "undefined filter in a branch": "{% if false %}{{ 1|nofilter }}{% endif %}x",
    "undefined call": "{{ nothing() }}",
    "no number": "{{ 1 / 0 }}",
    "empty": "",
    "broken": "{% if %}",
    "unknown tag": "{% generate %}{% endgenerate %}",
    "open generation": "{% generation %}x",
    "break in generation": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}"
    "{% endfor %}",
}


class Role(StrEnum):
    USER = "user"


CHATS = [
    [{"role": "user", "content": "  Hi there 🙂 <b> é\u2028  "}],
    [
        {"role": "system", "content": "Be brief. stop"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nHm\n</think>\n\nHello."},
        {"role": "user", "content": "1+1? stop"},
    ],
    [
        {"role": "user", "content": "a", "name": None, "weight": 1.5},
        {"role": "assistant", "content": None, "reasoning": "why", "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": {"b": [1, None, True], "a": "é"}},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
    ],
    [{"content": "order", "role": "user"}, {"role": "assistant", "content": "", "thinking": "t"}],
    [OrderedDict(role=Role.USER, content=("a", 1)), {"role": "user", "content": object}],
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<m>", "image_token": "<img>"}


@pytest.fixture
def a_day(monkeypatch):
    """The same moment for ours and theirs."""
    from transformers.utils import chat_template_utils

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 2, 3, 4, 5, 6)

    monkeypatch.setattr(d2f.chat_template, "datetime", Frozen)
    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    import transformers

    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", **SPECIAL})
    )
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.usefixtures("a_day")
@pytest.mark.parametrize("name", TEMPLATES)
def test_parity_with_transformers(theirs, name):
    from jinja2 import TemplateSyntaxError

    for chat in CHATS:
        try:
            expected = theirs.apply_chat_template(
                chat, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
            )
        except (TemplateSyntaxError, SyntaxError):
            expected = CheckpointError
        except Exception:
            expected = RequestError
        try:
            text = render_chat(TEMPLATES[name], chat, theirs.special_tokens_map)
        except (CheckpointError, RequestError) as error:
            text = type(error)
        assert text == expected


def test_special_tokens_of_a_folder_reach_its_template(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ messages[0].content }}"
    folder = write_tokenizer(tmp_path)
    config = {**SPECIAL, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode_prompt("a")
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s></s><img>a"
    assert len(ids) == 4


NAMED = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize("others", [[], ["tool_use"], ["default", "tool_use"]])
@pytest.mark.parametrize("config", [None, "c", NAMED, NAMED[:1], {"default": "m"}])
def test_the_same_template_is_found(tmp_path, default, others, config):
    import transformers

    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TokenizersBackend", "chat_template": config})
    )
    if default:
        (tmp_path / "chat_template.jinja").write_text("file")
    if others:
        (tmp_path / "additional_chat_templates").mkdir()
    for name in others:
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(f"other {name}")
    try:
        expected = transformers.AutoTokenizer.from_pretrained(tmp_path).get_chat_template()
    except ValueError:
        expected = None
    assert read_chat_template(tmp_path, {"chat_template": config}) == expected


def test_messages_are_left_as_they_were():
    message = types.MappingProxyType({"role": "user", "content": [{"text": "a"}], "name": None})
    assert render_chat("{{ messages[0] }}", [message], {}) == (
        "{'role': 'user', 'content': [{'text': 'a'}]}"
    )
    assert message["name"] is None


def test_errors_say_what_is_wrong():
    with pytest.raises(CheckpointError, match=r"is broken: .* \(line 2\)"):
        check_chat_template("a\n{% endif %}")
    with pytest.raises(RequestError, match="refuses the messages: no"):
        render_chat(TEMPLATES["refusal"], CHATS[0], {})
    with pytest.raises(RequestError, match="at least one"):
        render_chat("x", [], {})

"""The server as OpenAI's client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
import math
import re

import openai
import pytest
from tests.unit.serving.live import events, live_server
from tests.unit.serving.running import cached_model, served, tokenizer

from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.generate import generate_ids

MANY = 40
"""Tokens; the tiny models rarely end by themselves."""


@pytest.fixture(scope="module")
def server():
    models = [
        served(),
        served("other", family="Dream"),
        served("causal", family="qwen2", strategy="autoregressive"),
    ]
    with live_server(*models, max_choices=8) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ids_of(prompt="1+1=", family="llada", **settings):
    settings = {"max_new_tokens": MANY} | settings
    ids = tokenizer().encode_prompt(prompt, chat=False)
    return generate_ids(cached_model(family), ids, **settings)


def text_of(*args, **settings):
    return tokenizer().decode(ids_of(*args, **settings).token_ids)


def test_completion_is_what_generate_ids_says(client):
    done = client.completions.create(model="tiny", prompt="1+1=", max_tokens=MANY)
    result = ids_of()
    assert done.choices[0].text == text_of()
    assert done.choices[0].finish_reason == "length"
    assert (done.object, done.model) == ("text_completion", "tiny")
    usage = done.usage.model_dump()
    assert usage["prompt_tokens"] == 4
    assert usage["completion_tokens"] == len(result.token_ids)
    assert usage["num_forwards"] == result.num_forwards
    assert usage["tokens_per_forward"] == result.tokens_per_forward
    assert usage["seconds"] > 0


def test_chat_of_one_message_is_its_prompt(client):
    messages = [{"role": "user", "content": "1+1="}]
    done = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=MANY
    )
    assert done.choices[0].message.content == text_of()
    assert done.choices[0].message.role == "assistant"
    assert done.object == "chat.completion"


def test_async_client_streams_as_many_as_it_likes(server):
    prompts = [f"{number}+1=" for number in range(12)]

    async def ask(client, prompt):
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=MANY, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == [text_of(prompt) for prompt in prompts]


def test_streamed_chat(client):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "1+1="}],
        max_tokens=MANY,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of()
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], MANY)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_choices_of_several_prompts_are_sampled_apart(client):
    done = client.completions.create(
        model="tiny",
        prompt=[[18, 12, 18, 30], [1, 2, 3]],
        n=3,
        max_tokens=8,
        temperature=1.0,
        seed=7,
    )
    assert [choice.index for choice in done.choices] == list(range(6))
    texts = [choice.text for choice in done.choices]
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    model = cached_model("llada")
    for number, prompt in enumerate([[18, 12, 18, 30], [1, 2, 3]]):
        for index in range(3):
            alone = generate_ids(model, prompt, **settings, seed=7 + index)
            assert texts[3 * number + index] == tokenizer().decode(alone.token_ids)
    assert done.usage.prompt_tokens == 7


def test_streamed_choices_are_the_same(client):
    settings = {"model": "tiny", "prompt": ["1+1=", "2+2="], "n": 2, "max_tokens": MANY}
    settings |= {"temperature": 1.0, "seed": -3}
    whole = client.completions.create(**settings)
    texts = [""] * 4
    for chunk in client.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_without_a_seed_samples_differ(client):
    settings = {"model": "tiny", "prompt": "a", "max_tokens": 16, "temperature": 2.0}
    texts = {client.completions.create(**settings).choices[0].text for _ in range(3)}
    assert len(texts) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [1, 2, 4])
def test_stop_strings_are_cut(client, stream, length):
    whole = text_of()
    stop = whole[10 : 10 + length]
    settings = {"model": "tiny", "prompt": "1+1=", "max_tokens": MANY, "stop": [stop, "never"]}
    if stream:
        options = {"include_usage": True}
        *chunks, last = client.completions.create(**settings, stream=True, stream_options=options)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason, usage = chunks[-1].choices[0].finish_reason, last.usage
    else:
        done = client.completions.create(**settings)
        text, reason, usage = done.choices[0].text, done.choices[0].finish_reason, done.usage
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"
    assert usage.completion_tokens == whole.index(stop) + length


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_completions(client, stream):
    settings = {"model": "tiny", "prompt": "1+1=", "max_tokens": MANY, "logprobs": 1}
    answer = client.completions.create(**settings, stream=stream)
    found = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    texts, values, offsets = [], [], []
    for choice in found:
        if choice.logprobs is not None:
            texts += choice.logprobs.tokens
            values += choice.logprobs.token_logprobs
            offsets += choice.logprobs.text_offset
            pairs = zip(choice.logprobs.tokens, choice.logprobs.token_logprobs, strict=True)
            assert choice.logprobs.top_logprobs == [dict([pair]) for pair in pairs]
    result = ids_of()
    assert "".join(texts) == "".join(choice.text for choice in found) == text_of()
    assert values == pytest.approx([math.log(p) for p in result.probabilities], abs=1e-4)
    assert offsets == list(range(MANY))


def test_logprobs_of_chat(client):
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "1+1="}], max_tokens=5, logprobs=True
    )
    content = done.choices[0].logprobs.content
    assert "".join(token.token for token in content) == done.choices[0].message.content
    assert bytes(content[0].bytes).decode() == content[0].token
    expected = [math.log(value) for value in ids_of(max_new_tokens=5).probabilities]
    assert [token.logprob for token in content] == pytest.approx(expected, abs=1e-4)


STRATEGIES = [
    ("tiny", {}),
    ("tiny", {"strategy": "serial"}),
    ("tiny", {"strategy": "vanilla", "options": {"num_steps": 6}}),
    ("tiny", {"strategy": "dual-cache"}),
    ("other", {"strategy": "dllm-cache", "options": {"num_steps": 6}}),
    ("causal", {}),
]


def token_logprobs(answer, stream):
    chunks = [chunk.choices[0] for chunk in (answer if stream else [answer])]
    return [token for one in chunks if one.logprobs for token in one.logprobs.content]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("model", "extra"), STRATEGIES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}])
def test_top_logprobs_of_chat(client, model, extra, sampling, stream):
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": "1+1="}],
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 20,
        "extra_body": extra,
        **sampling,
    }
    found = token_logprobs(client.chat.completions.create(**asked, stream=stream), stream)
    again = token_logprobs(client.chat.completions.create(**asked), False)
    assert [token.token for token in found] == [token.token for token in again]
    values = [token.logprob for token in again]
    assert [token.logprob for token in found] == pytest.approx(values, abs=1e-4)
    assert found
    for token in found:
        top = {other.token: other.logprob for other in token.top_logprobs}
        assert len(token.top_logprobs) == 20
        values = [other.logprob for other in token.top_logprobs]
        assert values == pytest.approx(sorted(values, reverse=True), abs=1e-5)
        assert sum(map(math.exp, values)) < 1 + 1e-5
        if not sampling:
            assert token.token == token.top_logprobs[0].token
        if token.token in top:
            assert top[token.token] == token.logprob
        for other in token.top_logprobs:
            assert other.bytes is None or bytes(other.bytes).decode() == other.token


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_top_logprobs_of_completions(client, count):
    asked = {"model": "tiny", "prompt": "1+1=", "max_tokens": 12, "temperature": 2.0, "seed": 1}
    logprobs = client.completions.create(**asked, logprobs=count).choices[0].logprobs
    if count == 0:
        assert logprobs.top_logprobs is None
        return
    pairs = zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    sizes = set()
    for token, value, top in pairs:
        assert top[token] == value
        assert sorted(top.values(), reverse=True)[0] >= value
        sizes.add(len(top))
    # The accepted one comes to them where it is none of them.
    assert sizes <= {count, count + 1}
    assert len(sizes) == 2 or count == 20


def test_min_p_reaches_the_engine(client):
    asked = {"model": "tiny", "prompt": "1+1=", "max_tokens": MANY, "temperature": 3.0, "seed": 5}
    texts = {}
    for min_p in (0.0, 0.5):
        done = client.completions.create(**asked, extra_body={"min_p": min_p})
        texts[min_p] = done.choices[0].text
        assert texts[min_p] == text_of(temperature=3.0, seed=5, min_p=min_p)
    assert texts[0.0] != texts[0.5]


def test_policy_strategy_and_options_by_extra_body(client):
    def ask(model="tiny", **extra):
        return client.completions.create(
            model=model, prompt="1+1=", max_tokens=MANY, extra_body=extra
        )

    policy = {"block_size": 8, "confidence_threshold": 0.3}
    done = ask(policy=policy)
    expected = ids_of(policy=DecodingPolicy(**policy))
    assert done.choices[0].text == tokenizer().decode(expected.token_ids)
    assert done.usage.num_forwards == expected.num_forwards != ids_of().num_forwards
    assert ask(strategy="serial").choices[0].text == text_of(strategy="serial")
    done = ask(strategy="vanilla", options={"num_steps": 4}, early_stop=False)
    vanilla = ids_of(strategy="vanilla", num_steps=4, early_stop=False)
    assert done.choices[0].text == tokenizer().decode(vanilla.token_ids)
    assert done.usage.num_forwards == vanilla.num_forwards
    assert ask("other").choices[0].text == text_of(family="Dream")
    expected = text_of(family="qwen2", strategy="autoregressive")
    assert ask("causal").choices[0].text == expected


def test_provisional_tokens_are_each_told_once(server):
    asked = {
        "prompt": "1+1=",
        "max_tokens": MANY,
        "stream": True,
        "stream_options": {"include_provisional": True},
        "policy": {"block_size": 8, "confidence_threshold": 0.6, "activate_threshold": 0.5},
    }
    chunks = events(server.post(asked).body)
    result = ids_of(
        policy=DecodingPolicy(block_size=8, confidence_threshold=0.6, activate_threshold=0.5)
    )
    told = [chunk["d2f"] for chunk in chunks]
    found = {token["position"]: token for step in told for token in step["tokens"]}
    assert sum(len(step["tokens"]) for step in told) == len(found) == MANY
    assert [found[place]["token_id"] for place in range(MANY)] == result.token_ids
    probabilities = [found[place]["probability"] for place in range(MANY)]
    assert probabilities == pytest.approx(result.probabilities, abs=1e-4)
    assert any(
        token["position"] >= step["num_committed"] for step in told for token in step["tokens"]
    )
    text = ""
    for chunk, step in zip(chunks, told, strict=True):
        text += chunk["choices"][0]["text"]
        assert len(text) == step["num_committed"]  # one character a token
    seconds = [step["seconds"] for step in told]
    assert seconds == sorted(seconds)
    assert told[-1]["done"] is True
    assert told[-1]["num_forwards"] == result.num_forwards
    assert [block["start"] for block in told[-1]["blocks"]] == [0, 8, 16, 24, 32]
    states = {block["state"] for step in told for block in step["blocks"]}
    assert states <= {"semi-active", "fully active", "complete", "cached"}


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["tiny", "other", "causal"]
    told = server.ask("GET", "/v1/models/causal").json
    assert told["d2f"]["strategies"] == ["autoregressive"]
    assert told["d2f"]["policy"] == DecodingPolicy().to_dict()
    assert told["d2f"]["chat_template"] is False
    assert told["d2f"]["leaves_out"] == []
    assert (told["d2f"]["max_positions"], told["d2f"]["dtype"]) == (512, "float32")
    assert client.models.retrieve("other").id == "other"


@pytest.mark.parametrize(
    ("wrong", "error", "param"),
    [
        ({"model": "tniy"}, openai.NotFoundError, "model"),
        ({"max_tokens": 4000}, openai.BadRequestError, "max_tokens"),
        ({"max_tokens": 511}, openai.BadRequestError, "max_tokens"),
        ({"n": 9}, openai.BadRequestError, "n"),
        ({"prompt": "a" * 512}, openai.BadRequestError, "prompt"),
        ({"prompt": "a" * 100_000}, openai.BadRequestError, "prompt"),
        ({"prompt": [96]}, openai.BadRequestError, None),
        ({"echo": True}, openai.BadRequestError, "echo"),
        ({"extra_body": {"strategy": "pipelind"}}, openai.BadRequestError, "strategy"),
        ({"extra_body": {"options": {"num_steps": 4}}}, openai.BadRequestError, "options"),
        ({"extra_body": {"max_completion_tokens": 3}}, openai.BadRequestError, "max_tokens"),
        ({"stop": ["a"] * 17}, openai.BadRequestError, "stop"),
        (
            {"extra_body": {"strategy": "serial", "policy": {"add_threshold": 0.5}}},
            openai.BadRequestError,
            "policy",
        ),
        ({"model": "causal", "prompt": ""}, openai.BadRequestError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_reach_the_client_by_name(client, wrong, error, param, stream):
    asked = {"model": "tiny", "prompt": "1+1=", "max_tokens": 4} | wrong
    with pytest.raises(error) as raised:
        client.completions.create(**asked, stream=stream)
    assert raised.value.param == param
    assert raised.value.body["message"]
    assert raised.value.response.headers["x-request-id"].startswith("req-")


def test_options_of_a_stream_need_one(client):
    asked = {"model": "tiny", "prompt": "a", "stream_options": {"include_usage": True}}
    with pytest.raises(openai.BadRequestError, match="add stream: true"):
        client.completions.create(**asked)


def test_a_conversation_needs_a_template(client):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_default_length_leaves_room(server):
    answer = server.post({"prompt": "a" * 500, "stop": []})
    assert answer.json["usage"]["completion_tokens"] <= 12


def test_probes_and_metrics(server):
    assert server.ask("GET", "/health").json == {"status": "ready"}
    assert server.ask("GET", "/health/ready").status == 200
    assert server.ask("GET", "/health/live").json == {"status": "live"}
    server.post({"prompt": "a", "max_tokens": 2})
    text = server.ask("GET", "/metrics").body.decode()
    assert 'd2f_requests_total{endpoint="/v1/completions",model="tiny",status="200"}' in text
    assert "d2f_requests_waiting 0.0" in text


def test_each_route_is_counted_under_its_name():
    paths = ["/openapi.json", "/v1/models/tiny", "/health/live", "/page/style.css", "/nothing"]
    with live_server(served()) as server:
        for path in paths:
            server.ask("GET", path)
        text = server.ask("GET", "/metrics").body.decode()
    counted = set(re.findall(r'd2f_requests_total{endpoint="([^"]+)"', text))
    names = {"/openapi.json", "/v1/models/{id}", "/health/live", "/page", "other"}
    assert counted == names


def test_the_page_has_strict_headers(server):
    answer = server.ask("GET", "/")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    for name in ("../settings.py", "..%2fsettings.py", "nothing.js", ""):
        assert server.ask("GET", f"/page/{name}").status == 404


def test_log_has_no_prompts_unless_asked(caplog):
    for wanted in (False, True):
        caplog.clear()
        with (
            caplog.at_level("INFO", logger="d2f.serving"),
            live_server(served(), log_prompts=wanted) as server,
        ):
            server.post({"prompt": "1+1=2", "max_tokens": 3})
            server.post({"prompt": "1+1=2", "zebra": 3})
        lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
        # The module's server may still be logging what was asked of it before.
        lines = [line for line in lines if line["method"] == "POST"]
        assert [line["status"] for line in lines] == [200, 400]
        assert lines[0]["completion_tokens"] == 3
        assert ("1+1=2" in json.dumps(lines)) is wanted

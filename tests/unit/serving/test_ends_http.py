"""A response ends where clients say: `stop_token_ids`, `replace_eos`, special tokens."""

from __future__ import annotations

import json

import openai
import pytest
from tests.unit.serving.live import live_server
from tests.unit.serving.running import cached_model
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from d2f import Engine, EngineConfig
from d2f.engine.generate import generate_ids
from d2f.serving.served_model import ServedModel
from d2f.testing import write_tokenizer
from d2f.text import Tokenizer

PROMPT = [1, 2, 3]
MANY = 24


@pytest.fixture(scope="module")
def answer():
    """What the tiny model says without any end."""
    return generate_ids(cached_model(), PROMPT, max_new_tokens=MANY, eos_token_id=()).token_ids


@pytest.fixture(scope="module")
def place(answer):
    """Of the token that is a special one here."""
    return next(n for n in range(6, MANY) if answer[n] not in answer[:n] and answer[n] < 94)


@pytest.fixture(scope="module")
def tokenizer(answer, place, tmp_path_factory):
    """Of single letters, but for one special token that the answer holds."""
    folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    [letter] = [text for text, number in vocab.items() if number == answer[place]]
    vocab["<|stop|>"] = vocab.pop(letter)
    file.write_text(json.dumps(content))
    backend = Backend.from_file(str(file))
    backend.add_special_tokens([AddedToken("<|stop|>", special=True)])
    backend.save(str(file))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def ask(tokenizer):
    config = EngineConfig(max_batch_size=4, page_size=4, kv_cache_bytes=1_000_000)
    engine = Engine(cached_model(), config, tokenizer)
    model = ServedModel(name="tiny", engine=engine, tokenizer=tokenizer)
    with live_server(model) as server, openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as client:  # fmt: skip

        def ask(stream, stop=None, **extra):
            """Text, finish reason and number of tokens."""
            done = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=MANY, stream=stream, stop=stop,
                extra_body=extra, **({"stream_options": {"include_usage": True}} if stream else {}),
            )  # fmt: skip
            chunks = list(done) if stream else [done]
            choices = [choice for chunk in chunks for choice in chunk.choices]
            text = "".join(choice.text for choice in choices)
            return text, choices[-1].finish_reason, chunks[-1].usage.completion_tokens

        yield ask


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_with_a_special_token_in_it(ask, answer, place, tokenizer, stream):
    before, behind = tokenizer.decode(answer[:place]), tokenizer.decode(answer[place + 1 :])
    shown = tokenizer.decode(answer, skip_special_tokens=False)
    assert shown == f"{before}<|stop|>{behind}"
    free = {"replace_eos": True}
    assert ask(stream, **free) == (before + behind, "length", MANY)
    assert ask(stream, "<|stop|>", **free) == (before, "stop", place + 1)
    assert ask(stream, f"{before[-2:]}<|stop|>", **free) == (before[:-2], "stop", place + 1)
    longer = f"{before[-1:]}<|stop|>{behind[:2]}"
    assert ask(stream, longer, **free) == (before[:-1], "stop", place + 3)
    # Also where the token is an end anyway.
    settings = free | {"stop_token_ids": [answer[place]]}
    assert ask(stream, f"{before[-2:]}<|stop|>", **settings) == (before[:-2], "stop", place + 1)
    # What is spelled in part only is no special token.
    assert ask(stream, "stop|>", **free) == (before + behind, "length", MANY)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_token_ids_end_it_and_are_no_text(ask, answer, place, tokenizer, stream):
    end = answer[3]
    count = answer.index(end) + 1
    expected = (tokenizer.decode(answer[: count - 1]), "stop", count)
    assert ask(stream, stop_token_ids=[end]) == expected
    assert ask(stream, stop_token_ids=[answer[place], end], replace_eos=True) == expected
    assert ask(stream, stop_token_ids=[], replace_eos=None)[2] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_models_own_ends_stay_unless_they_are_replaced(ask, answer, tokenizer, stream):
    spec = cached_model().spec
    own = spec.eos_token_ids
    end = answer[4]
    object.__setattr__(spec, "eos_token_ids", (end,))
    try:
        count = answer.index(end) + 1
        cut = (tokenizer.decode(answer[: count - 1]), "stop", count)
        other = next(token for token in range(94) if token not in answer)
        assert ask(stream) == cut
        assert ask(stream, stop_token_ids=[other]) == cut
        assert ask(stream, stop_token_ids=[other], replace_eos=True)[1:] == ("length", MANY)
    finally:
        object.__setattr__(spec, "eos_token_ids", own)


@pytest.mark.parametrize(
    ("value", "words"),
    [([96], "outside the vocabulary of 96"), ([-1], "stop_token_ids"), (["a"], "stop_token_ids"),
     ([True], "stop_token_ids"), (3, "stop_token_ids"), (list(range(17)), "stop_token_ids")],
)  # fmt: skip
def test_what_is_no_token_is_refused_by_name(ask, value, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(False, stop_token_ids=value)
    assert refused.value.param.startswith("stop_token_ids")

"""Without early stop, stop strings cut the answer and change nothing of how it is decoded."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.engine.workload import make_engine

from d2f import DecodingPolicy, Engine, Request
from d2f.testing import tiny_model, write_tokenizer
from d2f.text import Tokenizer

PAGED = (("llada", "pipelined"), ("Dream", "serial"), ("qwen2", "autoregressive"))
UNPAGED = (
    ("llada", "vanilla"), ("Dream", "vanilla"), ("llada", "dllm-cache"), ("llada", "parallel"),
    ("Dream", "prefix-cache"), ("llada", "dual-cache"), ("Dream", "reference"),
)  # fmt: skip
EVERY_WAY = pytest.mark.parametrize(("name", "strategy"), PAGED + UNPAGED)
LENGTH = 16


class Letters:
    """Two letters for each token, so that a stop string may begin and end amid tokens."""

    def decode(self, token_ids):
        return "".join(chr(65 + token // 10) + chr(97 + token % 10) for token in token_ids)


class Words:
    """Tokens of different lengths; every third one has no text, as special tokens have none."""

    def decode(self, token_ids):
        return "".join("" if t % 3 == 0 else " x" if t % 3 == 1 else f"<{t}>" for t in token_ids)


@functools.cache
def model_of(name):
    return tiny_model(name)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    byte_level = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return {"letters": Letters(), "words": Words(), "bytes": byte_level}


def request_of(prompt, strategy, *, eos=(), **values):
    if strategy in ("vanilla", "dllm-cache", "parallel", "prefix-cache", "dual-cache"):
        values["options"] = {"block_length": 4}
    return Request(
        prompt_ids=prompt,
        max_new_tokens=LENGTH,
        strategy=strategy,
        eos_token_id=eos,
        policy=DecodingPolicy(block_size=5, confidence_threshold=0.3),
        **values,
    )


def answer(engine, request):
    """Its result; no prompt is cached from a request before."""
    engine.forget_prompts()
    [result] = engine.generate([request])
    return result


def work(result):
    """What a result tells of the work behind it."""
    return result.num_forwards, result.num_query_tokens, result.num_decoded_tokens


@EVERY_WAY
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_stop_strings_cut_the_answer_alone(name, strategy, tokenizers, data):
    tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
    prompt = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    engine = Engine(model_of(name), tokenizer=tokenizer)
    free = answer(engine, request_of(prompt, strategy, early_stop=False))
    # An EOS behind which vanilla goes on, at any place of the answer or nowhere.
    eos = data.draw(st.sampled_from([(), *((token,) for token in free.token_ids)]))
    whole = request_of(prompt, strategy, eos=eos, early_stop=False)
    full = answer(engine, whole)
    text = tokenizer.decode(full.token_ids)
    start = data.draw(st.integers(0, max(len(text) - 1, 0)))
    stops = [text[start : start + data.draw(st.integers(1, 4))] or "?", "never there"]

    fixed = answer(engine, dataclasses.replace(whole, stop=stops))
    early = answer(engine, dataclasses.replace(whole, stop=stops, early_stop=True))
    assert work(fixed) == work(full)
    assert fixed.token_ids == early.token_ids
    assert fixed.finish_reason == early.finish_reason
    assert fixed.probabilities == pytest.approx(early.probabilities, abs=1e-5)
    ids, count = full.token_ids, range(len(full.token_ids) + 1)
    fewest = next((n for n in count if any(s in tokenizer.decode(ids[:n]) for s in stops)), None)
    assert fixed.token_ids == ids[:fewest]
    assert fixed.finish_reason == (full.finish_reason if fewest is None else "stop")
    assert early.num_forwards <= fixed.num_forwards


@EVERY_WAY
def test_a_stop_in_the_first_token_ends_early_or_not_as_asked(name, strategy):
    engine = Engine(model_of(name), tokenizer=Letters())
    request = request_of([7, 8], strategy, early_stop=False)
    full = answer(engine, request)
    stop = [Letters().decode(full.token_ids[:1])]
    fixed = answer(engine, dataclasses.replace(request, stop=stop))
    early = answer(engine, dataclasses.replace(request, stop=stop, early_stop=True))
    assert fixed.token_ids == early.token_ids == full.token_ids[:1]
    assert work(fixed) == work(full)
    assert fixed.num_decoded_tokens == LENGTH
    assert early.num_forwards < fixed.num_forwards


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llada", {"num_steps": 16, "block_length": 4}),
        ("llada", {"num_steps": 8, "block_length": 8}),
        ("Dream", {"num_steps": 16, "algorithm": "entropy"}),
        ("Dream", {"num_steps": 5, "algorithm": "maskgit_plus"}),
    ],
)
def test_vanilla_runs_as_many_steps_as_asked(name, options):
    engine = Engine(model_of(name), tokenizer=Letters())
    request = Request(
        prompt_ids=[3], max_new_tokens=LENGTH, strategy="vanilla", options=options,
        early_stop=False, stop=[chr(65 + n) for n in range(20)],
    )  # fmt: skip
    result = answer(engine, request)
    assert result.num_forwards == options["num_steps"]
    assert len(result.token_ids) == 1


@pytest.mark.parametrize("overlap", [False, True], ids=["in-step", "overlapped"])
@pytest.mark.parametrize(("name", "strategy"), PAGED)
def test_rows_of_a_batch_stop_each_as_it_is_asked(name, strategy, overlap):
    engine = make_engine(model_of(name), overlap=overlap)
    engine._tokenizer = Letters()
    prompts = [[n + 1, 2 * n] for n in range(4)]
    requests = [request_of(prompt, strategy, early_stop=False) for prompt in prompts]
    full = engine.generate(requests)
    stops = [Letters().decode(result.token_ids)[3:6] for result in full]
    mixed = engine.generate(
        [
            dataclasses.replace(request, stop=[stop], early_stop=index % 2 == 0)
            for index, (request, stop) in enumerate(zip(requests, stops, strict=True))
        ]
    )
    for index, (whole, result) in enumerate(zip(full, mixed, strict=True)):
        assert result.finish_reason == "stop"
        assert result.token_ids == whole.token_ids[: len(result.token_ids)]
        if index % 2:
            assert work(result)[::2] == work(whole)[::2]
        else:
            assert result.num_forwards < whole.num_forwards


@EVERY_WAY
def test_what_is_told_of_a_running_answer_never_passes_its_stop(name, strategy):
    engine = Engine(model_of(name), tokenizer=Letters())
    request = request_of([5, 6, 7], strategy, early_stop=False)
    full = answer(engine, request)
    stop = Letters().decode(full.token_ids)[6:9]
    request = dataclasses.replace(request, stop=[stop])
    result = answer(engine, request)
    engine.forget_prompts()
    number = engine.add(request)
    told = []
    while not (outputs := engine.step()):
        told.append(engine.progress(number).token_ids)
    assert outputs[0].result == result
    streamed = [output.token_ids for output in engine.stream(request)]
    for seen in (told, streamed):
        for token_ids in seen:
            assert token_ids == result.token_ids[: len(token_ids)]
        assert [len(ids) for ids in seen] == sorted(len(ids) for ids in seen)


@EVERY_WAY
def test_what_was_decoded_in_all_counts_the_tail_but_no_end_tokens(name, strategy):
    engine = Engine(model_of(name))
    free = answer(engine, request_of([9, 4], strategy, early_stop=False))
    assert free.num_decoded_tokens == LENGTH == len(free.token_ids)
    end = free.token_ids[5]
    ended = answer(engine, request_of([9, 4], strategy, eos=(end,), early_stop=False))
    assert ended.num_decoded_tokens >= len(ended.token_ids) - 1
    if strategy in ("vanilla", "dllm-cache", "parallel", "prefix-cache", "dual-cache"):
        others = sum(token != end for token in free.token_ids)
        assert (ended.num_forwards, ended.num_decoded_tokens) == (free.num_forwards, others)
    if strategy == "autoregressive":
        assert ended.num_decoded_tokens == len(ended.token_ids) - 1

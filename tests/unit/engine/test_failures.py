"""A fault of one request is that request's alone."""

import random
from dataclasses import replace

import pytest
import torch
from tests.unit.engine.workload import (
    Case,
    answer_of_oracle,
    cached_model,
    check_answers,
    check_idle,
    check_pages,
    drive,
    lane_of,
    make_engine,
    random_cases,
)

from d2f import DecodingPolicy, Engine, EngineConfig, Request, generate_ids
from d2f.decoding.paged import PipelinedDecoder
from d2f.decoding.rows import RowStorage
from d2f.engine.paged import LEAST_ALONE
from d2f.engine.runner import Pending
from d2f.errors import ConfigError, D2FError, RequestError
from d2f.models.cache import PagedCache, PromptCache
from d2f.testing import tiny_model

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in-step", "overlapped"])
GOOD = Request(prompt_ids=[1, 2, 3], max_new_tokens=6, eos_token_id=())


@OVERLAP
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"prompt_ids": [1] * 30}, RequestError, "30 tokens and max_new_tokens 6 need 9 pages"),
        ({"max_new_tokens": 40}, RequestError, "which has 8 of 4 tokens; shorten the prompt"),
        ({"prompt_ids": [1] * 510}, RequestError, "exceed the model's 512 positions"),
        ({"max_new_tokens": 0}, RequestError, "max_new_tokens is 0"),
        ({"max_new_tokens": -3}, RequestError, "max_new_tokens is -3"),
        ({"strategy": "pipelnied"}, ConfigError, "pipelined"),
        ({"strategy": "autoregressive"}, RequestError, "not autoregressive"),
        ({"options": {"num_steps": 4}}, ConfigError, "num_steps"),
        ({"stop": ["x"]}, RequestError, "tokenizer"),
        ({"stop": [""]}, RequestError, "stop string ''"),
        ({"stop": [5]}, RequestError, "stop string 5"),
        ({"stop": ["x"], "strategy": "vanilla"}, RequestError, "need the engine's tokenizer"),
        ({"prompt_ids": [96]}, RequestError, "outside the vocabulary"),
        ({"prompt_ids": [True, False]}, RequestError, "True is not a whole number"),
        ({"strategy": ["vanilla"]}, ConfigError, "unknown strategy"),
        ({"options": None}, ConfigError, "options is None"),
        ({"stop": 5}, RequestError, "stop is 5"),
        ({"stop": None}, RequestError, "stop is None"),
        ({"early_stop": float("nan")}, RequestError, "early_stop is nan"),
        ({"temperature": True}, RequestError, "temperature is True"),
        ({"temperature": 1e300}, RequestError, "temperature is 1e.300"),
        ({"temperature": 10**400}, RequestError, "temperature is 1000"),
        ({"strategy": "parallel", "options": {"factor": 10**400}}, ConfigError, "factor is 1000"),
        *(
            ({"strategy": strategy, "options": {"num_steps": 10**7}}, ConfigError, "at most 65536")
            for strategy in ("vanilla", "dllm-cache")
        ),
        (
            {"strategy": "vanilla", "options": {"num_steps": 2**70, "algorithm": "origin"}},
            ConfigError,
            "at most 65536",
        ),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(values, error, message, overlap):
    engine = make_engine(tiny_model("llada"), 8, overlap=overlap)
    first = engine.add(GOOD)
    engine.step()
    with pytest.raises(error, match=message):
        engine.add(Request(**(vars(GOOD) | values)))
    second = engine.add(GOOD)
    results = {}
    while len(results) < 2:
        results |= {output.request_id: output.result for output in engine.step()}
    assert results[first].token_ids == results[second].token_ids
    assert len(results[first].token_ids) == 6
    check_idle(engine)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 2**70, "strategy": "vanilla"},
        {"temperature": 2**70},
        {"strategy": "dual-cache", "options": {"factor": 2**70}},
        {"strategy": "prefix-cache", "options": {"block_length": 2**70}},
        {"strategy": "dllm-cache", "options": {"prompt_interval": 2**70, "refresh_share": 1}},
    ],
)
def test_large_numbers_are_numbers(values):
    [result] = Engine(tiny_model("llada")).generate([Request(**(vars(GOOD) | values))])
    assert len(result.token_ids) == 6


@pytest.mark.parametrize("prompt", [None, 5, torch.tensor(3)])
def test_what_is_no_prompt_is_refused_in_words(prompt):
    with pytest.raises(RequestError, match="is no list of token ids"):
        generate_ids(tiny_model("llada"), prompt, max_new_tokens=4)


def test_a_request_may_fill_the_cache_to_the_last_slot():
    engine = make_engine(tiny_model("llada"), 8)
    [result] = engine.generate([Request(prompt_ids=[1] * 26, max_new_tokens=6, eos_token_id=())])
    assert len(result.token_ids) == 6


def test_a_closed_engine_says_so():
    engine = make_engine(tiny_model("llada"))
    number = engine.add(GOOD)
    engine.close()
    for call in (lambda: engine.add(GOOD), engine.step, lambda: engine.generate([GOOD])):
        with pytest.raises(RequestError, match="closed"):
            call()
    assert not engine.abort(number)


def test_no_room_for_a_single_page_is_an_error():
    engine = Engine(tiny_model("llada"), EngineConfig(kv_cache_bytes=10))
    with pytest.raises(ConfigError, match="kv_cache_bytes"):
        engine.add(GOOD)


@OVERLAP
@pytest.mark.parametrize("name", ["llada", "Dream", "qwen2"])
def test_logits_that_are_not_finite_fail_their_request_alone(name, overlap):
    # Of others, tokens behind the EOS are not known here.
    cases = [case for case in random_cases(name) if case.result.finish_reason == "length"]
    used = [{*case.request.prompt_ids, *case.result.token_ids} for case in cases]
    poison = min(range(94), key=lambda token: sum(token in mine for mine in used))
    cases = [case for case, mine in zip(cases, used, strict=True) if poison not in mine]
    assert len(cases) > 15
    model = tiny_model(name)
    model.embed.weight.data[poison] = torch.nan
    broken = [
        Case(Request(**(vars(case.request) | {"prompt_ids": [*prompt, poison, *prompt]})), None, 0)
        for case in cases[:8]
        for prompt in [case.request.prompt_ids]
    ]
    engine = make_engine(model, overlap=overlap, max_batch_size=6)
    outputs = drive(engine, [*cases, *broken], random.Random(name))
    assert len(outputs) == len(cases) + len(broken)
    for index in range(len(cases), len(outputs)):
        error = outputs.pop(index).error
        assert isinstance(error, RequestError)
        assert "not finite" in str(error)
    check_answers(outputs, cases)
    check_idle(engine)


LONG = Request(prompt_ids=[1] * 200, max_new_tokens=4)


def without_memory_for_long(model, monkeypatch):
    forward = model.forward_packed

    def forward_of_little_memory(ids_T, *rest):
        if len(ids_T) >= len(LONG.prompt_ids):
            raise torch.OutOfMemoryError("out of memory")
        return forward(ids_T, *rest)

    monkeypatch.setattr(model, "forward_packed", forward_of_little_memory)
    return model


@OVERLAP
@pytest.mark.parametrize("prefill_tokens", [1, 2048], ids=["one by one", "together"])
def test_a_prompt_that_memory_does_not_hold_fails_alone(overlap, prefill_tokens, monkeypatch):
    model = without_memory_for_long(tiny_model("llada"), monkeypatch)
    cases = list(random_cases("llada"))[:20]
    engine = make_engine(model, overlap=overlap, prefill_tokens=prefill_tokens, max_batch_size=3)
    outputs = drive(engine, [*cases, Case(LONG, None, 0)], random.Random(1))
    error = outputs.pop(len(cases)).error
    assert "not enough memory for this prompt" in str(error)
    check_answers(outputs, cases)
    check_idle(engine)


def test_requests_join_together_after_a_lone_prompt_that_was_too_much(monkeypatch):
    engine = make_engine(without_memory_for_long(tiny_model("llada"), monkeypatch))
    with pytest.raises(RequestError, match="not enough memory"):
        engine.generate([LONG])
    for token in (1, 2):
        engine.add(Request(prompt_ids=[token], max_new_tokens=30, eos_token_id=()))
    engine.step()
    assert len(lane_of(engine).running) == 2


def test_requests_join_together_again_once_steps_went_well(monkeypatch):
    engine = make_engine(without_memory_for_long(tiny_model("llada"), monkeypatch))
    lane, slow = lane_of(engine), DecodingPolicy(block_size=4, confidence_threshold=1.0)

    def join(*tokens):
        before = len(lane.running)
        for token in tokens:
            request = Request(prompt_ids=[token], max_new_tokens=99, policy=slow, eos_token_id=())
            engine.add(replace(request, strategy="serial"))
        engine.step()
        return len(lane.running) - before

    engine.add(LONG)
    join(1, 2)  # memory runs out
    while not engine.step():
        pass
    assert join(3, 4) == 1
    for _ in range(LEAST_ALONE):
        engine.step()
    assert join(5, 6, 7) == 3


def test_a_batch_without_pages_that_breaks_off_starts_again(monkeypatch):
    model = tiny_model("llada")
    request = Request(
        prompt_ids=[1, 2], max_new_tokens=8, strategy="vanilla", options={"num_steps": 4}
    )
    [expected] = Engine(model).generate([request])
    engine = Engine(model)
    number = engine.add(request)
    engine.step()
    with monkeypatch.context() as patch:

        def interrupted(*arguments, **settings):
            raise KeyboardInterrupt

        patch.setattr(type(model), "forward_packed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert [output.request_id for output in outputs] == [number]
    assert outputs[0].result == expected


# --------------------------------------------------------------------------- steps that break off


class BrokenOffError(Exception):
    """Of these tests alone."""


def broken_once(monkeypatch, owner, name):
    """The first call does its work, then fails."""
    works, calls = getattr(owner, name), []

    def fails(*arguments, **options):
        result = works(*arguments, **options)
        calls.append(name)
        if len(calls) == 1:
            raise BrokenOffError
        return result

    monkeypatch.setattr(owner, name, fails)
    return calls


PARTS = [
    *((RowStorage, name) for name in ("write", "write_pages", "resized", "rows", "__init__")),
    (PagedCache, "copy_page"),
    (PipelinedDecoder, "begin"),
    (PipelinedDecoder, "step"),
    (PromptCache, "keep"),
    (Pending, "read"),
]


@OVERLAP
@pytest.mark.parametrize(("owner", "name"), PARTS)
def test_a_step_that_breaks_off_loses_nobody(owner, name, overlap, monkeypatch):
    cases = [answer_of_oracle(cached_model("llada"), request) for request in BREAKABLE]
    engine = make_engine(cached_model("llada"), 20, overlap=overlap, max_batch_size=3)
    engine.generate([GOOD])
    numbers = {engine.add(case.request): index for index, case in enumerate(cases)}
    calls = broken_once(monkeypatch, owner, name)
    outputs, broken = {}, 0
    for _ in range(200):
        try:
            outputs |= {numbers[output.request_id]: output for output in engine.step()}
        except BrokenOffError:
            broken += 1
        check_pages(engine)
    assert len(outputs) == len(cases)
    assert broken == 1, calls
    check_answers(outputs, cases)
    check_idle(engine)


BREAKABLE = [
    Request(prompt_ids=[1, 2, 3, 4, 5][:n], max_new_tokens=length, eos_token_id=(), policy=policy)
    for n, length, policy in (
        (5, 12, DecodingPolicy(block_size=4)),
        (5, 9, DecodingPolicy(block_size=8)),
        (3, 20, DecodingPolicy(block_size=4)),
        (5, 16, DecodingPolicy(block_size=16)),
    )
]


@OVERLAP
@pytest.mark.parametrize("owner", [PipelinedDecoder, Pending], ids=["starting", "reading"])
@pytest.mark.parametrize("ending", ["abort", "close"])
def test_a_device_that_fails_for_good_lets_requests_go(owner, ending, overlap, monkeypatch):
    engine = make_engine(tiny_model("llada"), 40, overlap=overlap, max_batch_size=4)
    prompts = [[1, 2, 3]] * 3 + [[4], [5], [6]]
    numbers = [engine.add(Request(prompt_ids=p, max_new_tokens=40)) for p in prompts]
    for _ in range(3):
        engine.step()

    def fails(*arguments, **options):
        raise RuntimeError("an illegal memory access was encountered\nhere is how to debug it")

    name = "step" if owner is PipelinedDecoder else "read"
    for what, method in ((owner, name), (RowStorage, "move"), (RowStorage, "clear")):
        monkeypatch.setattr(what, method, fails)
    with pytest.raises(RuntimeError, match="illegal"):
        engine.step()
    if ending == "abort":
        assert all(engine.abort(number) for number in numbers)
        status = engine.status()
        assert (status.num_waiting, status.num_running) == (0, 0)
        assert status.num_free_pages == status.num_pages == 40
        engine.add(GOOD)
        with pytest.raises(D2FError, match=r"^the device failed \(an illegal .* a new one$"):
            engine.step()
    engine.close()
    assert not engine.abort(numbers[0])
    with pytest.raises(RequestError, match="closed"):
        engine.step()


# ----------------------------------------------------------------------------------- stop strings


class Letters:
    """Two letters for each token; some tokens cannot be decoded."""

    def __init__(self, broken=()):
        self.broken = broken

    def decode(self, token_ids):
        if set(token_ids) & set(self.broken):
            raise ValueError("cannot be decoded")
        return "".join(chr(65 + t // 10) + chr(97 + t % 10) for t in token_ids)


def engine_of_letters(model, overlap, broken=()):
    return Engine(model, EngineConfig(overlap=overlap, page_size=4), tokenizer=Letters(broken))


@OVERLAP
@pytest.mark.parametrize("name", ["llada", "Dream", "qwen2"])
def test_an_answer_ends_with_the_token_that_completes_a_stop(name, overlap):
    model = tiny_model(name)
    strategy = "autoregressive" if name == "qwen2" else "pipelined"
    text = Letters().decode
    values = {
        "max_new_tokens": 24,
        "eos_token_id": (),
        "strategy": strategy,
        "policy": DecodingPolicy(block_size=4, confidence_threshold=0.3),
    }
    engine = engine_of_letters(model, overlap)
    prompts = [[3, 1], [4, 1, 5, 9], [2, 6]]
    requests = [Request(prompt_ids=prompt, **values) for prompt in prompts]
    full = [result.token_ids for result in engine.generate(requests)]
    for offset, length in ((0, 2), (5, 3), (20, 5), (47, 1)):
        # From the middle of a token to the middle of another.
        stops = [text(ids)[offset : offset + length] for ids in full]
        results = engine.generate(
            [
                Request(prompt_ids=prompt, stop=["??", stop], **values)
                for prompt, stop in zip(prompts, stops, strict=True)
            ]
        )
        for ids, stop, result in zip(full, stops, results, strict=True):
            fewest = next(n for n in range(len(ids) + 1) if stop in text(ids[:n]))
            assert result.token_ids == ids[:fewest]
            assert result.finish_reason == "stop"
    [result] = engine.generate([Request(prompt_ids=[3, 1], stop="??", **values)])
    assert result.token_ids == full[0]
    assert result.finish_reason == "length"
    check_idle(engine)


@OVERLAP
def test_an_answer_that_cannot_be_decoded_fails_alone(overlap):
    model = tiny_model("qwen2")
    values = {"max_new_tokens": 12, "eos_token_id": (), "strategy": "autoregressive"}
    requests = [Request(prompt_ids=[i, 2 * i + 1], **values) for i in range(4)]
    full = [result.token_ids for result in Engine(model).generate(requests)]
    only = next(iter(set(full[0]) - set(full[1]) - set(full[2]) - set(full[3])))
    engine = engine_of_letters(model, overlap, broken=[only])
    numbers = [engine.add(Request(**(vars(r) | {"stop": "??"}))) for r in requests]
    outputs = {}
    while len(outputs) < len(numbers):
        outputs |= {output.request_id: output for output in engine.step()}
    assert "could not decode" in str(outputs[numbers[0]].error)
    for number, ids in zip(numbers[1:], full[1:], strict=True):
        assert outputs[number].result.token_ids == ids
    check_idle(engine)

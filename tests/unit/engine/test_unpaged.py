"""Strategies without pages through the engine: one at a time, in turn, broken off, stopped."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from d2f import DecodingPolicy, Engine, EngineConfig, Request, generate_ids
from d2f.decoding.canvas import Canvas
from d2f.decoding.dllm_cache import DLLMCacheBatch
from d2f.decoding.fast_dllm import FastBatch
from d2f.decoding.strategies import STRATEGIES
from d2f.decoding.vanilla import VanillaBatch
from d2f.decoding.workspace import Workspace
from d2f.errors import RequestError
from d2f.models.transformer import Transformer
from d2f.testing import tiny_model

UNPAGED = ("vanilla", "parallel", "prefix-cache", "dual-cache", "reference")
ALONE = ("parallel", "prefix-cache", "dual-cache")


@pytest.fixture(scope="module", params=["llada", "Dream"])
def model(request):
    return tiny_model(request.param)


def request_of(prompt, length, strategy, **values):
    return Request(
        prompt_ids=prompt, max_new_tokens=length, strategy=strategy, eos_token_id=(), **values
    )


def alone(model, request):
    return generate_ids(
        model, request.prompt_ids, max_new_tokens=request.max_new_tokens,
        strategy=request.strategy, eos_token_id=(),
    )  # fmt: skip


@pytest.mark.parametrize("strategy", UNPAGED)
def test_requests_in_turn_leave_nothing_to_each_other(model, strategy):
    engine = Engine(model, EngineConfig(max_batch_size=1))
    shapes = [([1, 2, 3], 20), ([4], 9), ([5, 6, 7, 8], 19), ([1, 2, 3], 20)]
    requests = [request_of(prompt, length, strategy) for prompt, length in shapes]
    assert engine.generate(requests) == [alone(model, request) for request in requests]


@pytest.mark.parametrize("strategy", ALONE)
def test_such_requests_run_one_at_a_time(model, strategy):
    engine = Engine(model, EngineConfig(max_batch_size=4))
    requests = [request_of([n + 1] * (n + 1), 6 + n, strategy) for n in range(3)]
    numbers = [engine.add(request) for request in requests]
    engine.step()
    assert [bool(engine.view(number)) for number in numbers] == [True, False, False]
    outputs = {}
    while len(outputs) < 3:
        outputs |= {output.request_id: output.result for output in engine.step()}
    assert list(outputs) == numbers
    assert list(outputs.values()) == [alone(model, request) for request in requests]


@pytest.mark.parametrize("strategy", UNPAGED)
def test_an_abort_leaves_the_engine_usable(model, strategy):
    engine = Engine(model)
    request = request_of([1, 2], 12, strategy)
    number = engine.add(request_of([9, 8, 7], 16, strategy))
    engine.step()
    assert engine.abort(number)
    assert engine.generate([request]) == [alone(model, request)]


@pytest.mark.parametrize("strategy", UNPAGED)
def test_a_stream_only_grows(model, strategy):
    request = request_of([1, 2], 12, strategy)
    outputs = list(Engine(model).stream(request))
    for before, after in itertools.pairwise(outputs):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids
        known = [token for block in before.blocks for token in block.token_ids]
        later = [token for block in after.blocks for token in block.token_ids]
        for old, new in zip(known, later, strict=False):
            assert old in (None, new)
    assert outputs[-1].result == alone(model, request)
    assert len(outputs) == outputs[-1].result.num_forwards


@pytest.mark.parametrize("strategy", UNPAGED)
def test_logits_that_are_not_finite_give_an_error(strategy):
    model = tiny_model("llada")
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RequestError, match="not finite"):
        generate_ids(model, [1, 2], max_new_tokens=4, strategy=strategy)


class Letters:
    """Two letters for each token; some tokens cannot be decoded."""

    broken: frozenset[int] = frozenset()

    def decode(self, token_ids):
        if self.broken.intersection(token_ids):
            raise ValueError("cannot be decoded")
        return "".join(chr(65 + t // 10) + chr(97 + t % 10) for t in token_ids)


@pytest.mark.parametrize("strategy", UNPAGED)
def test_an_answer_ends_with_the_token_that_completes_a_stop(model, strategy):
    text = Letters().decode
    engine = Engine(model, tokenizer=Letters())
    options = {} if strategy == "reference" else {"block_length": 4}
    requests = [request_of([n + 1, n], 20, strategy, options=options) for n in range(2)]
    full = engine.generate(requests)
    # From the middle of a token to the middle of the next.
    stops = [text(result.token_ids)[11:13] for result in full]
    results = engine.generate(
        [
            request_of(request.prompt_ids, 20, strategy, options=options, stop=["??", stop])
            for request, stop in zip(requests, stops, strict=True)
        ]
    )
    for whole, stop, result in zip(full, stops, results, strict=True):
        ids = whole.token_ids
        fewest = next(n for n in range(len(ids) + 1) if stop in text(ids[:n]))
        assert result.token_ids == ids[:fewest]
        assert result.finish_reason == "stop"
        assert result.num_forwards <= whole.num_forwards
    assert sum(r.num_forwards for r in results) < sum(r.num_forwards for r in full)
    [result] = engine.generate([request_of([1, 0], 20, strategy, options=options, stop="??")])
    assert result == full[0]


def test_an_answer_that_cannot_be_decoded_fails_alone():
    model, tokenizer = tiny_model("llada"), Letters()
    engine = Engine(model, tokenizer=tokenizer)
    requests = [request_of([n + 1, 7 * n], 8, "vanilla", stop="??") for n in range(2)]
    full = engine.generate(requests)
    tokenizer.broken = frozenset(full[0].token_ids) - frozenset(full[1].token_ids)
    assert tokenizer.broken
    numbers = [engine.add(request) for request in requests]
    outputs = {}
    while len(outputs) < 2:
        outputs |= {output.request_id: output for output in engine.step()}
    assert "could not decode" in str(outputs[numbers[0]].error)
    assert outputs[numbers[1]].result == full[1]


def test_every_option_of_every_strategy_is_known_by_its_kind(model):
    values = {"algorithm": [], "eps": "x", "threshold": "x", "factor": "x", "refresh_share": "x"}
    for strategy, facts in STRATEGIES.items():
        for option in facts.option_kinds:
            options = {option: values.get(option, 1.5)}
            with pytest.raises(ValueError, match=f"strategy {strategy}: {option} is"):
                Engine(model).add(request_of([1], 4, strategy, options=options))


def test_a_batch_that_cannot_start_stays_queued(monkeypatch):
    engine = Engine(tiny_model("llada"))
    request = request_of([1, 2], 6, "parallel")
    number = engine.add(request)
    with monkeypatch.context() as patch:

        def full(*arguments):
            raise RuntimeError("full")

        patch.setattr(Workspace, "buffers", full)
        with pytest.raises(RuntimeError, match="full"):
            engine.step()
    assert (engine.status().num_waiting, engine.status().num_running) == (1, 0)
    outputs = []
    while not outputs:
        outputs = engine.step()
    assert outputs[0].request_id == number
    assert len(outputs[0].result.token_ids) == 6


@pytest.mark.parametrize("owner", [Transformer, Workspace])
def test_a_request_that_memory_does_not_hold_fails_alone(owner, monkeypatch):
    model, most = tiny_model("llada"), 100
    name = "forward_packed" if owner is Transformer else "padded"
    works = getattr(owner, name)

    def of_little_memory(self, tokens, *rest):
        count = tokens if isinstance(tokens, int) else len(tokens)
        if count > most:
            raise torch.OutOfMemoryError("out of memory")
        return works(self, tokens, *rest)

    requests = [request_of([n, 1], 30, "vanilla") for n in range(5)]
    expected = Engine(model).generate(requests)
    monkeypatch.setattr(owner, name, of_little_memory)
    engine = Engine(model)
    numbers = [engine.add(request) for request in requests]
    # It comes in the middle of what would fit two by two.
    long = engine.add(request_of([1] * 60, 60, "vanilla"))
    outputs = {}
    for _ in range(200):
        outputs |= {output.request_id: output for output in engine.step()}
    assert [outputs[number].result for number in numbers] == expected
    assert "not enough memory for this request" in str(outputs[long].error)
    assert engine._tasks == {}
    for request in requests[:3]:
        engine.add(request)
    engine.step()
    assert engine.status().num_running == 3, "of the small ones several fit all the same"


def broken_once(monkeypatch, owner, name):
    """The method does its work, then fails; the first time only."""
    works, failures = getattr(owner, name), []

    def fails(*arguments, **options):
        result = works(*arguments, **options)
        if not failures:
            failures.append(name)
            raise RuntimeError("broken off")
        return result

    monkeypatch.setattr(owner, name, fails)
    return failures


BREAKS = [
    (VanillaBatch, "select", "vanilla"),
    (Canvas, "_write", "vanilla"),
    (Canvas, "report", "dual-cache"),
    *((FastBatch, name, "dual-cache") for name in ("finished", "results", "view")),
    *((DLLMCacheBatch, name, "dllm-cache") for name in ("finished", "results", "view")),
]


@pytest.mark.parametrize(("owner", "name", "strategy"), BREAKS)
def test_whatever_breaks_off_starts_again(monkeypatch, owner, name, strategy):
    engine = Engine(tiny_model("Dream"))
    requests = [request_of([n + 1, 5], 3 + 4 * n, strategy, seed=n) for n in range(4)]
    expected = [engine.generate([request])[0] for request in requests]
    numbers = [engine.add(request) for request in requests]
    failures = broken_once(monkeypatch, owner, name)
    outputs = {}
    while len(outputs) < 4:
        try:
            outputs |= {output.request_id: output.result for output in engine.step()}
        except RuntimeError:
            assert failures
    assert failures
    assert [outputs[number] for number in numbers] == expected


def test_no_page_cache_is_made_for_those_that_need_none(monkeypatch):
    model = tiny_model("llada")

    def refused(*arguments, **options):
        raise AssertionError("it made a cache")

    monkeypatch.setattr("d2f.engine.engine.PagedCache", refused)
    request = request_of([1, 2], 5, "vanilla")
    engine = Engine(model)
    with engine.timed() as clock:
        [result] = engine.generate([request])
    engine.forget_prompts()
    assert (clock.times(), engine.num_preemptions, engine.num_graphs) == ([], 0, 0)
    assert alone(model, request) == result
    engine.close()
    assert (engine.num_preemptions, engine.num_graphs) == (0, 0)
    with pytest.raises(RequestError, match="closed"), engine.timed():
        pass


def test_steps_are_noted_from_the_first_request_on():
    engine = Engine(tiny_model("llada"))
    with engine.timed() as clock:
        [result] = engine.generate([request_of([1, 2], 5, "pipelined")])
    engine.generate([request_of([1, 2], 5, "pipelined")])
    assert len(clock.times()) == result.num_forwards


@pytest.mark.parametrize("strategy", ["vanilla", "pipelined"])
def test_an_answer_whose_end_cannot_be_decoded_fails_alone(strategy):
    at_once = {"num_steps": 1} if strategy == "vanilla" else {}
    model, tokenizer = tiny_model("llada"), Letters()
    request = request_of(
        [1, 2], 6, strategy, options=at_once, policy=DecodingPolicy(confidence_threshold=0.0)
    )
    [whole] = Engine(model).generate([request])
    assert whole.num_forwards == 1
    end = next(t for t in whole.token_ids if t != whole.token_ids[0])
    cut = whole.token_ids[: whole.token_ids.index(end) + 1]

    def decode(token_ids):
        if token_ids == cut:
            raise ValueError("cannot be decoded")
        return tokenizer.decode(token_ids)

    engine = Engine(model, tokenizer=SimpleNamespace(decode=decode))
    ends = dataclasses.replace(request, eos_token_id=end, stop="??")
    numbers = [engine.add(ends), engine.add(dataclasses.replace(request, stop="??"))]
    outputs = {}
    while len(outputs) < 2:
        outputs |= {output.request_id: output for output in engine.step()}
    assert "could not decode" in str(outputs[numbers[0]].error)
    assert outputs[numbers[1]].result.token_ids == whole.token_ids

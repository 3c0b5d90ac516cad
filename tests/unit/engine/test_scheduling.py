"""Who joins when, what is shared, what it costs, and what is left afterwards."""

import gc
import random
import weakref

import pytest
import torch
from tests.unit.engine.workload import (
    answer_of_oracle,
    cached_model,
    check_answers,
    check_idle,
    drive,
    lane_of,
    make_engine,
    random_cases,
)

from d2f import DecodingPolicy, Engine, Request, generate_ids
from d2f.decoding import rows
from d2f.testing import tiny_model

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in-step", "overlapped"])
POLICY = DecodingPolicy(block_size=4, confidence_threshold=0.5)
SHARING = [("llada", "pipelined"), ("Dream", "pipelined"), ("qwen2", "autoregressive")]


def request_of(prompt, strategy="pipelined", length=9, **values):
    return Request(
        prompt_ids=prompt,
        max_new_tokens=length,
        policy=POLICY,
        strategy=strategy,
        eos_token_id=(),
        **values,
    )


def run(engine, numbers):
    outputs = {}
    while len(outputs) < len(numbers):
        outputs |= {output.request_id: output for output in engine.step()}
    return [outputs[number].result for number in numbers]


# --------------------------------------------------------------------------------------- sharing


@OVERLAP
@pytest.mark.parametrize(("name", "strategy"), SHARING)
@pytest.mark.parametrize("length", [1, 4, 7, 8])
def test_a_prompt_is_computed_once(name, strategy, length, overlap):
    """Also where its last page is full, or filled in part and so private to each."""
    model = cached_model(name)
    prompt = list(range(10, 10 + length))
    cases = [
        answer_of_oracle(model, request_of(prompt, strategy, temperature=0.9, seed=seed))
        for seed in range(4)
    ]
    engine = make_engine(model, overlap=overlap)
    first = engine.add(cases[0].request)
    engine.step()
    numbers = [first, *(engine.add(case.request) for case in cases[1:])]
    engine.step()
    assert len(lane_of(engine).running) == 4, "what is cached need not wait for anything"
    results = run(engine, numbers)
    computed_again = 1 if strategy == "autoregressive" else 0
    for index, (result, case) in enumerate(zip(results, cases, strict=True)):
        assert result.token_ids == case.result.token_ids
        saved = 0 if index == 0 else length - computed_again
        assert result.num_query_tokens == case.result.num_query_tokens - saved
    assert len(lane_of(engine).prompts) == 1
    check_idle(engine)


@OVERLAP
@pytest.mark.parametrize(("name", "strategy"), SHARING)
def test_prompts_outlive_their_requests_until_pages_are_needed(name, strategy, overlap):
    model = cached_model(name)
    engine = make_engine(model, 12, overlap=overlap)
    one, other = ([start + i for i in range(14)] for start in (10, 40))
    expected = {
        tuple(prompt): answer_of_oracle(model, request_of(prompt, strategy)).result
        for prompt in (one, other)
    }

    def computed(prompt):
        [result] = engine.generate([request_of(prompt, strategy)])
        assert result.token_ids == expected[tuple(prompt)].token_ids
        return expected[tuple(prompt)].num_query_tokens - result.num_query_tokens

    assert computed(one) == 0
    assert computed(one) >= 13, "kept after its request was done"
    assert computed(other) == 0
    assert computed(one) >= 13
    long = request_of([70 + i for i in range(20)], strategy, length=28)
    engine.generate([long])
    assert computed(one) == 0, "the pages were needed"
    engine.forget_prompts()
    assert computed(one) == 0
    check_idle(engine)


def test_requests_without_a_prompt_join_together():
    model = cached_model("llada")
    engine = make_engine(model)
    numbers = [engine.add(request_of([])) for _ in range(5)]
    engine.step()
    assert len(lane_of(engine).running) == 5
    results = run(engine, numbers)
    assert results == [results[0]] * 5
    check_idle(engine)


# ------------------------------------------------------------------------------------- admission


@OVERLAP
@pytest.mark.parametrize("budget", [1, 12, 40])
def test_joining_requests_keep_to_the_budget(budget, overlap, monkeypatch):
    model, rng = cached_model("llada"), random.Random(budget)
    engine = make_engine(model, overlap=overlap, prefill_tokens=budget, max_batch_size=32)
    prompts = [[rng.randrange(94) for _ in range(rng.choice([2, 9, 30]))] for _ in range(30)]
    numbers = [engine.add(request_of(prompt)) for prompt in prompts]
    lane = lane_of(engine)
    admit, joining = lane._admit, []

    def watch():
        joined = admit()
        joining.append([task.state.end - task.state.start for task in joined])
        return joined

    monkeypatch.setattr(lane, "_admit", watch)
    run(engine, numbers)
    assert sum(map(len, joining)) >= 30
    for counts in joining:
        assert sum(counts) <= budget or len(counts) == 1
    assert budget == 1 or max(map(len, joining)) > 1


def test_a_row_longer_than_the_step_allows_sits_out():
    from d2f.decoding.batch import RowRequest
    from d2f.decoding.rows import NEW_ROW, HostRow, RowSizes, RowStorage
    from d2f.ops.packed import pack_tokens

    sizes = RowSizes(num_blocks=4, block_size=4, prompt_length=2, num_eos=1)
    storage = RowStorage(sizes, max_rows=4, num_pages=8, mask_token_id=94)
    for row, end in enumerate((5, 14, 4)):
        sequence = HostRow(asked=RowRequest(prompt=[1, 2], max_new_tokens=16, policy=POLICY))
        storage.write(row, sequence, NEW_ROW._replace(start=2, end=end, opened=1), [True], 0.9)
    settings = {"page_size": 4, "max_end": 18, "prefill": False, "causal": False}
    rows = storage.rows(4)
    packing = pack_tokens(rows, num_tokens=16, max_count=4, **settings)
    assert packing.runs_B.tolist() == [True, False, True, False]
    assert packing.packed.counts_B.tolist() == [3, 0, 2, 0]
    assert packing.row_T[:5].tolist() == [0, 0, 0, 2, 2]
    # Too few tokens for all: the last rows sit out.
    packing = pack_tokens(rows, num_tokens=14, max_count=16, **settings)
    assert packing.packed.counts_B.tolist() == [3, 0, 0, 0]


@OVERLAP
@pytest.mark.parametrize(("name", "strategy"), SHARING)
def test_whoever_sits_out_at_first_may_be_preempted(name, strategy, overlap):
    model = cached_model(name)
    engine = make_engine(model, overlap=overlap)
    number = engine.add(request_of([1, 2, 3], strategy))
    lane = lane_of(engine)
    lane._select()
    # It has a row and pages, but no forward yet.
    lane._preempt(lane.running[0])
    assert run(engine, [number]) == generate_and_wrap(model, [1, 2, 3], strategy)


def generate_and_wrap(model, prompt, strategy):
    return Engine(model).generate([request_of(prompt, strategy)])


@pytest.mark.parametrize("overlap", [False, True])
def test_large_blocks_beside_many_small_ones_wait_for_room(overlap, monkeypatch):
    """One grid holds all rows; where it would grow too large, a request runs without the others."""
    monkeypatch.setattr(rows, "MOST_PLACES", 4 * 64)
    model = cached_model("llada")
    policies = [DecodingPolicy(block_size=size) for size in (1, 32, 1, 32, 2)]
    cases = [
        answer_of_oracle(
            model, Request(prompt_ids=[i + 1, 5], max_new_tokens=32, policy=policy, eos_token_id=())
        )
        for i, policy in enumerate(policies)
    ]
    engine = make_engine(model, overlap=overlap, max_batch_size=4)
    outputs = drive(engine, cases, random.Random(0), burst=5)
    check_answers(outputs, cases)
    assert len(outputs) == 5
    check_idle(engine)


# ---------------------------------------------------------------------------------------- leaving


@OVERLAP
def test_two_hundred_aborts_leave_nothing(overlap):
    cases = random_cases("llada") * 8
    engine = make_engine(cached_model("llada"), 60, overlap=overlap, max_batch_size=16)
    outputs = drive(engine, cases, random.Random(5), burst=12, abort_share=0.95)
    assert len(cases) - len(outputs) >= 200
    check_answers(outputs, cases)
    check_idle(engine)


def test_a_dropped_engine_frees_its_cache_at_once():
    gc.collect()
    gc.disable()
    try:
        engine = make_engine(tiny_model("llada"))
        engine.generate([request_of([1, 2])])
        reference = weakref.ref(lane_of(engine).decoder.cache)
        del engine
        assert reference() is None
    finally:
        gc.enable()


def test_generate_ids_frees_its_cache_even_if_it_fails(monkeypatch):
    model, caches = tiny_model("llada"), []
    forward = model.forward_packed

    def fail(ids_T, packed, cache, backend):
        caches.append(weakref.ref(cache))
        if len(caches) > 2:
            raise RuntimeError("broken")
        return forward(ids_T, packed, cache, backend)

    monkeypatch.setattr(model, "forward_packed", fail)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="broken") as error:
            generate_ids(model, [1, 2], max_new_tokens=30, eos_token_id=())
        # The engine itself is still known to the traceback.
        assert error.value.__traceback__ is not None
        del error
        assert caches[0]() is None
    finally:
        gc.enable()


def test_closing_twice_is_fine_and_forgets_everything():
    engine = make_engine(tiny_model("llada"))
    engine.add(request_of([1, 2]))
    engine.step()
    engine.close()
    engine.close()
    assert not engine._lanes
    assert torch.is_tensor(engine.model.embed.weight)


def test_a_request_that_waits_for_another_lane_gives_up_no_prompt():
    model, prompt = cached_model("llada"), list(range(20, 28))

    def request(prompt, strategy, length):
        # Of one block, so that it takes all its pages at once.
        return Request(prompt_ids=prompt, max_new_tokens=length, strategy=strategy, eos_token_id=())

    def computed(engine, others):
        engine.generate([request(prompt, "pipelined", 4)])
        for other in others:
            engine.add(other)
        engine.step()
        [result] = engine.generate([request(prompt, "entropy", 32)])
        return result.num_query_tokens

    long = request(list(range(40, 48)), "pipelined", 32)
    assert computed(make_engine(model, 12), [long]) == computed(make_engine(model, 99), [])

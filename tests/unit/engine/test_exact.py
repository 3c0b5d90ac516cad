"""However requests are batched, paged, delayed and interrupted, answers are the oracle's."""

import functools
import json
import random
from pathlib import Path

import pytest
import torch
from tests.unit.engine.workload import (
    MODELS,
    Case,
    answer_of_oracle,
    cached_model,
    check_answers,
    check_idle,
    check_pages,
    drive,
    lane_of,
    make_engine,
    pages_for,
    random_cases,
)

import d2f
from d2f.decoding.batch import GenerationResult, cut_at_eos
from d2f.engine.runner import Pending, StepSizer

GOLDEN = Path(__file__).parents[2] / "golden"
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in-step", "overlapped"])


def golden_cases(name: str) -> list[Case]:
    cases = []
    for trace in json.loads((GOLDEN / name / "decode.json").read_text()):
        request = d2f.Request(
            prompt_ids=trace["prompt"],
            max_new_tokens=trace["max_new_tokens"],
            policy=d2f.DecodingPolicy(
                block_size=trace["block_size"],
                add_threshold=trace["tau_add"],
                activate_threshold=trace["tau_act"],
                confidence_threshold=trace["tau_conf"],
            ),
            eos_token_id=trace["eos_token_id"],
            early_stop=False,
        )
        token_ids, reason = cut_at_eos(trace["output"], (trace["eos_token_id"],))
        result = GenerationResult(
            token_ids=token_ids,
            probabilities=[],
            num_forwards=trace["forwards"],
            num_prefill_forwards=0,
            num_query_tokens=trace["forwarded_tokens"],
            finish_reason=reason,
        )
        cases.append(Case(request, result, margin=1.0))
    return cases


@pytest.fixture(scope="module", params=["llada-tiny", "dream-tiny"])
def golden(request):
    folder = GOLDEN / request.param
    model = d2f.load_model(folder, adapter=folder / "adapter", device="cpu")
    return model, golden_cases(request.param)


# Each of the pairs comes in test_random_work_equals_the_oracle.
@pytest.mark.parametrize(("page_size", "overlap"), [(1, False), (3, True), (16, True)])
def test_golden_traces_in_random_batches(golden, page_size, overlap):
    model, cases = golden
    rng = random.Random(page_size)
    engine = make_engine(
        model, page_size=page_size, overlap=overlap, max_batch_size=rng.choice([3, 7, 32])
    )
    # The same prompts come again and again; the authors' loop computes each of them.
    outputs = drive(engine, cases, rng, on_step=engine.forget_prompts)
    assert len(outputs) == len(cases)
    check_answers(outputs, cases, query_tokens=True)
    check_answers(drive(engine, cases, rng), cases)
    check_idle(engine)


def test_few_cases_are_decided_narrowly():
    cases = [case for name in MODELS for case in random_cases(name)]
    assert sum(not case.clear for case in cases) < 0.01 * len(cases)


@OVERLAP
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 1, "max_batch_size": 5},
        {"page_size": 3, "max_batch_size": 16, "prefill_tokens": 12},
        {"page_size": 16, "max_batch_size": 64, "prefill_tokens": 1},
        {"page_size": 64, "max_batch_size": 1},
    ],
    ids=lambda settings: f"pages-of-{settings['page_size']}",
)
def test_random_work_equals_the_oracle(name, settings, overlap):
    # One at a time, none can harm another.
    cases = random_cases(name)[:: 1 if settings["max_batch_size"] > 1 else 3]
    engine = make_engine(cached_model(name), overlap=overlap, **settings)
    rng = random.Random(str((name, settings, overlap)))
    outputs = drive(engine, cases, rng, burst=rng.choice([1, 4, 60]))
    assert len(outputs) == len(cases)
    check_answers(outputs, cases)
    check_idle(engine)


@OVERLAP
@pytest.mark.parametrize("name", MODELS)
def test_aborts_and_few_pages_change_no_answer(name, overlap, monkeypatch):
    """Freed pages are spoilt, so that reading one shows."""
    cases = random_cases(name)
    engine = make_engine(
        cached_model(name), pages_for(cases, 4) + 3, overlap=overlap, max_batch_size=9
    )
    pool, cache = lane_of(engine).pool, lane_of(engine).decoder.cache
    release = pool.release

    def spoil(pages):
        release(pages)
        for page in set(pages) & set(pool._free):
            cache.kv_N2SKH[:, :, page * 4 : page * 4 + 4] = torch.nan

    monkeypatch.setattr(pool, "release", spoil)
    outputs = drive(
        engine, cases, random.Random(name), abort_share=0.1, on_step=lambda: check_pages(engine)
    )
    assert 10 < len(outputs) < len(cases)
    check_answers(outputs, cases)
    check_idle(engine)


@pytest.mark.parametrize(
    ("name", "overlap"), [*((name, False) for name in MODELS), (MODELS[0], True)]
)
def test_many_preemptions_lose_nothing(name, overlap):
    cases = random_cases(name)
    engine = make_engine(
        cached_model(name), pages_for(cases, 1), overlap=overlap, page_size=1, max_batch_size=12
    )
    lane, rng = lane_of(engine), random.Random(name)
    oldest: list[tuple[int, int]] = []

    def watch():
        check_pages(engine)
        alive = [task for task in (*lane.running, *lane.waiting) if task.num_in_flight == 0]
        if alive and not overlap:
            first = min(alive, key=lambda task: task.number)
            # Whoever is oldest ran in this step, however few pages there are.
            assert (first.number, first.state.forwards) not in oldest
            oldest.append((first.number, first.state.forwards))

    rounds = 0
    while lane.num_preemptions < 25:
        outputs = drive(engine, cases, rng, burst=20, on_step=watch, most_steps=4000)
        assert len(outputs) == len(cases)
        check_answers(outputs, cases)
        rounds += 1
        oldest.clear()
        assert rounds < 4
    check_idle(engine)


@functools.cache
def eager_cases(name: str) -> tuple[Case, ...]:
    """Requests that complete several blocks in one step, so that their rows grow and shrink."""
    rng, cases = random.Random(name), []
    for _ in range(40):
        policy = d2f.DecodingPolicy(
            block_size=rng.randint(1, 3),
            add_threshold=0.0,
            activate_threshold=rng.choice([0.0, 0.5, 1.0]),
            confidence_threshold=rng.choice([0.3, 0.4, 0.5]),
        )
        request = d2f.Request(
            prompt_ids=[rng.randrange(94) for _ in range(rng.choice([2, 5, 20]))],
            max_new_tokens=rng.randint(20, 60),
            policy=policy,
            eos_token_id=(),
            strategy="autoregressive" if name == "qwen2" else "pipelined",
        )
        cases.append(answer_of_oracle(cached_model(name), request))
    return tuple(cases)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pages", [400, 40], ids=["many-pages", "few-pages"])
def test_rows_that_do_not_fit_sit_out(name, pages, monkeypatch):
    cases, rng = eager_cases(name), random.Random(name)
    engine = make_engine(
        cached_model(name), pages, overlap=True, max_batch_size=16, prefill_tokens=32
    )
    lane, bucket = lane_of(engine), StepSizer._bucket
    too_small = stalls = 0

    def small_bucket(self, running, counts):
        nonlocal too_small
        enough = bucket(self, running, counts)
        if any(task.stalled for task in running) or rng.random() < 0.3:
            return enough
        too_small += 1
        return max(1, rng.randint(enough // 3, enough))

    def count_stalls():
        nonlocal stalls
        stalls += sum(task.stalled for task in lane.running)
        check_pages(engine)
        if lane.running and rng.random() < 0.2:
            # One that comes back computes all of its response's blocks in its first step.
            lane._preempt(rng.choice(lane.running))

    monkeypatch.setattr(StepSizer, "_bucket", small_bucket)
    outputs = drive(engine, cases, rng, burst=2, on_step=count_stalls)
    assert len(outputs) == len(cases)
    assert too_small > 30
    assert stalls > 30
    check_answers(outputs, cases)
    check_idle(engine)


@OVERLAP
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("where", ["before", "after", "reading"])
def test_an_interrupt_loses_nothing(name, overlap, where, monkeypatch):
    model, cases, rng = cached_model(name), random_cases(name)[:25], random.Random(where)
    engine = make_engine(model, overlap=overlap, max_batch_size=8)
    forward, read = model.forward_packed, Pending.read
    interrupts = 0

    def interrupt(place):
        nonlocal interrupts
        if place == where and rng.random() < 0.2:
            interrupts += 1
            raise rng.choice([KeyboardInterrupt, RuntimeError])

    def broken_forward(*arguments):
        interrupt("before")
        hidden_TD = forward(*arguments)
        interrupt("after")
        return hidden_TD

    def broken_read(self):
        interrupt("reading")
        return read(self)

    monkeypatch.setattr(model, "forward_packed", broken_forward)
    monkeypatch.setattr(Pending, "read", broken_read)
    step = engine.step

    def patient_step():
        try:
            return step()
        except (KeyboardInterrupt, RuntimeError):
            return []

    monkeypatch.setattr(engine, "step", patient_step)
    outputs = drive(engine, cases, rng)
    assert interrupts > 5
    check_answers(outputs, cases)
    where = "nowhere"
    check_idle(engine)

"""An engine tells of its requests while they wait and run."""

import itertools

import pytest
from tests.unit.engine.workload import (
    check_idle,
    check_pages,
    check_probabilities,
    lane_of,
    make_engine,
)

from d2f import DecodingPolicy, Engine, EngineConfig, Request
from d2f.decoding.batch import cut_at_eos, decoded_prefix
from d2f.decoding.strategies import STRATEGIES
from d2f.engine.engine import EngineStatus
from d2f.errors import RequestError
from d2f.testing import tiny_model

MODELS = {name: tiny_model(name) for name in ("llada", "Dream", "qwen2")}
POLICY = DecodingPolicy(block_size=4, confidence_threshold=0.2, activate_threshold=0.5)
WAYS = [
    *((name, strategy) for name in ("llada", "Dream") for strategy in STRATEGIES),
    ("qwen2", "autoregressive"),
]
WAYS = [way for way in WAYS if (way[0] == "qwen2") == (way[1] == "autoregressive")]
EVERY_WAY = pytest.mark.parametrize(("name", "strategy"), WAYS)
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in-step", "overlapped"])


class Letters:
    """A letter for each token."""

    def decode(self, token_ids):
        return "".join(chr(0x100 + token) for token in token_ids)


def request_of(prompt, strategy, length=14, **values):
    values = {"eos_token_id": (), "policy": POLICY} | values
    return Request(prompt_ids=prompt, max_new_tokens=length, strategy=strategy, **values)


def flat(blocks, name):
    return list(itertools.chain.from_iterable(getattr(block, name) for block in blocks))


# --------------------------------------------------------------------------------- probabilities


@OVERLAP
@EVERY_WAY
def test_a_token_keeps_the_probability_that_it_was_shown_with(name, strategy, overlap):
    engine = make_engine(MODELS[name], overlap=overlap)
    *outputs, last = engine.stream(request_of([1, 2, 3], strategy, temperature=0.7))
    shown = {}
    for output in [*outputs, last]:
        tokens, known = flat(output.blocks, "token_ids"), flat(output.blocks, "probabilities")
        check_probabilities(tokens, known)
        places = enumerate(zip(tokens, known, strict=True))
        pairs = {place: pair for place, pair in places if pair[0] is not None}
        assert shown.items() <= pairs.items()
        shown = pairs
    result = last.result
    assert len(result.token_ids) == 14
    assert dict(enumerate(zip(result.token_ids, result.probabilities, strict=True))) == shown


@EVERY_WAY
def test_probabilities_end_with_the_answer(name, strategy):
    engine = Engine(MODELS[name], tokenizer=Letters())
    [full] = engine.generate([request_of([1, 2], strategy)])
    ends = {"eos_token_id": full.token_ids[8]}, {"stop": Letters().decode(full.token_ids[8:9])}
    for values, early_stop in itertools.product(ends, [True, False]):
        request = request_of([1, 2], strategy, early_stop=early_stop, **values)
        [result] = engine.generate([request])
        length = full.token_ids.index(full.token_ids[8]) + 1
        assert result.token_ids == full.token_ids[:length]
        assert result.probabilities == pytest.approx(full.probabilities[:length], abs=1e-5)


@OVERLAP
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("llada", "pipelined"), ("Dream", "serial"), ("qwen2", "autoregressive")],
)
def test_what_gave_way_keeps_its_probabilities(name, strategy, overlap):
    model = MODELS[name]
    requests = [request_of([n, n + 1], strategy, 30) for n in range(6)]
    expected = Engine(model).generate(requests)
    engine = make_engine(model, 14, overlap=overlap)
    results = engine.generate(requests)
    assert engine.num_preemptions > 0
    for result, alone in zip(results, expected, strict=True):
        assert result == alone or result.num_query_tokens > alone.num_query_tokens
        assert result.token_ids == alone.token_ids
        assert result.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    check_idle(engine)


@pytest.mark.parametrize("confidence", ["margin", "neg_entropy"])
def test_the_probability_is_the_tokens_own_whatever_ranks_it(confidence):
    policy = DecodingPolicy(block_size=8, confidence_threshold=1.0, confidence=confidence)
    request = request_of([5, 6], "pipelined", policy=policy)
    [result] = Engine(MODELS["llada"]).generate([request])
    [oracle] = Engine(MODELS["llada"]).generate([request_of([5, 6], "reference", policy=policy)])
    assert result.token_ids == oracle.token_ids
    assert result.probabilities == pytest.approx(oracle.probabilities, abs=1e-5)
    check_probabilities(result.token_ids, result.probabilities)


# -------------------------------------------------------------------------------------- progress


@OVERLAP
@EVERY_WAY
def test_progress_is_what_the_view_has_up_to_its_first_gap_or_eos(name, strategy, overlap):
    model = MODELS[name]
    [free] = Engine(model).generate([request_of([4, 5], strategy)])
    values = {"eos_token_id": (free.token_ids[10],), "early_stop": False}
    engine = make_engine(model, overlap=overlap)
    numbers = [engine.add(request_of([4, n], strategy, **values)) for n in (5, 6, 7)]
    for number in numbers:
        assert (engine.progress(number).token_ids, engine.progress(number).num_forwards) == ([], 0)
    results, before = {}, {number: [] for number in numbers}
    while len(results) < len(numbers):
        results |= {output.request_id: output.result for output in engine.step()}
        for number in set(numbers) - set(results):
            progress = engine.progress(number)
            seen = decoded_prefix(t for block in engine.view(number) for t in block.token_ids)
            assert progress.token_ids == cut_at_eos(seen, values["eos_token_id"])[0]
            assert progress.token_ids[: len(before[number])] == before[number]
            before[number] = progress.token_ids
    for number in numbers:
        ids = results[number].token_ids
        assert ids[: len(before[number])] == before[number]
        with pytest.raises(RequestError, match=f"no request {number}"):
            engine.progress(number)


@EVERY_WAY
def test_progress_counts_forwards_to_the_last(name, strategy):
    engine = Engine(MODELS[name])
    number = engine.add(request_of([1, 2], strategy))
    seen = []
    while not (outputs := engine.step()):
        seen.append(engine.progress(number).num_forwards)
    assert [*seen, outputs[0].result.num_forwards] == list(range(1, len(seen) + 2))


@pytest.mark.parametrize("strategy", ["pipelined", "vanilla"])
def test_progress_of_an_answer_that_nobody_took_yet_is_all_of_it(strategy):
    engine = Engine(MODELS["llada"])
    number = engine.add(request_of([1, 2], strategy, 5))
    # It is done while another caller waits.
    engine.generate([request_of([1, 2], strategy, 20)])
    progress = engine.progress(number)
    [output] = engine.step()
    assert progress.token_ids == output.result.token_ids
    assert progress.num_forwards == output.result.num_forwards
    assert len(progress.token_ids) == 5


# ---------------------------------------------------------------------------------------- status


def test_a_fresh_engine_has_no_pages():
    engine = Engine(MODELS["llada"])
    nothing = EngineStatus(num_waiting=0, num_running=0, num_pages=0, num_free_pages=0)
    assert engine.status() == nothing
    engine.add(request_of([1], "vanilla"))
    assert engine.status() == EngineStatus(
        num_waiting=1, num_running=0, num_pages=0, num_free_pages=0
    )
    engine.close()
    assert engine.status() == nothing


@OVERLAP
def test_status_follows_requests_that_wait_run_and_are_aborted(overlap):
    engine = make_engine(MODELS["llada"], 40, overlap=overlap, max_batch_size=4)
    # Five of one prompt, which is kept and shared, and one of another.
    prompts = [[1, 2, 3, 4, 5]] * 5 + [[9]]
    numbers = [engine.add(request_of(prompt, "pipelined", 40)) for prompt in prompts]

    def counts():
        check_pages(engine)
        status = engine.status()
        assert status.num_pages == 40
        return status.num_waiting, status.num_running, status.num_free_pages

    assert counts() == (6, 0, 40)
    engine.step()
    # The second computes no prompt that the first one is computing.
    assert counts()[:2] == (5, 1)
    engine.step()
    assert counts()[:2] == (2, 4)
    assert counts()[2] < 40
    for number in (numbers[-1], numbers[1]):
        assert engine.abort(number)
    assert counts()[:2] == (1, 3)
    assert len(lane_of(engine).prompts) == 1
    for number in numbers:
        engine.abort(number)
    assert counts() == (0, 0, 40)
    assert len(lane_of(engine).prompts) == 1, (
        "a kept prompt's pages are free for whoever wants them"
    )
    assert lane_of(engine).pool.num_free < 40
    assert engine.step() == []
    check_idle(engine)


def test_status_counts_both_kinds_of_requests():
    engine = Engine(MODELS["llada"], EngineConfig(max_batch_size=2))
    for n in range(3):
        engine.add(request_of([n], "vanilla"))
        engine.add(request_of([n], "pipelined"))
    assert (engine.status().num_waiting, engine.status().num_running) == (6, 0)
    engine.step()
    assert (engine.status().num_waiting, engine.status().num_running) == (2, 4)
    while engine._tasks:
        engine.step()
    assert (engine.status().num_waiting, engine.status().num_running) == (0, 0)

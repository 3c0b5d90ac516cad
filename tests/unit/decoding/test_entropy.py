"""Entropy acceptance: against an oracle without cache or batch, and on every surface."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tests.unit.engine.workload import (
    answer_of_oracle,
    cached_model,
    check_idle,
    lane_of,
    make_engine,
)
from typer.testing import CliRunner

from d2f import DecodingPolicy, Request, generate_ids
from d2f.cli.chat_session import ChatSession
from d2f.cli.main import app
from d2f.decoding.reference import BlockState, ReferenceSequence
from d2f.engine.policy import check_decoding
from d2f.engine.request import Task, resolve
from d2f.errors import ConfigError
from d2f.evaluation.eval_recipe import RowSettings
from d2f.serving.protocol import CompletionBody, parse_body
from d2f.testing import tiny_model, write_checkpoint
from d2f.text import Tokenizer

OPTIONS = [{}, {"threshold": 0}, {"threshold": 1.5}, {"threshold": 2.5}, {"threshold": 3}]


class EntropySequence(ReferenceSequence):
    """Algorithm 2 in which entropies stand in place of probabilities; notes narrow decisions."""

    limit_of_entropy = 0.5
    margin = 1.0

    def _choose(self, logits_V, position):
        candidate = super()._choose(logits_V, position)
        scaled_V = logits_V / (self.settings.temperature or 1.0)
        entropy = float(torch.distributions.Categorical(logits=scaled_V).entropy())
        self.margin = min(self.margin, abs(entropy - self.limit_of_entropy))
        top_2 = logits_V[: self.model.spec.mask_token_id].topk(2).values
        if self.settings.temperature == 0:
            self.margin = min(self.margin, float(top_2[0] - top_2[1]))
        return candidate._replace(rank=-entropy)

    def _accept(self, candidates):
        self.num_forwards[0] += 1
        for number, block in enumerate(self.blocks):
            mine = {o: value for (n, o), value in candidates.items() if n == number}
            chosen = [o for o, found in mine.items() if -found.rank < self.limit_of_entropy]
            if mine and not chosen and block.state is BlockState.FULLY_ACTIVE:
                chosen = [min(mine, key=lambda o: -mine[o].rank)]
                ranks = sorted((found.rank for found in mine.values()), reverse=True)
                self.margin = min([self.margin, *(ranks[0] - rank for rank in ranks[1:2])])
            for offset in chosen:
                block.tokens[offset] = mine[offset].token
                block.probabilities[offset] = mine[offset].probability
                self.eos_seen |= mine[offset].token in self.settings.eos_token_ids


def answer(model, request):
    """What the oracle answers, and how narrowly it decided."""
    full = resolve(request, model.spec)
    asked = Task.of(0, full, model.spec, None).asked
    sequence = EntropySequence(model, [asked])
    sequence.limit_of_entropy = full.options.get("threshold", 0.5)
    while not all(sequence.done):
        sequence.step()
    return sequence.results([0])[0], sequence.margin


def told(result):
    return result.token_ids, result.num_forwards, result.finish_reason


def random_requests(count):
    rng = random.Random(count)
    return [
        Request(
            prompt_ids=[rng.randrange(90) for _ in range(rng.choice([1, 3, 9]))],
            max_new_tokens=rng.choice([1, 6, 17]),
            policy=DecodingPolicy(
                block_size=rng.choice([1, 3, 4, 8]),
                add_threshold=rng.choice([0.0, 0.1, 0.5, 1.0]),
                activate_threshold=rng.choice([0.0, 0.5, 1.0]),
                max_live_blocks=rng.choice([None, 1, 2]),
            ),
            strategy="entropy",
            options=rng.choice(OPTIONS),
            temperature=rng.choice([0.0, 0.0, 0.8]),
            seed=rng.randrange(1000),
            early_stop=rng.random() < 0.7,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["llada", "Dream"])
def test_it_decodes_as_the_oracle_alone_and_beside_others(name, overlap):
    """The others run on the same pages with another decoder, and there are few pages."""
    model, requests = cached_model(name), random_requests(16)
    expected = [answer(model, request) for request in requests]
    others = [replace(r, strategy="pipelined", options={}) for r in requests[:6]]
    cases = [answer_of_oracle(model, request) for request in others]
    engine = make_engine(model, 8, overlap=overlap, max_batch_size=5)
    results = engine.generate([*requests, *others])
    expected += [(case.result, case.margin) for case in cases]
    assert engine.num_preemptions > 0
    clear = 0
    for request, (oracle, margin), result in zip(
        [*requests, *others], expected, results, strict=True
    ):
        if margin > 1e-5:
            clear += 1
            assert told(result) == told(oracle), request
            assert result.probabilities == pytest.approx(oracle.probabilities, abs=1e-4)
    assert clear >= 18
    lane = lane_of(engine, "entropy")
    assert lane is not lane_of(engine, "pipelined")
    assert lane.pool is lane_of(engine, "serial").pool
    check_idle(engine)


def test_whoever_waits_for_pages_is_not_overtaken_by_another_lane():
    engine = make_engine(cached_model("llada"), 8, max_batch_size=5)
    policy = DecodingPolicy(block_size=8, confidence_threshold=1.0)
    small = Request(prompt_ids=[1, 2], max_new_tokens=14, policy=policy, eos_token_id=())
    large = Request(
        prompt_ids=[3] * 9, max_new_tokens=23, policy=policy, eos_token_id=(), strategy="entropy"
    )
    first = engine.add(replace(small, strategy="pipelined"))
    engine.step()
    second, done = engine.add(large), []
    while second not in done:
        engine.add(small)
        done += [output.request_id for output in engine.step()]
        assert len(done) < 3
    assert done == [first, second]


def test_the_threshold_is_what_makes_the_difference():
    model, counts = tiny_model("llada"), []
    for threshold in (0, 100):
        result = generate_ids(
            model, [1, 2], max_new_tokens=16, strategy="entropy", threshold=threshold,
            eos_token_id=(),
        )  # fmt: skip
        counts.append(result.num_forwards)
    assert counts == [16, 1]


def test_acceptance_may_be_imposed():
    engine = make_engine(tiny_model("llada"), imposed_acceptance=(3, 1))
    request = Request(prompt_ids=[1], max_new_tokens=6, strategy="entropy", eos_token_id=())
    [result] = engine.generate([replace(request, options={"threshold": 100})])
    assert result.num_forwards == 4


def test_every_surface_takes_it(tmp_path):
    table = {"threshold": 100.0}
    folder = write_checkpoint(tmp_path / "model", "llada", tokenizer=True)
    words = ["--strategy", "entropy", "--threshold", "100", "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, ["generate", "1+1=", "--model", str(folder), "--json", *words])
    assert json.loads(done.stdout)["num_forwards"] == 1
    tokenizer = Tokenizer.load(folder)
    session = ChatSession(model=tiny_model("llada"), tokenizer=tokenizer, strategy="serial")
    session.change_strategy("entropy", ["threshold=100"])
    assert "entropy" in session.race_requests("1+1=")
    body = parse_body(CompletionBody, {"prompt": "1", "strategy": "entropy", "options": table})
    check_decoding(body.strategy, {"add_threshold": 0.5}, body.options)
    row = RowSettings(name="entropy", model="student", strategy="entropy", options=table)
    assert row.method == "entropy"


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ({}, {"threshold": -0.1}, "threshold is -0.1; it must be a number of at least 0"),
        ({}, {"threshold": float("nan")}, "threshold is nan"),
        ({}, {"treshold": 1}, "did you mean 'threshold'"),
        ({"confidence_threshold": 0.5}, {}, "without effect on strategy entropy"),
        ({"confidence": "margin"}, {}, "without effect on strategy entropy"),
    ],
)
def test_what_makes_no_sense_is_refused(policy, options, message):
    with pytest.raises(ConfigError, match=message):
        check_decoding("entropy", policy, options)

"""Random work for an engine, the oracle's answers to it, and how to drive an engine through it."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

from d2f import DecodingPolicy, Engine, EngineConfig, Request
from d2f.decoding.batch import BlockState, GenerationResult, cut_at_eos
from d2f.decoding.reference import ReferenceSequence
from d2f.decoding.strategies import STRATEGIES, default_strategy
from d2f.diffusion.policy import CONFIDENCES
from d2f.engine.request import Output, Task, resolve
from d2f.models.cache import PagedCache
from d2f.ops.sampling import Sampling, choose_tokens, gumbel_noise
from d2f.testing import tiny_model

LEAST_MARGIN = 1e-5
"""Where the oracle decides more narrowly than this, rounding may decide otherwise."""
SAMPLING = (
    {},
    {},
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.2, "top_p": 0.3},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.7},
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request, what the oracle answers, and how narrowly it decided."""

    request: Request
    result: GenerationResult
    margin: float

    @property
    def clear(self) -> bool:
        return self.margin >= LEAST_MARGIN


def random_request(rng: random.Random, causal: bool, prompts: list[list[int]]) -> Request:
    prompt = [rng.randrange(94) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 30]))]
    if prompts and rng.random() < 0.2:
        prompt = rng.choice(prompts)
    prompts.append(prompt)
    strategy = "autoregressive" if causal else rng.choice(["pipelined", "pipelined", "serial"])
    policy = DecodingPolicy(
        block_size=rng.randint(1, 9),
        add_threshold=rng.choice([0.0, 0.1, 0.5, 0.95, 1.0]),
        activate_threshold=rng.choice([0.0, 0.25, 0.9, 1.0]),
        confidence_threshold=rng.choice([0.0, 0.2, 0.5, 0.8, 0.95, 1.0]),
        max_live_blocks=rng.choice([None, None, 1, 2, 4]),
        confidence=rng.choice(CONFIDENCES),
    )
    return Request(
        prompt_ids=prompt,
        max_new_tokens=rng.choice([1, 2, 5, 9, 16, 24, 40]),
        policy=policy,
        eos_token_id=rng.choice([(), None, (95, 7), tuple(range(20, 26))]),
        strategy=strategy,
        early_stop=rng.random() < 0.7,
        seed=rng.randrange(2**40),
        **rng.choice(SAMPLING),
    )


class CarefulSequence(ReferenceSequence):
    """The oracle, noting the narrowest of its decisions."""

    margin = 1.0

    def _choose(self, logits_V, position):
        candidate = super()._choose(logits_V, position)
        threshold = self.policy.confidence_threshold
        self.narrow(abs(candidate.probability - threshold) if threshold < 1 else 1.0)
        if candidate.probability > threshold:
            self.narrow(self._gap(logits_V, position))
        return candidate

    def _accept(self, candidates):
        for number, block in enumerate(self.blocks):
            mine = [value for (n, _), value in candidates.items() if n == number]
            ranks = sorted((value.rank for value in mine), reverse=True)
            sure = any(v.probability > self.policy.confidence_threshold for v in mine)
            forced = block.state is BlockState.FULLY_ACTIVE and not sure
            # Of several whose top p is a single token, the first is taken, whatever the rounding.
            if forced and len(ranks) > 1 and ranks[1] < 1:
                self.narrow(ranks[0] - ranks[1])
        super()._accept(candidates)

    def _gap(self, logits_V, position):
        asked, [step], mask = self.settings, self.num_forwards, self.model.spec.mask_token_id
        return gap(logits_V, asked.temperature, asked.seed, position, step, mask)

    def narrow(self, margin):
        self.margin = min(self.margin, margin)


def gap(logits_V, temperature, seed, position, step, mask=None) -> float:
    """How far the best token is ahead of the second."""
    score_V = logits_V.float().clone()
    if mask is not None:
        score_V[mask] = -torch.inf
    if temperature == 0:
        top_2 = score_V.softmax(-1).topk(2).values
    else:
        key = (torch.tensor([value]) for value in (seed, position, step))
        top_2 = (score_V / temperature + gumbel_noise(*key, len(score_V))[0]).topk(2).values
    return float(top_2[0] - top_2[1])


def answer_of_oracle(model, request: Request) -> Case:
    """The answer without cache, pages or batch."""
    full = resolve(request, model.spec)
    if model.spec.architecture.causal:
        return autoregressive_oracle(model, request, full)
    sequence = CarefulSequence(model, [Task.of(0, full, model.spec, None).asked])
    while not all(sequence.done):
        sequence.step()
    return Case(request, sequence.results([0])[0], sequence.margin)


@torch.inference_mode()
def autoregressive_oracle(model, request: Request, full: Request) -> Case:
    tokens: list[int] = []
    probabilities: list[float] = []
    margin, num_prompt = 1.0, len(full.prompt_ids)
    while len(tokens) < full.max_new_tokens and not set(tokens) & set(full.eos_token_id):
        # One token more, as logits are aligned to the token that they predict.
        logits_V = model.logits(torch.tensor([[*full.prompt_ids, *tokens, 0]]))[0, -1]
        step, position = len(tokens), num_prompt + len(tokens)
        sampling = None
        if full.temperature > 0:
            sampling = Sampling(
                temperature_M=torch.tensor([full.temperature]),
                top_k_M=torch.tensor([full.top_k]),
                top_p_M=torch.tensor([full.top_p]),
                seed_M=torch.tensor([full.seed]),
                position_M=torch.tensor([position]),
                step_M=torch.tensor([step]),
                truncated=full.top_k > 0 or full.top_p < 1,
            )
        margin = min(margin, gap(logits_V, full.temperature, full.seed, position, step))
        choice = choose_tokens(logits_V[None], mask_token_id=None, sampling=sampling)
        tokens.append(int(choice.token_M))
        probabilities.append(float(choice.probability_M))
    token_ids, reason = cut_at_eos(tokens, full.eos_token_id)
    result = GenerationResult(
        token_ids=token_ids,
        probabilities=probabilities,
        num_forwards=len(tokens),
        num_prefill_forwards=0,
        num_query_tokens=num_prompt + len(tokens) - 1,
        finish_reason=reason,
    )
    return Case(request, result, margin)


MODELS = ("llada", "Dream", "qwen2")


@functools.cache
def cached_model(name: str):
    return tiny_model(name)


@functools.cache
def random_cases(name: str, count: int = 60, seed: int = 0) -> tuple[Case, ...]:
    """Random requests with the oracle's answers."""
    model, rng, prompts = cached_model(name), random.Random(f"{name} {seed}"), []
    requests = [random_request(rng, model.spec.architecture.causal, prompts) for _ in range(count)]
    return tuple(answer_of_oracle(model, request) for request in requests)


def make_engine(model, pages: int | None = None, **settings) -> Engine:
    """An engine whose cache has so many pages."""
    page_size = settings.setdefault("page_size", 4)
    if pages is not None:
        bytes_each = PagedCache.page_bytes(model.spec, page_size, model.dtype)
        settings["kv_cache_bytes"] = pages * bytes_each
    return Engine(model, EngineConfig(**settings))


def pages_for(cases, page_size: int) -> int:
    """Pages that the longest request needs."""
    longest = max(len(c.request.prompt_ids) + c.request.max_new_tokens for c in cases)
    return -(-longest // page_size)


def drive(
    engine: Engine,
    cases,
    rng: random.Random,
    *,
    burst: int = 4,
    abort_share: float = 0.0,
    on_step=lambda: None,
    most_steps: int = 20_000,
) -> dict[int, Output]:
    """Outputs by the case's index; requests arrive in random order at random steps."""
    order = list(range(len(cases)))
    rng.shuffle(order)
    index_of: dict[int, int] = {}
    outputs: dict[int, Output] = {}
    for _ in range(most_steps):
        for _ in range(min(rng.randint(0, burst), len(order))):
            index = order.pop()
            index_of[engine.add(cases[index].request)] = index
        if index_of and rng.random() < abort_share:
            number = rng.choice(sorted(index_of))
            assert engine.abort(number)
            del index_of[number]
        for output in engine.step():
            outputs[index_of.pop(output.request_id)] = output
        on_step()
        if not order and not index_of:
            return outputs
    raise AssertionError(f"{len(index_of)} requests are not done after {most_steps} steps")


def check_answers(outputs: dict[int, Output], cases, *, query_tokens: bool = False) -> int:
    """All that the oracle decided clearly are equal; returns how many were not decided clearly."""
    unclear = 0
    for index, output in outputs.items():
        case = cases[index]
        assert output.error is None, output.error
        check_probabilities(output.result.token_ids, output.result.probabilities)
        if not case.clear:
            unclear += 1
            continue
        got, expected = output.result, case.result
        assert got.token_ids == expected.token_ids, case
        assert got.num_forwards == expected.num_forwards, case
        assert got.finish_reason == expected.finish_reason, case
        # The golden traces have none.
        if expected.probabilities:
            assert got.probabilities == pytest.approx(expected.probabilities, abs=1e-4), case
        if query_tokens:
            assert got.num_query_tokens == expected.num_query_tokens, case
    return unclear


def check_probabilities(token_ids, probabilities) -> None:
    """What is decoded has a probability, and nothing else has."""
    assert len(probabilities) == len(token_ids)
    for token, probability in zip(token_ids, probabilities, strict=True):
        assert (token is None) == (probability is None)
        assert probability is None or 0 < probability <= 1


def lane_of(engine: Engine, strategy: str | None = None):
    """The lane that runs a strategy, or the model's own, on pages."""
    return engine._lane(STRATEGIES[strategy or default_strategy(engine.model.spec)])


def check_pages(engine: Engine) -> None:
    """Every page is free or held by exactly those that are known to hold it."""
    lane = lane_of(engine)
    held: dict[int, int] = {}
    status = engine.status()
    assert (status.num_waiting, status.num_running) == (len(lane.waiting), len(lane.running))
    for task in lane.running:
        assert len(set(task.pages)) == len(task.pages)
        for page in task.pages:
            held[page] = held.get(page, 0) + 1
    for task in lane.waiting:
        assert task.pages == []
    assert status.num_free_pages == status.num_pages - len(held)
    for entry in lane.prompts._entries.values():
        for page in entry.pages:
            held[page] = held.get(page, 0) + 1
    assert held == lane.pool._holders
    assert not set(held) & set(lane.pool._free)
    assert len(held) + lane.pool.num_free == lane.pool.num_pages
    assert [task.row for task in lane.running] == list(range(len(lane.running)))


def check_idle(engine: Engine) -> None:
    """Nothing is left but prompts that may be used again."""
    check_pages(engine)
    lane = lane_of(engine)
    # What was aborted last may still be on its way.
    while lane.busy:
        lane.step()
    assert engine._tasks == {}
    assert engine._ready == {}
    assert engine._watched == set()
    status = engine.status()
    assert (status.num_waiting, status.num_running) == (0, 0)
    assert status.num_free_pages == status.num_pages == lane.pool.num_pages
    engine.forget_prompts()
    assert lane.pool.num_free == lane.pool.num_pages

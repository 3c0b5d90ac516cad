"""The prompts of a load with the engine's own answers, and the verdict on a server's answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d2f.engine.engine import Engine
from d2f.engine.generate import generate_ids
from d2f.engine.request import Request
from d2f.models.checkpoint import load_model
from d2f.problems import generate_problems
from d2f.shipped import shipped_model
from d2f.text import Tokenizer

from .client import ServedAnswer

NUM_IDLE = 20
"""The number of prompts that one client asks of the idle server."""
SEED = 2026
DTYPE = "float32"
"""The dtype in which a batch changes no answer."""
VERDICTS = ("right", "lost", "doubled", "mixed", "wrong", "refused", "failed")
"""The verdicts on an answer. `refused` is a 429, `failed` another error that the server told; an
answer that never came to its end, or lacks a part, is `lost`."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A prompt and the engine's own answer."""

    prompt: str
    text: str
    num_tokens: int
    finish_reason: str
    """The protocol's word: `stop` or `length`."""


def judge(answer: ServedAnswer, pool: Sequence[Expected]) -> str:
    """The verdict on an answer, one of `VERDICTS`.

    Args:
        answer: An answer to one of the pool's prompts.
        pool: All prompts of the run; they tell an answer with a part of another one (`mixed`) from
            an answer that is wrong by itself.

    Example:
        >>> ends = {"num_tokens": 2, "finish_reason": "stop"}
        >>> pool = [Expected(prompt="1+1", text="= 2", **ends)]
        >>> judge(ServedAnswer(prompt=0, began=0.0, seconds=0.1, status=429), pool)
        'refused'
    """
    if answer.status == 429:
        return "refused"
    if answer.status is None:
        return "lost"
    if answer.status != 200:
        return "failed"
    if len(answer.finish_reasons) > 1 or len(answer.choices) > 1 or answer.num_done > 1:
        return "doubled"
    if len(answer.ids) > 1:
        return "mixed"
    if answer.fault is not None or not answer.finish_reasons or answer.num_done == 0:
        return "lost"
    expected = pool[answer.prompt]
    if answer.text != expected.text:
        others = [other.text for number, other in enumerate(pool) if number != answer.prompt]
        return _difference(answer.text, expected.text, others)
    same_end = answer.finish_reasons == [expected.finish_reason]
    same_count = answer.usage.get("completion_tokens") == expected.num_tokens
    return "right" if same_end and same_count else "wrong"


def _difference(text: str, expected: str, others: Sequence[str]) -> str:
    """The verdict on a text that is not the expected one."""
    head = _num_alike(text, expected)
    tail = _num_alike(text[head:][::-1], expected[head:][::-1])
    added = text[head : len(text) - tail]
    missing = expected[head : len(expected) - tail]
    if not added:
        return "lost"
    if not missing and added in expected:
        return "doubled"
    # Answers are alike in places, so a foreign part of a few characters proves nothing.
    foreign = text in others or (len(added) > 8 and any(added in other for other in others))
    return "mixed" if foreign else "wrong"


def _num_alike(one: str, other: str) -> int:
    """The number of characters at the beginning that are the same in both."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The prompts that the server is asked, with the answers that it must give."""

    busy: Sequence[Expected]
    idle: Sequence[Expected]
    """Prompts that are new to the server; they are asked first, one at a time."""
    block_seconds: Sequence[float]
    """Seconds that the engine alone takes for the first block of each of them."""


def make_pool(num_prompts: int, max_tokens: int, device: str, threads: int) -> Pool:
    """Word problems with the engine's own answers, and the seconds of each first block."""
    # As many as the server has: products are summed in the same order.
    torch.set_num_threads(threads)
    model = load_model(shipped_model("student"), device=device, dtype=DTYPE)
    tokenizer = Tokenizer.load(shipped_model("student"))
    problems = generate_problems(num_prompts + NUM_IDLE, seed=SEED, split="test")
    prompts = [problem.prompt for problem in problems]
    ids = [tokenizer.encode_prompt(prompt, chat=False) for prompt in prompts]
    results = generate_ids(model, ids, max_new_tokens=max_tokens)
    expected = [
        Expected(
            prompt=prompt,
            text=tokenizer.decode(result.token_ids),
            num_tokens=len(result.token_ids),
            finish_reason="stop" if result.finish_reason == "eos" else "length",
        )
        for prompt, result in zip(prompts, results, strict=True)
    ]
    alone = [Request(prompt_ids=p, max_new_tokens=max_tokens) for p in ids[:NUM_IDLE]]
    engine = Engine(model)
    block_seconds = first_block_seconds(engine, alone)
    engine.close()
    return Pool(busy=expected[NUM_IDLE:], idle=expected[:NUM_IDLE], block_seconds=block_seconds)


def first_block_seconds(engine: Engine, requests: Sequence[Request]) -> list[float]:
    """The seconds that the engine alone takes for all forwards of each answer's first block.

    The requests run one at a time, each with a prompt that is new to the engine, after one run that
    does not count.
    """
    found = []
    for request in [*requests[:1], *requests]:
        engine.forget_prompts()
        start = time.perf_counter()
        for output in engine.stream(request):
            if output.result is not None or None not in output.blocks[0].token_ids:
                break
        found.append(time.perf_counter() - start)
    return found[1:]

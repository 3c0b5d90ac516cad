"""How soon an idle server shows text, against what the engine alone takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from d2f.engine.engine import Engine
from d2f.engine.request import Request
from d2f.evaluation.serve_load import Turn, milliseconds


def first_block_seconds(engine: Engine, requests: Sequence[Request]) -> list[float]:
    """How long the engine itself takes for all forwards of each answer's first block.

    One request at a time, its prompt new to the engine; one run before that does not count.
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


def idle_report(turn: Turn, block_seconds: Sequence[float]) -> dict[str, Any]:
    """Time to the first committed text with one client, against one block's forwards.

    Args:
        turn: Streamed with `provisional`, one client, each prompt once.
        block_seconds: Of each prompt, by `first_block_seconds`.
    """
    pairs = [
        (answer.first_text, block_seconds[answer.prompt])
        for answer in turn.answers
        if answer.first_text is not None
    ]
    outside = [
        answer.first_text - answer.first_text_engine
        for answer in turn.answers
        if answer.first_text is not None and answer.first_text_engine is not None
    ]
    return {
        "num_requests": len(turn.answers),
        "num_right": turn.verdicts.count("right"),
        "first_text_ms": milliseconds([first for first, _ in pairs]),
        "outside_engine_ms": milliseconds(outside),
        "block_ms": milliseconds([block for _, block in pairs]),
        "most_beyond_block_ms": max((1000 * (f - b) for f, b in pairs), default=None),
    }

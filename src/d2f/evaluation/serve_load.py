"""Load on a server by many clients at once, streamed and plain in turns; every answer is checked.

The load comes from a process of its own (`load_worker`), which is started anew for each turn. A
turn is over when its last request is answered, so that what the server counted between two turns
belongs to one of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2f.errors import ConfigError, D2FError
from d2f.evaluation.load_worker import ServedAnswer
from d2f.evaluation.measured_server import ServerReading, Target, read_server
from d2f.evaluation.metrics import percentile, ratio

if TYPE_CHECKING:
    from d2f.engine.engine import Engine
    from d2f.engine.request import Request

MODES = ("streamed", "plain")
TURN_SECONDS = 15.0
REQUEST_SECONDS = 120.0
"""Most seconds of one request; one that takes longer counts as lost."""
_PERCENTS = (50, 95, 99)
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
class Turn:
    """A stretch of load in one mode."""

    mode: str
    num_clients: int
    seconds: float
    """Seconds until the last answer."""
    load_cpu_seconds: float
    """CPU time that the load generator took from the machine."""
    answers: list[ServedAnswer]
    verdicts: list[str]
    """The verdict on each answer."""
    before: ServerReading
    after: ServerReading


def run_turn(
    target: Target,
    pool: Sequence[Expected],
    *,
    mode: str,
    num_clients: int,
    seconds: float | None,
    first: int = 0,
    provisional: bool = False,
) -> Turn:
    """Let clients ask the pool's prompts in turn, each the next one when it has its answer.

    They begin requests for so many `seconds` (None: until each prompt was asked once), from the
    prompt with the number `first` on. With `provisional`, streams are asked for the engine's own
    clock and counts.

    Raises:
        D2FError: The server's metrics cannot be read, or there is no load generator.
    """
    streamed = mode == "streamed"
    parts = urllib.parse.urlsplit(target.url)
    options = {"include_usage": True} | ({"include_provisional": True} if provisional else {})
    bodies: list[dict[str, Any]] = [
        {
            "model": target.model,
            "prompt": expected.prompt,
            "max_tokens": target.max_tokens,
            "temperature": 0,
            "stream": streamed,
        }
        | ({"stream_options": options} if streamed else {})
        for expected in pool
    ]
    task = {
        "host": parts.hostname,
        "port": parts.port or 80,
        "path": "/v1/completions",
        "headers": {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {},
        "bodies": bodies,
        "first": first % len(pool),
        "streamed": streamed,
        "num_clients": num_clients,
        "seconds": seconds,
        "timeout": REQUEST_SECONDS,
    }
    before = read_server(target.url, target.api_key)
    most = (seconds or REQUEST_SECONDS * len(pool)) + 2 * REQUEST_SECONDS
    report = _run_worker(task, most)
    answers = [ServedAnswer(**answer) for answer in report["answers"]]
    return Turn(
        mode=mode,
        num_clients=num_clients,
        seconds=report["seconds"],
        load_cpu_seconds=report["cpu_seconds"],
        answers=answers,
        verdicts=[judge(answer, pool) for answer in answers],
        before=before,
        after=read_server(target.url, target.api_key),
    )


def _run_worker(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "d2f.evaluation.load_worker"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise D2FError(f"the load generator did not end within {seconds:g} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines() or ["it said nothing"]
        raise D2FError(f"the load generator failed: {last[-1]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def plan_turns(mode: str, seconds: float) -> Iterator[tuple[str, float]]:
    """Mode and seconds of each turn: for `both` the two take turns of about 15 seconds.

    Example:
        >>> list(plan_turns("both", 60))
        [('streamed', 15.0), ('plain', 15.0), ('streamed', 15.0), ('plain', 15.0)]
        >>> list(plan_turns("plain", 60))
        [('plain', 60.0)]
    """
    if mode != "both":
        yield mode, float(seconds)
        return
    count = max(round(seconds / len(MODES) / TURN_SECONDS), 1)
    for _ in range(count):
        for each in MODES:
            yield each, seconds / len(MODES) / count


def run_load(
    target: Target,
    pool: Sequence[Expected],
    *,
    mode: str,
    num_clients: int,
    seconds: float,
    on_turn: Callable[[Turn], None] = lambda turn: None,
) -> list[Turn]:
    """Make all turns of a run.

    Raises:
        ConfigError: The mode is unknown.
        D2FError: The server cannot be asked.
    """
    if mode not in (*MODES, "both"):
        raise ConfigError(f"--mode is {mode!r}; it must be streamed, plain or both")
    turns: list[Turn] = []
    for each, length in plan_turns(mode, seconds):
        turn = run_turn(
            target,
            pool,
            mode=each,
            num_clients=num_clients,
            seconds=length,
            # Where the last turn stopped, so that no prompt is asked more often than it must be.
            first=sum(len(turn.answers) for turn in turns),
        )
        on_turn(turn)
        turns.append(turn)
    return turns


def summarize(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The report's row for each mode."""
    modes = [mode for mode in MODES if any(turn.mode == mode for turn in turns)]
    return [_row(mode, [turn for turn in turns if turn.mode == mode]) for mode in modes]


def _row(mode: str, turns: Sequence[Turn]) -> dict[str, Any]:
    counts = Counter(verdict for turn in turns for verdict in turn.verdicts)
    answers = [
        answer
        for turn in turns
        for answer, verdict in zip(turn.answers, turn.verdicts, strict=True)
        if verdict not in ("refused", "failed", "lost")
    ]
    seconds = sum(turn.seconds for turn in turns)
    tokens = sum(answer.usage.get("completion_tokens", 0) for answer in answers)
    forwards = sum(answer.usage.get("num_forwards", 0) for answer in answers)
    first_texts = [a.first_text for a in answers if a.first_text is not None]
    faults = Counter(answer.fault for turn in turns for answer in turn.answers if answer.fault)
    return {
        "name": mode,
        "num_clients": turns[0].num_clients,
        "num_turns": len(turns),
        "seconds": seconds,
        "num_requests": sum(counts.values()),
        **{f"num_{verdict}": counts[verdict] for verdict in VERDICTS},
        "faults": dict(faults.most_common(5)),
        "num_tokens": tokens,
        "tokens_per_second": ratio(tokens, seconds),
        "requests_per_second": ratio(len(answers), seconds),
        "tokens_per_forward": ratio(tokens, forwards) if forwards else None,
        "first_text_ms": milliseconds(first_texts) if mode == "streamed" else None,
        "request_ms": milliseconds([answer.seconds for answer in answers]),
        "cpu": _cpu(turns),
        "load_cpu_share": ratio(sum(turn.load_cpu_seconds for turn in turns), seconds),
        "resident_mb": [
            None if turn.after.resident_bytes is None else turn.after.resident_bytes / 1e6
            for turn in turns
        ],
    }


def milliseconds(seconds: Sequence[float]) -> dict[str, float] | None:
    """The median and two percentiles in milliseconds; None if there are no values."""
    if not seconds:
        return None
    return {f"p{percent}": 1000 * percentile(seconds, percent) for percent in _PERCENTS}


def _spent(turn: Turn) -> tuple[float, float, float] | None:
    """CPU seconds of the engine's thread and of all others, and tokens; None if one is unknown."""
    names = ("engine_cpu_seconds", "process_cpu_seconds", "tokens")
    pairs = [(getattr(turn.before, name), getattr(turn.after, name)) for name in names]
    if any(None in pair for pair in pairs):
        return None
    engine, process, tokens = (after - before for before, after in pairs)
    return engine, process - engine, tokens


def _cpu(turns: Sequence[Turn]) -> dict[str, float] | None:
    """The server's CPU time per token, in the engine's thread and outside of it."""
    spent = [found for turn in turns if (found := _spent(turn)) is not None]
    engine, other, tokens = (sum(found[part] for found in spent) for part in range(3))
    if tokens == 0:
        return None
    return {
        "engine_ms_per_token": 1000 * engine / tokens,
        "other_ms_per_token": 1000 * other / tokens,
        "other_over_engine": ratio(other, engine),
    }


def count_wrong(turns: Sequence[Turn]) -> int:
    """The number of answers that are not the engine's own although the server told no error."""
    kinds = ("lost", "doubled", "mixed", "wrong")
    return sum(verdict in kinds for turn in turns for verdict in turn.verdicts)


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


def idle_report(turn: Turn, block_seconds: Sequence[float]) -> dict[str, Any]:
    """The time to the first text of an idle server, beside the engine's own time for a block.

    One client has asked each prompt once in a streamed turn with `provisional`; `block_seconds` has
    what `first_block_seconds` gave for each prompt.
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

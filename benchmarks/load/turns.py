"""Load on a server by many clients at once, streamed and plain in turns; every answer is checked.

The load comes from a process of its own (`client`), which is started anew for each turn. A turn is
over when its last request is answered, so that what the server counted between two turns
belongs to one of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from d2f.errors import ConfigError, D2FError
from d2f.evaluation.metrics import percentile, ratio

from . import client
from .answers import VERDICTS, Expected, judge
from .client import ServedAnswer, Task
from .server import ServerReading, Target, read_server

MODES = ("streamed", "plain")
TURN_SECONDS = 15.0
REQUEST_SECONDS = 120.0
"""Most seconds of one request; one that takes longer counts as lost."""
_PERCENTS = (50, 95, 99)


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
    task = make_task(
        target,
        pool,
        streamed=mode == "streamed",
        num_clients=num_clients,
        seconds=seconds,
        first=first,
        provisional=provisional,
    )
    before = read_server(target.url, target.api_key)
    most = (seconds or REQUEST_SECONDS * len(pool)) + 2 * REQUEST_SECONDS
    report = _run_client(task, most)
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


def make_task(
    target: Target,
    pool: Sequence[Expected],
    *,
    streamed: bool,
    num_clients: int,
    seconds: float | None,
    first: int = 0,
    provisional: bool = False,
) -> Task:
    """The requests of a turn; see `run_turn`."""
    parts = urllib.parse.urlsplit(target.url)
    options = {"include_usage": True} | ({"include_provisional": True} if provisional else {})
    common = {
        "model": target.model,
        "max_tokens": target.max_tokens,
        "temperature": 0,
        "stream": streamed,
    } | ({"stream_options": options} if streamed else {})
    return Task(
        host=parts.hostname or "",
        port=parts.port or 80,
        path="/v1/completions",
        headers={"Authorization": f"Bearer {target.api_key}"} if target.api_key else {},
        bodies=[common | {"prompt": expected.prompt} for expected in pool],
        first=first % len(pool),
        streamed=streamed,
        num_clients=num_clients,
        seconds=seconds,
        timeout=REQUEST_SECONDS,
    )


def _run_client(task: Task, seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(
            [sys.executable, client.__file__],
            input=json.dumps(asdict(task)),
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
        "resident_mb": [megabytes(turn.after.resident_bytes) for turn in turns],
    }


def megabytes(size: float | None) -> float | None:
    """Bytes in MB, where they are known."""
    return None if size is None else size / 1e6


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

"""A server under load: many clients at once, streamed and not in turns, every answer checked.

The load comes from a process of its own (`load_worker`), which is started anew for each turn. A
turn is over when its last request is answered, so that what the server counted between two turns
belongs to one of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.errors import ConfigError, D2FError
from d2f.evaluation.answer_check import VERDICTS, Expected, judge
from d2f.evaluation.metrics import ratio
from d2f.evaluation.served_answer import ServedAnswer
from d2f.evaluation.server_reading import CpuShare, ServerReading, read_server
from d2f.evaluation.server_target import Target
from d2f.evaluation.statistics import percentile

MODES = ("streamed", "plain")
TURN_SECONDS = 15.0
REQUEST_SECONDS = 120.0
"""Of one request at most; what takes longer counts as lost."""
_PERCENTS = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One stretch of load."""

    mode: str
    num_clients: int
    seconds: float
    """Until the last answer."""
    load_cpu_seconds: float
    """What the load generator took from the machine."""
    answers: list[ServedAnswer]
    verdicts: list[str]
    """Of each answer."""
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

    Args:
        target: The server.
        pool: Prompts and right answers.
        mode: `streamed` or `plain`.
        num_clients: Requests at a time.
        seconds: Until when requests are begun; None: until each prompt was asked once.
        first: Number of the prompt that is asked first.
        provisional: Ask streams for what the engine itself knows, its clock among it.

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
    """All turns of a run.

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
    """A row for each mode."""
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
    """Median and the two percentiles that clients feel; None of none."""
    if not seconds:
        return None
    return {f"p{percent}": 1000 * percentile(seconds, percent) for percent in _PERCENTS}


def _cpu(turns: Sequence[Turn]) -> dict[str, float] | None:
    """The server's CPU time per token, within the engine's thread and outside of it."""
    shares = [CpuShare.between(turn.before, turn.after) for turn in turns]
    found = [share for share in shares if share is not None]
    tokens = sum(share.tokens for share in found)
    if tokens == 0:
        return None
    engine = sum(share.engine_seconds for share in found)
    other = sum(share.other_seconds for share in found)
    return {
        "engine_ms_per_token": 1000 * engine / tokens,
        "other_ms_per_token": 1000 * other / tokens,
        "other_over_engine": ratio(other, engine),
    }


def count_wrong(turns: Sequence[Turn]) -> int:
    """Answers that are not the engine's own, though no error was said."""
    kinds = ("lost", "doubled", "mixed", "wrong")
    return sum(verdict in kinds for turn in turns for verdict in turn.verdicts)

"""Test how `d2f serve` stands clients that vanish, broken requests and a stop under load.

    python benchmarks/serve_faults.py

The script starts a server with the shipped model, kills 200 clients in mid-stream, sends 1,000
broken requests, and stops the server by SIGTERM under load. It takes two minutes and exits with 1
if a check failed.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from load.answers import DTYPE, Expected, judge, make_pool
from load.client import Connection, Exchange, load, read_answer
from load.server import ServerProcess, ServerReading, Target, read_server
from load.turns import make_task, run_turn

NUM_KILLED = 200
NUM_BROKEN = 1000
NUM_CLIENTS = 24
MAX_TOKENS = 160
LONGEST_SECONDS = 3.0
"""Most seconds until a client is killed."""
SETTLE_SECONDS = 20.0
MOST_STEPS = 2
"""Most steps until the pages of killed clients are free: the running one, and one that had begun
when the last client's end was noticed."""
REQUEST_SECONDS = 30.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SECRETS = (b"Traceback", b'File "', b"site-packages", b"src/d2f")
"""Texts that no answer may contain."""
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, 1e400, -1e400, 10**30, "", "x", "\x00", "\ud800", "a" * 5000,
    [], [[]], [None], [-1], [10**9], [1.5], ["a", 1], [[1], "a"], [True], {}, {"a": {}},
    "pipelined", "1", "NaN",
)  # fmt: skip
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
    "top_k", "seed", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs", "user",
    "strategy", "policy", "options", "early_stop", "frequency_penalty", "presence_penalty",
    "best_of", "echo", "logit_bias", "suffix", "tools", "response_format", "maxtokens", "",
)  # fmt: skip


def main() -> None:
    pool = make_pool(32, MAX_TOKENS, "cpu", 1).busy
    checks = []
    with ServerProcess(["--device", "cpu", "--dtype", DTYPE]) as server:
        target = Target.find(server.url, max_tokens=MAX_TOKENS)
        checks += asyncio.run(kill_clients(target, pool))
        checks += answers_still_right(target, pool, "the kills")
        checks += asyncio.run(send_broken(target))
        checks += answers_still_right(target, pool, "the broken requests")
        checks += asyncio.run(stop_under_load(target, pool, server))
        silent = [line for line in server.log.splitlines() if "Traceback" in line]
        checks.append((not silent, f"tracebacks in the server's log: {len(silent)}"))
    for held, words in checks:
        print("held         " if held else "DID NOT HOLD ", words)
    sys.exit(0 if all(held for held, _ in checks) else 1)


Check = tuple[bool, str]
"""Whether a check passed, and its description."""


def answers_still_right(target: Target, pool: Sequence[Expected], after: str) -> list[Check]:
    turn = run_turn(target, pool, mode="streamed", num_clients=8, seconds=None)
    right = turn.verdicts.count("right")
    return [(right == len(pool), f"after {after}, {right} of {len(pool)} answers are right")]


def post(target: Target, body: Any, path: str = COMPLETIONS, **headers: str) -> bytes:
    """Return a request in bytes; a body of bytes is sent unchanged."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "Host": urlsplit(target.url).netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(data)),
    } | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"POST {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if v), "", ""]
    return "\r\n".join(lines).encode("latin-1") + data


def connection(target: Target) -> Connection:
    parts = urlsplit(target.url)
    return Connection(parts.hostname or "", parts.port or 80)


# ------------------------------------------------------------------------------- clients that die


async def kill_clients(target: Target, pool: Sequence[Expected]) -> list[Check]:
    draw = random.Random(2026)
    killed: list[Exchange] = []
    finished: list[Exchange] = []

    async def client(number: int) -> None:
        while len(killed) < NUM_KILLED and len(finished) < 10 * NUM_KILLED:
            body = {
                "model": target.model,
                "prompt": draw.choice(pool).prompt,
                "max_tokens": MAX_TOKENS,
                "stream": True,
                "stream_options": {"include_provisional": number % 2 == 0},
            }
            line = connection(target)
            asked = asyncio.create_task(line.ask(post(target, body), timeout=REQUEST_SECONDS))
            await asyncio.wait([asked], timeout=draw.uniform(0, LONGEST_SECONDS))
            line.close()
            exchange = await asked
            (finished if exchange.complete else killed).append(exchange)

    await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
    start = time.perf_counter()
    before = await asyncio.to_thread(read_server, target.url)
    reading = await settled(target)
    seconds = time.perf_counter() - start
    steps = (reading.num_steps or 0) - (before.num_steps or 0)
    streaming = sum(bool(exchange.parts) for exchange in killed)
    return [
        (
            len(killed) >= NUM_KILLED,
            f"{len(killed)} clients killed, {streaming} of them after their first event; "
            f"{len(finished)} were done before",
        ),
        (
            is_idle(reading) and steps <= MOST_STEPS,
            f"{steps:.0f} steps ({seconds:.2f} s) later {reading.num_running:.0f} requests run, "
            f"{reading.num_waiting:.0f} wait, {reading.num_free_pages:.0f} of "
            f"{reading.num_pages:.0f} pages are free",
        ),
    ]


def is_idle(reading: ServerReading) -> bool:
    return (
        reading.num_running == reading.num_waiting == 0
        and reading.num_free_pages == reading.num_pages
    )


async def settled(target: Target) -> ServerReading:
    until = time.perf_counter() + SETTLE_SECONDS
    while True:
        reading = await asyncio.to_thread(read_server, target.url)
        if is_idle(reading) or time.perf_counter() > until:
            return reading
        await asyncio.sleep(0.01)


# -------------------------------------------------------------------------------- broken requests


def by_hand(target: Target) -> list[bytes]:
    """Send requests written by hand, each of which must be refused with a 4xx."""
    good = {"model": target.model, "prompt": "1+1?", "max_tokens": 2}
    message = {"role": "user", "content": "1+1?"}
    host = urlsplit(target.url).netloc
    deep = b"[" * 100_000 + b"]" * 100_000
    bodies: list[Any] = [
        b"", b"{", b"null", b"[]", b"1", b'"x"', b"\xff\xfe", b"\x00" * 100, deep,
        b'{"prompt": ' + deep + b"}", b'{"prompt": "\\ud800", "max_tokens": 2}',
        b'{"prompt": "x", "max_tokens": NaN}', b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
        b"x" * 3_000_000, {}, good | {"prompt": []},
        good | {"prompt": [10**12]}, good | {"prompt": "x" * 900_000}, good | {"model": "nobody's"},
        good | {"max_tokens": 10**6}, good | {"n": 10**6}, good | {"stop": [""] * 3},
        good | {"logprobs": 99}, good | {"policy": {"block_size": 0}}, good | {"policy": {"x": 1}},
        good | {"options": {"num_steps": -1}, "strategy": "vanilla"},
        good | {"strategy": "no-such"}, good | {"stream_options": {"include_usage": True}},
    ]  # fmt: skip
    chats: list[Any] = [
        {"model": target.model}, {"messages": []}, {"messages": [{}]}, {"messages": "x"},
        {"messages": [{"role": "nobody", "content": "x"}]}, {"messages": [message, message, 1]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [message], "tools": [{"type": "function"}]},
        {"messages": [message], "top_logprobs": 5},
    ]  # fmt: skip
    return [
        *(post(target, body) for body in bodies),
        *(post(target, body, CHAT) for body in chats),
        post(target, good, Content_Type="text/plain"),
        post(target, good, Content_Type=""),
        post(target, good, Content_Type="application/x-www-form-urlencoded"),
        post(target, good, Content_Length="-1"),
        post(target, good, Content_Length="x"),
        post(target, good, Host="evil.example"),
        post(target, good, "/v1/nothing"),
        post(target, good, "/v1/../etc/passwd"),
        post(target, good, "/page/../../../../etc/passwd"),
        post(target, good, "/page/%2e%2e/%2e%2e/pyproject.toml"),
        f"GET /page/..%2f..%2fapp.py HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),
        f"GET {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),
        f"DELETE /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),
        f"GET /v1/models/nobody%00s HTTP/1.1\r\nHost: {host}\r\n\r\n".encode(),
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ]


def mutated(target: Target, draw: random.Random) -> bytes:
    """Return a valid request with one to three random fields; by chance it may stay valid."""
    if draw.random() < 0.5:
        path, body = COMPLETIONS, dict[str, Any](prompt="1+1?")
    else:
        path, body = CHAT, dict[str, Any](messages=[{"role": "user", "content": "1+1?"}])
    body |= {"model": target.model, "max_tokens": 2}
    for _ in range(draw.randint(1, 3)):
        body[draw.choice(FIELDS)] = draw.choice(JUNK)
    data = json.dumps(body).encode()
    if draw.random() < 0.1:
        place = draw.randrange(len(data))
        data = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    return post(target, data, path)


async def send_broken(target: Target) -> list[Check]:
    draw = random.Random(2026)
    bad = by_hand(target)
    requests = bad + [mutated(target, draw) for _ in range(NUM_BROKEN - len(bad))]
    statuses: Counter[int | None] = Counter()
    odd: list[str] = []

    async def client(mine: list[tuple[int, bytes]]) -> None:
        for number, request in mine:
            line = connection(target)
            exchange = await line.ask(request, timeout=REQUEST_SECONDS)
            line.close()
            statuses[exchange.status] += 1
            status = exchange.status or 0
            refused = 400 <= status < 500 or (number >= len(bad) and status == 200)
            if not refused or any(secret in exchange.body for secret in SECRETS):
                odd.append(
                    f"{request[:60]!r}… {request[-120:]!r}: {status} {exchange.body[:200]!r}"
                )

    numbered = list(enumerate(requests))
    await asyncio.gather(*(client(numbered[first::NUM_CLIENTS]) for first in range(NUM_CLIENTS)))
    counts = ", ".join(f"{count}x {status}" for status, count in sorted(statuses.items(), key=str))
    checks = [(not odd, f"{len(requests)} broken requests: {counts}")]
    return checks + [(False, words) for words in odd[:10]]


# ---------------------------------------------------------------------------------------- its end


async def stop_under_load(
    target: Target, pool: Sequence[Expected], server: ServerProcess
) -> list[Check]:
    """Send SIGTERM while streamed and whole answers are in progress."""
    start = time.perf_counter()
    loads = {
        streamed: make_task(
            target, pool, streamed=streamed, num_clients=NUM_CLIENTS // 2, seconds=6.0
        )
        for streamed in (True, False)
    }
    running = [asyncio.create_task(load(task)) for task in loads.values()]
    await asyncio.sleep(2.0)
    server.terminate()
    at = time.perf_counter() - start
    code = await asyncio.to_thread(server.wait)
    ended = time.perf_counter() - start
    found = await asyncio.gather(*running)
    answers = [
        read_answer(exchange, prompt=prompt, start=start, streamed=streamed)
        for streamed, exchanges in zip(loads, found, strict=True)
        for prompt, exchange in exchanges
    ]
    begun = [a for a in answers if a.began < at and a.status is not None and a.status < 500]
    across = sum(answer.began + answer.seconds > at for answer in begun)
    verdicts = Counter(judge(answer, pool) for answer in begun)
    later = Counter(str(a.status or "no connection") for a in answers if a not in begun)
    return [
        (
            code == 0,
            f"after SIGTERM under load the server ended in {ended - at:.1f} s, code {code}",
        ),
        (
            set(verdicts) == {"right"} and across > 0,
            f"answers that it had begun: {dict(verdicts)}, {across} of them ended after the signal",
        ),
        (
            set(later) <= {"503", "no connection"},
            f"requests that came later: {dict(later)}",
        ),
    ]


if __name__ == "__main__":
    main()

"""What a server says of itself in its metrics."""

from __future__ import annotations

import urllib.error
import urllib.request
from dataclasses import dataclass

from d2f.errors import D2FError

_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A server that is measured is asked directly, whatever proxy the environment names."""


@dataclass(frozen=True, kw_only=True)
class ServerReading:
    """The counters at one time; None: the server does not say."""

    engine_cpu_seconds: float | None
    """CPU time of the thread that runs the engines."""
    process_cpu_seconds: float | None
    """… of all threads."""
    tokens: float | None
    """Of answers so far."""
    resident_bytes: float | None
    num_running: float | None
    num_waiting: float | None
    num_pages: float | None
    num_free_pages: float | None
    num_steps: float | None
    """Of the engines so far."""

    @classmethod
    def parse(cls, text: str) -> ServerReading:
        """From the text format of Prometheus; what several models have is added up.

        Example:
            >>> ServerReading.parse('d2f_tokens_total{model="a"} 2.0').tokens
            2.0
        """
        sums: dict[str, float] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                labelled, _, value = line.rpartition(" ")
                name = labelled.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
        return cls(
            engine_cpu_seconds=sums.get("d2f_engine_cpu_seconds_total"),
            process_cpu_seconds=sums.get("process_cpu_seconds_total"),
            tokens=sums.get("d2f_tokens_total"),
            resident_bytes=sums.get("process_resident_memory_bytes"),
            num_running=sums.get("d2f_requests_running"),
            num_waiting=sums.get("d2f_requests_waiting"),
            num_pages=sums.get("d2f_kv_pages"),
            num_free_pages=sums.get("d2f_kv_pages_free"),
            num_steps=sums.get("d2f_step_seconds_count"),
        )


@dataclass(frozen=True, kw_only=True)
class CpuShare:
    """CPU time of a server between two readings."""

    engine_seconds: float
    other_seconds: float
    """Of all threads but the engine's."""
    tokens: float

    @classmethod
    def between(cls, before: ServerReading, after: ServerReading) -> CpuShare | None:
        """None where the server does not say.

        Example:
            >>> reading = ServerReading.parse("d2f_tokens_total 5")
            >>> CpuShare.between(reading, reading) is None
            True
        """
        pairs = [
            (getattr(before, name), getattr(after, name))
            for name in ("engine_cpu_seconds", "process_cpu_seconds", "tokens")
        ]
        if any(one is None or other is None for one, other in pairs):
            return None
        engine, process, tokens = (other - one for one, other in pairs)
        return cls(engine_seconds=engine, other_seconds=process - engine, tokens=tokens)


def read_server(url: str, api_key: str | None = None) -> ServerReading:
    """Ask for the metrics now.

    Raises:
        D2FError: There is no answer.
    """
    return ServerReading.parse(fetch(f"{url}/metrics", api_key))


def fetch(url: str, api_key: str | None = None, *, seconds: float = 30.0) -> str:
    """The body of a page of the server.

    Raises:
        D2FError: There is no answer, or an error.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with _OPENER.open(
            urllib.request.Request(url, headers=headers), timeout=seconds
        ) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        remedy = "; give its key with --api-key" if error.code == 401 else ""
        raise D2FError(f"{url} answers with status {error.code}{remedy}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise D2FError(f"{url} cannot be reached: {reason}") from None

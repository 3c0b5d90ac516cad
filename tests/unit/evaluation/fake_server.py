"""A server that answers like `d2f serve` and is wrong on demand."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.load.answers import Expected

POOL = [
    Expected(prompt="1+1?", text="One and one are 2.\n#### 2", num_tokens=9, finish_reason="stop"),
    Expected(prompt="2*3?", text="Twice three is 6.\n#### 6", num_tokens=8, finish_reason="stop"),
    Expected(
        prompt="9-4?", text="Nine less four: 5.\n#### 5", num_tokens=7, finish_reason="length"
    ),
]
FAULTS = {
    "lose": "lost",
    "gap": "lost",
    "endless": "lost",
    "error event": "lost",
    "double": "doubled",
    "second end": "doubled",
    "mix": "mixed",
    "other's part": "mixed",
    "other's id": "mixed",
    "wrong": "wrong",
    "count": "wrong",
    "429": "refused",
    "500": "failed",
}
"""What the server can do wrong, and what that must be called."""
STREAMED_ONLY = {"gap", "endless", "error event", "second end", "other's part", "other's id"}


class FakeServer:
    """Answers the prompts of a pool; every n-th request goes wrong in the given way.

    `delay` is slept before each event of a stream; `refusal`, a status and a text, is the answer to
    all requests; of its 8 pages `free_pages` are free.
    """

    def __init__(
        self, pool=POOL, fault=None, every=1, key=None, delay=0, refusal=None, free_pages=8
    ):
        self.delay, self.refusal, self.free_pages = delay, refusal, free_pages
        self.texts = {expected.prompt: expected for expected in pool}
        self.pool, self.fault, self.every, self.key = pool, fault, every, key
        self.num_requests = self.num_tokens = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Clients of these tests go away as they like.
        self._server.handle_error = lambda *_: None
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def next_fault(self, num_tokens):
        with self._lock:
            self.num_requests += 1
            self.num_tokens += num_tokens
            return self.fault if self.num_requests % self.every == 0 else None

    def metrics(self):
        return (
            "# TYPE d2f_tokens_total counter\n"
            f'd2f_tokens_total{{model="fake"}} {self.num_tokens}.0\n'
            f"d2f_engine_cpu_seconds_total {self.num_tokens * 0.004}\n"
            f"process_cpu_seconds_total {1 + self.num_tokens * 0.005}\n"
            "process_resident_memory_bytes 5e+08\n"
            "d2f_requests_running 0.0\nd2f_requests_waiting 0.0\n"
            f"d2f_kv_pages 8.0\nd2f_kv_pages_free {self.free_pages}.0\n"
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        state = self.server_state
        if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
            self.reply(401, "{}")
        elif self.path == "/metrics":
            self.reply(200, state.metrics())
        else:
            self.reply(200, json.dumps({"object": "list", "data": [{"id": "fake"}]}))

    def do_POST(self):
        state = self.server_state
        if state.refusal is not None:
            self.reply(*state.refusal)
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.watched = "include_provisional" in body.get("stream_options", ())
        expected = state.texts[body["prompt"]]
        other = state.pool[(state.pool.index(expected) + 1) % len(state.pool)]
        fault = state.next_fault(expected.num_tokens)
        if fault in ("429", "500"):
            error = json.dumps({"error": {"message": "not now"}})
            self.reply(int(fault), error, {"Retry-After": "0"} if fault == "429" else {})
        elif body["stream"]:
            self.stream(expected, other, fault)
        else:
            self.answer(expected, other, fault)

    def answer(self, expected, other, fault):
        text = {
            "mix": other.text,
            "wrong": expected.text[:-1] + "?",
            "double": expected.text * 2,
        }.get(fault, expected.text)
        whole = json.dumps(self.chunk(text, expected, fault, end=True))
        self.reply(200, whole, cut=fault == "lose")

    def stream(self, expected, other, fault):
        text = expected.text
        pieces = [text[:9], text[9:14], text[14:]]
        pieces = {
            "mix": [other.text],
            "other's part": [text[:9], other.text[:9], *pieces[1:]],
            "wrong": [*pieces[:2], "?"],
            "double": [*pieces[:2], *pieces[1:]],
            "gap": [pieces[0], pieces[2]],
        }.get(fault, pieces)
        events = [self.chunk(piece, expected, None) for piece in pieces]
        events.append(self.chunk("", expected, fault, end=True))
        if fault == "other's id":
            events[1]["id"] = "another"
        if fault == "second end":
            events.append(events[-1])
        if fault == "error event":
            events[1:] = [{"error": {"message": "out of order"}}]
        lines = [json.dumps(event) for event in events] + ["[DONE]"]
        if fault == "endless":
            lines.pop()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines[: 2 if fault == "lose" else None]:
            time.sleep(self.server_state.delay)
            data = f"data: {line}\n\n".encode()
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        if fault == "lose":
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def chunk(self, text, expected, fault, end=False):
        choice = {
            "index": 0,
            "text": text,
            "finish_reason": expected.finish_reason if end else None,
        }
        tokens = expected.num_tokens + (fault == "count")
        usage = {"completion_tokens": tokens, "num_forwards": 2} if end else None
        chunk = {"id": f"id-{id(self)}", "choices": [choice], "usage": usage}
        return chunk | ({"d2f": {"seconds": 0.0}} if self.watched else {})

    def reply(self, status, text, headers=None, cut=False):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

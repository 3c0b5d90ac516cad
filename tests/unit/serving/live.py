"""A server that listens, in a thread of this process."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import Any, NamedTuple

from tests.unit.serving.running import Metrics, ServedModel, Service

from d2f.serving.app import create_app
from d2f.serving.server import Server, open_socket, url_of
from d2f.serving.settings import ServeSettings


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class LiveServer(NamedTuple):
    url: str
    port: int
    service: Service
    server: Server

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; bodies that are no bytes are sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, found, response.read())
        connection.close()
        return answer

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    def send(self, data: bytes, *, half_close: bool = False) -> bytes:
        """Raw bytes in, all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


def events(body: bytes) -> list[Any]:
    """The objects of server-sent events; the last must say that it is the last."""
    *data, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in data]


@contextmanager
def live_server(*models: ServedModel, **settings: Any):
    """Serves until the end of the context; then everything has ended."""
    chosen = ServeSettings(port=0, drain_seconds=0.0, **settings)
    metrics = Metrics([model.name for model in models])
    service = Service(models, max_waiting=chosen.max_waiting, metrics=metrics)
    bound = open_socket("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(create_app(service, chosen, metrics), service, chosen, ready.set)
    # A test that fails while an engine is held must not hold up the others.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    url, port = url_of(bound), bound.getsockname()[1]
    thread.start()
    try:
        assert ready.wait(30)
        yield LiveServer(url, port, service, server)
    finally:
        with suppress(RuntimeError):  # it has ended already, and its loop is closed
            server._loop.call_soon_threadsafe(server.drain)
        thread.join(30)
        bound.close()
        assert not thread.is_alive()

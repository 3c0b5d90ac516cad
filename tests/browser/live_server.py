"""The real server with shipped models, in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import uvicorn

from d2f.engine.engine import Engine, EngineConfig
from d2f.models.checkpoint import load_model
from d2f.problems import ProblemConfig, generate_problems
from d2f.serving.app import create_app
from d2f.serving.metrics import Metrics
from d2f.serving.served_model import ServedModel
from d2f.serving.service import Service
from d2f.serving.settings import ServeSettings
from d2f.shipped import shipped_model
from d2f.text import Tokenizer

# Name, shipped model, default strategy.
ALL = (
    ("d2f-student", "student", "pipelined"),
    ("autoregressive", "autoregressive", "autoregressive"),
    ("teacher", "teacher", "vanilla"),
)
# Unlike the shipped models' own template, this one keeps every message of a conversation.
WHOLE_CONVERSATION = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
)
LONG = ProblemConfig(min_steps=6, shuffle_rate=1.0)
EXAMPLES = tuple(
    problem.prompt for problem in generate_problems(3, seed=5, split="test", config=LONG)
)


class LiveServer:
    """A server that listens on a free port.

    Args:
        app: What it serves.
    """

    def __init__(self, app) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def start(self) -> str:
        """Returns its address."""
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/"

    def stop(self) -> None:
        """End it; may be called twice."""
        self._server.should_exit = True
        self._thread.join()


@contextmanager
def live_server(
    names=ALL, api_key=None, templates: Mapping[str, str] | None = None
) -> Iterator[tuple[str, LiveServer]]:
    """A running server and its address.

    Args:
        names: Name, shipped model and default strategy of each model.
        api_key: The key that clients must send, if any.
        templates: Chat templates by name, for models that do not keep their own.
    """
    models = [_served(*entry, (templates or {}).get(entry[0])) for entry in names]
    metrics = Metrics()
    settings = ServeSettings(port=0, api_key=api_key, drain_seconds=0.0)
    server = LiveServer(create_app(Service(models, metrics=metrics), settings, metrics))
    try:
        yield server.start(), server
    finally:
        server.stop()


def _served(name: str, model: str, strategy: str, template: str | None) -> ServedModel:
    tokenizer = Tokenizer.load(shipped_model("student"))
    tokenizer.chat_template = template or tokenizer.chat_template
    config = EngineConfig(max_batch_size=4, kv_cache_bytes=1 << 24)
    network = load_model(shipped_model(model), device="cpu", dtype="float32")
    return ServedModel(
        name=name,
        engine=Engine(network, config, tokenizer),
        tokenizer=tokenizer,
        strategy=strategy,
        examples=EXAMPLES,
    )

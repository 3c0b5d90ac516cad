"""Mark answers to MATH problems with lm-eval's scorer, in a process of its own.

That scorer parses and simplifies whatever formula a model wrote: it may run for ever, eat memory
or end the process, and its own time limit works in a process's first thread only. Run as a program
whose input is one end of a pipe, on which it answers JSON with JSON. Imports nothing of this
package.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MEMORY = 4 * 2**30
"""Bytes; simplifying a sane formula takes a tenth."""


def answer(official: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Scores and the extracted answer of `{"doc": …, "text": …}`, or `{"error": …}`."""
    doc, text = request["doc"], request["text"]
    try:
        found = official.last_boxed_only_string(text) or ""
        final = official.get_unnormalized_answer(text)
        return {
            "scores": official.process_results(doc, [text]),
            "answer": (found or None) if final == "[invalidanswer]" else final,
        }
    except Exception as error:  # a model wrote what is parsed here
        return {"error": f"{type(error).__name__}: {error}"}


def main(file: str) -> None:
    """Serve until the other side closes its end."""
    import resource  # what asks can be imported where this does not exist

    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    pipe = Connection(0)
    reply = {"ready": True}
    while True:
        pipe.send_bytes(json.dumps(reply).encode())
        try:
            reply = answer(official, json.loads(pipe.recv_bytes()))
        except EOFError:
            return


if __name__ == "__main__":
    main(sys.argv[1])

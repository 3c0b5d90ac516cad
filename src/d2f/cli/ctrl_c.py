"""Handling of Ctrl-C, which must not be lost when it comes during a library's import."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

_AGAIN_SECONDS = 0.05


class CtrlC:
    """Context in which Ctrl-C raises `KeyboardInterrupt`, as usual, and is recorded in `came`.

    In two places the exception would be swallowed and is raised a little later: while a module is
    imported, since libraries catch every exception of imports that they only try; and in a
    destructor, where Python prints a traceback and goes on.

    Example:
        >>> with CtrlC() as ctrl_c:
        ...     ctrl_c.came
        False
    """

    def __init__(self) -> None:
        self.came = False
        self._ended = False

    def __enter__(self) -> CtrlC:
        self._handler, self._hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        # The parent process may have set Ctrl-C to be ignored, as nohup does.
        self._heard = self._handler is signal.default_int_handler
        if self._heard:
            signal.signal(signal.SIGINT, self._note)
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self._heard:
            sys.unraisablehook = self._hook
            # A second Ctrl-C during the exit ends the process at once, without a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL if self.came else self._handler)

    def _note(self, _number: int, frame: FrameType | None) -> None:
        self.came = True
        if not _is_importing(frame):
            raise KeyboardInterrupt
        self._again()

    def _unraisable(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._again()
        else:
            self._hook(unraisable)

    def _again(self) -> None:
        timer = threading.Timer(_AGAIN_SECONDS, self._send)
        timer.daemon = True  # the process must not wait for the timer when it ends
        timer.start()

    def _send(self) -> None:
        if not self._ended:
            os.kill(os.getpid(), signal.SIGINT)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False

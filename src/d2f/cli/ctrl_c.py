"""Ctrl-C, heard wherever it comes: one that falls into a library's callback is not lost."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_AGAIN_SECONDS = 0.05


class CtrlC:
    """Within it Ctrl-C raises `KeyboardInterrupt`, as usual, and is remembered.

    Where Python cannot raise it, in a destructor or another callback, it would print a traceback
    and go on; it is raised a little later instead.

    Example:
        >>> with CtrlC() as ctrl_c:
        ...     ctrl_c.came
        False
    """

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> CtrlC:
        self._handler, self._hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        # Whoever started us may have it ignored, as nohup does for what runs in the background.
        self._heard = self._handler is signal.default_int_handler
        if self._heard:
            signal.signal(signal.SIGINT, self._note)
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._heard:
            sys.unraisablehook = self._hook
            # A second one ends the process at once, without a traceback of what was about to end.
            signal.signal(signal.SIGINT, signal.SIG_DFL if self.came else self._handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main).start()
        else:
            self._hook(unraisable)

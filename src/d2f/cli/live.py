"""The pipeline as a person watches it: one panel of blocks, tokens appearing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from d2f.text import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from d2f.decoding.batch import BlockView
    from d2f.engine.engine import Engine
    from d2f.engine.request import Output, Request

SLOWED_SECONDS = 0.25
"""A forward takes a few milliseconds: too fast to watch."""
STYLES = {
    "semi-active": "black on bright_yellow",
    "fully active": "black on bright_green",
    "complete": "white on blue",
    "cached": "white on grey30",
}
SIGNS = "· is not decoded yet, ■ is the end"
"""What stands for tokens without a text."""
_PATIENCE_SECONDS = 0.02
"""How often somebody who waits looks up."""
# What a terminal would obey instead of showing it; a model may write anything.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What came of an answer that somebody watched."""

    output: Output | None
    """The last that was seen of it, with the result unless it was stopped; None: nothing yet."""
    num_forwards: int
    seconds: float
    """What decoding took, without the time for showing it."""


def legend() -> Text:
    """What the colours mean."""
    text = Text("blocks: ")
    for state, style in STYLES.items():
        text.append(f" {state} ", style)
        text.append("  ")
    return text


def harmless(text: str) -> str:
    """A model's text without what would steer the terminal.

    Example:
        >>> harmless("a" + chr(27) + "[2Jb")
        'a�[2Jb'
    """
    return text.translate(_CONTROLS)


def watch_answer(
    console: Console,
    engine: Engine,
    request: Request,
    tokenizer: Tokenizer,
    *,
    slow: float = 0.0,
    stopped: Callable[[], bool] = lambda: False,
) -> Watched:
    """Decode a request and show its blocks after each forward.

    In a terminal they stay in their place and are gone at the end; elsewhere each forward gets a
    line.

    Args:
        console: Where to.
        engine: Decodes it.
        request: What to answer.
        tokenizer: The model's.
        slow: Seconds that a forward takes at least, in a terminal.
        stopped: Asked after each forward and while waiting; True ends the answer, and takes its
            request out of the engine.

    Raises:
        RequestError: The request cannot be served.
    """
    from rich.console import Group
    from rich.live import Live

    forwards, seconds, output = 0, 0.0, None
    screen = Live(console=console, auto_refresh=False, transient=console.is_terminal)
    with screen, closing(engine.stream(request)) as stream:
        while not stopped():
            start = time.perf_counter()
            step = next(stream, None)
            end = time.perf_counter()
            if step is None:
                break
            forwards, seconds, output = forwards + 1, seconds + end - start, step
            if not console.is_terminal:
                blocks = render_blocks(step.blocks, tokenizer, named=True)
                console.print(f"{forwards:3d} ", blocks, sep="")
                continue
            colourless = console.color_system is None or console.no_color
            blocks = render_blocks(step.blocks, tokenizer, named=colourless, apart=colourless)
            status = Text(f"forward {forwards}", style="dim")
            shown = last_lines(blocks, console, console.height - 2)
            screen.update(Group(shown, status), refresh=True)
            _wait_until(start + slow, stopped)
    return Watched(output=output, num_forwards=forwards, seconds=seconds)


def _wait_until(end: float, stopped: Callable[[], bool]) -> None:
    while (rest := end - time.perf_counter()) > 0 and not stopped():
        time.sleep(min(rest, _PATIENCE_SECONDS))


def last_lines(text: Text, console: Console, most: int) -> Text:
    """As much of the end of a text as fits in a number of lines."""
    lines = text.wrap(console, console.width)
    return Text("\n").join(lines[-max(most, 1) :])


def render_blocks(
    blocks: Sequence[BlockView], tokenizer: Tokenizer, *, named: bool = False, apart: bool = False
) -> Text:
    """All blocks of a response in their colours, or, where there are none, with their states.

    Without the states, the text of decoded blocks is that of their tokens decoded as a whole:
    nothing stands between two blocks but what the tokens say.

    Args:
        blocks: The blocks.
        tokenizer: The model's.
        named: Write each block's state before it.
        apart: Begin each block on a line of its own, with a space behind its state. There no
            state is broken over lines or taken for a part of a word.
    """
    text = Text()
    writer = _Writer(tokenizer)
    for number, block in enumerate(blocks, 1):
        style = STYLES[block.state.value]
        if apart and number > 1:
            text.append("\n")
        if named:
            text.append(f"[{block.state.value}]" + " " * apart, "bold")
        written = "".join(map(writer.write, block.token_ids))
        if number == len(blocks):
            written += writer.close()
        text.append(harmless(written.replace("\n", "⏎").replace("<|endoftext|>", "■")), style)
    return text


class _Writer:
    """Text of tokens one after the other, in which a gap does not change what follows it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special_tokens=False)

    def write(self, token: int | None) -> str:
        if token is not None:
            return self._stream.push([token])
        text = self._stream.close() + "·"
        self._stream = self._tokenizer.stream(skip_special_tokens=False, follows=True)
        return text

    def close(self) -> str:
        return self._stream.close()

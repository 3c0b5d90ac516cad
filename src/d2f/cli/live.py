"""Live view of the pipeline in the terminal: the blocks of an answer while they are decoded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from d2f.decoding.batch import BlockView
from d2f.engine.engine import Engine
from d2f.engine.request import Output, Request
from d2f.text import Tokenizer

SLOWED_SECONDS = 0.25
"""Seconds for which a forward is shown; it takes a few milliseconds, too fast to watch."""
STYLES = {
    "semi-active": "black on bright_yellow",
    "fully active": "black on bright_green",
    "complete": "white on blue",
    "cached": "white on grey30",
}
SIGNS = "· is not decoded yet, ■ is the end"
"""Explanation of the two signs that stand for tokens without a text."""
_PATIENCE_SECONDS = 0.02
"""Interval at which waiting asks whether to stop."""
# Control characters, which a terminal would carry out; a model may write any text.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


class Watched(NamedTuple):
    """An answer that was shown while it was decoded."""

    output: Output | None
    """Output of the last step, with the result unless it was stopped; None: no step was done."""
    num_forwards: int
    seconds: float
    """Time of decoding, without the time for showing it."""


def legend() -> Text:
    """Return a line that explains the colours of the states."""
    text = Text("blocks: ")
    for state, style in STYLES.items():
        text.append(f" {state} ", style)
        text.append("  ")
    return text


def harmless(text: str) -> str:
    """Replace control characters in a model's text, which would act on the terminal.

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

    A terminal shows the blocks in one place, each forward for at least `slow` seconds, and clears
    them at the end; elsewhere each forward prints a line. `stopped` is called after each forward
    and while waiting; if it returns True, decoding ends and the request leaves the engine.
    """
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
            while (rest := start + slow - time.perf_counter()) > 0 and not stopped():
                time.sleep(min(rest, _PATIENCE_SECONDS))
    return Watched(output, forwards, seconds)


def last_lines(text: Text, console: Console, most: int) -> Text:
    """Return the last lines of a text, at most `most` of them."""
    lines = text.wrap(console, console.width)
    return Text("\n").join(lines[-max(most, 1) :])


def render_blocks(
    blocks: Sequence[BlockView], tokenizer: Tokenizer, *, named: bool = False, apart: bool = False
) -> Text:
    """Return all blocks of a response in the colours of their states.

    The text of decoded blocks equals that of all their tokens decoded at once, but for what options
    add for output without colours: `named` writes each block's state before its text; `apart`
    begins each block on a new line, with a space behind its state, so that no state is broken over
    lines or read as part of a word.
    """
    text, stream = Text(), tokenizer.stream(skip_special_tokens=False)
    for number, block in enumerate(blocks, 1):
        style = STYLES[block.state.value]
        if apart and number > 1:
            text.append("\n")
        if named:
            text.append(f"[{block.state.value}]" + " " * apart, "bold")
        written = ""
        for token in block.token_ids:
            if token is not None:
                written += stream.push([token])
            else:
                # The text behind a gap does not depend on the gap.
                written += stream.close() + "·"
                stream = tokenizer.stream(skip_special_tokens=False, follows=True)
        if number == len(blocks):
            written += stream.close()
        text.append(harmless(written.replace("\n", "⏎").replace("<|endoftext|>", "■")), style)
    return text

"""The pipeline as a person watches it: one panel of blocks, tokens appearing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from d2f.text import Tokenizer

if TYPE_CHECKING:
    from d2f.decoding.batch import BlockView

STYLES = {
    "semi-active": "black on bright_yellow",
    "fully active": "black on bright_green",
    "complete": "white on blue",
    "cached": "white on grey30",
}


def legend() -> Text:
    """What the colours mean."""
    text = Text("blocks: ")
    for state, style in STYLES.items():
        text.append(f" {state} ", style)
        text.append("  ")
    return text


def render_blocks(
    blocks: Sequence[BlockView], tokenizer: Tokenizer, *, named: bool = False
) -> Text:
    """All blocks of a response in their colours, or, where there are none, with their states."""
    text = Text()
    for block in blocks:
        style = STYLES[block.state.value]
        if named:
            text.append(f"[{block.state.value}]")
        run: list[int] = []
        for token in block.token_ids:
            if token is None:
                text.append(_words(run, tokenizer), style)
                run = []
                text.append("·", style)
            else:
                run.append(token)
        text.append(_words(run, tokenizer), style)
        text.append(" ")
    return text


def _words(token_ids: list[int], tokenizer: Tokenizer) -> str:
    words = tokenizer.decode(token_ids, skip_special_tokens=False)
    return words.replace("\n", "⏎").replace("<|endoftext|>", "■")

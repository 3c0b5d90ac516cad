"""Pairs of prompt and response from the rows of a data set, and the rows that give none.

Free of torch, since the worker processes that encode problems import it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from d2f.text import Tokenizer

if TYPE_CHECKING:
    from d2f.models.spec import ModelSpec
    from d2f.training.sections import ColumnConfig


_RECORDED = 100
_SHOWN = 5
_MAX_COLUMNS = 100
_MAX_REASONS = 50


class BadRow(Exception):
    """One row cannot be used; the message is the reason, without the row's number."""


@dataclass(kw_only=True)
class BadRows:
    """The numbers of bad rows by reason, and the first of them.

    Example:
        >>> bad = BadRows()
        >>> bad.add("a.jsonl:3", "not valid JSON")
        >>> bad.count, bad.text()
        (1, '1 × not valid JSON (a.jsonl:3)')
    """

    counts: dict[str, int] = field(default_factory=dict)
    """Rows by reason."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """The first rows of each reason, as `file:line` or `data set:row`, counted from 1."""
    columns: set[str] = field(default_factory=set, compare=False)
    """Names of columns that bad rows have."""

    @property
    def count(self) -> int:
        """Bad rows of all reasons."""
        return sum(self.counts.values())

    def add(self, where: str, reason: str, row: object = None) -> None:
        """Count a row."""
        if reason not in self.counts and len(self.counts) >= _MAX_REASONS:
            reason = "other reasons"
        self.counts[reason] = self.counts.get(reason, 0) + 1
        rows = self.first.setdefault(reason, [])
        if len(rows) < _RECORDED:
            rows.append(where)
        if isinstance(row, Mapping) and len(self.columns) < _MAX_COLUMNS:
            self.columns.update(str(name) for name in row)

    def to_table(self) -> dict[str, Any]:
        """Counts and first rows as JSON values."""
        return {"counts": self.counts, "first": self.first}

    def text(self) -> str:
        """The reasons with their counts and first rows, in one line."""
        parts = []
        for reason, count in self.counts.items():
            rows = self.first[reason][:_SHOWN]
            more = ", …" if count > len(rows) else ""
            parts.append(f"{count:,} × {reason} ({', '.join(rows)}{more})")
        return "; ".join(parts)


Message = Mapping[str, str]
Prompt = str | Sequence[Message]
"""A plain text, or messages with `role` and `content` where there is more than one."""

_KINDS = {
    type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
    list: "a list", dict: "an object",
}  # fmt: skip


class Pair(NamedTuple):
    """A prompt and its response, of which a sample is made."""

    prompt: Prompt
    response: str

    def texts(self, *, response: bool = True) -> Iterator[str]:
        """The texts of the pair in their order, with or without the response."""
        if isinstance(self.prompt, str):
            yield self.prompt
        else:
            yield from (message["content"] for message in self.prompt)
        if response:
            yield self.response


def read_pair(row: object, columns: ColumnConfig) -> Pair:
    """The pair that a row holds.

    Of a conversation the last message, the assistant's, is the response, and all before it are the
    prompt.

    Raises:
        BadRow: A column is missing, empty or of another type, or the text is not valid Unicode.

    Example:
        >>> from d2f.training.sections import ColumnConfig
        >>> columns = ColumnConfig(messages="chat", role="from", content="value")
        >>> read_pair({"chat": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
        ...           columns)
        Pair(prompt='1+1=', response='2')
    """
    messages = _said(row, columns, columns.used())
    if columns.messages is None:
        assert isinstance(row, Mapping)
        response = _text(_value(row, columns.response), f"'{columns.response}'")
    else:
        if messages[-1]["role"] != "assistant":
            raise BadRow(
                f"'{columns.messages}' ends with a message of role '{messages[-1]['role']}', "
                "not the assistant's"
            )
        response = messages.pop()["content"]
    return Pair(_prompt(messages, columns), response)


def read_prompt(row: object, columns: ColumnConfig) -> Prompt:
    """The prompt that a row holds, whether or not it has a response.

    An assistant's message at the end of a conversation is its response and not part of the prompt,
    so a row that `read_pair` takes has the same prompt here. Raises `BadRow` as that does.
    """
    messages = _said(row, columns, columns.used(response=False))
    if columns.messages is not None and messages[-1]["role"] == "assistant":
        messages.pop()
    return _prompt(messages, columns)


def _said(row: object, columns: ColumnConfig, needed: Sequence[str]) -> list[Message]:
    """The messages of a row: up to the user's, or the whole list; `needed` columns are named."""
    if not isinstance(row, Mapping):
        listed = ", ".join(f"'{name}'" for name in needed)
        raise BadRow(f"{_kind(row)}, not an object with the columns {listed}")
    messages: list[Message] = []
    if columns.system is not None:
        system = _value(row, columns.system)
        if system is not None and system != "":
            text = _text(system, f"'{columns.system}'")
            messages.append({"role": "system", "content": text})
    if columns.messages is not None:
        return messages + _messages(_value(row, columns.messages), columns)
    prompt = _text(_value(row, columns.prompt), f"'{columns.prompt}'")
    return [*messages, {"role": "user", "content": prompt}]


def _prompt(messages: list[Message], columns: ColumnConfig) -> Prompt:
    if not any(message["role"] == "user" for message in messages):
        raise BadRow(f"'{columns.messages}' has no message of the user before the answer")
    alone = len(messages) == 1
    return messages[0]["content"] if alone else messages


def _messages(value: object, columns: ColumnConfig) -> list[Message]:
    name = columns.messages
    if not isinstance(value, list):
        raise BadRow(f"'{name}' is {_kind(value)}, not a list of messages")
    if not value:
        raise BadRow(f"'{name}' is empty")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, Mapping):
            raise BadRow(f"'{name}' holds {_kind(message)} where a message should be")
        for key in (columns.role, columns.content):
            if key not in message:
                raise BadRow(f"a message in '{name}' has no '{key}'")
        role = _text(message[columns.role], f"'{columns.role}' in '{name}'")
        text = _text(message[columns.content], f"'{columns.content}' in '{name}'")
        messages.append({"role": columns.roles.get(role, role), "content": text})
    return messages


def _value(row: Mapping[str, object], name: str) -> object:
    if name not in row:
        raise BadRow(f"no column '{name}'")
    return row[name]


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid Unicode") from None
    return value


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """The texts of a model's mask and end tokens, which no text of a data set may hold.

    A tokenizer cannot tell `<|endoftext|>` that somebody wrote from the token itself, so the model
    would be taught to end, or to write masks, in the midst of an answer.
    """

    masks: tuple[str, ...]
    ends: tuple[str, ...]
    """Paddings and the added tokens of `data.response_suffix` are among them."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, spec: ModelSpec | None = None, suffix: str = "") -> Reserved:
        """Find the texts of a tokenizer, of the model that it belongs to, and of a suffix."""
        masks, ends = {tokenizer.mask_token_id}, {tokenizer.eos_token_id}
        if spec is not None:
            masks.add(spec.mask_token_id)
            ends |= {spec.pad_token_id, *spec.eos_token_ids}
        if suffix:
            ends |= set(tokenizer.encode(suffix))
        return cls(masks=_texts(tokenizer, masks), ends=_texts(tokenizer, ends - masks))

    def check(self, pair: Pair, *, written: bool) -> None:
        """Refuse a pair, as it is before the chat template, that holds one of them.

        Where no template will write the prompt (`written`), ends of turns in it are meant.

        Raises:
            BadRow: One is written out in the prompt or in the response.
        """
        texts = [("prompt", text) for text in pair.texts(response=False)]
        for where, text in (*texts, ("response", pair.response)):
            ends = () if where == "prompt" and written else self.ends
            for token in self.masks + ends:
                if token in text:
                    raise BadRow(
                        f"the {where} has '{token}' written out, which the model reads as a mask "
                        "or an end; take it out"
                    )


def _texts(tokenizer: Tokenizer, ids: Iterable[int | None]) -> tuple[str, ...]:
    """The texts of those tokens that a tokenizer keeps whole wherever they stand."""
    added = tokenizer.added_tokens
    texts = {added[i] for i in ids if i is not None and i in added}
    # Some tokenizers add spaces and ends of lines to their vocabulary.
    return tuple(sorted(text for text in texts if text.strip()))

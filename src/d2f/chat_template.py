"""A conversation as one text: the jinja template of a checkpoint, filled in as transformers 5 does.

The template comes from whoever published the checkpoint, so it runs in a sandbox and sees plain
values alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2f.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

# Names that a message's thoughts go by; templates read the first, or in gpt-oss' case the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template that a folder's files give for chats without tools, if they give one.

    Files of templates come before what tokenizer_config.json says; of several the one of the name
    `default` is meant.

    Raises:
        CheckpointError: A file cannot be read.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {f.stem: f for f in (folder / "additional_chat_templates").glob("*.jinja")}
    if any(file.exists() for file in files.values()):
        file = files["default"]
        try:
            return file.read_text(encoding="utf-8") if file.exists() else None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) else None


def check_chat_template(template: str) -> None:
    """Refuse a template that is no jinja.

    Raises:
        CheckpointError: It is broken.

    Example:
        >>> check_chat_template("{% if %}")
        Traceback (most recent call last):
        ...
        d2f.errors.CheckpointError: the chat template is broken: Expected an expression, got \
'end of statement block' (line 1)
    """
    _compiled(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special: Mapping[str, str],
    *,
    open_answer: bool = True,
) -> str:
    """The text of a conversation, up to where the assistant's next message begins.

    Args:
        template: In jinja.
        messages: At least one; their values are those of JSON.
        special: Special tokens that the template may name.
        open_answer: End with what begins the assistant's next message (`add_generation_prompt`).

    Raises:
        RequestError: The template refuses the messages or fails on them, or there are none.
        CheckpointError: The template is broken.

    Example:
        >>> render_chat("{{ bos_token }}{{ messages[0].content }}", [{"content": "Hi"}],
        ...             {"bos_token": "<s>"})
        '<s>Hi'
    """
    if not messages:
        raise RequestError("the chat template cannot render no messages; give at least one")
    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=[_message(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=open_answer,
            **special,
        )
    except RequestError:
        raise
    except Exception as error:  # a template is a program and can fail in any way
        raise RequestError(f"the chat template cannot render these messages: {error}") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without what is None, with its thoughts by each name."""
    plain = {name: _plain(value) for name, value in message.items() if value is not None}
    thoughts = next((plain[name] for name in _THOUGHTS if name in plain), None)
    if thoughts is None:
        return plain
    return {"thinking": thoughts, **plain, "reasoning_content": thoughts}


def _plain(value: Any) -> Any:
    """A value without methods of its own, which the sandbox would not know to be harmless."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(inner) for inner in value)
    for base in (str, int, float):
        if isinstance(value, base):
            return getattr(base, f"__{base.__name__}__")(value)
    return f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """A template made ready once: that takes longer than to fill it in."""
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is broken: {error.message} (line {error.lineno})"
        ) from None
    except Exception as error:  # of Python, for what jinja made of the template
        raise CheckpointError(f"the chat template is broken: {error}") from None


def _environment() -> Any:
    # Imported here: most uses of ids need no template.
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what an assistant wrote, for training; the text stays."""

        tags = {"generation"}  # noqa: RUF012 - so does the base class

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A block that is called has names of its own: what is set in it ends with it.
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> Any:
            return caller()

    def public(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the template's namespace has the private name {name!r}")

    class Names(Namespace):
        """`namespace(…)` for names that do not begin with an underscore."""

        def __init__(*args: Any, **names: Any) -> None:  # so that a name may be `self`
            own, *pairs = args
            values = dict(*pairs, **names)
            for name in values:
                public(name)
            Namespace.__init__(own, values)

        def __setitem__(self, name: str, value: Any) -> None:
            public(name)
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise RequestError(f"the chat template refuses the messages: {message}")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": _strftime_now,
        "namespace": Names,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)

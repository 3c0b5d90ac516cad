"""Chat templates: turn a conversation into one text, as transformers 5 does.

The jinja template comes from whoever published the checkpoint, so it runs in jinja's sandbox and
is given only plain values (texts, numbers, lists, tables).
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

# Keys under which messages carry reasoning. Templates read the first, that of gpt-oss the second.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return a folder's chat template for chats without tools; None if it has none.

    Template files win over the entry of tokenizer_config.json. Where there are several templates,
    the one named `default` is taken.

    Raises:
        CheckpointError: A template file cannot be read.
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
    """Refuse a template that jinja cannot parse.

    Raises:
        CheckpointError: The template is broken.

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
    """Return the text of a conversation, by default up to where the next answer begins.

    Args:
        template: The template's source, in jinja.
        messages: One message or more, each a table of JSON values.
        special: Special tokens by the names that the template may use, such as `bos_token`.
        open_answer: Whether the text ends with the header of the assistant's next message
            (`add_generation_prompt`).

    Raises:
        RequestError: There are no messages, or the template refuses them or fails on them.
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
    """Return a message as templates expect it: no None values, reasoning under each known key."""
    plain = {name: _plain(value) for name, value in message.items() if value is not None}
    thoughts = next((plain[name] for name in _THOUGHTS if name in plain), None)
    if thoughts is None:
        return plain
    return {"thinking": thoughts, **plain, "reasoning_content": thoughts}


def _plain(value: Any) -> Any:
    """Convert a value to built-in types, since the sandbox cannot judge methods of others."""
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
    """Compile a template, once: compiling takes longer than rendering."""
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(template)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template is broken: {error.message} (line {error.lineno})"
        ) from None
    except Exception as error:  # jinja compiles to Python, which can fail in other ways
        raise CheckpointError(f"the chat template is broken: {error}") from None


def _environment() -> Any:
    # Imported here: most uses of the package need no template.
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """Accept `{% generation %}`, which marks an assistant's text for training, and keep it."""

        tags = {"generation"}  # noqa: RUF012 - the base class does the same

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block has a scope of its own, as in transformers: names set in it end with it.
            return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

        def _text(self, caller: Any) -> Any:
            return caller()

    def public(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the template's namespace has the private name {name!r}")

    class Names(Namespace):
        """Provide `namespace(…)`, and refuse names that begin with an underscore."""

        def __init__(*args: Any, **names: Any) -> None:  # no `self`: a template may use the name
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

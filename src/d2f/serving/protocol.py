"""The bodies of the two POST endpoints, checked.

Fields of OpenAI's that this server does not support are accepted at the values at which they change
nothing. Fields that only identify a request or hint at how to cache it may have any value, since no
answer depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from d2f.engine.request import MOST_ALTERNATIVES, MOST_TEMPERATURE
from d2f.errors import unknown_name
from d2f.serving.errors import ApiError, bad_field, show_value

_MOST_TOKEN_ID = 2**31 - 1
_MOST_STOPS = 16
_LONGEST_STOP = 256


def _show_neutral(schema: dict[str, Any], kind: type[_Body]) -> None:
    """Put the fields of `neutral` into a body's JSON schema."""
    for name, accepted in kind.neutral.items():
        known = {"enum": list(accepted), "description": "Not supported; accepted so."}
        schema["properties"][name] = known


class _Body(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        hide_input_in_errors=True,
        json_schema_extra=_show_neutral,
    )

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Fields of OpenAI's that are not supported -> the values at which they change nothing."""


def _as_list(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A prompt as a list of prompts."""
    try:
        checked = check(value)
    except ValidationError:
        raise ValueError(
            "must be a text, a list of texts, a list of token ids or a list of such lists, "
            "not empty"
        ) from None
    return [checked] if isinstance(checked, str) or isinstance(checked[0], int) else checked


_Several = Field(min_length=1, fail_fast=True)
StopText = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Stop = StopText | Annotated[list[StopText], Field(max_length=_MOST_STOPS)] | None
TokenId = Annotated[int, Field(ge=0, le=_MOST_TOKEN_ID)]
StopTokenIds = Annotated[list[TokenId], Field(max_length=_MOST_STOPS, fail_fast=True)] | None
_Ids = Annotated[list[TokenId], Field(fail_fast=True)]
Prompt = Annotated[
    str
    | Annotated[list[str], _Several]
    | Annotated[list[TokenId], _Several]
    | Annotated[list[_Ids], _Several],
    WrapValidator(_as_list),
    Field(description="A text, or its token ids, or several of either."),
]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)] | None
Count = Annotated[int, Field(ge=1, lt=2**31)] | None
Alternatives = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None


class Policy(_Body):
    """Fields of the decoding policy that differ from what the checkpoint recommends."""

    block_size: Count = None
    add_threshold: Share = None
    activate_threshold: Share = None
    confidence_threshold: Share = None
    max_live_blocks: Count = None
    confidence: Literal["probability", "margin", "neg_entropy"] | None = None

    def changes(self) -> dict[str, Any]:
        """The fields that were given. A null is a value of `max_live_blocks` only: no bound."""
        given = self.model_fields_set
        return {
            name: value
            for name, value in self
            if name in given and (value is not None or name == "max_live_blocks")
        }


class StreamOptions(_Body):
    """Options of a stream: what its events carry beside text."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None
    """Whether a last chunk has the usage."""
    include_provisional: bool | None = None
    """Whether every step has a chunk, with what is decoded ahead in its field `d2f`."""


class TextPart(_Body):
    """A part of a message, which is always a text.

    Further keys of a part, such as `cache_control`, are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Message(_Body):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is OpenAI's newer word for `system`, which is what templates know."""
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    """The text; that of an assistant may be null or missing, which means nothing."""
    name: str | None = None
    """The name of the speaker, for the chat template."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        # Clients send back the messages of an assistant as they were given.
        **dict.fromkeys(
            ("refusal", "audio", "function_call", "tool_calls", "annotations"), (None, [])
        ),
        **dict.fromkeys(("reasoning", "reasoning_content"), (None, "")),
        "parsed": (None,),
        "provider_specific_fields": (None, {}),
    }

    def for_template(self) -> dict[str, str]:
        """The message in the form of chat templates.

        Example:
            >>> Message(role="developer", content="Be brief.").for_template()
            {'role': 'system', 'content': 'Be brief.'}
        """
        role = "system" if self.role == "developer" else self.role
        named = {"name": self.name} if self.name else {}
        return {"role": role, "content": self.text, **named}

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class GenerationBody(_Body):
    """The fields that both endpoints take."""

    model: str | None = None
    """The name of a served model; None: the first."""
    max_tokens: Count = None
    max_completion_tokens: Count = None
    """The same as `max_tokens`."""
    temperature: Annotated[FiniteFloat, Field(ge=0, le=MOST_TEMPERATURE)] | None = None
    """None: 0, the most probable tokens."""
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Share = None
    """Sample among tokens of at least this share of the largest probability."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The seed of the first choice; each next one has one more. None: drawn for each request."""
    stop: Stop = None
    """Texts that end a response and are cut off; one may be, or hold, a special token."""
    stop_token_ids: StopTokenIds = None
    """Tokens that end a response, beside the model's own ends."""
    replace_eos: bool | None = None
    """Whether `stop_token_ids`, if any, stand in place of the model's own ends."""
    n: Count = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Ignored, like the next five."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    strategy: str | None = None
    """The decoding strategy; None: the model's default."""
    policy: Policy | None = None
    options: dict[str, int | FiniteFloat | str | None] | None = None
    """Options of the strategy, such as `num_steps`."""
    early_stop: bool | None = None
    """Whether decoding stops at an end; False decodes every block that was opened."""

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        stop = self.stop or ()
        return (stop,) if isinstance(stop, str) else tuple(stop)

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("frequency_penalty", "presence_penalty"), (None, 0)),
        "logit_bias": (None, {}),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
    }


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`."""

    prompt: Prompt
    logprobs: Alternatives = None
    """Report the logarithm of the probability with which each token was accepted, and this many of
    the most probable tokens in its place."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None, ""),
    }


class ChatBody(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    # The first wrong message is enough: a body has room for a hundred thousand.
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    """Report the logarithm of the probability with which each token was accepted."""
    top_logprobs: Alternatives = None
    """The number of most probable tokens to report in its place; needs `logprobs`."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **GenerationBody.neutral,
        **dict.fromkeys(("tools", "functions"), (None, [])),
        **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
        **dict.fromkeys(("audio", "prediction", "web_search_options", "moderation"), (None,)),
        "parallel_tool_calls": (None, True, False),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
    }


Body = CompletionBody | ChatBody
AnyBody = TypeVar("AnyBody", bound=GenerationBody)
_TABLES: dict[str, type[_Body]] = {
    "policy": Policy, "stream_options": StreamOptions, "messages": Message,
}  # fmt: skip


def parse_body(kind: type[AnyBody], value: dict[str, Any]) -> AnyBody:
    """Check a body.

    Raises:
        ApiError: A field is unknown, not supported, missing or has a bad value.

    Example:
        >>> parse_body(CompletionBody, {"prompt": "1+1=", "echo": False}).prompt
        ['1+1=']
        >>> parse_body(CompletionBody, {"prompt": "1+1=", "max_tokns": 4})
        Traceback (most recent call last):
        ...
        d2f.serving.errors.ApiError: unknown parameter 'max_tokns'; did you mean 'max_tokens'?
    """
    value = _without_neutral(_without_idle(value), kind.neutral, "")
    messages, options = value.get("messages"), value.get("stream_options")
    if isinstance(messages, list):
        value["messages"] = [_said(index, message) for index, message in enumerate(messages)]
    if isinstance(options, dict):
        value["stream_options"] = _without_neutral(
            options, StreamOptions.neutral, "stream_options."
        )
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(kind, error, value) from None
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        words = f"top_logprobs is {body.top_logprobs}, which needs logprobs: true"
        raise bad_field("top_logprobs", words)
    return body


def _said(index: int, message: Any) -> Any:
    """A message without its neutral fields, an assistant's missing content made empty."""
    if not isinstance(message, dict):
        return message
    message = _without_neutral(message, Message.neutral, f"messages.{index}.")
    if message.get("role") == "assistant" and message.get("content") is None:
        message["content"] = ""
    return message


def _without_idle(value: Mapping[str, Any]) -> dict[str, Any]:
    """The body without fields that have no effect beside another field.

    Example:
        >>> _without_idle({"tools": [{"type": "function"}], "tool_choice": "none", "n": 2})
        {'tool_choice': 'none', 'n': 2}
    """
    idle = {
        offered
        for choice, offered in (("tool_choice", "tools"), ("function_call", "functions"))
        if value.get(choice) == "none" and isinstance(value.get(offered), list)
    }
    # The best n of n are all of them.
    number = value.get("n")
    if isinstance(number, int) and is_neutral(value.get("best_of"), (number,)):
        idle.add("best_of")
    return {name: one for name, one in value.items() if name not in idle}


def is_neutral(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether a value is one of those accepted. 0 is not False; zeros in a table are left out.

    Example:
        >>> is_neutral(0.0, (None, 0)), is_neutral(False, (None, 0)), is_neutral({"5": 0}, ({},))
        (True, False, True)
    """
    if isinstance(value, dict):
        value = {name: one for name, one in value.items() if not is_neutral(one, (0,))}
    return any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted
    )


def _without_neutral(
    table: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], where: str
) -> dict[str, Any]:
    """The table without the fields of OpenAI's that have a neutral value."""
    rest = {}
    for name, value in table.items():
        accepted = neutral.get(name)
        if accepted is None:
            rest[name] = value
        elif not is_neutral(value, accepted):
            words = " or ".join("null" if one is None else repr(one) for one in accepted)
            message = f"{where}{name} is not supported here; leave it out (or say {words})"
            raise bad_field(where + name, message, "unsupported_parameter")
    return rest


def _refusal(kind: type[GenerationBody], error: ValidationError, value: Any) -> ApiError:
    errors = error.errors(include_url=False, include_context=False)
    # Of a field's alternatives the error of the one whose type fits says more.
    same = [one for one in errors if one["loc"][:1] == errors[0]["loc"][:1]]
    first = next((one for one in same if not one["type"].endswith("_type")), errors[0])
    where = [part for part in first["loc"] if not _is_branch(part)]
    param = ".".join(map(str, where))
    if first["type"] == "extra_forbidden":
        table = kind if len(where) == 1 else _TABLES.get(str(where[0]))
        known = [] if table is None else list(table.model_fields)
        text = unknown_name("parameter", where[-1], known)
        # The whole list would drown the hint.
        short = text.partition(" Known:")[0] if "did you mean" in text else text
        return bad_field(param, short, "unknown_parameter")
    if first["type"] == "missing":
        return bad_field(param, f"{param} is missing", "missing_parameter")
    words = first["msg"].removeprefix("Value error, ")
    words = words[:1].lower() + words[1:]
    return bad_field(param, f"{param} is {show_value(_at(value, where))}: {words}")


def _is_branch(part: int | str) -> bool:
    """Whether a part of a location names an alternative of a type instead of a field."""
    return isinstance(part, str) and (
        "[" in part or part in ("str", "int", "float", "finite-float", "constrained-str")
    )


def _at(value: Any, where: list[int | str]) -> Any:
    for part in where:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return value
    return value

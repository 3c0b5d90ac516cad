"""The state of `d2f chat`: the conversation and the settings for the next answer; its race."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from d2f.cli.console import plain_table
from d2f.decoding.batch import GenerationResult
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.policy import (
    changed_policy,
    check_decoding,
    default_limit,
    unheeded,
    useful_strategies,
)
from d2f.engine.request import Request, resolve
from d2f.errors import ConfigError, RequestError
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

_WARM_TOKENS = 8


@dataclass(kw_only=True)
class ChatSession:
    """A model, the settings of its answers, and the conversation so far."""

    model: Transformer
    tokenizer: Tokenizer
    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] = field(default_factory=dict)
    """Fields of the policy that differ from the model's own."""
    max_new_tokens: int | None = None
    """None: the length that the model names, else 256, or less if the prompt leaves less room."""
    temperature: float = 0.0
    seed: int = 0
    """Seed of the first answer; each answer adds 1, so that the same question differs next time."""
    remembers: bool = False
    """Whether the model is told the conversation so far, which its chat template must support."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """Messages so far; empty if `remembers` is false."""
    num_answers: int = 0

    def __post_init__(self) -> None:
        if self.remembers and self.tokenizer.chat_template is None:
            raise ConfigError(
                "--history: this model has no chat template, which would tell it of one"
            )
        if self.remembers and "history" in self.tokenizer.left_out:
            raise ConfigError(
                "--history: this model was trained on single questions, and its chat template "
                "leaves out what was said before; use --no-history"
            )
        self.renew()

    def renew(self) -> None:
        """Replace the engine by a new one, since an error may have left it in a bad state."""
        self.engine = Engine(self.model, EngineConfig(max_batch_size=1), self.tokenizer)

    def request(self, message: str) -> Request:
        """Return the request for the answer to the user's next message."""
        if self.remembers:
            said = [*self.messages, {"role": "user", "content": message}]
            prompt_ids = self.tokenizer.encode_chat(said)
        else:
            prompt_ids = self.tokenizer.encode_prompt(message)
        return self._request(prompt_ids, self.strategy, self.options)

    def keep(self, message: str, answer: str) -> None:
        """Append a message and its answer to the conversation."""
        self.num_answers += 1
        if self.remembers:
            self.messages += [
                {"role": "user", "content": message},
                {"role": "assistant", "content": answer},
            ]

    def clear(self) -> None:
        """Start a new conversation."""
        self.messages.clear()

    def change_policy(self, settings: Sequence[str]) -> None:
        """Change fields by texts `NAME=VALUE`, all or none; `reset` alone: the model's policy."""
        if list(settings) == ["reset"]:
            self.changed = {}
            return
        new = _parsed(settings)
        check_decoding(self.strategy, new, {})
        changed_policy(self.model.spec, {**self.changed, **new})
        self.changed |= new

    def change_strategy(self, name: str, settings: Sequence[str]) -> None:
        """Decode with another strategy from now on, with options given as texts `NAME=VALUE`."""
        options = _parsed(settings)
        check_decoding(name, {}, options)
        resolve(self._request([0], name, options), self.model.spec)
        self.strategy, self.options = name, options

    def policy(self) -> dict[str, Any]:
        """Return the fields of the policy that have an effect on the strategy."""
        values = changed_policy(self.model.spec, self.changed).to_dict()
        useless = unheeded(self.strategy, values)
        return {name: value for name, value in values.items() if name not in useless}

    def race_requests(self, message: str) -> dict[str, Request]:
        """Return a request for one message for each strategy that can decode the model.

        The current strategy keeps its options, and each strategy gets those changed fields of the
        policy that have an effect on it.
        """
        own = self.request(message)
        resolve(own, self.model.spec)
        requests = {}
        for name in useful_strategies(self.model.spec):
            options = self.options if name == self.strategy else {}
            request = self._request(own.prompt_ids, name, options)
            # A strategy that cannot answer is left out; the others still race.
            with suppress(RequestError, ConfigError):
                resolve(request, self.model.spec)
                requests[name] = request
        return requests

    def _request(
        self, prompt_ids: Sequence[int], strategy: str, options: Mapping[str, Any]
    ) -> Request:
        useless = unheeded(strategy, self.changed)
        heeded = {name: value for name, value in self.changed.items() if name not in useless}
        spec, limit = self.model.spec, self.max_new_tokens
        return Request(
            prompt_ids=prompt_ids,
            max_new_tokens=default_limit(spec, len(prompt_ids)) if limit is None else limit,
            policy=changed_policy(spec, heeded),
            strategy=strategy,
            temperature=self.temperature,
            seed=self.seed + self.num_answers,
            options=options,
        )


class Finish(NamedTuple):
    """The answer of one strategy and its time."""

    strategy: str
    result: GenerationResult
    seconds: float


def run_race(
    engine: Engine, requests: Mapping[str, Request], stopped: Callable[[], bool]
) -> Iterator[Finish]:
    """Answer requests by strategy in turn, each after a warm-up and without a cached prompt.

    `stopped` is called after each forward; if it returns True, the race ends and the running
    request is removed from the engine.
    """
    for name, request in requests.items():
        few = min(_WARM_TOKENS, request.max_new_tokens)
        if answer(engine, replace(request, max_new_tokens=few), stopped) is None:
            return
        engine.forget_prompts()
        start = time.perf_counter()
        result = answer(engine, request, stopped)
        if result is None:
            return
        yield Finish(name, result, time.perf_counter() - start)


def answer(
    engine: Engine, request: Request, stopped: Callable[[], bool]
) -> GenerationResult | None:
    """The answer to a request; None if it was stopped."""
    number = engine.add(request)
    try:
        while not stopped():
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                return output.result
    finally:
        engine.abort(number)
    return None


def print_race(console: Console, finishes: list[Finish], tokenizer: Tokenizer) -> None:
    """Print a table of speeds, and each distinct answer with the strategies that gave it."""
    from d2f.cli.live import harmless

    gap = 2 if console.width >= 70 else 1
    columns = (
        "tokens", "forwards", "tokens/\nforward", "ms/\nforward", "s", "tokens\nper s"
    )  # fmt: skip
    table = plain_table(gap, names=[""], numbers=columns)
    answers: dict[str, list[str]] = {}
    for strategy, result, seconds in finishes:
        count, forwards = len(result.token_ids), result.num_forwards
        table.add_row(
            strategy,
            str(count),
            str(forwards),
            f"{result.tokens_per_forward:.2f}",
            f"{1000 * seconds / max(forwards, 1):.2f}",
            f"{seconds:.3f}",
            f"{count / seconds:.0f}",
        )
        answers.setdefault(harmless(tokenizer.decode(result.token_ids)), []).append(strategy)
    console.print(table)
    for text, names in answers.items():
        console.print(f"\n[bold]{', '.join(names)}[/bold]")
        console.print(text, markup=False, highlight=False, emoji=False)


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"{setting!r}: write it as NAME=VALUE")
        values[name] = _value(text)
    return values


def _value(text: str) -> int | float | str | None:
    if text.lower() == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

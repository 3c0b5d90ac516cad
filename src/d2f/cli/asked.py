"""The options of `d2f generate` that choose the model and how it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from d2f.cli.decoding_options import ModelChoice, check_choices, check_fit, chosen_policy
from d2f.cli.usage import UsageError
from d2f.decoding.strategies import default_strategy

if TYPE_CHECKING:
    from d2f.engine.request import Request
    from d2f.models.spec import ModelSpec
    from d2f.models.transformer import Transformer
    from d2f.text import Tokenizer
    from d2f.training.pairs import Message, Prompt


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of `d2f generate` as the user gave them, without the prompts."""

    choice: ModelChoice
    strategy: str | None
    changed: dict[str, Any]
    """Fields of the decoding policy that options set."""
    max_new_tokens: int | None
    chat: bool | None
    system: str | None
    request: Request
    """The remaining options, as a request without a prompt."""

    def check(self) -> None:
        """Refuse options that fit no model, before one is loaded."""
        if self.system is not None and self.chat is False:
            raise UsageError("--system: without effect with --no-chat")
        check_choices(self.request, self.strategy, self.changed)

    def load(self, dtype: str | None = None) -> tuple[Transformer, Tokenizer, Request]:
        """Load the model and its tokenizer; return them and the request with the model's defaults.

        `dtype` is what to load if the user named none; None: the model's own.
        """
        choice = self.choice
        model, tokenizer = replace(choice, dtype=choice.dtype or dtype).load()
        self._check_template(tokenizer)
        strategy = self.strategy or default_strategy(model.spec, policy=bool(self.changed))
        policy = chosen_policy(model.spec, strategy, self.changed)
        request = replace(self.request, strategy=strategy, policy=policy)
        return model, tokenizer, self.limited(request, model.spec)

    def limited(self, request: Request, spec: ModelSpec, prompt_ids: Sequence[int] = ()) -> Request:
        """Return the request with a prompt and, if the user named none, the default length."""
        from d2f.engine.policy import default_limit

        if self.max_new_tokens is None:
            limit = default_limit(spec, len(prompt_ids))
            request = replace(request, max_new_tokens=limit)
        check_fit(spec, request)
        return replace(request, prompt_ids=prompt_ids)

    def prompt_ids(self, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, rendered by the chat template if it is used.

        A system message in the prompt wins over that of the options.
        """
        from d2f.training.sources import encode_prompt

        if self.system is not None:
            messages: list[Message] = (
                [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
            )
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": self.system})
            prompt = messages
        return encode_prompt(tokenizer, prompt, self.chat)

    def settings(self) -> dict[str, Any]:
        """Return all options on which answers depend, except for the model's files."""
        request = self.request
        return {
            "strategy": self.strategy,
            "policy": self.changed,
            "options": dict(request.options),
            "max_new_tokens": self.max_new_tokens,
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "min_p": request.min_p,
            "seed": request.seed,
            "stop": list(request.stop),
            "eos": list(self.choice.eos or ()),
            "replace_eos": self.choice.replace_eos,
            "chat": self.chat,
            "system": self.system,
            "dtype": self.choice.dtype,
        }

    def _check_template(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None and (self.chat or self.system is not None):
            option = "--chat" if self.chat else "--system"
            raise UsageError(
                f"{option}: this model has no chat template; pass the prompt without it"
            )
        if self.system is not None and "system" in tokenizer.left_out:
            raise UsageError(
                "--system: this model's chat template leaves system messages out; pass the prompt "
                "without it"
            )

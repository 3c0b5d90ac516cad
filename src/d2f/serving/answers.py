"""Whole answers: the JSON objects of completions and chat completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from d2f.serving.choice import Choice, TokenLogprob, TokenTexts, finish_reason
from d2f.serving.plan import Plan
from d2f.serving.ticket import Update

_LOGGED = (
    "prompt_tokens", "completion_tokens", "num_forwards", "seconds", "waited", "finish_reason",
)  # fmt: skip


def to_json(value: Any) -> str:
    """Compact JSON. Text that a tokenizer gave can always be written as UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def new_choice(plan: Plan, texts: TokenTexts) -> Choice:
    """An empty response to one of a plan's requests."""
    return Choice(
        plan.model.tokenizer,
        eos_token_ids=plan.eos_token_ids,
        stop=plan.stop,
        texts=texts if plan.logprobs else None,
    )


def usage(plan: Plan, lasts: Sequence[Update]) -> dict[str, Any]:
    """What an answer took. Tokens and forwards of all choices; the longest of their times.

    Args:
        plan: What was asked.
        lasts: The last update of each choice.
    """
    results = [last.result for last in lasts if last.result is not None]
    tokens = sum(len(result.token_ids) for result in results)
    forwards = sum(result.num_forwards for result in results)
    return {
        "prompt_tokens": plan.num_prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": plan.num_prompt_tokens + tokens,
        "num_forwards": forwards,
        "tokens_per_forward": tokens / max(forwards, 1),
        "seconds": round(max(last.seconds for last in lasts), 6),
        "waited": round(max(last.waited for last in lasts), 6),
    }


def log_fields(plan: Plan, lasts: Sequence[Update]) -> dict[str, Any]:
    """What the log has of an answer: no text."""
    reasons = {
        finish_reason(last.result.finish_reason) for last in lasts if last.result is not None
    }
    fields = {**usage(plan, lasts), "finish_reason": ",".join(sorted(reasons))}
    return {name: fields[name] for name in _LOGGED}


def logprobs_object(plan: Plan, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Tokens with their logarithms, in the shape of the endpoint."""
    if plan.chat:
        content = [
            {
                **_logprob_object(token.text, token.logprob),
                "top_logprobs": [_logprob_object(*other) for other in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}
    top = [_top_object(token) for token in tokens] if plan.num_alternatives else None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }


def _logprob_object(text: str, logprob: float) -> dict[str, Any]:
    # Half a character is no text, and what its bytes are only its tokenizer knows.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": known}


def _top_object(token: TokenLogprob) -> dict[str, float]:
    """The most probable tokens by their text, the accepted one in any case."""
    top: dict[str, float] = {}
    for text, logprob in token.alternatives:
        # Of tokens that look alike the most probable one.
        top.setdefault(text, logprob)
    return top | {token.text: token.logprob}


def whole_answer(plan: Plan, lasts: Sequence[Update], texts: TokenTexts) -> bytes:
    """The answer to a request that is not streamed."""
    choices = [
        _whole_choice(plan, index, last, new_choice(plan, texts))
        for index, last in enumerate(lasts)
    ]
    answer = {
        "id": answer_id(plan),
        "object": "chat.completion" if plan.chat else "text_completion",
        "created": plan.created,
        "model": plan.model.name,
        "choices": choices,
        "usage": usage(plan, lasts),
    }
    return to_json(answer).encode()


def answer_id(plan: Plan) -> str:
    """The id of an answer and of each of its chunks."""
    return f"{'chatcmpl' if plan.chat else 'cmpl'}-{plan.id}"


def _whole_choice(plan: Plan, index: int, last: Update, choice: Choice) -> dict[str, Any]:
    result = last.result
    assert result is not None
    text = choice.end(result.token_ids)
    logprobs = None
    if plan.logprobs:
        tokens = choice.logprobs(result.probabilities, result.alternatives, ended=True)
        logprobs = logprobs_object(plan, tokens)
    content: dict[str, Any] = {"text": text}
    if plan.chat:
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
    reason = finish_reason(result.finish_reason)
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

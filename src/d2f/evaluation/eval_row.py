"""The rows of an evaluation made ready: prompts, requests, and the engines that answer them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2f.engine.ends import choose_ends
from d2f.engine.engine import Engine, EngineConfig
from d2f.engine.policy import changed_policy, heeds_policy
from d2f.engine.request import Request, resolve
from d2f.engine.stops import StopStrings
from d2f.errors import CheckpointError, ConfigError, D2FError, RequestError
from d2f.evaluation.answering import fitted_engine
from d2f.evaluation.eval_recipe import GOLD, EvalRecipe, RowSettings
from d2f.evaluation.race import gold_limit
from d2f.evaluation.task import Example, Task, Verdict
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer

GOLD_BLOCK = 32
"""The longest gold answer is rounded up to this."""
_MEMORY_SHARE = 0.5
"""Largest share of the free memory that an engine takes; another engine may come."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that rows name, in memory."""

    model: Transformer
    tokenizer: Tokenizer
    description: Mapping[str, Any]
    """name, adapter, num_parameters, sha256 of the weights; for result files."""


LoadModel = Callable[[str], LoadedModel]
"""Loads one of a recipe's `[models]` by its name."""


class EvalRow:
    """A row with everything that its problems need.

    Raises:
        ConfigError: The row asks for what its model cannot do.
    """

    def __init__(
        self,
        settings: RowSettings,
        recipe: EvalRecipe,
        task: Task,
        examples: Sequence[Example],
        loaded: LoadedModel,
    ) -> None:
        self.settings, self.loaded = settings, loaded
        self.name = settings.name
        self._task, self.examples = task, examples
        self.stop = tuple(task.stop)
        self._stops = StopStrings(self.stop, loaded.tokenizer)
        self._verdicts: dict[tuple[int, str], Verdict] = {}
        try:
            self._tokenizer = self._beginning(recipe)
            self.chat = self._uses_chat(recipe)
            self._ends = self._chosen_ends(recipe)
            self.max_new_tokens = self._limit(recipe)
            self._policy = changed_policy(loaded.model.spec, settings.policy)
            self._prompts = [self._prompt(example) for example in examples]
            # Asks of the row what it asks of any prompt.
            resolved = resolve(self._request([0], 0), loaded.model.spec).policy
        except D2FError as error:
            raise ConfigError(f"row {settings.name}: {error}") from None
        assert resolved is not None
        self.policy = resolved

    def _uses_chat(self, recipe: EvalRecipe) -> bool:
        wanted = recipe.models[self.settings.model].chat_template
        there = self.loaded.tokenizer.chat_template is not None
        if wanted and not there:
            raise ConfigError(
                f"model {self.settings.model} has no chat template; "
                f"set models.{self.settings.model}.chat_template = false"
            )
        return there if wanted is None else wanted

    def _chosen_ends(self, recipe: EvalRecipe) -> tuple[int, ...]:
        """Choose the tokens that end an answer."""
        own, entry = self.settings, recipe.models[self.settings.model]
        return choose_ends(
            entry.eos if own.eos is None else own.eos,
            self.loaded.tokenizer,
            self.loaded.model.spec,
            replace=entry.replace_eos if own.replace_eos is None else own.replace_eos,
        )

    def _beginning(self, recipe: EvalRecipe) -> Tokenizer:
        """Give the tokenizer whose prompts begin as the recipe says."""
        name, tokenizer = self.settings.model, self.loaded.tokenizer
        self.add_bos = recipe.models[name].add_bos
        if self.add_bos is None:
            return tokenizer
        try:
            return tokenizer.with_bos(self.add_bos)
        except CheckpointError:
            raise ConfigError(
                f"the tokenizer of model {name} has no BOS; set models.{name}.add_bos = false, "
                "or leave it out"
            ) from None

    def _limit(self, recipe: EvalRecipe) -> int:
        limit = self.settings.max_new_tokens or recipe.max_new_tokens
        if isinstance(limit, int):
            return limit
        responses = [example.response for example in self.examples]
        if None in responses:
            raise ConfigError(
                f'max_new_tokens = "{GOLD}": task {self._task.name} has no gold answers; '
                "give a number"
            )
        gold = [response for response in responses if response is not None]
        return gold_limit(gold, self.loaded.tokenizer, GOLD_BLOCK)

    def _prompt(self, example: Example) -> list[int] | RequestError:
        try:
            return example.encode(self._tokenizer, self.chat)
        except RequestError as error:
            return error

    def _request(self, prompt: list[int], index: int) -> Request:
        settings = self.settings
        return Request(
            prompt_ids=prompt,
            max_new_tokens=self.max_new_tokens,
            policy=self._policy,
            strategy=settings.strategy,
            eos_token_id=self._ends,
            early_stop=settings.early_stop,
            temperature=settings.temperature,
            seed=settings.seed + index,
            stop=self.stop,
            options=settings.options,
        )

    def request(self, index: int) -> Request:
        """Make the request of a problem.

        Raises:
            RequestError: The problem cannot be put into tokens.
        """
        prompt = self._prompts[index]
        if isinstance(prompt, RequestError):
            raise prompt
        return self._request(prompt, index)

    def num_prompt_tokens(self, index: int) -> int:
        """Count the tokens of a prompt; 0 if it cannot be put into tokens."""
        prompt = self._prompts[index]
        return 0 if isinstance(prompt, RequestError) else len(prompt)

    def prompt_sha256(self, index: int) -> str:
        """Hash a prompt's token ids as a JSON list; its text where there are none."""
        prompt = self._prompts[index]
        text = self.examples[index].prompt
        if not isinstance(prompt, RequestError):
            text = json.dumps(prompt)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def gold_sha256(self, index: int) -> str:
        """Hash the right answer, and what else the task judges by."""
        example = self.examples[index]
        text = repr((example.response, example.source))
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    @property
    def longest(self) -> int:
        """Count the positions of the longest prompt that the model can serve, and of its answer."""
        most = self.loaded.model.spec.max_positions
        lengths = (
            self.num_prompt_tokens(index) + self.max_new_tokens
            for index in range(len(self.examples))
        )
        return max((length for length in lengths if length <= most), default=most)

    def text(self, token_ids: Sequence[int]) -> str:
        """Give the text that is judged: up to the first stop string, without special tokens.

        Example:
            "7 apples." of "7 apples. Question: …" where " Question:" is one.
        """
        ended = bool(token_ids) and token_ids[-1] in self._ends
        text = self._stops.cut_text(token_ids)
        # An end is no part of the text, even one that is an ordinary word.
        return min(text, self._stops.cut_text(token_ids[:-1]), key=len) if ended else text

    def judge(self, indices: Sequence[int], texts: Sequence[str]) -> list[Verdict]:
        """Mark answers; the same answer to the same problem is marked once."""
        keys = list(zip(indices, texts, strict=True))
        new = [key for key in dict.fromkeys(keys) if key not in self._verdicts]
        if new:
            verdicts = self._task.judge([self.examples[i] for i, _ in new], [t for _, t in new])
            self._verdicts.update(zip(new, verdicts, strict=True))
        return [self._verdicts[key] for key in keys]

    def describe(self) -> dict[str, Any]:
        """Describe for result files how the row answers."""
        settings = self.settings
        return {
            "model": dict(self.loaded.description),
            "strategy": settings.strategy,
            "policy": self.policy.to_dict() if heeds_policy(settings.strategy) else None,
            "options": dict(settings.options),
            "max_new_tokens": self.max_new_tokens,
            "eos_token_ids": list(self._ends),
            "early_stop": settings.early_stop,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "stop": list(self.stop),
            "chat_template": self.chat,
            "add_bos": self.add_bos,
        }


class Engines:
    """Makes engines when they are asked for, one for each model and batch size, and keeps them.

    Example:
        `Engines(rows).of(rows[0], batch_size=64).generate([rows[0].request(0)])`
    """

    def __init__(self, rows: Sequence[EvalRow], backend: str = "auto") -> None:
        self._backend = backend
        self._engines: dict[tuple[str, int], Engine] = {}
        self._longest: dict[str, int] = {}
        for row in rows:
            known = self._longest.get(row.settings.model, 0)
            self._longest[row.settings.model] = max(known, row.longest)

    def of(self, row: EvalRow, batch_size: int) -> Engine:
        """Give the engine for a row's model at this batch size."""
        key = (row.settings.model, batch_size)
        if key not in self._engines:
            self._engines[key] = fitted_engine(
                row.loaded.model,
                EngineConfig(max_batch_size=batch_size, backend=self._backend),
                row.loaded.tokenizer,
                longest=self._longest[row.settings.model],
                memory_share=_MEMORY_SHARE,
            )
        return self._engines[key]

    def close(self) -> None:
        """Give all memory back."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

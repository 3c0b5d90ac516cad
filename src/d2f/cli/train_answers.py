"""The answers that `d2f train` asks of the model: samples, and problems for a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from d2f.engine.generate import generate_ids
from d2f.engine.policy import check_decoding
from d2f.evaluation.quick_score import QuickScore, own_rows
from d2f.evaluation.task import Task
from d2f.evaluation.tasks import load_task
from d2f.models.transformer import Transformer
from d2f.text import Tokenizer
from d2f.training.config import TrainConfig
from d2f.training.evaluations import Evaluator, HeldOut
from d2f.training.sections import EvaluateConfig
from d2f.training.sources import encode_prompt, read_held_out
from d2f.training.trainer import Sampler

# How a stage's model answers during training. Vanilla takes two tokens a step, to be done soon.
_STRATEGIES = {
    "autoregressive": "autoregressive", "masked-diffusion": "vanilla", "d2f": "pipelined",
}  # fmt: skip
_WITH_VALIDATION = ("word-problems", "functions", "gsm8k-variants", "advising", "wikisql")


def make_sampler(config: TrainConfig, tokenizer: Tokenizer) -> Sampler:
    """Make a function that answers a few prompts: held-out problems, or the first rows."""
    assert config.sample is not None
    count, most = config.sample.num_prompts, config.sample.max_new_tokens
    pairs = read_held_out(config.data, count)
    chat = config.data.chat_template
    prompts = [encode_prompt(tokenizer, prompt, chat) for prompt, _ in pairs]
    strategy = _STRATEGIES[config.stage]
    options = _options(strategy, most)

    def sample(model: Transformer) -> Sequence[Mapping[str, Any]]:
        results = generate_ids(
            model, prompts, config.policy, max_new_tokens=most, strategy=strategy, **options
        )
        return [
            {
                "prompt": "\n\n".join(pair.texts(response=False)),
                "answer": tokenizer.decode(result.token_ids),
                "expected": pair.response,
                "num_forwards": result.num_forwards,
            }
            for pair, result in zip(pairs, results, strict=True)
        ]

    return sample


def make_evaluator(
    config: TrainConfig, tokenizer: Tokenizer
) -> Callable[[Sequence[HeldOut]], Evaluator]:
    """Make a function that scores the model on a benchmark, or on samples held out."""
    settings = config.evaluate
    assert settings is not None
    strategy = settings.strategy or _STRATEGIES[config.stage]
    check_decoding(strategy, {}, _options(strategy, settings.max_new_tokens))
    task = None if settings.task is None else _load_task(settings)

    def prepare(held_out: Sequence[HeldOut]) -> Evaluator:
        own = task or own_rows(
            [
                (tokenizer.decode(row.prompt_ids), tokenizer.decode(row.response_ids))
                for row in held_out
            ],
            settings.answer,
        )
        problems = QuickScore(
            task=own,
            tokenizer=tokenizer,
            chat=config.data.chat_template,
            prompt_ids=None if task else [row.prompt_ids for row in held_out],
            strategy=strategy,
            policy=config.policy,
            options=_options(strategy, settings.max_new_tokens),
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        prompts = problems.prompts()
        return lambda model: problems.of(model, prompts)

    return prepare


def _load_task(settings: EvaluateConfig) -> Task:
    assert settings.task is not None
    split = settings.split or ("validation" if settings.task in _WITH_VALIDATION else "test")
    return load_task(
        settings.task,
        num_examples=settings.num_problems,
        seed=settings.seed,
        split=split,
        data=settings.data,
    )


def _options(strategy: str, most: int) -> dict[str, Any]:
    if strategy != "vanilla":
        return {}
    return {"num_steps": max(most // 2, 1), "block_length": most}

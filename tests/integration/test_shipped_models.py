"""The shipped models hold their promise, on a sample small enough for one CPU thread."""

from __future__ import annotations

import pytest
from benchmarks.shipped_models import score_problems

from d2f.engine.engine import Engine
from d2f.engine.generate import generate_ids
from d2f.engine.policy import default_limit, default_strategy
from d2f.engine.request import Request
from d2f.models.checkpoint import load_model, read_spec
from d2f.problems import extract_answer, generate_problems
from d2f.shipped import MODELS, shipped_model
from d2f.text import Tokenizer

MAX_NEW_TOKENS = 192
PROBLEMS = list(generate_problems(40, seed=11, split="test"))
FEW = PROBLEMS[:10]


@pytest.fixture(scope="module")
def student():
    return load_model(shipped_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(shipped_model())


def answer(student, prompts, **options):
    return generate_ids(student, prompts, max_new_tokens=MAX_NEW_TOKENS, **options)


def test_student_is_right_at_many_tokens_a_forward(student, tokenizer):
    row = score_problems(
        "pipelined",
        Engine(student),
        tokenizer,
        PROBLEMS,
        lambda ids: Request(prompt_ids=ids, max_new_tokens=MAX_NEW_TOKENS),
    )
    assert row.correct.count(False) <= 2
    assert row.summary()["tokens_per_forward"] >= 8


def test_pipeline_agrees_with_the_oracle_and_with_its_batches(student, tokenizer):
    prompts = [tokenizer.encode_prompt(problem.prompt) for problem in FEW]
    batched = answer(student, prompts)
    for prompt, result in zip(prompts, batched, strict=True):
        oracle = answer(student, prompt, strategy="reference")
        alone = answer(student, prompt)
        assert result.token_ids == alone.token_ids == oracle.token_ids
        assert result.num_forwards == alone.num_forwards == oracle.num_forwards
        assert result.finish_reason == "eos"


def test_what_the_models_are_offered_by_default():
    strategies = {"autoregressive": "autoregressive", "teacher": "vanilla", "student": "pipelined"}
    for name in MODELS:
        spec = read_spec(shipped_model(name))
        assert (default_strategy(spec), default_limit(spec)) == (strategies[name], 192)


def test_teacher_is_right_by_default(tokenizer):
    """Through the pipeline it is not; few steps, as the test has little time."""
    teacher = load_model(shipped_model("teacher"), device="cpu", dtype="float32")
    result = answer(teacher, tokenizer.encode_prompt(FEW[0].prompt), num_steps=32)
    assert extract_answer(tokenizer.decode(result.token_ids)) == FEW[0].answer


def test_models_share_one_tokenizer():
    files = {(shipped_model(name) / "tokenizer.json").read_bytes() for name in MODELS}
    assert len(files) == 1


def test_student_carries_its_policy(student):
    policy = student.spec.recommended_policy
    assert policy is not None
    assert policy.confidence_threshold == 0.98

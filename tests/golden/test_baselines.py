"""The published samplers of LLaDA, Dream and Fast-dLLM decode exactly these ids and forwards."""

import json
from pathlib import Path

import pytest

import d2f

GOLDEN = Path(__file__).parent
STRATEGIES = {
    "fast_dllm_parallel": "parallel",
    "fast_dllm_prefix_cache": "prefix-cache",
    "fast_dllm_dual_cache": "dual-cache",
}


def rows(name: str, method: str) -> list[dict]:
    every = json.loads((GOLDEN / name / "baselines.json").read_text())
    return [row for row in every if row["method"] == method]


def answer(model, row: dict, strategy: str, **options):
    return d2f.generate_ids(
        model,
        row["prompt"],
        max_new_tokens=row["gen_length"],
        eos_token_id=(),
        strategy=strategy,
        **options,
    )


@pytest.fixture(scope="module")
def llada():
    return d2f.load_model(GOLDEN / "llada-tiny", device="cpu")


def test_there_are_rows_of_every_method():
    assert len(rows("llada-tiny", "vanilla")) == 10
    assert [len(rows("llada-tiny", method)) for method in STRATEGIES] == [10, 10, 10]
    dream = rows("dream-tiny", "vanilla")
    assert {row["alg"] for row in dream} == {"maskgit_plus", "topk_margin", "entropy"}


def test_vanilla_rows_of_llada(llada):
    for row in rows("llada-tiny", "vanilla"):
        result = answer(
            llada, row, "vanilla", num_steps=row["steps"], block_length=row["block_length"]
        )
        assert result.token_ids == row["output"]
        assert result.num_forwards == row["forwards"]


@pytest.mark.parametrize("method", STRATEGIES)
def test_rows_of_fast_dllm(llada, method):
    for row in rows("llada-tiny", method):
        result = answer(
            llada,
            row,
            STRATEGIES[method],
            block_length=row["block_length"],
            threshold=row["threshold"],
        )
        assert result.token_ids == row["output"]
        assert result.num_forwards == row["forwards"]


def test_rows_of_dream():
    model = d2f.load_model(GOLDEN / "dream-tiny", device="cpu")
    for row in rows("dream-tiny", "vanilla"):
        assert row["masks_left"] == 0
        result = answer(
            model,
            row,
            "vanilla",
            num_steps=row["steps"],
            algorithm=row["alg"],
            eps=row["eps"],
        )
        assert result.token_ids == row["output"]
        assert result.num_forwards == row["steps"]

"""LLaDA's and Dream's own samplers in batches."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.decoding.unpaged import run, sequences, start, summary

from d2f import generate_ids
from d2f.decoding.strategies import ALGORITHMS
from d2f.decoding.workspace import Workspace
from d2f.errors import RequestError
from d2f.testing import tiny_model

FAST = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
MODELS = {name: tiny_model(name) for name in ("llada", "Dream")}
models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
rows = st.lists(
    st.tuples(st.lists(st.integers(0, 93), min_size=1, max_size=9), st.integers(1, 20)),
    min_size=1,
    max_size=4,
)


@FAST
@given(models, rows, st.sampled_from(ALGORITHMS), st.sampled_from([0.0, 0.9]), st.booleans())
def test_batched_and_padded_equals_alone(model, rows, algorithm, temperature, early_stop):
    prompts, limits = zip(*rows, strict=True)
    settings = {"eos": (7, 8), "temperature": temperature, "early_stop": early_stop}
    batch = sequences(prompts, limits, **settings)
    padded = Workspace(torch.device("cpu"), pads=True)
    expected = [
        summary(run(model, "vanilla", sequences([p], [n], **settings), algorithm=algorithm)[0])
        for p, n in rows
    ]
    for workspace in (None, padded):
        results = run(model, "vanilla", batch, workspace, algorithm=algorithm)
        assert [summary(result) for result in results] == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rows_that_stay_go_on_as_if_alone(algorithm):
    model, prompts, limits = MODELS["Dream"], [[1, 2], [3], [4, 5, 6]], [5, 12, 9]
    batch = start(model, "vanilla", sequences(prompts, limits), algorithm=algorithm)
    for _ in range(5):
        batch.step()
    assert batch.finished() == [True, False, False]
    batch.select([2, 1])
    while not all(batch.finished()):
        batch.step()
    for row, result in zip((2, 1), batch.results([0, 1]), strict=True):
        alone = generate_ids(
            model, prompts[row], max_new_tokens=limits[row], eos_token_id=(), seed=7,
            strategy="vanilla", algorithm=algorithm,
        )  # fmt: skip
        assert result == alone
        assert result.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["llada", "Dream"])
def test_each_token_has_the_probability_that_the_model_gave_it(name, algorithm):
    model, prompt = MODELS[name], [1, 2, 3]
    running = start(model, "vanilla", sequences([prompt], [10]), algorithm=algorithm, num_steps=6)
    before = [None] * 10
    while not running.finished()[0]:
        masked = [94 if token is None else token for token in before]
        with torch.inference_mode():
            probability_LV = model.logits(torch.tensor([prompt + masked]))[0].softmax(-1)
        running.step()
        [block] = running.view(0)
        for place, token in enumerate(block.token_ids):
            if before[place] is None and token is not None:
                expected = float(probability_LV[len(prompt) + place, token])
                assert block.probabilities[place] == pytest.approx(expected, abs=1e-5)
        before = block.token_ids
    assert running.results([0])[0].probabilities == list(block.probabilities)


def test_algorithms_differ():
    answers = {
        name: generate_ids(
            MODELS["Dream"], [1, 2, 3], max_new_tokens=24, eos_token_id=(),
            strategy="vanilla", algorithm=name, num_steps=8,
        )
        for name in ALGORITHMS
    }  # fmt: skip
    assert {result.num_forwards for result in answers.values()} == {8}
    assert len({tuple(result.token_ids) for result in answers.values()}) == len(ALGORITHMS)


def test_origin_keeps_positions_by_the_seed():
    def order(seed):
        batch = sequences([[1, 2, 3]], [24], seed=seed)
        running = start(MODELS["Dream"], "vanilla", batch, algorithm="origin", num_steps=6)
        masks = []
        while not running.finished()[0]:
            running.step()
            [block] = running.view(0)
            masks.append([token is None for token in block.token_ids])
        return masks

    one = order(1)
    assert one == order(1) != order(2)
    left = [sum(mask) for mask in one]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[2] > left[-1] == 0


def test_a_row_whose_logits_are_not_finite_fails_alone():
    model = tiny_model("llada")
    with torch.no_grad():
        model.embed.weight[42] = torch.nan
    batch = start(model, "vanilla", sequences([[1], [42], [2]], [6, 6, 4]), num_steps=4)
    batch.step()
    batch.select([2, 1])
    while not all(batch.finished()):
        batch.step()
    assert len(batch.results([0])[0].token_ids) == 4
    with pytest.raises(RequestError, match="not finite"):
        batch.results([1])

"""The pipeline is exact for every layout and policy, however it is run."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2f import DecodingPolicy, Engine, GenerationResult, Request, generate_ids
from d2f.decoding.batch import BlockState
from d2f.diffusion.layout import BlockLayout
from d2f.diffusion.policy import CONFIDENCES
from d2f.testing import tiny_model

FAST = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
MODELS = {name: tiny_model(name) for name in ("llada", "Dream")}
EOS = MODELS["llada"].spec.eos_token_ids[0]

models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
share = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.95, 1.0])
policies = st.builds(
    DecodingPolicy,
    block_size=st.integers(1, 9),
    add_threshold=share,
    activate_threshold=share,
    # A tiny random model is never sure: low thresholds make it accept several tokens at once.
    confidence_threshold=st.sampled_from([0.0, 0.02, 0.03, 0.05, 1.0]),
    max_live_blocks=st.sampled_from([None, 1, 2, 3]),
    confidence=st.sampled_from(CONFIDENCES),
)
# An empty prompt gives exact ties (masks alone are all alike), which rounding may break either way;
# test_edges.py covers it.
prompts = st.lists(st.integers(0, 93), min_size=1, max_size=11)
lengths = st.integers(1, 21)
sampling = st.sampled_from(
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.3},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.7},
    ]
)


def summary(result: GenerationResult):
    return result.token_ids, result.num_forwards, result.num_query_tokens, result.finish_reason


@FAST
@given(models, policies, prompts, lengths, st.booleans(), sampling)
def test_cached_equals_uncached(model, policy, prompt, length, early_stop, options):
    run = {
        strategy: generate_ids(
            model,
            prompt,
            policy,
            max_new_tokens=length,
            eos_token_id=[EOS, 7],
            strategy=strategy,
            early_stop=early_stop,
            seed=3,
            **options,
        )
        for strategy in ("pipelined", "reference")
    }
    assert summary(run["pipelined"]) == summary(run["reference"])


@FAST
@given(
    models,
    policies,
    # A prompt that is there twice is computed once, so its second request computes less.
    st.lists(prompts, min_size=2, max_size=5, unique_by=tuple),
    lengths,
    st.sampled_from(["pipelined", "serial", "vanilla"]),
    sampling,
)
def test_batched_equals_alone(model, policy, batch, length, strategy, options):
    def run(prompt_ids):
        return generate_ids(
            model,
            prompt_ids,
            policy,
            max_new_tokens=length,
            eos_token_id=7,
            strategy=strategy,
            **options,
        )

    assert [summary(r) for r in run(batch)] == [summary(run(prompt)) for prompt in batch]


def test_each_confidence_forces_tokens_in_an_order_of_its_own():
    def order(confidence):
        policy = DecodingPolicy(block_size=16, confidence_threshold=1.0, confidence=confidence)
        request = Request(prompt_ids=[1, 2, 3], max_new_tokens=16, policy=policy, eos_token_id=())
        return [
            [token is not None for token in output.blocks[0].token_ids]
            for output in Engine(MODELS["llada"]).stream(request)
        ]

    probability, margin, neg_entropy = map(order, CONFIDENCES)
    assert probability != margin != neg_entropy != probability


@FAST
@given(models, policies, prompts, lengths)
def test_tokens_stay_and_blocks_are_cached_in_order(model, policy, prompt, length):
    request = Request(
        prompt_ids=prompt, max_new_tokens=length, policy=policy, eos_token_id=(), early_stop=False
    )
    order = list(BlockState)
    before = []
    for output in Engine(model).stream(request):
        after = output.blocks
        for old, new in zip(before, after, strict=False):
            assert order.index(new.state) >= order.index(old.state)
            for token, later in zip(old.token_ids, new.token_ids, strict=True):
                assert token is None or later == token
        states = [order.index(block.state) for block in after]
        cached = [s for s in states if s == order.index(BlockState.CACHED)]
        assert states[: len(cached)] == cached, "cached blocks come first"
        for old, new in zip(before, after, strict=False):
            if new.state is BlockState.CACHED:
                assert None not in old.token_ids, "cached only from its final tokens"
        before = after
    assert sum(len(block.token_ids) for block in before) == length


@FAST
@given(models, prompts, st.integers(1, 6), st.integers(1, 4), st.integers(0, 93))
def test_later_block_never_changes_earlier_logits(model, prompt, size, num_blocks, token):
    layout = BlockLayout(prompt_length=len(prompt), block_size=size)
    ids = torch.tensor([prompt + [94] * (size * num_blocks)])
    changed = ids.clone()
    changed[:, len(prompt) + size * (num_blocks - 1) :] = token
    kept = len(prompt) + size * (num_blocks - 1)
    with torch.inference_mode():
        one, other = model.logits(ids, layout), model.logits(changed, layout)
    torch.testing.assert_close(one[:, :kept], other[:, :kept], atol=1e-5, rtol=0)


@FAST
@given(models, policies, prompts, lengths)
def test_length_is_exact_without_eos(model, policy, prompt, length):
    result = generate_ids(model, prompt, policy, max_new_tokens=length, eos_token_id=())
    assert len(result.token_ids) == length
    assert result.finish_reason == "length"
    assert model.spec.mask_token_id not in result.token_ids

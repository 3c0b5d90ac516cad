"""Fast-dLLM's samplers against an oracle that keeps whole sequences of keys and values."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.decoding.unpaged import run, sequences, start, summary

from d2f import generate_ids
from d2f.decoding.workspace import Workspace
from d2f.ops.attention import attention
from d2f.ops.rope import apply_rope, rope_frequencies, rope_tables
from d2f.testing import tiny_model

FAST = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
MODELS = {name: tiny_model(name) for name in ("llada", "Dream")}
MASK = 94
STRATEGIES = ("parallel", "prefix-cache", "dual-cache")
models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)
prompts = st.lists(st.integers(0, 93), min_size=1, max_size=9)
# A tiny random model is never sure.
rules = st.sampled_from(
    [{"threshold": t} for t in (0.02, 0.05, 0.2, 1.0)] + [{"factor": f} for f in (0.9, 2.0, 5.0)]
)


class Oracle:
    """One sequence, plain Python; keys and values of a layer are tensors of all positions."""

    def __init__(self, model, prompt, limit, size, rule):
        self.model, self.prompt, self.limit = model, len(prompt), limit
        self.size, self.rule = size, rule
        self.ids = [*prompt, *[MASK] * limit]
        self.hidden = torch.zeros(len(self.ids), model.spec.hidden_size)
        shape = (1, len(self.ids), model.spec.num_kv_heads, model.spec.head_dim)
        self.caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in model.layers]
        self.accepted = [None] * limit
        self.forwards = self.queries = 0

    @torch.inference_mode()
    def forward(self, start, stop):
        """Compute some positions; everything else is as some forward before left it."""
        model, spec = self.model, self.model.spec
        frequency = rope_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        rope = rope_tables(torch.arange(start, stop)[None], frequency, torch.float32)
        x = model.embed(torch.tensor([self.ids[start:stop]]))
        for layer, (keys, values) in zip(model.layers, self.caches, strict=True):
            q, k, values[:, start:stop] = layer.qkv.heads(layer.attention_norm(x))
            keys[:, start:stop] = apply_rope(k, *rope)
            x = x + layer.o_proj(attention(apply_rope(q, *rope), keys, values, None))
            x = x + layer.down_proj(layer.gate_up(layer.mlp_norm(x)))
        self.hidden[start:stop] = model.norm(x)[0]
        self.forwards += 1
        self.queries += stop - start

    def predict(self, position):
        before = max(position - 1, 0) if self.model.spec.architecture.shifted else position
        logits = self.model.head(self.hidden[before]).detach()
        probability = logits.softmax(-1)
        logits[MASK] = -torch.inf
        token = int(logits.argmax())
        return token, float(probability[token])

    def accept(self, start, stop):
        """Keep predictions."""
        masked = [p for p in range(start, stop) if self.ids[p] == MASK]
        found = {p: self.predict(p) for p in masked}
        masked.sort(key=lambda p: -found[p][1])
        if "threshold" in self.rule:
            least = float(torch.tensor(self.rule["threshold"]))
            number = sum(found[p][1] >= least for p in masked)
        else:
            sure = [(n + 1) * (1 - found[p][1]) for n, p in enumerate(masked, 1)]
            number = max((n for n, x in enumerate(sure, 1) if x < self.rule["factor"]), default=0)
        for p in masked[: max(number, 1)]:
            self.ids[p], self.accepted[p - self.prompt] = found[p]

    def run(self, strategy):
        total = len(self.ids)
        for begin in range(self.prompt, total, self.size):
            end = min(begin + self.size, total)
            parts = {"prefix-cache": (begin, total), "dual-cache": (begin, end)}
            self.forward(0, total)
            self.accept(begin, end)
            # As published, the caches are used at least once.
            once = strategy != "parallel"
            while once or MASK in self.ids[begin:end]:
                self.forward(*parts.get(strategy, (0, total)))
                self.accept(begin, end)
                once = False
        return self.ids[self.prompt :], self.forwards, self.queries, "length"


@FAST
@given(models, prompts, st.integers(1, 20), st.integers(1, 9), rules, st.sampled_from(STRATEGIES))
def test_equals_the_oracle(model, prompt, limit, size, rule, strategy):
    result = generate_ids(
        model, prompt, max_new_tokens=limit, eos_token_id=(), strategy=strategy,
        block_length=size, **rule,
    )  # fmt: skip
    oracle = Oracle(model, prompt, limit, size, rule)
    assert summary(result) == oracle.run(strategy)
    assert result.probabilities == pytest.approx(oracle.accepted, abs=1e-5)


@FAST
@given(models, prompts, st.integers(1, 20), st.integers(1, 9), rules, st.sampled_from(STRATEGIES))
def test_padding_changes_nothing(model, prompt, limit, size, rule, strategy):
    batch = sequences([prompt], [limit], eos=(7, 8))
    padded = Workspace(torch.device("cpu"), pads=True)
    [exact], [wide] = (
        run(model, strategy, batch, workspace, block_length=size, **rule)
        for workspace in (None, padded)
    )
    assert summary(exact) == summary(wide)
    assert exact.probabilities == pytest.approx(wide.probabilities, abs=1e-5)


@pytest.fixture(scope="module")
def shallow():
    """A model of one layer, whose keys and values depend on tokens alone: caches are exact."""
    model = tiny_model("llada")
    model.layers = model.layers[:1]
    model.spec = dataclasses.replace(model.spec, num_layers=1)
    return model


@pytest.mark.parametrize("strategy", ["prefix-cache", "dual-cache"])
@pytest.mark.parametrize("rule", [{"threshold": 0.95}, {"factor": 2.0}])
def test_exact_caches_give_what_no_cache_gives(shallow, strategy, rule):
    options = {"max_new_tokens": 21, "eos_token_id": (), "block_length": 6, **rule}
    expected = generate_ids(shallow, [5, 6, 7], strategy="parallel", **options)
    result = generate_ids(shallow, [5, 6, 7], strategy=strategy, **options)
    assert result.token_ids == expected.token_ids
    assert result.num_query_tokens < expected.num_query_tokens


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_threshold_one_keeps_one_token_a_forward(model, strategy):
    result = generate_ids(
        model, [3, 1, 4], max_new_tokens=12, eos_token_id=(), strategy=strategy,
        block_length=4, threshold=1,
    )  # fmt: skip
    assert result.num_forwards == 12


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_early_stop_gives_the_same_tokens_in_fewer_forwards(model, strategy):
    def answer(**settings):
        return generate_ids(
            model, [3, 1, 4], max_new_tokens=24, strategy=strategy, block_length=4,
            threshold=0.1, **settings,
        )  # fmt: skip

    free = answer(eos_token_id=())
    eos = free.token_ids[9]
    stopped, whole = answer(eos_token_id=eos), answer(eos_token_id=eos, early_stop=False)
    assert stopped.token_ids == whole.token_ids == free.token_ids[: free.token_ids.index(eos) + 1]
    assert stopped.finish_reason == whole.finish_reason == "eos"
    assert stopped.num_forwards < whole.num_forwards == free.num_forwards


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampling_depends_on_the_seed_alone(strategy):
    def answer(seed):
        return generate_ids(
            MODELS["llada"], [1, 2], max_new_tokens=16, eos_token_id=(), strategy=strategy,
            temperature=1.0, top_k=20, top_p=0.9, seed=seed,
        )  # fmt: skip

    assert answer(1) == answer(1)
    assert answer(1).token_ids != answer(2).token_ids


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_are_shown_up_to_the_one_that_is_decoded(strategy):
    batch = sequences([[1, 2, 3]], [10])
    running = start(MODELS["llada"], strategy, batch, block_length=4, threshold=1.0)
    seen = []
    while not running.finished()[0]:
        running.step()
        blocks = running.view(0)
        seen.append([sum(token is not None for token in block.token_ids) for block in blocks])
    assert seen[0] == [1]
    assert seen[-1] == [4, 4, 2]
    assert [sum(counts) for counts in seen] == list(range(1, 11))

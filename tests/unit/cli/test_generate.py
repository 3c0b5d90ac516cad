"""`d2f generate`: what goes where, what each option does and which are refused."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from tests.unit.cli.conftest import POLICY

from d2f.engine.engine import Engine
from d2f.engine.generate import generate_ids
from d2f.models.checkpoint import load_model
from d2f.testing import write_adapter, write_checkpoint
from d2f.text import Tokenizer

EASY = "Tom has 5 apples. Ann has 3 times as many apples as Tom. How many apples does Ann have?"
KEYS = [
    "text", "token_ids", "num_tokens", "num_forwards", "tokens_per_forward", "seconds",
    "tokens_per_second", "finish_reason",
]  # fmt: skip


@pytest.fixture
def generate(d2f, folder):
    """Text of the tiny diffusion model."""

    def run(*arguments, model=folder, prompt="1+1=", **others):
        common = ("--model", model, "--device", "cpu", "--max-new-tokens", 20)
        return d2f("generate", prompt, *common, *arguments, **others)

    return run


def test_text_on_stdout_and_statistics_on_stderr(generate, folder):
    done = generate()
    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, device="cpu")
    expected = generate_ids(model, tokenizer.encode_prompt("1+1="), max_new_tokens=20)
    assert done.code == 0
    assert done.out == tokenizer.decode(expected.token_ids) + "\n"
    assert f"{len(expected.token_ids)} tokens in {expected.num_forwards} forwards" in done.err


def test_json_has_the_keys_of_the_contract(generate):
    done = generate("--json")
    record = json.loads(done.out)
    assert list(record) == KEYS
    assert record["text"] == generate().out[:-1]
    assert record["num_tokens"] == len(record["token_ids"]) <= 20
    assert record["tokens_per_forward"] == record["num_tokens"] / record["num_forwards"]
    assert record["tokens_per_second"] == record["num_tokens"] / record["seconds"]
    assert record["finish_reason"] in ("eos", "length")
    assert done.err == ""


@pytest.mark.parametrize("strategy", ["pipelined", "serial", "vanilla", "reference", "dual-cache"])
def test_stream_prints_the_same_text(generate, strategy):
    options = ("--strategy", strategy)
    plain, streamed = generate(*options), generate(*options, "--stream")
    assert plain.code == streamed.code == 0
    assert streamed.out == plain.out
    assert "forwards" in streamed.err


def test_an_autoregressive_model_decodes_autoregressively(generate, causal):
    record = json.loads(generate("--json", model=causal).out)
    assert record["tokens_per_forward"] == 1
    assert generate("--stream", model=causal).out == record["text"] + "\n"


@pytest.mark.parametrize("stream", [False, True])
def test_the_clock_starts_when_the_engine_is_warm(generate, monkeypatch, stream):
    events = []
    answer, watch, clock = Engine.generate, Engine.stream, time.perf_counter

    def noted(call, prompts):
        def run(engine, asked):
            events.append([len(request.prompt_ids) for request in prompts(asked)])
            return call(engine, asked)

        return run

    monkeypatch.setattr(Engine, "generate", noted(answer, list))
    monkeypatch.setattr(Engine, "stream", noted(watch, lambda asked: [asked]))
    monkeypatch.setattr(
        "d2f.cli.generate.time",
        SimpleNamespace(perf_counter=lambda: events.append("clock") or clock()),
    )
    assert generate(*["--stream"] * stream).code == 0
    assert events == [[1], "clock", [4], "clock"]


def test_prompt_from_standard_input(generate):
    assert generate(prompt="-", stdin="1+1=\n").out == generate().out


def test_adapter(generate, tmp_path):
    adapter = write_adapter(tmp_path, "llada")
    assert generate("--adapter", adapter).out != generate().out


def test_policy_options_change_the_checkpoints_policy(generate):
    def forwards(*options):
        return json.loads(generate("--json", *options).out)["num_forwards"]

    own = ("--block-size", 8, "--confidence-threshold", 0.5)
    assert forwards(*own, "--add-threshold", 0.1, "--activate-threshold", 0.95) == forwards()
    # Never more than the one forced token a forward.
    assert forwards("--confidence-threshold", 1, "--max-live-blocks", 1) > forwards()
    assert forwards("--strategy", "serial") >= forwards()
    assert forwards("--confidence", "margin") > 0
    assert forwards("--strategy", "vanilla", "--num-steps", 5, "--block-length", 20) == 5


def test_options_of_the_baselines_reach_them(generate):
    def forwards(*options):
        return json.loads(generate("--json", *options).out)["num_forwards"]

    dream = ("--strategy", "vanilla", "--num-steps", 5, "--algorithm", "entropy", "--eps", 0.01)
    assert forwards(*dream) == 5
    for strategy in ("parallel", "prefix-cache", "dual-cache"):
        fast = ("--strategy", strategy, "--block-length", 20)
        assert forwards(*fast, "--threshold", 1) == 20
        assert forwards(*fast, "--factor", 1000) <= 2


@pytest.mark.parametrize("prompt", ["-5 + 3?", "-5", "-x is what?", "--stream of what?", "—"])
def test_a_prompt_may_begin_with_a_dash(generate, d2f, folder, prompt):
    ids = Tokenizer.load(folder).encode_prompt(prompt)
    expected = generate_ids(load_model(folder, device="cpu"), ids, max_new_tokens=20)
    text = Tokenizer.load(folder).decode(expected.token_ids) + "\n"
    options = ("--model", folder, "--device", "cpu", "--max-new-tokens", 20, "--seed", -1)
    assert generate("--seed", -1, prompt=prompt).out == text
    assert d2f("generate", *options, prompt).out == text
    assert d2f("generate", *options, "--", prompt).out == text


@pytest.mark.parametrize("wrong", ["--streem", "--no-such=1", "-x"])
def test_an_unknown_option_is_no_prompt(d2f, wrong):
    done = d2f("generate", wrong)
    assert (done.code, done.out) == (2, "")
    assert "No such option" in done.err


def test_text_ends_before_a_stop_string(generate):
    whole = generate().out[:-1]
    assert len(whole) > 6
    for stops in ([whole[3:5]], [whole[4], "never"], ["never"]):
        options = [word for stop in stops for word in ("--stop", stop)]
        ends = [whole.find(stop) for stop in stops if stop in whole]
        expected = whole[: min(ends)] if ends else whole
        assert generate(*options).out == expected + "\n"
        assert generate(*options, "--stream").out == expected + "\n"
        record = json.loads(generate(*options, "--json").out)
        assert (record["text"], record["finish_reason"] == "stop") == (expected, bool(ends))


def test_a_system_message_goes_through_the_template(generate, tmp_path):
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    path = write_checkpoint(tmp_path, "llada", policy=POLICY, tokenizer=True)
    (path / "chat_template.jinja").write_text(template)
    asked = generate("--system", "be brief", model=path)
    assert asked.code == 0
    assert asked.out == generate("--no-chat", model=path, prompt="system:be brief;user:1+1=;").out
    assert asked.out != generate(model=path).out


def test_sampling_is_seeded(generate):
    hot = ("--temperature", 2)
    assert generate(*hot, "--seed", 1).out == generate(*hot, "--seed", 1).out
    assert generate(*hot, "--seed", 1).out != generate(*hot, "--seed", 2).out


def test_sampling_among_one_token_needs_no_seed(generate):
    hot = ("--temperature", 2, "--confidence-threshold", 0)
    greedy = generate("--confidence-threshold", 0).out
    assert generate(*hot).out != greedy
    assert generate(*hot, "--top-k", 1).out == greedy
    assert generate(*hot, "--top-p", 1e-6).out == greedy
    assert generate(*hot, "--min-p", 1.0).out == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--add-threshold", -1], "add_threshold is -1.0; it must be a number between 0 and 1"),
        (["--confidence-threshold", 1.5], "confidence_threshold is 1.5"),
        (["--block-size", 0], "block_size is 0"),
        (["--confidence", "margn"], "did you mean 'margin'"),
        (["--top-p", 0], "top_p is 0.0"),
        (["--min-p", 2], "min_p is 2.0"),
        (["--max-new-tokens", 0], "max_new_tokens is 0"),
        (["--temperature", -1], "temperature is -1.0"),
        (["--strategy", "pipelind"], "did you mean 'pipelined'"),
        (["--strategy", "pipelind", "--block-size", 8], "did you mean 'pipelined'"),
        (["--strategy", "autoregressive"], "not autoregressive"),
        (["--strategy", "vanilla", "--block-size", 8], "--block-size: without effect"),
        (["--strategy", "serial", "--add-threshold", 0.5], "--add-threshold: without effect"),
        (["--num-steps", 4], "num_steps"),
        (["--strategy", "vanilla", "--algorithm", "entropi"], "did you mean 'entropy'"),
        (["--strategy", "parallel", "--threshold", 2], "threshold is 2.0"),
        (["--strategy", "parallel", "--factor", -1], "factor is -1.0"),
        (["--strategy", "dual-cache", "--refresh-share", 0.2], "refresh_share"),
        (["--prompt-interval", 4], "prompt_interval"),
        (["--strategy", "vanilla", "--response-interval", 4], "response_interval"),
        (["--strategy", "serial", "--block-length", 4], "block_length"),
        (["--chat"], "no chat template"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used"),
        (["--dtype", "float31"], "float31"),
        (["--seed", 2**63], "seed is"),
        (["--stop", ""], "stop string ''"),
        (["--system", "be brief"], "--system: this model has no chat template"),
        (["--system", "be brief", "--no-chat"], "--system: without effect with --no-chat"),
    ],
)
def test_wrong_values_are_refused_in_one_clear_line(generate, options, message):
    done = generate(*options)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert message in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "vanila"], "did you mean 'vanilla'"),
        (["--strategy", "vanilla", "--threshold", 0.5], "unknown option 'threshold'"),
        (["--strategy", "vanilla", "--num-steps", 0], "num_steps is 0"),
        (["--strategy", "parallel", "--factor", "nan"], "factor is nan"),
        (["--strategy", "dllm-cache", "--refresh-share", 2], "refresh_share is 2.0"),
    ],
)
def test_options_are_checked_before_the_model_is_read(generate, options, message):
    assert message in generate(*options, model="/no/such/model").err


def test_policy_options_are_refused_for_an_autoregressive_model(generate, causal):
    done = generate("--add-threshold", 0.5, model=causal)
    assert done.code == 2
    assert "--add-threshold: without effect on strategy autoregressive" in done.err


def test_stream_and_json_exclude_each_other(generate):
    done = generate("--stream", "--json")
    assert done.code == 2
    assert "exclude each other" in done.err


def test_wrong_folders(generate, causal, tmp_path):
    def error(*options, **others):
        done = generate(*options, **others)
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        return done.err

    assert "there is no folder '/no/such/model'" in error(model="/no/such/model")
    assert "/no/such/adapter" in error("--adapter", "/no/such/adapter")
    assert "did you mean 'teacher'" in error(model="shipped:techer")
    adapter = write_adapter(tmp_path / "a", "Dream")
    assert "an adapter for another model" in error("--adapter", adapter)
    assert "holds an adapter, not a model" in error(model=adapter)
    broken = write_checkpoint(tmp_path / "m", "llada", tokenizer=True)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors is truncated" in error(model=broken)
    assert "holds no tokenizer" in error(model=write_checkpoint(tmp_path / "n", "llada"))


def test_prompts_of_extreme_length(generate, causal):
    done = generate(prompt="~", model=causal)
    assert done.code == 1
    assert "the prompt is empty" in done.err
    done = generate(prompt="-", stdin="word " * 100_000)
    assert done.code == 1
    assert "500000 tokens" in done.err
    assert len(done.err) < 300


@pytest.mark.parametrize(
    ("prompt", "stdin", "where"),
    [("", "", ""), (" \t", "", ""), ("-", "", " on stdin"), ("-", " \n\n", " on stdin")],
)
@pytest.mark.parametrize("options", [[], ["--json"], ["--stream"], ["--no-chat"]])
def test_an_empty_prompt_is_refused_before_the_model_is_read(
    generate, prompt, stdin, where, options
):
    done = generate(*options, prompt=prompt, stdin=stdin, model="/no/such/model")
    assert (done.code, done.out) == (1, "")
    assert done.err == (f"error: the prompt{where} is empty; write what the model is to answer\n")


@pytest.mark.parametrize("options", [[], ["--stream"], ["--json"]])
def test_an_answer_without_a_text_is_explained(generate, options):
    said = "the answer ended without a text\n"
    whole = generate().out[:-1]
    assert said not in generate(*options).err
    done = generate(*options, "--stop", whole[0])
    assert done.code == 0
    if "--json" in options:  # whose record says as much
        assert (json.loads(done.out)["text"], done.err) == ("", "")
    else:
        assert done.out == "\n"
        assert done.err.count(said) == 1


def test_a_system_message_that_the_template_leaves_out_is_refused(d2f):
    done = d2f("generate", EASY, "--system", "be brief", "--device", "cpu")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: --system: this model's chat template leaves system messages out; pass the prompt "
        "without it\n"
    )


def test_the_shipped_model_answers_an_easy_problem(d2f):
    assert " ".join(EASY.split()) in " ".join(d2f("generate", "--help").out.split())
    for dtype in ("float32", "bfloat16"):
        done = d2f("generate", EASY, "--device", "cpu", "--dtype", dtype)
        assert done.code == 0
        assert done.out == "Ann has 5 * 3 = 15 apples.\n#### 15\n"


def test_the_shipped_model_refuses_a_prompt_that_is_too_long(d2f):
    done = d2f("generate", "-", "--device", "cpu", stdin="apples " * 100_000)
    assert done.code == 1
    assert "exceed the model's 1024 positions" in done.err


class TestEnds:
    """Chosen tokens end an answer, beside the model's own ends or in their place."""

    def test_by_id_and_by_text(self, generate, folder):
        free = json.loads(generate("--json", "--replace-eos").out)["token_ids"]
        place = next(n for n in range(3, 20) if free[n] not in free[:n] and free[n] < 94)
        text = Tokenizer.load(folder).decode([free[place]])
        for named in (str(free[place]), text):
            # A digit alone is an id.
            if named.isdigit() and named == text:
                continue
            done = json.loads(generate("--json", "--replace-eos", "--eos", named).out)
            assert done["token_ids"] == free[: place + 1]
            assert done["finish_reason"] == "eos"
            assert done["text"] == Tokenizer.load(folder).decode(free[:place])
            streamed = generate("--stream", "--replace-eos", "--eos", named).out
            assert streamed == done["text"] + "\n"

    def test_joins_the_models_own(self, generate, tmp_path):
        free = json.loads(generate("--json", "--replace-eos").out)["token_ids"]
        first, second = free[4], free[9]
        model = write_checkpoint(
            tmp_path, "llada", policy=POLICY, tokenizer=True, eos_token_id=second
        )
        (model / "tokenizer_config.json").write_text("{}")
        own = json.loads(generate("--json", model=model).out)["token_ids"]
        both = json.loads(generate("--json", "--eos", first, model=model).out)["token_ids"]
        alone = json.loads(generate("--json", "--replace-eos", "--eos", first, model=model).out)[
            "token_ids"
        ]
        assert own == free[: free.index(second) + 1]
        assert both == free[: min(free.index(first), free.index(second)) + 1]
        assert alone == free[: free.index(first) + 1]

    @pytest.mark.parametrize("named", ["96", "1+1", "<|mask|>"])
    def test_what_is_no_end_is_refused_before_the_weights(self, generate, named, monkeypatch):
        monkeypatch.setattr("d2f.models.checkpoint.load_model", None)
        done = generate("--eos", named)
        assert done.code != 0
        assert repr(named) in done.err or named in done.err

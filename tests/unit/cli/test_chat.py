"""`d2f chat`: piped, under a pseudo terminal, and what its commands do."""

from __future__ import annotations

import functools
import io
import os
import pty
import re
import select
import signal
import sys
import time
from subprocess import Popen

import pytest
from rich.console import Console
from rich.text import Text

from d2f.cli import chat
from d2f.cli.chat import Chat
from d2f.cli.chat_session import ChatSession, run_race
from d2f.cli.live import last_lines, watch_answer
from d2f.diffusion.policy import DecodingPolicy
from d2f.engine.generate import generate_ids
from d2f.engine.request import Request
from d2f.errors import ConfigError, RequestError
from d2f.models.checkpoint import load_model
from d2f.shipped import MODELS, shipped_model
from d2f.testing import tiny_model, write_checkpoint, write_tokenizer
from d2f.text import Tokenizer

POLICY = DecodingPolicy(block_size=8, confidence_threshold=0.5)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("llada"), "llada", policy=POLICY, tokenizer=True
    )


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    write_tokenizer(path, chat_template=TEMPLATE)
    return write_checkpoint(path, "llada", policy=POLICY)


@pytest.fixture
def talk(d2f, folder):
    def run(*lines, model=folder, options=()):
        common = ("--model", model, "--device", "cpu", "--max-new-tokens", 20)
        return d2f("chat", *common, *options, stdin="".join(f"{line}\n" for line in lines))

    return run


def new_session(folder, **settings):
    model, tokenizer = loaded(folder)
    return ChatSession(
        model=model,
        tokenizer=tokenizer,
        **{"strategy": "pipelined", "max_new_tokens": 20, **settings},
    )


@functools.cache
def loaded(folder):
    return load_model(folder, device="cpu"), Tokenizer.load(folder)


def expected(folder, prompt, **settings):
    model, tokenizer = loaded(folder)
    result = generate_ids(model, tokenizer.encode(prompt), max_new_tokens=20, **settings)
    return tokenizer.decode(result.token_ids) + "\n"


# ----------------------------------------------------------------------------------- a pipe


def test_each_piped_line_is_answered_alone(talk, folder):
    done = talk("1+1=", "", "2+2=")
    assert done.code == 0
    assert done.out == expected(folder, "1+1=") + expected(folder, "2+2=")
    assert "each message stands alone" in done.err
    assert len(re.findall(r"tokens in \d+ forwards .* ms per forward, \d+ tokens/s", done.err)) == 2
    assert "shown at" not in done.err
    assert talk().code == 0


def test_an_error_ends_neither_the_talk_nor_silently(talk, folder):
    done = talk("x" * 600, "/nope", "1+1=", "/policy block_size=0", "/quit", "2+2=")
    assert done.code == 1
    assert done.out == expected(folder, "1+1=")
    assert "exceed the model's" in done.err
    assert "unknown command '/nope'" in done.err
    assert "block_size is 0" in done.err


def test_a_fault_that_nobody_foresaw_ends_one_answer(talk, folder, monkeypatch):
    from d2f.engine.engine import Engine

    good = Engine.step
    calls = iter([RuntimeError("the device is on fire")])

    def step(engine):
        for error in calls:
            raise error
        return good(engine)

    monkeypatch.setattr(Engine, "step", step)
    done = talk("1+1=", "2+2=")
    assert done.out == expected(folder, "2+2=")
    assert "error: RuntimeError: the device is on fire" in done.err


def test_commands_change_what_follows(talk, folder):
    done = talk("/strategy serial", "1+1=", "/policy block_size=4", "1+1=", "/policy reset", "1+1=")
    serial = expected(folder, "1+1=", strategy="serial")
    small = DecodingPolicy(block_size=4, confidence_threshold=0.5)
    other = expected(folder, "1+1=", strategy="serial", policy=small)
    assert done.out == serial + other + serial
    assert "block_size=4" in done.err
    assert "block_size=8" in done.err


def test_strategy_takes_its_options(talk):
    done = talk("/strategy vanilla num_steps=5", "/policy", "1+1=")
    assert "strategy vanilla num_steps=5" in done.err
    assert "strategy vanilla has no policy" in done.err
    assert "in 5 forwards" in done.err
    refused = talk("/strategy vanila", "/strategy autoregressive", "/strategy vanilla num_steps=0")
    for words in ("did you mean 'vanilla'", "not autoregressive", "num_steps is 0"):
        assert words in refused.err


def test_help_and_example(talk):
    done = talk("/help", "/example")
    for name in chat._COMMANDS:
        assert name in done.err
    assert done.err.count("How many") + done.err.count("how many") >= 1
    assert done.out.endswith("\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strategy", "autoregressive"], "not autoregressive"),
        (["--strategy", "serial", "--add-threshold", 0.5], "--add-threshold: without effect"),
        (["--history"], "no chat template"),
        (["--max-new-tokens", 0], "max_new_tokens is 0"),
    ],
)
def test_refused_before_the_first_message(d2f, folder, options, message):
    done = d2f("chat", "--model", folder, *options)
    assert done.code == 2
    assert message in done.err


# --------------------------------------------------------------------------------- history


def test_a_model_with_a_template_is_told_the_conversation(talk, templated):
    both = talk("1+1=", "2+2=", model=templated)
    first = expected(templated, "1+1=|")
    assert both.out == first + expected(templated, f"1+1=|{first[:-1]}|2+2=|")
    assert "stands alone" not in both.err
    alone = first + expected(templated, "2+2=|")
    assert talk("1+1=", "/clear", "2+2=", model=templated).out == alone
    assert talk("1+1=", "2+2=", model=templated, options=["--no-history"]).out == alone


def test_the_shipped_models_are_not_told_the_conversation(d2f):
    for name in MODELS:
        shipped = Tokenizer.load(shipped_model(name))
        assert not chat._remembers(None, shipped)
        assert chat._remembers(True, shipped)
    done = d2f("chat", "--history")
    assert done.code == 2
    assert "--history: this model was trained on single questions" in done.err


def test_history_follows_the_template(folder, templated):
    assert chat._remembers(None, Tokenizer.load(templated))
    assert not chat._remembers(False, Tokenizer.load(templated))
    assert not chat._remembers(None, Tokenizer.load(folder))


def test_asking_again_draws_anew(folder):
    session = new_session(folder, temperature=1.0, seed=5)
    assert session.request("1").seed == 5
    session.keep("1", "2")
    assert session.request("1").seed == 6


# ------------------------------------------------------------------------------- the session


def test_policy_fields_without_effect_are_refused(folder):
    session = new_session(folder, strategy="serial")
    with pytest.raises(ConfigError, match="add_threshold: without effect on strategy serial"):
        session.change_policy(["add_threshold=0.5"])
    with pytest.raises(ConfigError, match="did you mean 'block_size'"):
        session.change_policy(["blocksize=4"])
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        session.change_policy(["block_size"])
    session.change_policy(["max_live_blocks=2", "confidence=margin"])
    session.change_policy(["max_live_blocks=none"])
    assert session.changed == {"max_live_blocks": None, "confidence": "margin"}


def test_race_runs_what_the_model_can_do(folder):
    session = new_session(folder, max_new_tokens=6)
    finishes = list(run_race(session.engine, session.race_requests("1+1="), lambda: False))
    names = [finish.strategy for finish in finishes]
    assert names[:2] == ["pipelined", "serial"]
    assert {"vanilla", "parallel", "dllm-cache"} < set(names)
    assert not {"autoregressive", "reference"} & set(names)
    for finish in finishes[:2]:
        text = session.tokenizer.decode(finish.result.token_ids)
        alone = session.engine.generate([session.race_requests("1+1=")[finish.strategy]])
        assert text == session.tokenizer.decode(alone[0].token_ids)


def test_race_of_an_autoregressive_model(tmp_path):
    model, folder = tiny_model("qwen2"), write_tokenizer(tmp_path)
    session = ChatSession(
        model=model, tokenizer=Tokenizer.load(folder), strategy="autoregressive", max_new_tokens=4
    )
    assert list(session.race_requests("1+1=")) == ["autoregressive"]
    with pytest.raises(RequestError, match="prompt is empty"):
        session.race_requests("~")


def test_race_uses_the_last_prompt_and_shows_each_answer(talk):
    done = talk("/race", "1+1=", "/race", options=["--max-new-tokens", 6])
    assert "no prompt to race with" in done.err
    rows = [line.split() for line in done.out.splitlines() if line.startswith("pipelined ")]
    assert [len(row) for row in rows] == [7]
    assert re.search(r"^pipelined(, [a-z-]+)*$", done.out, re.MULTILINE)


def test_a_stopped_race_leaves_no_request(folder):
    session, calls = new_session(folder), iter([False] * 3)
    requests = session.race_requests("1+1=")
    assert list(run_race(session.engine, requests, lambda: next(calls, True))) == []
    assert session.engine.step() == []
    with pytest.raises(RequestError, match="no request 0"):
        session.engine.view(0)


# ------------------------------------------------------------------------- what is watched


def test_a_stopped_answer_leaves_the_engine(folder):
    session, calls = new_session(folder), iter([False] * 2)
    console = Console(width=60, file=io.StringIO(), force_terminal=True)
    request = Request(prompt_ids=[1, 2], max_new_tokens=64)
    watched = watch_answer(
        console, session.engine, request, session.tokenizer, stopped=lambda: next(calls, True)
    )
    assert watched.num_forwards == 2
    assert watched.output is not None
    assert watched.output.result is None
    with pytest.raises(RequestError, match="no request"):
        session.engine.view(watched.output.request_id)


@pytest.mark.parametrize("off", [{"color_system": None}, {"no_color": True}])
def test_states_are_named_where_there_are_no_colours(folder, off):
    session, screen = new_session(folder), io.StringIO()
    console = Console(width=18, file=screen, force_terminal=True, **off)
    request = session.request("1+1=")
    watch_answer(console, session.engine, request, session.tokenizer)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    names = re.findall(r"^\[(?:semi-active|fully active|complete|cached)\]", shown, re.MULTILINE)
    assert "[fully active]" in names
    assert len(names) == len(re.findall("active|complete|cached", shown))


def test_answers_and_errors_break_between_words(folder, monkeypatch):
    session, screen = new_session(folder), io.StringIO()
    # As the console of answers is.
    console = Console(width=20, file=screen, force_terminal=True, soft_wrap=True)
    monkeypatch.setattr(chat, "out", console)
    monkeypatch.setattr(chat, "log", console)
    talk = Chat(session, slow=None)
    talk.is_live = True
    text = "seventeen [apples] and twentythree :pear: and 14"
    monkeypatch.setattr(session.tokenizer, "decode", lambda _: text)
    talk._print_text([])
    talk._say_error(text)
    shown = screen.getvalue().splitlines()
    assert shown[:3] == ["seventeen [apples] ", "and twentythree ", ":pear: and 14"]
    assert {word for line in shown[3:] for word in line.split()} >= set(text.split()[:-1])


@pytest.mark.parametrize(("text", "count"), [("", 1), (" \n", 1), ("4", 0)])
def test_an_answer_without_a_text_is_explained(talk, monkeypatch, text, count):
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: text)
    done = talk("1+1=")
    assert (done.code, done.out) == (0, text + "\n")
    assert done.err.count("the answer ended without a text\n") == count


def test_the_signs_are_explained_before_the_first_message(folder, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(chat, "log", Console(width=80, file=screen, force_terminal=True))
    talk = Chat(new_session(folder), None)
    talk.is_live = True
    talk.welcome()
    assert "· is not decoded yet, ■ is the end" in screen.getvalue()


def test_only_the_end_of_a_long_answer_is_shown():
    console = Console(width=10, file=io.StringIO())
    assert last_lines(Text("aaaa bbbb cccc dddd eeee"), console, 2).plain == "cccc dddd \neeee"
    assert last_lines(Text("aaaa"), console, 0).plain == "aaaa"


def test_twice_ctrl_c_leaves(folder, monkeypatch):
    talk = Chat(new_session(folder), None)
    talk.is_live = True
    answers = iter([KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def read(_prompt):
        answer = next(answers)
        if not isinstance(answer, str):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", read)
    with pytest.raises(KeyboardInterrupt):
        talk.run()
    assert list(answers) == ["never"]


class Terminal:
    """A process on a pseudo terminal of its own."""

    def __init__(self, *arguments):
        leader, follower = pty.openpty()
        code = "import sys; from d2f.cli.main import main; sys.exit(main())"
        self.process = Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"},
        )
        os.close(follower)
        self.leader, self.text = leader, ""

    def wait_for(self, words):
        """What came until these words did; it starts where the last wait ended."""
        end = time.monotonic() + 60
        while words not in self.text:
            assert time.monotonic() < end, f"no {words!r} in {self.text!r}"
            if select.select([self.leader], [], [], 1)[0]:
                self.text += os.read(self.leader, 65536).decode(errors="replace")
        before, _, self.text = self.text.partition(words)
        return before

    def type(self, text):
        os.write(self.leader, text.encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.leader)


def test_statistics_are_of_the_clock_that_is_not_slowed(folder, capsys):
    session = new_session(folder)
    [result] = session.engine.generate([session.request("1+1=")])
    count, forwards = len(result.token_ids), result.num_forwards
    talk = Chat(session, None)
    talk._report(result, 0.01 * forwards, 0.25)
    words = " ".join(capsys.readouterr().err.split())
    assert f"{count} tokens in {forwards} forwards" in words
    assert f"10.00 ms per forward, {count / forwards * 100:.0f} tokens/s" in words
    assert "shown at 0.25 s per forward" in words
    talk._report(result, 0.5 * forwards, 0.25)
    assert "shown at" not in capsys.readouterr().err


def test_under_a_pseudo_terminal(folder):
    options = ("--model", folder, "--device", "cpu", "--max-new-tokens", 64, "--slow", 0.02)
    with Terminal("chat", *options) as terminal:
        terminal.wait_for("/help lists commands")
        terminal.wait_for("> ")
        terminal.type("1+1=\r")
        shown = terminal.wait_for("tokens/s")
        assert "forward 1" in shown
        assert "\x1b[30;103m" in shown  # semi-active
        assert "tokens in" in shown
        terminal.wait_for("> ")
        terminal.type("/policy confidence_threshold=1 max_live_blocks=1\r")
        terminal.wait_for("max_live_blocks=1")
        terminal.wait_for("> ")
        terminal.type("2+2=\r")
        terminal.wait_for("forward 3")
        os.killpg(terminal.process.pid, signal.SIGINT)
        terminal.wait_for("stopped; not kept")
        terminal.wait_for("> ")
        terminal.type("/nope\r")
        terminal.wait_for("unknown command")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0

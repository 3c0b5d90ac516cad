"""The page in a real browser against the real server."""

from __future__ import annotations

import itertools
import json
import re
import time
import urllib.request
from contextlib import closing

import pytest
from tests.browser.live_server import ALL, EXAMPLES, WHOLE_CONVERSATION, live_server

from d2f.engine.generate import generate_ids
from d2f.models.checkpoint import load_model
from d2f.shipped import shipped_model
from d2f.text import Tokenizer

pytestmark = pytest.mark.browser

DECODED = "#blocks .tile:not(.masked)"
LANES = ["pipelined", "serial", "autoregressive", "vanilla"]

# Counts in the page, where an answer's end comes before its reader hears of it. Events of the
# network come from another process: one answer's end may be told after the next one's start.
COUNT_ANSWERS = """() => {
  const answers = window.answers = {running: 0, most: 0, all: 0};
  const ask = window.fetch;
  window.fetch = async (url, options) => {
    if (!String(url).endsWith("completions")) return ask(url, options);
    answers.all += 1;
    answers.running += 1;
    answers.most = Math.max(answers.most, answers.running);
    const response = await ask(url, options);
    const ends = new TransformStream({flush: () => { answers.running -= 1; }});
    return new Response(response.body.pipeThrough(ends), response);
  };
}"""


@pytest.fixture(scope="module")
def answer_ids():
    """What the engine answers to the first example."""
    model = load_model(shipped_model(), device="cpu", dtype="float32")
    prompt = Tokenizer.load(shipped_model()).encode_prompt(EXAMPLES[0])
    return generate_ids(model, prompt, max_new_tokens=192).token_ids


def ask_example(page, index=0):
    page.locator(".chip").nth(index).click()
    page.wait_for_selector(".notes .link")


def tiles(page):
    """Texts of the decoded tiles by position."""
    pairs = page.eval_on_selector_all(
        DECODED, "tiles => tiles.map(tile => [Number(tile.dataset.position), tile.textContent])"
    )
    return dict(pairs)


def sign(text):
    """A token's text as its tile shows it."""
    if re.fullmatch(r"<\|.*\|>", text):
        return "■"
    return (
        "␣" * len(text)
        if text.isspace() and "\n" not in text
        else text.replace("\n", "⏎").removeprefix(" ")
    )


def num_running(address):
    """Requests that the server's engines work on."""
    with closing(urllib.request.urlopen(f"{address}metrics")) as answer:
        text = answer.read().decode()
    return sum(map(float, re.findall(r"^d2f_requests_running(?:{.*})? (\S+)$", text, re.M)))


def fulfil(page, status=200, body="", **headers):
    """Answer the next questions in the server's place."""
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=status, body=body, headers=headers),
    )


# ------------------------------------------------------------------------------------- chat


def test_example_is_answered_and_every_token_stands_at_its_place(open_page, address, answer_ids):
    page = open_page(address)
    ask_example(page)
    tokenizer = Tokenizer.load(shipped_model())
    assert page.locator(".answer .text").inner_text() == tokenizer.decode(answer_ids)
    assert f"{len(answer_ids)} tokens" in page.locator(".answer .notes").inner_text()
    assert tokenizer.decode(answer_ids) in page.locator("#announcer").text_content()
    page.click("#to-end")
    shown = tiles(page)
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in answer_ids]
    assert {position: shown[position] for position in range(len(texts))} == {
        position: sign(text) for position, text in enumerate(texts)
    }
    assert page.locator("#c-tokens").inner_text() == str(len(answer_ids))


def test_enter_sends_shift_enter_starts_a_line_and_text_stays_text(open_page, address):
    page = open_page(address)
    page.wait_for_selector("#send:enabled")
    page.fill("#max-tokens", "8")
    page.focus("#prompt")
    hostile = "<img src=x onerror=alert(1)>"
    page.keyboard.type(hostile)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("How many?")
    assert page.locator(".question").count() == 0
    page.keyboard.press("Enter")
    page.wait_for_selector(".notes .link")
    assert page.locator(".question").inner_text() == f"{hostile}\nHow many?"
    assert page.locator("img").count() == 0
    assert page.input_value("#prompt") == ""


def test_a_model_of_single_questions_says_so_and_offers_no_earlier_messages(open_page, address):
    page = open_page(address)
    page.wait_for_selector("#send:enabled")
    assert "trained on single questions" in page.locator("#alone").inner_text()
    assert page.locator("#keep").is_visible()
    assert page.locator("#keep").is_disabled()
    assert not page.is_checked("#keep")


def test_earlier_messages_are_sent_only_when_asked_for(browser, open_page):
    several = ("conversation", "student", "pipelined")
    templates = {"conversation": WHOLE_CONVERSATION}
    with live_server([several, ALL[0]], templates=templates) as (address, _):
        page = open_page(address)
        page.wait_for_selector("#send:enabled")
        assert page.locator("#alone").is_hidden()
        page.fill("#max-tokens", "8")
        ask_example(page)
        assert "cut at the most tokens allowed" in page.locator(".notes").inner_text()
        sent = []
        for keep in (False, True):
            page.set_checked("#keep", keep)
            with page.expect_request("**/v1/chat/completions") as asked:
                page.locator(".chip").nth(1).click()
            sent.append([message["role"] for message in asked.value.post_data_json["messages"]])
            page.wait_for_selector("#send:visible")
        assert sent == [["user"], ["user", "assistant", "user"]]
        # The choice does not go along to a model that would not read those messages.
        page.select_option("#model", ALL[0][0])
        assert page.locator("#keep").is_disabled()
        assert not page.is_checked("#keep")
        page.select_option("#model", "conversation")
        assert page.locator("#keep").is_enabled()


def test_stop_ends_the_request_on_the_server_too(open_page, address):
    page = open_page(address)
    page.select_option("#model", "teacher")
    page.fill("#max-tokens", "512")
    page.locator(".chip").first.click()
    page.wait_for_selector("#pipeline-show:visible")
    assert num_running(address) == 1
    page.click("#stop")
    assert "stopped" in page.locator(".notes").inner_text()
    page.wait_for_selector("#send:visible")
    deadline = time.monotonic() + 10
    while num_running(address) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num_running(address) == 0


# ----------------------------------------------------------------------------------- replay


def test_replay_by_scrubber_and_keyboard_shows_each_step(open_page, address):
    page = open_page(address)
    ask_example(page)
    page.focus("#scrubber")
    page.keyboard.press("Home")
    assert tiles(page) == {}
    last = int(page.get_attribute("#scrubber", "max"))
    steps, forwards = [{}], [0]
    for _ in range(last):
        page.keyboard.press("ArrowRight")
        steps.append(tiles(page))
        here, total = re.findall(r"\d+", page.locator("#where").inner_text())
        forwards.append(int(here))
    assert forwards == list(range(int(total) + 1))
    for before, after in itertools.pairwise(steps):
        assert before.items() <= after.items(), "a token that was decoded never changes"
    assert len(steps[-1]) > len(steps[1]) > 0
    states = set(page.locator("#blocks .state").all_inner_texts())
    assert states <= {"complete", "cached"}
    page.click("#step-back")
    assert tiles(page) == steps[-2]
    page.click("#to-start")
    page.select_option("#speed", "slowed:1")
    page.click("#play")
    page.wait_for_selector("#play:not(.playing)")
    assert tiles(page) == steps[-1]


def told_events(*totals):
    """The body of an answer after whose steps so many seconds, forwards and tokens are past."""
    blocks = [{"start": 0, "length": 4, "state": "fully active"}]
    chunks = []
    for seconds, num_forwards, num_committed in totals:
        step = {"seconds": seconds, "num_forwards": num_forwards, "num_committed": num_committed}
        step |= {"waited": 0, "tokens": [], "blocks": blocks}
        chunks.append({"choices": [{"delta": {}, "finish_reason": None}], "d2f": step})
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    lines = [f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks]
    return "".join([*lines, "data: [DONE]\r\n\r\n"])


def test_counters_follow_the_events_own_seconds(open_page, address):
    page = open_page(address)
    fulfil(page, body=told_events((0.5, 1, 2), (2.0, 4, 8)))
    ask_example(page)
    page.click("#to-end")
    names = ("seconds", "forwards", "tokens", "per-forward", "per-second", "ms")
    shown = [page.locator(f"#c-{name}").inner_text() for name in names]
    assert shown == ["2.000 s", "4", "8", "2.00", "4.00", "500"]


def test_one_of_a_thing_is_told_in_the_singular(open_page, address):
    page = open_page(address)
    fulfil(page, body=told_events((0.5, 1, 1), (1.0, 2, 2)))
    ask_example(page)
    assert " · 2 tokens · 2 forwards · " in page.locator(".notes").inner_text()
    page.click("#to-start")
    for number, forward, token in (
        (0, "forwards", "tokens"),
        (1, "forward", "token"),
        (2, "forwards", "tokens"),
    ):
        counters = page.locator(".counters div").all_inner_texts()
        expected = [f"{forward}\n{number}", f"{token} decoded\n{number}"]
        assert counters[1:3] == expected
        page.click("#step-on")
    page.unroute("**/v1/chat/completions")
    fulfil(page, body=told_events((0.5, 1, 1)))
    page.click("#again")
    page.wait_for_selector(".answer:nth-of-type(4) .link")
    assert " · 1 token · 1 forward · " in page.locator(".notes").last.inner_text()
    page.click("#race-tab")
    page.click("#race-start")
    page.wait_for_selector("#race-player:visible")
    page.focus("#race-scrubber")
    page.keyboard.press("End")
    results = page.locator(".lane-result").all_inner_texts()
    assert results == ["1 token · 1 forward · 1.00 tokens/forward · 2.00 tokens/s"] * len(LANES)
    told = page.locator("#announcer").text_content()
    assert told.count("1 token in 1 forward, 0.500 s") == len(LANES)


def test_page_calls_the_states_of_a_block_by_one_name_each(open_page, address):
    page = open_page(address)
    page.wait_for_selector(".chip")
    text = page.locator("body").text_content()
    assert "semi-active" in text
    assert "fully active" in text
    assert not re.search(r"activated|fully-active", text)


def test_probability_is_told_on_hover_and_on_focus(open_page, address):
    page = open_page(address)
    ask_example(page)
    page.click("#to-end")
    first = page.locator("#blocks .tile").first
    first.hover()
    assert re.search(r"probability [\d.]+%", page.locator("#tip").inner_text())
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()
    first.focus()
    page.keyboard.press("ArrowRight")
    focused = page.evaluate("document.activeElement.dataset.position")
    assert focused == "1"
    assert "position 1," in page.locator("#tip").inner_text()
    assert "position 1," in page.evaluate("document.activeElement.ariaLabel")
    page.keyboard.press("ArrowDown")
    assert int(page.evaluate("document.activeElement.dataset.position")) > 2
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


# ------------------------------------------------------------------------------------- race


def test_race_measures_one_row_after_the_other_and_replays_them_together(open_page, address):
    page = open_page(address)
    page.evaluate(COUNT_ANSWERS)
    asked = []
    page.on(
        "request",
        lambda request: (
            request.url.endswith("completions") and asked.append(request.post_data_json)
        ),
    )
    page.click("#race-tab")
    page.wait_for_selector("#race-start:enabled")
    page.evaluate(
        "new MutationObserver(() => (window.said ??= []).push("
        "document.getElementById('race-status').textContent))"
        ".observe(document.getElementById('race-status'), {childList: true})"
    )
    page.fill("#race-tokens", "24")
    page.click("#race-start")
    page.wait_for_selector("#race-player:visible")
    assert page.evaluate("window.answers") == {"running": 0, "most": 1, "all": 2 * len(LANES)}
    measured = [body for body in asked if body["max_tokens"] == 24]
    assert [body["strategy"] for body in measured] == LANES
    assert {body["messages"][0]["content"] for body in asked} == {EXAMPLES[0]}
    said = page.evaluate("window.said")
    for number, name in enumerate(LANES, 1):
        assert f"Measuring {name} (row {number} of 4) …" in said
    page.focus("#race-scrubber")
    page.keyboard.press("Home")
    page.wait_for_selector('.lane[data-phase="running"]')
    page.keyboard.press("End")
    assert page.locator('.lane[data-phase="finished"]').count() == len(LANES)
    clocks = [float(text.split()[0]) for text in page.locator(".lane-clock").all_inner_texts()]
    assert float(page.locator("#race-clock").inner_text().split()[0]) >= max(clocks)
    ratios = page.locator(".ratio").all_inner_texts()
    assert ratios[0] == "1×"
    for ratio, clock in zip(ratios[1:], clocks[1:], strict=True):
        # The clocks show whole milliseconds.
        least, largest = (
            (clock - 0.0006) / (clocks[0] + 0.0006),
            (clock + 0.0006) / (clocks[0] - 0.0006),
        )
        assert least * 0.99 <= float(ratio.split("×")[0]) <= largest * 1.01
    assert "24 tokens · 24 forwards" in page.locator(".lane-result").nth(2).inner_text()


@pytest.mark.parametrize(("chosen", "sent"), [("d2f-student", True), ("teacher", False)])
def test_sliders_count_in_a_race_only_for_their_own_model(open_page, address, chosen, sent):
    page = open_page(address)
    page.select_option("#model", chosen)
    page.click("#race-tab")
    page.wait_for_selector("#race-start:enabled")
    page.fill("#race-tokens", "8")
    with page.expect_request("**/completions") as asked:
        page.click("#race-start")
    assert asked.value.post_data_json["model"] == "d2f-student"
    assert ("policy" in asked.value.post_data_json) is sent
    page.wait_for_selector("#race-player:visible")


def test_a_model_with_one_strategy_says_that_there_is_no_race(browser, open_page):
    alone = ("causal", *ALL[1][1:])
    with live_server([alone]) as (address, _):
        page = open_page(address)
        page.click("#race-tab")
        page.get_by_text("There is nothing to race").wait_for()
        assert page.locator("#race-start").is_disabled()


def test_race_hides_rows_without_a_model(browser, open_page):
    with live_server(ALL[:1]) as (address, _):
        page = open_page(address)
        page.click("#race-tab")
        page.wait_for_selector("#race-start:enabled")
        assert page.locator(".lane h3").all_inner_texts() == LANES[:2]
        assert page.locator("#race-missing").is_visible()


# --------------------------------------------------------------------------------- settings


def test_sliders_change_the_policy_of_the_request(open_page, address):
    page = open_page(address)
    page.wait_for_selector(".chip")
    recommended = {
        "add_threshold": 0.1,
        "activate_threshold": 0.95,
        "confidence_threshold": 0.98,
        "block_size": 32,
    }

    def policy_sent():
        with page.expect_request("**/v1/chat/completions") as asked:
            page.locator(".chip").first.click()
        page.wait_for_selector("#send:visible")
        return asked.value.post_data_json

    assert policy_sent()["policy"] == recommended
    page.fill("#add_threshold", "0.5")
    page.fill("#activate_threshold", "0.6")
    page.focus("#confidence_threshold")
    page.keyboard.press("ArrowLeft")
    page.fill("#block_size", "16")
    body = policy_sent()
    assert body["policy"] == {
        "add_threshold": 0.5,
        "activate_threshold": 0.6,
        "confidence_threshold": 0.97,
        "block_size": 16,
    }
    assert "16" in page.locator("#blocks .share").first.inner_text()
    page.select_option("#strategy", "serial")
    assert page.locator("#add_threshold").is_disabled()
    assert policy_sent()["policy"] == {"confidence_threshold": 0.97, "block_size": 16}
    assert not page.locator("#entropy_threshold").is_visible()
    page.select_option("#strategy", "entropy")
    page.fill("#entropy_threshold", "1.5")
    body = policy_sent()
    assert body["options"] == {"threshold": 1.5}
    assert body["policy"] == {"add_threshold": 0.5, "activate_threshold": 0.6, "block_size": 16}
    page.click("#reset")
    body = policy_sent()
    assert (body["policy"], body["strategy"]) == (recommended, "pipelined")


# ----------------------------------------------------------------------------------- errors


def test_key_is_asked_for_and_a_server_that_is_gone_is_told(browser, open_page):
    with live_server(ALL[:1], api_key="open-sesame") as (address, server):
        page = open_page(address, quiet=False)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-dialog[open]")
        assert "The API key was not accepted." in page.locator("#trouble").inner_text()
        assert "The API key was not accepted." in page.locator("#key-dialog").inner_text()
        page.fill("#key-input", "open-sesame")
        page.keyboard.press("Enter")
        ask_example(page)
        assert page.locator("#trouble").inner_text() == ""
        kept = page.evaluate("[Object.values(sessionStorage), Object.values(localStorage)]")
        assert kept == [["open-sesame"], []]
        server.stop()
        page.click("#again")
        told = page.locator(".answer").last.locator("[role=alert]")
        told.wait_for()
        assert "The server cannot be reached" in told.inner_text()


REFUSED = json.dumps({"error": {"message": "add_threshold is 3; it must be at most 1"}})
BROKEN = json.dumps({"error": {"message": "the engine failed (request 4711)"}})
BEGUN = json.dumps({"choices": [{"delta": {"content": "Tom has"}, "finish_reason": None}]})


FAULTS = (
    (400, REFUSED, "The server refused: add_threshold is 3; it must be at most 1"),
    (429, BROKEN, "Try again in 3 seconds."),
    (503, BROKEN, "The server failed (503): the engine failed"),
    (200, f"data: {BEGUN}\n\ndata: {BROKEN}\n\n", "The answer broke off: the engine failed"),
    (200, f"data: {BEGUN}\n\n", "The connection ended before the answer was whole."),
)


def test_errors_are_told_in_words_where_they_happen(open_page, address):
    page = open_page(address, quiet=False)
    page.wait_for_selector(".chip")
    for status, body, words in FAULTS:
        fulfil(page, status, body, **{"Retry-After": "3"})
        page.locator(".chip").first.click()
        answer = page.locator(".answer").last
        told = answer.locator("[role=alert]")
        told.wait_for()
        assert words in told.inner_text()
        assert ("Tom has" in answer.locator(".text").inner_text()) == (status == 200)
        page.unroute("**/v1/chat/completions")
    told.get_by_role("button", name="Try again").click()
    page.wait_for_selector(".notes .link")
    refused = page.locator(".answer").first
    refused.get_by_role("button", name="Edit").click()
    assert page.input_value("#prompt") == EXAMPLES[0]


def test_an_error_comes_into_view_on_a_phone(open_page, address):
    page = open_page(address, quiet=False, viewport={"width": 360, "height": 740})
    page.wait_for_selector(".chip")
    fulfil(page, 400, REFUSED)
    page.locator(".chip").first.click()
    page.wait_for_selector(".answer [role=alert]")
    page.wait_for_selector("#send:visible")
    top = page.locator(".answer [role=alert]").bounding_box()["y"]
    assert 0 <= top < 740


def test_events_are_read_whatever_pieces_they_come_in(open_page, address):
    page = open_page(address)
    text = ': hello\r\ndata: {"a": "grüß 🙂"}\r\n\r\ndata: one\ndata: two\n\ndata: [DONE]\r\r'
    read = """async ([text, size]) => {
        const { readEvents } = await import("/page/api.js");
        const bytes = new TextEncoder().encode(text);
        const stream = new ReadableStream({ start(controller) {
            for (let at = 0; at < bytes.length; at += size)
                controller.enqueue(bytes.slice(at, at + size));
            controller.close();
        }});
        const events = [];
        for await (const data of readEvents(stream)) events.push(data);
        return events;
    }"""
    for size in (1, 2, 3, 7, 1000):
        events = page.evaluate(read, [text, size])
        assert events == ['{"a": "grüß 🙂"}', "one\ntwo", "[DONE]"], size


# ------------------------------------------------------------------------------------ looks


@pytest.mark.parametrize("width", [360, 1360])
def test_what_a_button_starts_is_in_view(open_page, address, width):
    page = open_page(address, viewport={"width": width, "height": 740})
    for start in ("#try", ".chip", "#send"):
        page.wait_for_selector("#send:visible")
        if start == "#send":
            page.fill("#prompt", "1 + 1?")
        page.locator(start).first.click()
        page.wait_for_selector(".notes .link >> nth=-1")
        page.wait_for_selector("#send:visible")
        box = page.locator("#blocks .block").first.bounding_box()
        assert 0 <= box["y"] < 740
        page.evaluate("scrollTo(0, 0)")


def test_an_empty_field_means_its_default(open_page, address):
    page = open_page(address)
    page.wait_for_selector("#send:enabled")
    usual = page.input_value("#max-tokens")
    page.fill("#max-tokens", "")
    with page.expect_request("**/v1/chat/completions") as asked:
        page.locator(".chip").first.click()
    assert asked.value.post_data_json["max_tokens"] == int(usual) == 192
    page.wait_for_selector(".notes .link")
    assert page.locator(".error").count() == 0
    page.click("#race-tab")
    page.fill("#race-tokens", "")
    with page.expect_request(
        lambda request: "completions" in request.url and request.post_data_json["max_tokens"] > 16
    ) as asked:
        page.click("#race-start")
    assert asked.value.post_data_json["max_tokens"] == 128
    page.click("#race-stop")


def test_phone_width_never_scrolls_sideways(open_page, address):
    page = open_page(address, viewport={"width": 360, "height": 740}, has_touch=True)
    page.wait_for_selector(".chip")
    fits = "document.documentElement.scrollWidth <= 360"
    assert page.evaluate(fits)
    page.locator(".chip").first.tap()
    page.wait_for_selector(".notes .link")
    page.evaluate("document.getElementById('settings').open = true")
    page.locator("#blocks .tile").nth(3).tap()
    assert page.locator("#tip").is_visible()
    assert page.evaluate(fits)
    page.locator("#race-tab").tap()
    page.fill("#race-tokens", "8")
    page.locator("#race-start").tap()
    page.wait_for_selector("#race-player:visible")
    assert page.evaluate(fits)


CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = color => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
    };
    const mix = (over, below, share) =>
        [0, 1, 2].map(i => over[i] * share + below[i] * (1 - share));
    const luminance = color => {
        const [r, g, b] = color.map(value => value / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    // What stands behind an element's text: all backgrounds from the page up to its own.
    const ground = element => {
        if (element === null) return [255, 255, 255];
        const own = paint(getComputedStyle(element).backgroundColor);
        return mix(own, ground(element.parentElement), own[3]);
    };
    const worst = {};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        const { width, height } = element.getBoundingClientRect();
        const text = walker.currentNode.textContent.trim();
        if (!text || !element.checkVisibility() || width < 2 || height < 2) continue;
        let opacity = 1;
        for (let e = element; e; e = e.parentElement) opacity *= getComputedStyle(e).opacity;
        const [own, outer] = [ground(element), ground(element.parentElement)];
        const ink = paint(getComputedStyle(element).color);
        const pair = [mix(ink, own, ink[3]), own].map(color => mix(color, outer, opacity));
        const [dark, light] = pair.map(luminance).sort((a, b) => a - b);
        const name = `${element.tagName}#${element.id}.${element.className} ${text.slice(0, 20)}`;
        worst[name] = Math.min(worst[name] ?? 21, (light + 0.05) / (dark + 0.05));
    }
    return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(open_page, address, scheme):
    # Without motion: a colour that is on its way to another would be measured.
    page = open_page(address, color_scheme=scheme, quiet=False, reduced_motion="reduce")

    def check(least):
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > least
        assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}

    page.wait_for_selector(".chip")
    check(20)
    ask_example(page)
    page.click("#to-start")
    page.click("#step-on")
    assert page.locator("#blocks .tile.masked").count()
    check(40)
    page.click("#to-end")
    assert page.locator("#blocks .tile.past").count()
    # All four states and an error, whatever this answer has.
    page.evaluate(
        "['semi-active', 'fully-active', 'complete', 'cached'].forEach(state => {"
        "  const row = document.querySelector('.block').cloneNode(true);"
        "  row.dataset.state = state; document.getElementById('blocks').append(row); })"
    )
    page.fill("#max-tokens", "100000")
    page.click("#again")
    page.wait_for_selector(".error")
    check(60)
    page.click("#race-tab")
    page.fill("#race-tokens", "8")
    page.click("#race-start")
    page.wait_for_selector("#race-player:visible")
    check(30)
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


def test_the_focus_stays_where_it_was_pressed(open_page, address):
    page = open_page(address)
    page.wait_for_selector(".chip")

    def focused():
        return page.evaluate("document.activeElement.id || document.activeElement.className")

    page.select_option("#model", "teacher")
    page.fill("#max-tokens", "400")
    page.focus("#prompt")
    page.keyboard.type("How many?")
    page.focus("#send")
    page.keyboard.press("Enter")
    assert focused() == "stop"
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert focused() == "send"
    page.fill("#max-tokens", "8")
    page.locator(".chip").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert focused() == "chip"
    page.focus("#again")
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:visible")
    assert focused() == "again"


def test_theme_can_be_chosen_and_is_kept(open_page, address):
    page = open_page(address, color_scheme="light")
    page.get_by_role("button", name="Use dark colours").click()
    page.reload()
    page.get_by_role("button", name="Use light colours").wait_for()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(232, 234, 237)"


def test_reduced_motion_has_no_animation(open_page, address):
    page = open_page(address, reduced_motion="reduce")
    ask_example(page)
    page.click("#to-end")
    names = page.eval_on_selector_all(
        "#blocks .tile", "tiles => tiles.map(tile => getComputedStyle(tile).animationName)"
    )
    assert set(names) == {"none"}


def test_page_forbids_other_sources(address):
    with closing(urllib.request.urlopen(address)) as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert not re.search(rb"\sstyle=|<script>|<style|\son[a-z]+=|https?:", answer.read())

/** The race: the same prompt in four ways, one after the other, replayed against one clock. */

import { ApiError, streamAnswer } from "./api.js";
import { announce, byId, h, numberIn, swap } from "./dom.js";
import { showPlaying } from "./pipeline.js";
import { Player } from "./player.js";
import { END, Run, clock, counted, figure, visible } from "./run.js";

/**
 * @typedef {import("./api.js").Model} Model
 * @typedef {import("./settings.js").Settings} Settings
 * @typedef {{strategy: string, says: string, model: Model, run: Run | null,
 *            parts: Record<string, any>}} Lane
 */

/** Strategies, whose model each takes (the first model where none is named), and what it does. */
const LANES = [
  { strategy: "pipelined", says: "D2F: several blocks at once, exact KV cache" },
  { strategy: "serial", says: "D2F, block after block: only the KV cache" },
  { strategy: "autoregressive", model: "autoregressive", says: "one token a forward, KV cache" },
  { strategy: "vanilla", model: "teacher", says: "plain diffusion: all positions in each forward" },
];
const WARM_UP_TOKENS = 16;
const WATCHED_SECONDS = 1.5;
const LONGEST_REPLAY = 30;

export class Race {
  /** @param {Settings} settings */
  constructor(settings) {
    this.settings = settings;
    /** @type {Lane[]} */
    this.lanes = [];
    /** @type {AbortController | null} */
    this.running = null;
    this.prompt = byId("race-prompt");
    this.scrubber = byId("race-scrubber");
    this.speed = byId("race-speed");
    this.player = new Player({
      advance: (position, seconds) => position + seconds / this.slowness(),
      end: () => Math.max(0, ...this.lanes.map((lane) => lane.run?.seconds ?? 0)),
      growing: () => false,
      show: (position) => this.show(position),
      playing: (playing) => showPlaying(byId("race-play"), playing),
    });
    byId("race-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    byId("race-stop").addEventListener("click", () => this.running?.abort());
    byId("race-play").addEventListener("click", () => this.player.toggle());
    this.scrubber.addEventListener("input", () => {
      this.player.seek(Number(this.scrubber.value) / 1000);
    });
  }

  /**
   * Lay out the rows that these models can run.
   *
   * @param {Model[]} models
   */
  offer(models) {
    this.lanes = [];
    for (const { strategy, model: name, says } of LANES) {
      const model = name ? models.find((other) => other.id === name) : models[0];
      if (!model || !model.d2f.strategies.includes(strategy)) continue;
      this.lanes.push({ strategy, says, model, run: null, parts: buildLane(strategy, says, model) });
    }
    byId("lanes").replaceChildren(...this.lanes.map((lane) => lane.parts.element));
    byId("race-missing").hidden = this.lanes.length === LANES.length;
    byId("race-start").disabled = this.lanes.length === 0;
    const none = this.lanes.length ? "" : "There is nothing to race: the model has one strategy only.";
    byId("race-status").textContent = none;
  }

  /** Measure all rows, one after the other, then replay them together. */
  async start() {
    const prompt = this.prompt.value.trim();
    if (this.running) return;
    if (!prompt) {
      byId("race-status").textContent = "Write a prompt first.";
      this.prompt.focus();
      return;
    }
    this.player.pause();
    this.running = new AbortController();
    this.busy(true);
    for (const lane of this.lanes) reset(lane);
    try {
      for (const [index, lane] of this.lanes.entries()) {
        const where = `${index + 1} of ${this.lanes.length}`;
        await this.measure(lane, prompt, where, this.running.signal);
      }
      byId("race-status").textContent = "";
      this.replay();
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      for (const lane of this.lanes) reset(lane);
      byId("race-status").textContent = "Stopped.";
    } finally {
      this.running = null;
      this.busy(false);
    }
  }

  /** @param {boolean} busy */
  busy(busy) {
    const [start, stop] = [byId("race-start"), byId("race-stop")];
    swap(busy ? start : stop, busy ? stop : start);
    byId("race-player").hidden = busy || this.lanes.every((lane) => !lane.run);
  }

  /**
   * @param {Lane} lane
   * @param {string} prompt
   * @param {string} where
   * @param {AbortSignal} signal
   */
  async measure(lane, prompt, where, signal) {
    const { strategy, model, parts } = lane;
    // The sliders are those of the chosen model; a row of another takes what its model recommends.
    const own = this.settings.model.id === model.id;
    const policy = own ? this.settings.policy(strategy) : null;
    const options = own ? this.settings.options(strategy) : null;
    const body = {
      model: model.id,
      messages: [{ role: "user", content: prompt }],
      strategy,
      temperature: 0,
      ...(policy && { policy }),
      ...(options && { options }),
    };
    const run = new Run({ prompt, model: model.id, strategy, threshold: null });
    const note = (text) => {
      byId("race-status").textContent = `${text} ${strategy} (row ${where}) …`;
    };
    const ignored = { onText: () => {}, onStep: () => {}, onEnd: () => {} };
    parts.element.dataset.phase = "measuring";
    parts.clock.textContent = "measuring";
    try {
      note("Warming up");
      await streamAnswer({ ...body, max_tokens: WARM_UP_TOKENS }, ignored, signal);
      note("Measuring");
      const listener = {
        onText: (text) => run.say(text),
        onStep: (step) => {
          run.add(step);
          parts.result.textContent = `${counted(step.num_committed, "token")} in ${counted(step.num_forwards, "forward")}`;
        },
        onEnd: () => (run.finished = true),
      };
      const max_tokens = numberIn(byId("race-tokens"));
      await streamAnswer({ ...body, max_tokens }, listener, signal);
      lane.run = run;
      parts.element.dataset.phase = "measured";
      parts.clock.textContent = "measured";
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (!(error instanceof ApiError)) console.error(error);
      parts.element.dataset.phase = "failed";
      parts.clock.textContent = "failed";
      parts.result.replaceChildren(h("span", { class: "error-text", role: "alert" }, error.message));
    }
  }

  replay() {
    const runs = this.lanes.flatMap((lane) => lane.run ?? []);
    if (!runs.length) return;
    const [fastest, slowest] = [Math.min, Math.max].map((pick) => pick(...runs.map((r) => r.seconds)));
    this.scrubber.max = Math.ceil(slowest * 1000);
    byId("race-end").textContent = `of ${clock(slowest)}`;
    const wanted = Math.min(WATCHED_SECONDS / fastest, LONGEST_REPLAY / slowest);
    const offered = [...this.speed.options].map((option) => Number(option.value));
    this.speed.value = String(Math.max(...offered.filter((value) => value <= Math.max(wanted, 1))));
    this.player.position = 0;
    this.player.play();
    const words = this.lanes.filter((lane) => lane.run).map((lane) => this.summary(lane));
    announce(`Race measured. ${words.join(". ")}.`);
  }

  /** @param {Lane} lane */
  summary(lane) {
    const run = /** @type {Run} */ (lane.run);
    const { seconds, numTokens, numForwards } = run.counters(run.last);
    const tokens = counted(numTokens, "token");
    return `${lane.strategy}: ${tokens} in ${counted(numForwards, "forward")}, ${clock(seconds)}`;
  }

  /** Wall seconds for each second of the race. */
  slowness() {
    return Number(this.speed.value);
  }

  /** @param {number} seconds of the race's clock */
  show(seconds) {
    byId("race-clock").textContent = clock(seconds);
    this.scrubber.value = Math.round(seconds * 1000);
    this.scrubber.setAttribute("aria-valuetext", clock(seconds));
    const first = this.lanes.find((lane) => lane.run)?.run;
    for (const lane of this.lanes) if (lane.run && first) showLane(lane, lane.run, first, seconds);
  }
}

/**
 * @param {string} strategy
 * @param {string} says
 * @param {Model} model
 */
function buildLane(strategy, says, model) {
  const parts = {
    ahead: h("span", { class: "ahead" }),
    done: h("span", { class: "done" }),
    clock: h("span", { class: "lane-clock" }),
    ratio: h("span", { class: "ratio" }),
    text: h("p", { class: "lane-text" }),
    result: h("p", { class: "lane-result" }),
  };
  const name = h("h3", {}, strategy);
  const head = h("div", { class: "lane-head" }, name, h("span", { class: "says" }, says), parts.ratio, parts.clock);
  const track = h("div", { class: "track", "aria-hidden": "true" }, parts.ahead, parts.done);
  const foot = h("div", { class: "lane-foot" }, parts.text, parts.result);
  const element = h("li", { class: "lane", "data-strategy": strategy, title: model.id }, head, track, foot);
  return { ...parts, element };
}

/** @param {Lane} lane */
function reset(lane) {
  lane.run = null;
  lane.parts.element.dataset.phase = "waiting";
  for (const name of ["clock", "ratio", "text", "result"]) lane.parts[name].textContent = "";
  for (const name of ["done", "ahead"]) lane.parts[name].style.width = "0";
}

/**
 * @param {Lane} lane
 * @param {Run} run
 * @param {Run} first the row that others are compared with
 * @param {number} seconds
 */
function showLane(lane, run, first, seconds) {
  const { parts } = lane;
  const step = run.stepAt(seconds);
  const finished = step === run.last;
  const { numCommitted } = run.steps[step];
  const total = run.steps[run.last].numCommitted || 1;
  const tokens = run.tokensAt(step);
  let decoded = 0;
  const ahead = [];
  for (let position = 0; position < total; position += 1) {
    const token = tokens.get(position);
    decoded += token ? 1 : 0;
    if (position >= numCommitted) ahead.push(token ? plain(token.text) : "·");
  }
  // Masked places behind the last token say nothing.
  const behind = ahead.join("").replace(/·+$/, "");
  parts.element.dataset.phase = finished ? "finished" : "running";
  parts.done.style.width = `${(100 * numCommitted) / total}%`;
  parts.ahead.style.width = `${(100 * decoded) / total}%`;
  parts.clock.textContent = clock(finished ? run.seconds : seconds);
  parts.text.replaceChildren(run.textAt(step), h("span", { class: "provisional" }, behind));
  if (!finished) parts.text.scrollTop = parts.text.scrollHeight;
  const now = run.counters(step);
  const perForward = `${figure(now.tokensPerForward)} tokens/forward`;
  parts.result.textContent = now.numForwards
    ? [
        counted(now.numTokens, "token"),
        counted(now.numForwards, "forward"),
        perForward,
        `${figure(now.tokensPerSecond)} tokens/s`,
      ].join(" · ")
    : "";
  const ratio = run.seconds / first.seconds;
  parts.ratio.textContent = !finished ? "" : run === first ? "1×" : `${figure(ratio)}× the time`;
}

/** @param {string} text of a token, the special ones left out */
function plain(text) {
  return visible(text) === END ? "" : text;
}

/** The conversation on the left: prompts, answers, and what went wrong with them. */

import { ApiError, streamAnswer } from "./api.js";
import { announce, byId, errorBox, h, swap } from "./dom.js";
import { Run, clock, counted } from "./run.js";

/**
 * @typedef {import("./api.js").Model} Model
 * @typedef {import("./settings.js").Settings} Settings
 * @typedef {import("./pipeline.js").Pipeline} Pipeline
 * @typedef {{role: string, content: string}} Message
 */

export class Chat {
  /**
   * @param {Settings} settings
   * @param {Pipeline} pipeline
   * @param {{askKey: (then: () => void) => void, onAsk: (prompt: string) => void}} page
   */
  constructor(settings, pipeline, page) {
    this.settings = settings;
    this.pipeline = pipeline;
    this.page = page;
    /** @type {Model | null} */
    this.model = null;
    /** @type {Message[]} whole turns only */
    this.history = [];
    /** @type {string[]} */
    this.examples = [];
    this.asked = "";
    /** @type {AbortController | null} */
    this.running = null;
    this.input = byId("prompt");
    this.keep = byId("keep");
    this.messages = byId("messages");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("again").addEventListener("click", () => this.ask(this.asked));
    byId("try").addEventListener("click", () => {
      this.ask(this.examples[0]);
      this.messages.focus({ preventScroll: true }); // the button is gone
    });
  }

  /**
   * @param {Model} model
   * @param {string[]} examples prompts it can answer
   */
  choose(model, examples) {
    const template = model.d2f.chat_template;
    const single = model.d2f.leaves_out.includes("history");
    this.examples = examples;
    this.running?.abort();
    this.model = model;
    this.history = [];
    byId("keep-label").hidden = !template;
    byId("alone").hidden = template && !single;
    byId("alone").textContent = whyAlone(template, single);
    this.keep.disabled = single;
    // A model that comes with examples was made for questions like them, each on its own.
    this.keep.checked = template && !single && examples.length === 0;
    const chips = examples.map((text) => h("li", {}, this.chip(text)));
    byId("chips").replaceChildren(...chips);
    byId("examples").hidden = chips.length === 0;
    byId("send").disabled = false;
    byId("try").disabled = false;
    byId("try").hidden = chips.length === 0;
    byId("invitation").textContent = chips.length ? "Pick a question, or ask your own." : "Ask a question.";
  }

  /** @param {string} text */
  chip(text) {
    const ask = () => this.ask(text);
    return h("button", { type: "button", class: "chip", title: text, onclick: ask }, h("span", {}, text));
  }

  send() {
    const text = this.input.value.trim();
    if (!text || this.running || !this.model) return;
    this.input.value = "";
    this.ask(text);
  }

  /** @param {string} prompt */
  async ask(prompt) {
    if (this.running || !this.model) return;
    this.asked = prompt;
    byId("welcome").hidden = true;
    const earlier = this.keep.checked ? this.history : [];
    const answer = h("p", { class: "text" });
    const notes = h("div", { class: "notes" }, "answering …");
    const bubble = h("article", { class: "answer", "aria-label": "Answer" }, answer, notes);
    const question = h("article", { class: "question", "aria-label": "You" }, h("p", {}, prompt));
    this.messages.append(question, bubble);
    this.page.onAsk(prompt);
    await this.stream([...earlier, { role: "user", content: prompt }], answer, notes);
    this.messages.scrollTop = this.messages.scrollHeight;
  }

  /**
   * @param {Message[]} messages
   * @param {HTMLElement} answer
   * @param {HTMLElement} notes
   */
  async stream(messages, answer, notes) {
    const model = this.model;
    const request = this.settings.request();
    const prompt = messages[messages.length - 1].content;
    const run = new Run({
      prompt,
      model: model.id,
      strategy: request.strategy,
      threshold: request.policy ? request.policy.confidence_threshold : null,
    });
    this.running = new AbortController();
    this.busy(true);
    let reason = "stopped";
    try {
      await streamAnswer(
        { model: model.id, messages, ...request },
        {
          onText: (text) => {
            run.say(text);
            answer.textContent = run.text;
            this.messages.scrollTop = this.messages.scrollHeight;
          },
          onStep: (step) => {
            run.add(step);
            if (this.pipeline.run !== run) this.pipeline.watch(run);
            this.pipeline.grown();
          },
          onEnd: (why) => (reason = why),
        },
        this.running.signal,
      );
      if (model === this.model) {
        this.history = [...messages, { role: "assistant", content: run.text }];
      }
      this.conclude(run, reason, notes, prompt);
      announce(`Answer: ${run.text}`);
    } catch (error) {
      if (error.name === "AbortError") this.conclude(run, "stopped", notes, prompt);
      else this.fail(error, notes, prompt);
    } finally {
      run.finished = true;
      this.running = null;
      this.busy(false);
    }
  }

  /** @param {boolean} busy */
  busy(busy) {
    swap(busy ? byId("send") : byId("stop"), busy ? byId("stop") : byId("send"));
    byId("again").disabled = false;
    // Not disabled in earnest: the one that was pressed would lose the focus.
    const others = [byId("again"), ...byId("chips").querySelectorAll("button")];
    for (const button of others) button.setAttribute("aria-disabled", String(busy));
  }

  /**
   * @param {Run} run
   * @param {string} reason
   * @param {HTMLElement} notes
   * @param {string} prompt
   */
  conclude(run, reason, notes, prompt) {
    const { seconds, numTokens, numForwards } = run.counters(run.last);
    const ends = { length: "cut at the most tokens allowed", stopped: run.text ? "stopped" : "stopped before any text was final" };
    const parts = [counted(numTokens, "token"), counted(numForwards, "forward"), clock(seconds)];
    if (!run.text && reason !== "stopped") parts.unshift("It ended without a text");
    if (ends[reason]) parts.push(ends[reason]);
    const watch = () => this.pipeline.watch(run);
    notes.replaceChildren(
      h("span", {}, parts.join(" · ")),
      h("button", { type: "button", class: "link", onclick: watch }, "Replay"),
      h("button", { type: "button", class: "link", onclick: () => this.ask(prompt) }, "Ask again"),
    );
  }

  /**
   * @param {Error} error
   * @param {HTMLElement} notes
   * @param {string} prompt
   */
  fail(error, notes, prompt) {
    const again = () => this.ask(prompt);
    /** @type {Array<[string, () => void]>} */
    const ways = [["Try again", again]];
    if (error instanceof ApiError && error.kind === "key") {
      ways.unshift(["Enter the key", () => this.page.askKey(again)]);
    }
    if (error instanceof ApiError && error.kind === "request") {
      ways.push(["Edit", () => this.edit(prompt)]);
    }
    if (!(error instanceof ApiError)) console.error(error);
    notes.replaceChildren(errorBox(error, ways));
    notes.scrollIntoView({ block: "nearest" }); // on a phone the pipeline is in view
  }

  /** @param {string} prompt that was refused, and can be mended */
  edit(prompt) {
    this.input.value = prompt;
    this.input.focus();
  }
}

/**
 * Why a model answers each message on its own; nothing for a model that reads earlier ones.
 *
 * @param {boolean} template whether it has a chat template
 * @param {boolean} single whether that template leaves earlier messages out
 */
function whyAlone(template, single) {
  if (!template) return "This model has no chat template: each message stands alone.";
  return single ? "This model was trained on single questions: its template leaves earlier messages out." : "";
}

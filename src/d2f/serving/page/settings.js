/** How to decode: strategy, thresholds, length, temperature. */

import { byId, h, numberIn } from "./dom.js";

/**
 * @typedef {import("./api.js").Model} Model
 * @typedef {{name: string, symbol: string, title: string, says: string, min: number, max: number,
 *            step: number}} Slider
 */

/** @type {Slider[]} in the glossary's words, with the paper's symbols */
const SLIDERS = [
  {
    name: "add_threshold", symbol: "τ_add", title: "add the next block", min: 0, max: 1, step: 0.01,
    says: "A new, semi-active block joins the pipeline once this share of the last block is decoded.",
  },
  {
    name: "activate_threshold", symbol: "τ_act", title: "activate a block", min: 0, max: 1, step: 0.01,
    says: "A block becomes fully active once this share of its predecessor is decoded; it then decodes at least one token in each forward.",
  },
  {
    name: "confidence_threshold", symbol: "τ_conf", title: "accept a token", min: 0, max: 1, step: 0.01,
    says: "A token is accepted when its confidence exceeds this.",
  },
  {
    name: "block_size", symbol: "k", title: "block size", min: 4, max: 64, step: 4,
    says: "Tokens of a block. Blocks see those before them, never those behind; finished ones stay in the KV cache.",
  },
];

/** @type {Slider} an option of the strategy `entropy`, not a field of the policy */
const ENTROPY = {
  name: "entropy_threshold", symbol: "H", title: "accept a token", min: 0, max: 3, step: 0.05,
  says: "A token is accepted when the entropy of its distribution, in nats, is below this.",
};
const ENTROPY_DEFAULT = 0.5;

/** Strategies of the pipeline, with the thresholds each leaves open. */
const OPEN = {
  pipelined: SLIDERS.map((slider) => slider.name),
  serial: ["confidence_threshold", "block_size"],
  entropy: ["add_threshold", "activate_threshold", "block_size"],
};

export class Settings {
  constructor() {
    this.strategy = byId("strategy");
    this.maxTokens = byId("max-tokens");
    this.temperature = byId("temperature");
    /** @type {Model | null} */
    this.model = null;
    this.inputs = new Map(SLIDERS.map((slider) => [slider.name, this.build(slider)]));
    this.entropy = this.build(ENTROPY);
    this.strategy.addEventListener("change", () => this.refresh());
    this.temperature.addEventListener("input", () => this.refresh());
    byId("reset").addEventListener("click", () => this.reset());
  }

  /** @param {Slider} slider */
  build(slider) {
    const { name, symbol, title, says, min, max, step } = slider;
    const input = h("input", {
      type: "range", id: name, min, max, step, "aria-describedby": `${name}-says`,
      oninput: () => this.refresh(),
    });
    const [letter, index] = symbol.split("_");
    const sign = h("var", {}, letter, ...(index ? [h("sub", {}, index)] : []));
    const label = h("label", { for: name }, sign, ` ${title}`);
    const value = h("output", { for: name, id: `${name}-value` });
    const text = h("p", { id: `${name}-says` }, says);
    byId("sliders").append(h("div", { class: "slider" }, label, value, input, text));
    return input;
  }

  /**
   * Offer what a model can do, beginning with what it recommends.
   *
   * @param {Model} model
   */
  choose(model) {
    this.model = model;
    byId("settings").hidden = false;
    const options = model.d2f.strategies.map((name) => h("option", { value: name }, name));
    this.strategy.replaceChildren(...options);
    const size = this.inputs.get("block_size");
    size.max = Math.max(64, model.d2f.policy.block_size);
    size.min = model.d2f.policy.block_size % 4 ? 1 : 4;
    size.step = model.d2f.policy.block_size % 4 ? 1 : 4;
    this.maxTokens.max = model.d2f.max_positions;
    this.reset();
  }

  /** Back to what the model recommends. */
  reset() {
    if (this.model === null) return;
    const { policy, strategy, max_tokens: maxTokens } = this.model.d2f;
    for (const [name, input] of this.inputs) input.value = policy[name];
    this.entropy.value = ENTROPY_DEFAULT;
    this.strategy.value = strategy;
    this.maxTokens.value = maxTokens;
    this.maxTokens.placeholder = this.maxTokens.value;
    this.temperature.value = 0;
    this.refresh();
  }

  refresh() {
    const open = OPEN[this.strategy.value] ?? [];
    const parts = [this.strategy.value];
    for (const { name, symbol, step } of SLIDERS) {
      const input = this.inputs.get(name);
      input.disabled = !open.includes(name);
      input.closest(".slider").classList.toggle("off", input.disabled);
      const text = step < 1 ? Number(input.value).toFixed(2) : input.value;
      const fixed = this.strategy.value === "serial" ? "1 (serial)" : "not used";
      byId(`${name}-value`).textContent = input.disabled ? fixed : text;
      if (!input.disabled) parts.push(`${symbol.replace("_", " ")} ${text}`);
    }
    const threshold = Number(this.entropy.value).toFixed(2);
    const heeded = this.options(this.strategy.value) !== null;
    this.entropy.closest(".slider").hidden = !heeded;
    byId("entropy_threshold-value").textContent = threshold;
    if (heeded) parts.push(`H ${threshold}`);
    byId("temperature-value").textContent = Number(this.temperature.value).toFixed(1);
    byId("settings-summary").textContent = parts.join(" · ");
  }

  /**
   * The fields of the policy that a strategy heeds (the server refuses others); null for none.
   *
   * @param {string} strategy
   */
  policy(strategy) {
    const names = OPEN[strategy];
    return names ? Object.fromEntries(names.map((name) => [name, Number(this.inputs.get(name).value)])) : null;
  }

  /**
   * The options that a strategy has of its own; null for none.
   *
   * @param {string} strategy
   */
  options(strategy) {
    return strategy === "entropy" ? { threshold: Number(this.entropy.value) } : null;
  }

  /** The part of a request that these settings decide. */
  request() {
    const strategy = this.strategy.value;
    const policy = this.policy(strategy);
    const options = this.options(strategy);
    return {
      strategy,
      ...(policy && { policy }),
      ...(options && { options }),
      max_tokens: numberIn(this.maxTokens),
      temperature: Number(this.temperature.value),
    };
  }
}

/**
 * One answer as it came about: all that is needed to show it after any of its steps.
 *
 * @typedef {import("./api.js").Block} Block
 * @typedef {import("./api.js").StepEvent} StepEvent
 * @typedef {import("./api.js").Token & {step: number}} DatedToken
 * @typedef {{seconds: number, numForwards: number, numCommitted: number, blocks: Block[],
 *            numEvents: number, textLength: number}} Step
 * @typedef {{seconds: number, numForwards: number, numTokens: number, tokensPerSecond: number,
 *            tokensPerForward: number, millisecondsPerForward: number}} Counters
 */

export class Run {
  /**
   * @param {{prompt: string, model: string, strategy: string, threshold: number | null}} what
   *     `threshold`: the confidence that was asked for, null where none is
   */
  constructor({ prompt, model, strategy, threshold }) {
    this.prompt = prompt;
    this.model = model;
    this.strategy = strategy;
    this.threshold = threshold;
    /** @type {Step[]} the first one is before any forward */
    this.steps = [{ seconds: 0, numForwards: 0, numCommitted: 0, blocks: [], numEvents: 0, textLength: 0 }];
    /** @type {DatedToken[]} in the order they were decoded */
    this.tokens = [];
    /** @type {Map<number, DatedToken>} the latest by position */
    this.latest = new Map();
    this.finished = false;
    this.text = "";
  }

  /** @returns {number} the last step */
  get last() {
    return this.steps.length - 1;
  }

  /** @returns {number} seconds the whole run took on the engine */
  get seconds() {
    return this.steps[this.last].seconds;
  }

  /** @param {StepEvent} event */
  add(event) {
    // An event that only says how it ended belongs to the forward before it.
    const again = this.steps[this.last].numForwards === event.num_forwards;
    const index = again ? this.last : this.last + 1;
    for (const token of event.tokens) {
      const dated = { ...token, step: index };
      this.tokens.push(dated);
      this.latest.set(token.position, dated);
    }
    this.steps[index] = {
      seconds: event.seconds,
      numForwards: event.num_forwards,
      numCommitted: event.num_committed,
      blocks: event.blocks.length ? event.blocks : (this.steps[index - 1]?.blocks ?? []),
      numEvents: this.tokens.length,
      textLength: this.text.length,
    };
    if (index === 1) this.steps[0].blocks = beginning(event.blocks);
  }

  /**
   * Take text that the last step made final.
   *
   * @param {string} text
   */
  say(text) {
    this.text += text;
    this.steps[this.last].textLength = this.text.length;
  }

  /**
   * The text that was final after a step, as the server decoded it: as a whole.
   *
   * @param {number} step
   */
  textAt(step) {
    return this.text.slice(0, this.steps[step].textLength);
  }

  /**
   * Tokens by position after a step.
   *
   * @param {number} step
   * @returns {Map<number, DatedToken>}
   */
  tokensAt(step) {
    if (step >= this.last) return this.latest;
    const tokens = new Map();
    for (const token of this.tokens.slice(0, this.steps[step].numEvents)) {
      tokens.set(token.position, token);
    }
    return tokens;
  }

  /**
   * The last step that had happened by a time of the run's own clock.
   *
   * @param {number} seconds
   */
  stepAt(seconds) {
    let step = this.last;
    while (step > 0 && this.steps[step].seconds > seconds) step -= 1;
    return step;
  }

  /**
   * Where the text ends after a step, as far as it is known then.
   *
   * @param {number} step
   */
  endAt(step) {
    const ends = [...this.tokensAt(step).values()].filter((token) => visible(token.text) === END);
    return Math.min(...ends.map((token) => token.position));
  }

  /**
   * What was decoded by a step and belongs to the text, what is ahead of the first gap included.
   *
   * @param {number} step
   * @returns {Counters}
   */
  counters(step) {
    const { seconds, numForwards, numCommitted } = this.steps[step];
    const end = this.endAt(step);
    const decoded = [...this.tokensAt(step).keys()].filter((position) => position <= end).length;
    const numTokens = Math.max(decoded, numCommitted);
    return {
      seconds,
      numForwards,
      numTokens,
      tokensPerSecond: numTokens / seconds,
      tokensPerForward: numTokens / numForwards,
      millisecondsPerForward: (1000 * seconds) / numForwards,
    };
  }
}

/**
 * Before the first forward the first block is open and masked.
 *
 * @param {Block[]} blocks after it
 */
function beginning(blocks) {
  const first = blocks[0];
  return first && first.length > 1 ? [{ ...first, state: "fully active" }] : [];
}

/** Sign of a special token; in practice of the one that ends the text. */
export const END = "■";

/**
 * A token as a tile shows it: spaces alone, line ends and special tokens have signs; the space
 * before a word shows as a gap between tiles.
 *
 * @param {string} text
 */
export function visible(text) {
  if (/^<\|.*\|>$|^<\/s>$|^<eos>$|^$/.test(text)) return END;
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ /, "");
}

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/**
 * A figure of three digits or so; a dash where there is none yet.
 *
 * @param {number} value
 */
export function figure(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 100) return grouped.format(value);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** @param {number} value in seconds */
export function clock(value) {
  return value < 10 ? `${value.toFixed(3)} s` : `${value.toFixed(1)} s`;
}

/**
 * What so many things are called.
 *
 * @param {number} number
 * @param {string} thing
 */
export function named(number, thing) {
  return number === 1 ? thing : `${thing}s`;
}

/**
 * A number of things in words.
 *
 * @param {number} number
 * @param {string} thing
 */
export function counted(number, thing) {
  return `${number} ${named(number, thing)}`;
}

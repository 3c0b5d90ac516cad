/** The live pipeline: blocks of token tiles, replayed forward by forward. */

import { byId, h } from "./dom.js";
import { Player } from "./player.js";
import { END, clock, figure, named, visible } from "./run.js";

/**
 * @typedef {import("./run.js").Run} Run
 * @typedef {import("./run.js").DatedToken} DatedToken
 * @typedef {{element: HTMLButtonElement, token: DatedToken | undefined}} Tile
 * @typedef {{element: HTMLElement, name: HTMLElement, state: HTMLElement, share: HTMLElement,
 *            tiles: Tile[], home: HTMLElement}} Row
 */

const LONGEST_FORWARD = 0.8;
const FOLLOWED_REPLAY = 14;

export class Pipeline {
  constructor() {
    /** @type {Run | null} */
    this.run = null;
    /** @type {Row[]} */
    this.rows = [];
    this.step = 0;
    this.shown = "";
    this.home = byId("blocks");
    this.scrubber = byId("scrubber");
    this.speed = byId("speed");
    this.tip = byId("tip");
    this.player = new Player({
      advance: (position, seconds) => this.advance(position, seconds),
      end: () => this.run?.last ?? 0,
      growing: () => this.run !== null && !this.run.finished,
      show: (position) => this.showOnce(Math.floor(position)),
      playing: (playing) => showPlaying(byId("play"), playing),
    });
    this.listen();
    drawPicture();
  }

  listen() {
    byId("play").addEventListener("click", () => this.player.toggle());
    byId("to-start").addEventListener("click", () => this.player.seek(0));
    byId("step-back").addEventListener("click", () => this.player.seek(this.step - 1));
    byId("step-on").addEventListener("click", () => this.player.seek(this.step + 1));
    byId("to-end").addEventListener("click", () => this.player.seek(Infinity));
    this.scrubber.addEventListener("input", () => this.player.seek(Number(this.scrubber.value)));
    this.home.addEventListener("keydown", (event) => this.move(event));
    for (const name of ["pointerover", "focusin", "click"]) {
      this.home.addEventListener(name, (event) => this.explain(event.target.closest(".tile")));
    }
    for (const name of ["pointerleave", "focusout"]) {
      this.home.addEventListener(name, () => this.explain(null));
    }
    const focused = () => this.home.querySelector(".tile:focus-visible");
    document.addEventListener("scroll", () => this.explain(focused()), true);
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.explain(null));
  }

  /**
   * Show a run from its beginning; it may still grow.
   *
   * @param {Run} run
   */
  watch(run) {
    this.player.pause();
    this.run = run;
    this.rows = [];
    this.shown = "";
    this.home.replaceChildren();
    byId("pipeline-empty").hidden = true;
    byId("pipeline-show").hidden = false;
    byId("watched").textContent = run.prompt;
    byId("watched-how").textContent = `${run.strategy} · ${run.model}`;
    this.player.position = 0;
    this.player.play();
  }

  /** The run that is watched has new steps. */
  grown() {
    this.scrubber.max = this.run?.last ?? 0;
    this.showCounters();
  }

  /**
   * Where the replay is after so many wall seconds.
   *
   * @param {number} position in steps
   * @param {number} seconds
   */
  advance(position, seconds) {
    const { steps, last } = /** @type {Run} */ (this.run);
    let left = seconds;
    while (position < last) {
      const step = Math.floor(position);
      const cost = this.stepSeconds(steps[step + 1].seconds - steps[step].seconds, last);
      const rest = (step + 1 - position) * cost;
      if (rest > left) return position + left / cost;
      left -= rest;
      position = step + 1;
    }
    return position;
  }

  /**
   * How long a step is shown that truly took `seconds`.
   *
   * @param {number} seconds
   * @param {number} numSteps
   */
  stepSeconds(seconds, numSteps) {
    const [kind, value] = this.speed.value.split(":");
    if (kind === "slowed") return seconds * Number(value);
    if (kind === "each") return Number(value);
    return Math.min(LONGEST_FORWARD, FOLLOWED_REPLAY / numSteps);
  }

  /**
   * Show a step, unless it is shown already and no later one has come since.
   *
   * @param {number} step
   */
  showOnce(step) {
    if (this.run === null) return;
    const shown = `${step} of ${this.run.last}`;
    if (shown === this.shown) return;
    this.shown = shown;
    this.show(step);
  }

  /** @param {number} step */
  show(step) {
    const tokens = this.run.tokensAt(step);
    const { blocks, numForwards, seconds } = this.run.steps[step];
    const end = this.run.endAt(step);
    while (this.rows.length > blocks.length) this.rows.pop()?.element.remove();
    const wasInView = isInView(this.rows[this.rows.length - 1]?.element);
    const added = this.rows.length < blocks.length;
    while (this.rows.length < blocks.length) this.rows.push(this.addRow(this.rows.length + 1));
    blocks.forEach((block, index) => {
      const row = this.rows[index];
      let decoded = 0;
      while (row.tiles.length > block.length) row.tiles.pop()?.element.remove();
      while (row.tiles.length < block.length) row.tiles.push(addTile(row.home));
      row.tiles.forEach((tile, offset) => {
        const position = block.start + offset;
        const token = tokens.get(position);
        decoded += token ? 1 : 0;
        this.showTile(tile, token, position, step);
        tile.element.classList.toggle("past", position > end);
      });
      row.element.dataset.state = block.state.replace(" ", "-");
      row.state.textContent = block.state;
      row.share.textContent = `${decoded} of ${block.length}`;
    });
    this.step = step;
    this.scrubber.value = step;
    this.scrubber.max = this.run.last;
    const total = this.run.steps[this.run.last].numForwards;
    const text = `forward ${numForwards} of ${total}`;
    this.scrubber.setAttribute("aria-valuetext", `${text}, ${clock(seconds)}`);
    byId("where").textContent = text;
    this.showCounters();
    this.keepTabStop();
    // Whoever looks at the last block goes on to see the last one.
    if (added && wasInView && this.player.isPlaying) {
      this.rows[blocks.length - 1].element.scrollIntoView({ block: "nearest" });
    }
  }

  /**
   * @param {Tile} tile
   * @param {DatedToken | undefined} token
   * @param {number} position
   * @param {number} step
   */
  showTile(tile, token, position, step) {
    const { element } = tile;
    const run = /** @type {Run} */ (this.run);
    element.classList.toggle("fresh", token !== undefined && token.step === step && step > 0);
    // A place is as wide as its token will be, so that tokens come in without pushing others.
    const known = run.latest.get(position);
    const width = `${known ? visible(known.text).length : 1}ch`;
    if (element.style.getPropertyValue("--width") !== width) {
      element.style.setProperty("--width", width);
    }
    if (tile.token === token && element.dataset.position === String(position)) return;
    tile.token = token;
    element.dataset.position = String(position);
    element.textContent = token ? visible(token.text) : "·";
    element.classList.toggle("masked", token === undefined);
    element.classList.toggle("spaced", known !== undefined && /^ ./.test(known.text));
    element.classList.toggle("forced", token !== undefined && isForced(token, run.threshold));
    element.setAttribute("aria-label", describe(run, token, position).join(", "));
  }

  showCounters() {
    if (this.run === null) return;
    const now = this.run.counters(this.step);
    byId("c-seconds").textContent = clock(now.seconds);
    byId("c-forwards").textContent = String(now.numForwards);
    byId("c-forwards-name").textContent = named(now.numForwards, "forward");
    byId("c-tokens").textContent = String(now.numTokens);
    byId("c-tokens-name").textContent = `${named(now.numTokens, "token")} decoded`;
    byId("c-per-second").textContent = figure(now.tokensPerSecond);
    byId("c-per-forward").textContent = figure(now.tokensPerForward);
    byId("c-ms").textContent = figure(now.millisecondsPerForward);
  }

  /** @param {number} number @returns {Row} */
  addRow(number) {
    const state = h("span", { class: "state" });
    const share = h("span", { class: "share" });
    const name = h("h3", {}, `Block ${number}`);
    const home = h("div", { class: "tiles" });
    const element = h(
      "div",
      { class: "block", role: "group", "aria-label": `Block ${number}` },
      h("div", { class: "block-head" }, name, state, share),
      home,
    );
    this.home.append(element);
    return { element, name, state, share, tiles: [], home };
  }

  /** One tile can be reached with Tab; arrow keys lead to the others. */
  keepTabStop() {
    if (this.home.querySelector('.tile[tabindex="0"]')) return;
    this.home.querySelector(".tile")?.setAttribute("tabindex", "0");
  }

  /** @param {KeyboardEvent} event */
  move(event) {
    const tiles = [...this.home.querySelectorAll(".tile")];
    const at = tiles.indexOf(/** @type {any} */ (event.target));
    if (at < 0) return;
    const targets = {
      ArrowRight: () => tiles[at + 1],
      ArrowLeft: () => tiles[at - 1],
      ArrowDown: () => across(tiles, at, 1),
      ArrowUp: () => across(tiles, at, -1),
      Home: () => tiles[0],
      End: () => tiles[tiles.length - 1],
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    const target = targets[event.key]();
    if (!target) return;
    tiles[at].setAttribute("tabindex", "-1");
    target.setAttribute("tabindex", "0");
    target.focus();
  }

  /** @param {HTMLElement | null} tile */
  explain(tile) {
    this.tip.hidden = tile === null;
    if (tile === null || this.run === null) return;
    const position = Number(tile.dataset.position);
    const token = this.run.tokensAt(this.step).get(position);
    const [first, ...rest] = describe(this.run, token, position);
    this.tip.replaceChildren(h("strong", {}, first), ...rest.map((line) => h("span", {}, line)));
    const box = tile.getBoundingClientRect();
    const { offsetWidth, offsetHeight } = this.tip;
    const room = document.documentElement.clientWidth - offsetWidth - 8;
    const above = box.top - offsetHeight - 6;
    this.tip.style.left = `${Math.max(8, Math.min(box.left, room))}px`;
    this.tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  }
}

/** @param {HTMLElement | undefined} element */
function isInView(element) {
  if (!element) return false;
  const { top, bottom } = element.getBoundingClientRect();
  return top >= 0 && bottom <= innerHeight + 2;
}

/** @param {HTMLElement} home @returns {Tile} */
function addTile(home) {
  const element = h("button", { type: "button", class: "tile", tabindex: "-1" });
  home.append(element);
  return { element, token: undefined };
}

/** Before there is anything to show: blocks as they look on their way. */
function drawPicture() {
  const rows = [
    ["cached", "●●●●●●●●●●●●●●●●●●●●●●●●"],
    ["complete", "●●●●●●●●●●●●●●●●●●●●●●●●"],
    ["fully-active", "●●●●●●·●●·●●··●●●·●··●··"],
    ["semi-active", "●●··●·●···●·············"],
  ];
  for (const [state, places] of rows) {
    const tiles = [...places].map((sign) =>
      h("span", { class: sign === "·" ? "tile masked" : "tile" }, sign === "·" ? sign : " "),
    );
    byId("picture").append(h("div", { class: "tiles", "data-state": state }, ...tiles));
  }
}

/**
 * A fully active block accepts its best token even below the threshold.
 *
 * @param {DatedToken} token
 * @param {number | null} threshold
 */
function isForced(token, threshold) {
  return threshold !== null && token.probability !== null && token.probability <= threshold;
}

/**
 * What is known of a place, the most important first.
 *
 * @param {Run} run
 * @param {DatedToken | undefined} token
 * @param {number} position
 */
function describe(run, token, position) {
  if (token === undefined) return ["not decoded yet", `position ${position}`];
  const { probability, step } = token;
  const sure = probability === null ? "probability unknown" : `probability ${percent(probability)}`;
  const forced = isForced(token, run.threshold)
    ? [`forced: not above τ conf ${run.threshold}, but the best of its block`]
    : [];
  const { numForwards, seconds } = run.steps[step];
  const text = visible(token.text);
  const name = text === END ? "end of text" : `“${text}”`;
  return [`${name}, ${sure}`, ...forced, `position ${position}, forward ${numForwards}, ${clock(seconds)}`];
}

/** @param {number} probability */
function percent(probability) {
  const value = 100 * probability;
  return `${value > 99.9 ? value.toFixed(3) : value.toFixed(1)}%`;
}

/**
 * The nearest tile in the next line of tiles, up or down.
 *
 * @param {Element[]} tiles
 * @param {number} at
 * @param {number} direction
 */
function across(tiles, at, direction) {
  const from = tiles[at].getBoundingClientRect();
  let best;
  let least = Infinity;
  for (const tile of tiles) {
    const box = tile.getBoundingClientRect();
    const down = (box.top - from.top) * direction;
    if (down < from.height / 2) continue;
    const away = down * 100 + Math.abs(box.left - from.left);
    if (away < least) [best, least] = [tile, away];
  }
  return best;
}

/**
 * @param {HTMLElement} button
 * @param {boolean} playing
 */
export function showPlaying(button, playing) {
  button.classList.toggle("playing", playing);
  button.setAttribute("aria-label", playing ? "Pause" : "Play");
}

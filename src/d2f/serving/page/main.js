/** Puts the page together. */

import { ApiError, key, listModels } from "./api.js";
import { Chat } from "./chat.js";
import { byId, errorBox, h } from "./dom.js";
import { Pipeline } from "./pipeline.js";
import { Race } from "./race.js";
import { Settings } from "./settings.js";

const THEME = "d2f-theme";
const settings = new Settings();
const pipeline = new Pipeline();
const race = new Race(settings);
const chat = new Chat(settings, pipeline, { askKey, onAsk: showAsked });

/** What to do once a key was given. */
let afterKey = () => {};

/**
 * @param {() => void} then
 * @param {string} refused why the last one will not do
 */
function askKey(then, refused = "") {
  afterKey = then;
  byId("key-refused").textContent = refused;
  byId("key-input").value = key.get();
  byId("key-dialog").returnValue = ""; // else Escape would repeat the last choice
  byId("key-dialog").showModal();
}

/** The pipeline comes into view; the race is offered the same prompt. @param {string} prompt */
function showAsked(prompt) {
  race.prompt.value = prompt;
  choosePanel("pipeline");
  if (matchMedia("(max-width: 899px)").matches) byId("stage").scrollIntoView();
}

async function load() {
  byId("trouble").replaceChildren();
  try {
    const models = await listModels();
    const options = models.map((model) => h("option", { value: model.id }, model.id));
    const select = byId("model");
    select.replaceChildren(...options);
    const choose = () => {
      const model = models.find((other) => other.id === select.value) ?? models[0];
      const { num_parameters: size, device, dtype, examples } = model.d2f;
      byId("facts").textContent = `${parameters(size)} · ${device} · ${dtype}`;
      settings.choose(model);
      // A race's model is asked what the default model is asked.
      chat.choose(model, examples.length ? examples : models[0].d2f.examples);
    };
    select.onchange = choose;
    race.offer(models);
    race.prompt.value ||= models[0].d2f.examples[0] ?? "";
    choose();
  } catch (error) {
    /** @type {Array<[string, () => void]>} */
    const ways = [["Try again", load]];
    if (error instanceof ApiError && error.kind === "key") {
      ways.unshift(["Enter the key", () => askKey(load)]);
      askKey(load, key.get() ? error.message : "");
    }
    if (!(error instanceof ApiError)) console.error(error);
    byId("trouble").replaceChildren(errorBox(error, ways));
  }
}

/** @param {number} count */
function parameters(count) {
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "K"]];
  const [size, unit] = units.find(([least]) => count >= least) ?? [1, ""];
  const value = count / size;
  return `${value.toFixed(value < 10 ? 1 : 0)}${unit} parameters`;
}

/** @param {string} name pipeline or race */
function choosePanel(name) {
  for (const other of ["pipeline", "race"]) {
    const chosen = other === name;
    byId(`${other}-tab`).setAttribute("aria-selected", String(chosen));
    byId(`${other}-tab`).tabIndex = chosen ? 0 : -1;
    byId(`${other}-panel`).hidden = !chosen;
  }
}

function listen() {
  for (const [name, other] of [["pipeline", "race"], ["race", "pipeline"]]) {
    byId(`${name}-tab`).addEventListener("click", () => choosePanel(name));
    byId(`${name}-tab`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      choosePanel(other);
      byId(`${other}-tab`).focus();
    });
  }
  byId("key-button").addEventListener("click", () => askKey(load));
  byId("key-dialog").addEventListener("close", () => {
    if (byId("key-dialog").returnValue !== "use") return;
    key.set(byId("key-input").value.trim());
    afterKey();
  });
  byId("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => nameTheme());
  byId("settings").open = matchMedia("(min-width: 900px) and (min-height: 850px)").matches;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** @param {string} theme light or dark */
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  nameTheme();
}

function nameTheme() {
  byId("theme").setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
}

const theme = localStorage.getItem(THEME);
if (theme) document.documentElement.dataset.theme = theme;
nameTheme();
listen();
load();

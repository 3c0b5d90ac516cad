/** Small helpers to build the page. Text always goes in as text, never as HTML. */

/**
 * An element with attributes and children; `on…` attributes are listeners, false leaves one out.
 *
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children);
  return element;
}

/**
 * The element with this id, which index.html must have.
 *
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`index.html has no #${id}`);
  return element;
}

/**
 * Say something to those who listen to the page.
 *
 * @param {string} text
 */
export function announce(text) {
  byId("announcer").textContent = text;
}

/**
 * Show one button in the place of another, which hands on the focus if it has it.
 *
 * @param {HTMLElement} gone
 * @param {HTMLElement} shown
 */
export function swap(gone, shown) {
  const hadFocus = document.activeElement === gone;
  shown.hidden = false;
  gone.hidden = true;
  if (hadFocus) shown.focus({ preventScroll: true }); // what was started may be elsewhere
}

/**
 * The number in a field; left empty, it is the one that the field shows as its placeholder.
 *
 * @param {HTMLInputElement} field
 */
export function numberIn(field) {
  return Number(field.value || field.placeholder);
}

/**
 * What went wrong, where it went wrong, with a way on.
 *
 * @param {Error} error
 * @param {Array<[string, () => void]>} ways name and action of buttons
 */
export function errorBox(error, ways = []) {
  const buttons = ways.map(([name, act]) => h("button", { type: "button", onclick: act }, name));
  return h("div", { class: "error", role: "alert" }, h("p", {}, error.message), ...buttons);
}

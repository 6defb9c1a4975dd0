// How answers are made: kept in this browser. The key is kept in this tab alone.

const STORE = "vlm-serve settings";
const KEY = "vlm-serve key";
const DEFAULTS = { system: "", maxTokens: 256, temperature: 0, topP: 1, seed: null };
const byId = (id) => document.getElementById(id);

// Where storage is forbidden both last until the page is closed.
let chosen = { ...DEFAULTS, ...stored(() => JSON.parse(localStorage.getItem(STORE))) };
let heldKey = stored(() => sessionStorage.getItem(KEY)) ?? "";

function stored(action) {
  try {
    return action();
  } catch {
    return null; // forbidden, full, or something else lies there
  }
}

/** Settings as they were saved, by the names of DEFAULTS. */
export const settings = () => chosen;

/** The fields of a request that settings decide; what is at its default is left to the server. */
export function sampling({ maxTokens, temperature, topP, seed }) {
  return {
    max_completion_tokens: maxTokens,
    temperature,
    ...(topP < 1 ? { top_p: topP } : {}),
    ...(seed === null ? {} : { seed }),
  };
}

/** The API key, or "". */
export const key = () => heldKey;

/** Keep the API key; "" forgets it. */
export function keepKey(value) {
  heldKey = value;
  stored(() => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)));
}

/** The dialog: opened by its button, saved by Enter or Save, left by Esc or Cancel. */
export function settingsDialog(forgotten) {
  const dialog = byId("settings");
  byId("open-settings").onclick = () => {
    const now = settings();
    byId("system").value = now.system;
    byId("max-tokens").value = now.maxTokens;
    byId("temperature").value = now.temperature;
    byId("top-p").value = now.topP;
    byId("seed").value = now.seed ?? "";
    byId("forget-key").hidden = !key();
    dialog.showModal();
  };
  byId("cancel-settings").onclick = () => dialog.close();
  byId("forget-key").onclick = () => {
    keepKey("");
    dialog.close();
    forgotten();
  };
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    const seed = byId("seed").value;
    chosen = {
      system: byId("system").value.trim(),
      maxTokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      topP: byId("top-p").valueAsNumber,
      seed: seed === "" ? null : Number(seed),
    };
    stored(() => localStorage.setItem(STORE, JSON.stringify(chosen)));
    dialog.close();
  };
}

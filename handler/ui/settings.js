// The settings: a system prompt, and how words are chosen. An empty field is the model's own default.
import { recall, remember } from "./remember.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const dialog = document.getElementById("settings");
const values = recall("settings");

for (const name of ["system", ...NUMBERS]) {
  const field = document.getElementById(name);
  field.value = values[name] ?? "";
  field.addEventListener("input", () => {
    values[name] = field.value;
    remember("settings", values);
  });
}
document.getElementById("open").addEventListener("click", () => dialog.showModal());
document.getElementById("close").addEventListener("click", () => dialog.close());

/** The message that comes before the conversation, as a list of none or one. */
export function systemMessages() {
  return values.system?.trim() ? [{ role: "system", content: values.system }] : [];
}

/** The fields of a request that the settings fill. */
export function sampling() {
  return Object.fromEntries(NUMBERS.filter((name) => values[name]).map((name) => [name, Number(values[name])]));
}

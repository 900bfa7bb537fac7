// The engine's state, as /status tells it: asked often while it changes, seldom while it is warm.
import { Refusal, call } from "./api.js";

const WORDS = {
  asleep: "asleep, wakes when asked",
  draining: "shutting down",
  locked: "asks for an API key",
  unreachable: "cannot be reached",
};
const PHASES = { download: "downloading", convert: "converting", load: "loading", warmup: "warming up" };
const TROUBLE = {
  draining: "The server is shutting down and takes no more questions.",
  unreachable: "The server cannot be reached. This page keeps trying.",
};
const PAUSE_MS = { warm: 10_000, asleep: 10_000, failed: 10_000, unreachable: 3_000 };

/** What /status said last; also the states "connecting", "locked" and "unreachable". */
export let engine = { state: "connecting" };
let timer = 0;
let changed = () => {};
let refused = () => {};

/** Call `onChange(before)` after each look at the state; `onRefusal(message)` if a key is asked for. */
export function watch(onChange, onRefusal) {
  [changed, refused] = [onChange, onRefusal];
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) look();
  });
  look();
}

/** Look now, and again in a while. Without the key that is asked for, only the next call looks again. */
export async function look() {
  clearTimeout(timer);
  const before = engine;
  try {
    engine = await (await call("status")).json();
  } catch (error) {
    const locked = error instanceof Refusal && error.status === 401;
    engine = { ...engine, state: locked ? "locked" : "unreachable" };
    if (locked) refused(error.message);
  }
  changed(before);
  clearTimeout(timer);
  if (engine.state === "locked") return;
  timer = setTimeout(look, PAUSE_MS[engine.state] ?? 500);
}

/** The state in a few words: `downloading 43 %, 42 of 98 MB`. */
export function describe() {
  if (engine.state !== "loading") return WORDS[engine.state] ?? engine.state;
  const { phase, percent, bytes_done: done, bytes_total: total } = engine.progress;
  const words = PHASES[phase] ?? "loading";
  return percent == null ? words : `${words} ${percent} %, ${sizes(done, total)}`;
}

/** Why questions cannot be answered now; empty if they can, or will be. */
export function trouble() {
  if (engine.state === "failed") return engine.error ?? "The engine has failed. The server's log says why.";
  return TROUBLE[engine.state] ?? "";
}

function sizes(done, total) {
  const [unit, name] = total < 1e9 ? [1e6, "MB"] : [1e9, "GB"];
  const places = total / unit < 10 ? 1 : 0;
  return `${(done / unit).toFixed(places)} of ${(total / unit).toFixed(places)} ${name}`;
}

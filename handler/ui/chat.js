// The conversation: what is asked, what comes back, and how both are shown.
import { Refusal, call, chunks, setKey } from "./api.js";
import { describe, engine, look, trouble, watch } from "./engine.js";
import { render } from "./markdown.js";
import { sampling, systemMessages } from "./settings.js";

const $ = (id) => document.getElementById(id);
const log = $("log");

let turns = []; // {role, content, node}; they live as long as the page does
let running = null; // the AbortController of the answer that is being written

function make(tag, className = "", text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function button(label, act) {
  const node = make("button", "plain", label);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function announce(text) {
  $("announce").textContent = text;
}

// ---- turns ----

function add(role, content) {
  const node = make("article", role);
  const text = make("div", "text", content);
  text.dir = "auto";
  node.append(make("h2", "unseen", role === "user" ? "You" : "Answer"), text);
  const turn = { role, content, node };
  turns.push(turn);
  log.append(node);
  log.scrollTop = log.scrollHeight;
  return turn;
}

function dropAnswer() {
  if (turns.at(-1)?.role === "assistant") turns.pop().node.remove();
}

/** What the model is to see. A question that got no answer is shown, but not sent again with the next one. */
function messages() {
  const sent = turns.filter((turn, place) => turn.role !== "user" || turns[place + 1]?.role !== "user");
  return [...systemMessages(), ...sent.map(({ role, content }) => ({ role, content }))];
}

function show(turn) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const text = turn.node.querySelector(".text");
  if (turn.content) render(text, turn.content);
  else text.replaceChildren(make("p", "waiting", waitingFor()));
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function waitingFor() {
  if (engine.state === "loading") return `Waiting for the model: ${describe()}. The answer comes by itself.`;
  if (["asleep", "waking"].includes(engine.state)) return "Waking the model. The answer comes by itself.";
  return "Waiting for the first token";
}

// ---- an answer ----

async function answer() {
  log.querySelector(".fault")?.remove();
  const body = {
    ...sampling(),
    messages: messages(),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const turn = add("assistant", "");
  const mine = new AbortController();
  const meter = { asked: performance.now(), first: 0, last: 0, tokens: 0 };
  let end = ""; // why it ended: stop, length, stopped; empty when it broke off
  let error = null;
  setRunning(mine);
  show(turn);
  announce("Waiting for the answer");
  try {
    end = await receive(body, turn, meter, mine.signal);
  } catch (caught) {
    if (mine.signal.aborted) end = "stopped";
    else error = caught;
  }
  if (running !== mine) return; // a new chat has begun meanwhile
  setRunning(null);
  finish(turn, meter, end);
  if (error) explain(error, turn);
  else announce(turn.content);
}

async function receive(body, turn, meter, signal) {
  const options = { method: "POST", body: JSON.stringify(body), signal };
  let end = "";
  let frame = 0;
  for await (const { choices, usage } of chunks(await call("v1/chat/completions", options))) {
    meter.tokens = usage?.completion_tokens ?? meter.tokens;
    end = choices[0]?.finish_reason ?? end;
    const piece = choices[0]?.delta.content;
    if (!piece) continue;
    meter.last = performance.now();
    meter.first ||= meter.last;
    turn.content += piece;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => show(turn));
  }
  return end;
}

function finish(turn, meter, end) {
  if (!turn.content && (end === "stopped" || !end)) return dropAnswer();
  if (turn.content) show(turn);
  else turn.node.querySelector(".text").replaceChildren(make("p", "", "The model said nothing."));
  const after = make("div", "after");
  after.append(make("span", "", summary(meter, end)));
  if (navigator.clipboard) after.append(button("Copy", () => navigator.clipboard.writeText(turn.content)));
  const again = button("Regenerate", retry);
  again.classList.add("again"); // shown on the last turn only
  after.append(again);
  turn.node.append(after);
  log.scrollTop = log.scrollHeight;
}

function summary({ asked, first, last, tokens }, end) {
  const parts = [];
  if (tokens) parts.push(tokens === 1 ? "1 token" : `${tokens} tokens`);
  if (tokens > 1 && last > first) {
    const rate = ((tokens - 1) / (last - first)) * 1000;
    parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`);
  }
  if (first) parts.push(`first after ${((first - asked) / 1000).toFixed(2)} s`);
  if (end === "length") parts.push("cut at the token limit");
  if (end === "stopped") parts.push("stopped");
  if (!end) parts.push("broken off");
  return parts.join(" · ");
}

function explain(error, turn) {
  if (error.status === 401) return askKey(error.message);
  look();
  const broken = turn.content
    ? "The connection broke off before the answer was whole."
    : "The server cannot be reached.";
  const fault = make("div", "fault");
  fault.setAttribute("role", "alert");
  const again = button("Try again", retry);
  again.className = "";
  fault.append(make("p", "", error instanceof Refusal ? error.message : broken), again);
  log.append(fault);
  log.scrollTop = log.scrollHeight;
  announce("");
}

function retry() {
  dropAnswer();
  answer();
}

function setRunning(controller) {
  running = controller;
  const [shown, hidden] = running ? [$("stop"), $("send")] : [$("send"), $("stop")];
  shown.hidden = false;
  // Whoever works by keyboard must not lose their place together with the button.
  if (document.activeElement === hidden || document.activeElement === document.body) shown.focus();
  hidden.hidden = true;
}

// ---- the engine's state ----

function showState(before) {
  const { state, progress, model } = engine;
  const loaded = progress?.percent;
  document.body.dataset.state = state;
  document.body.style.setProperty("--risen", { warm: 1, loading: (loaded ?? 0) / 125, asleep: 0.2 }[state] ?? 0);
  $("model").textContent = model ?? "";
  $("state").textContent = describe();
  $("bar").hidden = state !== "loading";
  if (loaded == null) $("bar").removeAttribute("value");
  else $("bar").value = loaded;
  const why = trouble();
  if ($("trouble").textContent !== why) $("trouble").textContent = why;
  $("trouble").hidden = !why;
  $("hint").textContent =
    state === "loading"
      ? "The model is on its way. Ask already; the question waits for it."
      : "Enter sends, Shift and Enter start a new line.";
  if (running && !turns.at(-1).content) show(turns.at(-1));
  if (state !== before.state && !why) announce(`Model: ${describe()}`);
}

function askKey(why) {
  $("key-why").textContent = why;
  $("key-form").hidden = false;
  $("key").focus();
}

// ---- wiring ----

function resize() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function ask(event) {
  event.preventDefault();
  const content = $("question").value.trim();
  if (running || !content) return;
  $("question").value = "";
  resize();
  add("user", content);
  answer();
}

$("ask").addEventListener("submit", ask);
$("question").addEventListener("input", resize);
$("question").addEventListener("keydown", (event) => {
  // Enter that ends the writing of a word in another script sends nothing; Safari shows it by the code 229.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) ask(event);
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("new").addEventListener("click", () => {
  running?.abort();
  setRunning(null);
  for (const { node } of turns) node.remove();
  log.querySelector(".fault")?.remove();
  turns = [];
  $("question").focus();
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  $("question").focus();
  await look();
  if (engine.state !== "locked" && turns.at(-1)?.role === "user" && !running) answer();
});
watch(showState, askKey);

// Calls to the server that this page came from. Paths are relative, so that a proxy may add a prefix.
import { recall, remember } from "./remember.js";

let { key } = recall("key");

export function setKey(value) {
  key = value;
  remember("key", { key });
}

/** An error in the server's own words. `status` is 0 if it came in the middle of a stream. */
export class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The response to a call, whose status is good. Throws `Refusal` for others, TypeError if nobody answers. */
export async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  let message = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not this server's words, perhaps a proxy's: the status must do.
  }
  throw new Refusal(message, response.status);
}

/** The chunks of a streamed answer. Throws if the stream ends before it says that it is whole. */
export async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("cut off");
      const lines = (rest + value).split("\n");
      rest = lines.pop(); // networks cut anywhere; only whole lines count
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refusal(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

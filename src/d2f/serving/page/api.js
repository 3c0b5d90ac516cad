/**
 * The server's HTTP interface: models, streamed answers, and what can go wrong with them.
 *
 * @typedef {{position: number, token_id: number, text: string, probability: number | null}} Token
 * @typedef {{start: number, length: number, state: string}} Block
 * @typedef {{seconds: number, waited: number, num_forwards: number, num_committed: number,
 *            tokens: Token[], blocks: Block[], done?: boolean}} StepEvent
 * @typedef {{completion_tokens: number, num_forwards: number, seconds: number}} Usage
 * @typedef {{block_size: number, add_threshold: number, activate_threshold: number,
 *            confidence_threshold: number}} Policy
 * @typedef {{strategies: string[], strategy: string, policy: Policy, max_positions: number,
 *            max_tokens: number,
 *            chat_template: boolean, leaves_out: string[], examples: string[],
 *            num_parameters: number, device: string, dtype: string}} ModelFacts
 * @typedef {{id: string, d2f: ModelFacts}} Model
 * @typedef {{onText: (text: string) => void, onStep: (step: StepEvent) => void,
 *            onEnd: (reason: string, usage: Usage | null) => void}} Listener
 */

const KEY = "d2f-api-key";

/** What went wrong, in words. `kind`: network, key, busy, request, server or stream. */
export class ApiError extends Error {
  /**
   * @param {string} kind
   * @param {string} message
   */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** The API key lives as long as the tab, and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  /** @param {string} value */
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** @returns {Promise<Model[]>} */
export async function listModels() {
  const response = await request("v1/models", {});
  return (await response.json()).data;
}

/**
 * One streamed answer; resolves when it is whole.
 *
 * @param {object} body of the request, without the fields that make it a stream
 * @param {Listener} listener
 * @param {AbortSignal} signal
 */
export async function streamAnswer(body, listener, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true, include_provisional: true },
    }),
    signal,
  });
  let whole = false;
  let reason = "";
  let usage = null;
  for await (const data of readEvents(response.body)) {
    if (data === "[DONE]") {
      whole = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) {
      throw new ApiError("stream", `The answer broke off: ${chunk.error.message}`);
    }
    usage = chunk.usage ?? usage;
    if (chunk.d2f) listener.onStep(chunk.d2f);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) listener.onText(choice.delta.content);
    reason = choice?.finish_reason ?? reason;
  }
  if (whole && reason) return listener.onEnd(reason, usage);
  throw new ApiError("stream", "The connection ended before the answer was whole.");
}

/**
 * The data of server-sent events, whatever pieces the bytes arrive in.
 *
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<string>}
 */
export async function* readEvents(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // keeps half a character for the next piece
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { done, value } = await read(reader);
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A line may end in \r\n; one that ends in \r so far may be going to.
      const parts = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = parts.pop() ?? "";
      for (const line of parts) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // an answer nobody reads any longer is not computed further
  }
}

/** @param {ReadableStreamDefaultReader<Uint8Array>} reader */
async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("stream", "The connection broke before the answer was whole.");
  }
}

/**
 * @param {string} path relative to the page, which may lie behind a proxy's prefix
 * @param {RequestInit} options
 */
async function request(path, options) {
  const headers = new Headers(options.headers);
  if (key.get()) headers.set("Authorization", `Bearer ${key.get()}`);
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(
      "network",
      "The server cannot be reached. Is `d2f serve` still running, and this machine online?",
    );
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** @param {Response} response */
async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error.message;
  } catch {
    said = `HTTP ${response.status} ${response.statusText}`.trim();
  }
  if (response.status === 401) {
    const what = key.get() ? "The API key was not accepted." : "This server asks for an API key.";
    return new ApiError("key", what);
  }
  if (response.status === 429) {
    const wait = Number(response.headers.get("Retry-After"));
    const when = wait > 0 ? `in ${wait} second${wait === 1 ? "" : "s"}` : "in a moment";
    return new ApiError("busy", `The server is busy: ${said}. Try again ${when}.`);
  }
  if (response.status < 500) return new ApiError("request", `The server refused: ${said}`);
  return new ApiError("server", `The server failed (${response.status}): ${said}`);
}

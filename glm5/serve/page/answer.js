// One answer while it is streamed into its message: text, reasoning, tool calls, and how fast they came.

import { ApiError, streamChat } from "./api.js";
import { isWholeCall } from "./store.js";

/** An empty assistant message. */
export function emptyAnswer() {
  return { role: "assistant", reasoning: "", content: "", calls: [], info: {} };
}

/** Streams into `message`. `changed()` is called after each chunk. */
export class Answer {
  constructor(message, changed) {
    this.message = message;
    this.changed = changed;
    this.controller = new AbortController();
    this.deltas = 0;
  }

  /** Ends the answer where it is; what was said stays. */
  stop() {
    this.message.info.finish = "stopped"; // at once: a page that is left has no later
    this.controller.abort();
  }

  /** Runs to the end. Gives the error that ended it, or null; a stop is no error. */
  async run(body, key) {
    const { message } = this;
    this.started = performance.now();
    try {
      for await (const chunk of streamChat(body, key, this.controller.signal)) this.take(chunk);
      message.info.finish ??= "stop";
    } catch (error) {
      if (!this.controller.signal.aborted) {
        const cut = error instanceof TypeError; // as a reader says that the network is gone
        const said = cut ? "The connection ended before the answer did." : "The answer could not be read.";
        message.error = error instanceof ApiError ? error.message : said;
        return error;
      }
    } finally {
      this.end();
    }
    return null;
  }

  take(chunk) {
    const { info } = this.message;
    if (chunk.usage) {
      info.promptTokens = chunk.usage.prompt_tokens;
      info.cachedTokens = chunk.usage.prompt_tokens_details?.cached_tokens;
      info.completionTokens = chunk.usage.completion_tokens;
    }
    const choice = chunk.choices?.[0];
    if (!choice) return;
    if (choice.finish_reason) info.finish = choice.finish_reason;
    this.add(choice.delta ?? {});
    this.changed();
  }

  add({ reasoning_content: thought, content, tool_calls: calls }) {
    const { message } = this;
    if (!thought && !content && !calls?.length) return;
    const now = performance.now();
    this.first ??= now;
    this.last = now;
    this.deltas++;
    if (thought) {
      message.reasoning += thought;
      message.info.thinkingSeconds = (now - this.started) / 1000;
    }
    if (content) message.content += content;
    for (const call of calls ?? []) {
      const known = (message.calls[call.index ?? 0] ??= { id: "", name: "", arguments: "" });
      known.id ||= call.id ?? "";
      known.name += call.function?.name ?? "";
      known.arguments += call.function?.arguments ?? "";
    }
  }

  end() {
    const { message } = this;
    message.calls = message.calls.filter(isWholeCall);
    if (this.first !== undefined) {
      message.info.firstSeconds = (this.first - this.started) / 1000;
      message.info.seconds = (this.last - this.first) / 1000;
      message.info.deltas = this.deltas;
    }
    this.changed();
  }
}

/** The line below an answer: how many tokens, how fast, and why it ended if not by itself. */
export function summary(info) {
  const parts = [];
  if (info.completionTokens !== undefined) {
    parts.push(count(info.completionTokens, "token"));
    if (info.completionTokens > 1 && info.seconds > 0) {
      parts.push(`${rate((info.completionTokens - 1) / info.seconds)} tokens/s`);
    }
  } else if (info.deltas > 1 && info.seconds > 0) {
    parts.push(`about ${count(info.deltas, "token")}`, `${rate((info.deltas - 1) / info.seconds)} tokens/s`);
  }
  if (info.promptTokens !== undefined) {
    const cached = info.cachedTokens ? ` (${info.cachedTokens.toLocaleString("en")} cached)` : "";
    parts.push(`prompt ${info.promptTokens.toLocaleString("en")}${cached}`);
  }
  if (info.firstSeconds !== undefined) parts.push(`first after ${duration(info.firstSeconds)}`);
  if (info.finish === "length") parts.push("cut off at the limit of tokens");
  if (info.finish === "stopped") parts.push("stopped");
  if (info.finish === "abort") parts.push("ended by the server");
  return parts.join(" · ");
}

/** "0.4 s", "12 s", "2 min". */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  return seconds < 100 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
}

function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

function rate(number) {
  return number >= 100 ? Math.round(number).toLocaleString("en") : number.toFixed(1);
}

// Conversations as OpenAI's messages: what is sent, exported and imported.

import { el } from "./dom.js";
import { newConversation } from "./store.js";

/** The messages as the API takes them. Assistant turns that never said anything are left out. */
export function toApi(conversation) {
  const messages = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const message of conversation.messages) {
    if (message.role === "user") messages.push({ role: "user", content: message.content });
    else if (message.role === "tool") {
      messages.push({ role: "tool", tool_call_id: message.callId, content: message.content });
    } else if (message.content || message.reasoning || message.calls.length) messages.push(assistantToApi(message));
  }
  return messages;
}

function assistantToApi({ reasoning, content, calls }) {
  const message = { role: "assistant", content };
  if (reasoning) message.reasoning_content = reasoning;
  if (calls.length) {
    message.tool_calls = calls.map(({ id, name, arguments: text }) => (
      { id, type: "function", function: { name, arguments: text } }
    ));
  }
  return message;
}

/** A conversation from OpenAI's messages, as `toApi`, this page's export and `glm5 chat /save` write them. */
export function fromApi({ messages, title }) {
  if (!Array.isArray(messages)) throw new Error("The file holds no list of messages.");
  const conversation = newConversation();
  const text = (value) => (typeof value === "string" ? value : "");
  for (const message of messages) {
    if (message?.role === "system") conversation.system = text(message.content);
    else if (message?.role === "user") conversation.messages.push({ role: "user", content: text(message.content) });
    else if (message?.role === "tool") {
      conversation.messages.push({ role: "tool", callId: text(message.tool_call_id), content: text(message.content) });
    } else if (message?.role === "assistant") {
      const calls = (message.tool_calls ?? []).map((call) => (
        { id: text(call.id), name: text(call.function?.name), arguments: text(call.function?.arguments) }
      ));
      conversation.messages.push({
        role: "assistant", reasoning: text(message.reasoning_content), content: text(message.content), calls, info: {},
      });
    } else throw new Error("The file holds a message whose role is unknown.");
  }
  conversation.title = text(title);
  return conversation;
}

/** Offers a conversation as a file of JSON. */
export function exportFile(conversation, model) {
  const { title } = conversation;
  const name = `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation"}.json`;
  const content = { kind: "conversation", title, model, messages: toApi(conversation) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 2)], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** The conversation in a file. Raises an Error with a sentence. */
export async function importFile(file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    throw new Error("The file is not JSON.");
  }
  const conversation = fromApi(content);
  conversation.title ||= titleOf(conversation) || file.name;
  return conversation;
}

/** A title from what the reader said first. */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line;
}

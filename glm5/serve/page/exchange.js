// Conversations as OpenAI's messages: what is sent, exported and imported.

import { el } from "./dom.js";
import { isObject, isWholeCall, newConversation } from "./store.js";

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

/** A conversation from OpenAI's messages, as `toApi`, this page's export and `glm5 chat /save` write them. Raises an
 *  Error with a sentence for what the page cannot show: nothing is left out silently. */
export function fromApi(content) {
  if (!Array.isArray(content?.messages)) throw new Error("The file holds no list of messages.");
  const conversation = newConversation();
  const system = [];
  content.messages.forEach((message, at) => {
    const where = `Message ${at + 1}`;
    const role = message?.role;
    if (role === "system" || role === "developer") system.push(textOf(message.content, where));
    else if (role === "user") conversation.messages.push({ role, content: textOf(message.content, where) });
    else if (role === "tool") {
      conversation.messages.push({ role, callId: stringOf(message.tool_call_id), content: textOf(message.content, where) });
    } else if (role === "assistant") conversation.messages.push(assistantFromApi(message, where));
    else throw new Error(`${where} has no role that is known.`);
  });
  conversation.system = system.join("\n\n");
  conversation.title = stringOf(content.title);
  return conversation;
}

function assistantFromApi({ reasoning_content: reasoning, content, tool_calls: calls }, where) {
  if (!Array.isArray(calls ?? [])) throw new Error(`The tool calls of ${where.toLowerCase()} are no list.`);
  return {
    role: "assistant",
    reasoning: stringOf(reasoning),
    content: textOf(content ?? "", where),
    calls: (calls ?? []).map((call) => callFromApi(call, where)),
    info: {},
  };
}

function callFromApi(call, where) {
  const { name, arguments: given } = call?.function ?? {};
  const known = { id: stringOf(call?.id), name, arguments: isObject(given) ? JSON.stringify(given) : given || "{}" };
  if (!isWholeCall(known)) throw new Error(`${where} has a tool call without a name, or whose arguments are no JSON object.`);
  return known;
}

/** A content's text: a string, or the parts of one. */
function textOf(content, where) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) throw new Error(`${where} has a content that is no text.`);
  return content.map((part) => {
    const text = part?.type === "text" ? part.text : part;
    if (typeof text === "string") return text;
    throw new Error(`${where} holds more than text${part?.type ? ` (${part.type})` : ""}; the page shows text only.`);
  }).join("");
}

function stringOf(value) {
  return typeof value === "string" ? value : "";
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

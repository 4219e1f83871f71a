// What the browser keeps: each conversation under a key of its own, so that two tabs do not overwrite each other.
//
// A conversation: { id, title, updated, system, settings, messages }. Its messages:
//   { role: "user", content }
//   { role: "assistant", reasoning, content, calls: [{ id, name, arguments }], info, error }
//   { role: "tool", callId, content }

const PREFIX = "glm5/conversation/";
const PREFERENCES = "glm5/preferences";
const KEY = "glm5/api-key";

export const DEFAULTS = Object.freeze({
  thinking: true,
  temperature: "", // empty: the server's own default
  topP: "",
  maxTokens: "",
  seed: "",
  tools: "",
});

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

/** An empty conversation with the system prompt and settings of another, or the defaults. */
export function newConversation(like) {
  return {
    id: `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`,
    title: "",
    updated: Date.now(),
    system: like?.system ?? "",
    settings: { ...DEFAULTS, ...like?.settings },
    messages: [],
  };
}

/** All conversations, the newest first. */
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (key.startsWith(PREFIX)) found.push(read(key));
  }
  return found.filter(isConversation).sort((a, b) => b.updated - a.updated);
}

export function loadConversation(id) {
  const found = read(PREFIX + id);
  return isConversation(found) ? found : null;
}

/** Keeps a conversation. False when the browser's storage is full or closed. */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

export function deleteConversation(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Whether a key of localStorage, as a `storage` event names it, holds a conversation. */
export function isConversationKey(key) {
  return key === null || key.startsWith(PREFIX);
}

export function preferences() {
  return read(PREFERENCES) ?? {};
}

export function savePreferences(changes) {
  try {
    localStorage.setItem(PREFERENCES, JSON.stringify({ ...preferences(), ...changes }));
  } catch {
    // Without storage the choice holds until the page is closed.
  }
}

/** The API key: kept for this tab only. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

function isConversation(value) {
  return typeof value?.id === "string" && typeof value.title === "string" && Array.isArray(value.messages) &&
    value.messages.every(isMessage);
}

function isMessage(message) {
  if (message?.role === "assistant") {
    return typeof message.reasoning === "string" && typeof message.content === "string" && Array.isArray(message.calls);
  }
  return (message?.role === "user" || message?.role === "tool") && typeof message.content === "string";
}

// ---- OpenAI's messages: what is sent, exported and imported

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

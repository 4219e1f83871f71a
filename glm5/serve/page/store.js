// What the browser keeps: each conversation under a key of its own, so that two tabs with two of them do not meet.
//
// A conversation: { id, title, updated, system, settings, messages }. `updated`, the time at which it was last kept, also
// tells whether another tab has kept it since. Its messages:
//   { role: "user", content }
//   { role: "assistant", reasoning, content, calls: [{ id, name, arguments }], info, error }
//   { role: "tool", callId, content }

const PREFIX = "glm5/conversation/";
const PREFERENCES = "glm5/preferences";
const KEY = "glm5/api-key";
const CURRENT = "glm5/current";

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
    id: newId(),
    title: "",
    updated: Date.now(),
    system: like?.system ?? "",
    settings: { ...DEFAULTS, ...like?.settings },
    messages: [],
  };
}

export function newId() {
  return `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 10)}`;
}

/** All conversations, the newest first. */
export function conversations() {
  const found = [];
  for (let i = 0; i < localStorage.length; i++) {
    const key = localStorage.key(i);
    if (key.startsWith(PREFIX)) found.push(loadConversation(key.slice(PREFIX.length)));
  }
  return found.filter(Boolean).sort((a, b) => b.updated - a.updated);
}

/** A kept conversation, with defaults for what it lacks; null for what is none. */
export function loadConversation(id) {
  const found = read(PREFIX + id);
  if (!isConversation(found)) return null;
  const settings = Object.entries(DEFAULTS).map(([name, value]) => {
    const kept = found.settings?.[name];
    return [name, typeof kept === typeof value ? kept : value];
  });
  return {
    id,
    title: found.title,
    updated: Number(found.updated) || 0,
    system: typeof found.system === "string" ? found.system : "",
    settings: Object.fromEntries(settings),
    // The page may have ended in the middle of a call.
    messages: found.messages.map((message) => (
      message.calls ? { ...message, calls: message.calls.filter(isWholeCall) } : message
    )),
  };
}

/** Keeps a conversation, over what is there. False when the browser's storage is full or closed. */
export function saveConversation(conversation) {
  const before = conversation.updated;
  conversation.updated = Math.max(Date.now(), before + 1);
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    conversation.updated = before;
    return false;
  }
}

/** Whether another tab has kept this conversation after it was read or kept here. */
export function changedSince({ id, updated }) {
  const kept = loadConversation(id);
  return kept !== null && kept.updated !== updated;
}

export function deleteConversation(id) {
  localStorage.removeItem(PREFIX + id);
}

/** The conversation that a key of localStorage holds, as a `storage` event names it; null for other keys. */
export function conversationOf(key) {
  return key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
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

/** The API key, and which conversation is on screen: kept for this tab only. */
export const apiKey = ofThisTab(KEY);
export const currentConversation = ofThisTab(CURRENT);

function ofThisTab(key) {
  return {
    get: () => sessionStorage.getItem(key) ?? "",
    set: (value) => (value ? sessionStorage.setItem(key, value) : sessionStorage.removeItem(key)),
  };
}

function isConversation(value) {
  return typeof value?.title === "string" && Array.isArray(value.messages) && value.messages.every(isMessage);
}

function isMessage(message) {
  if (message?.role === "assistant") {
    return typeof message.reasoning === "string" && typeof message.content === "string" && Array.isArray(message.calls);
  }
  return (message?.role === "user" || message?.role === "tool") && typeof message.content === "string";
}

/** The results that follow an answer with tool calls, in the order of its calls. */
export function resultsOf({ messages }, message) {
  const results = [];
  for (let i = messages.indexOf(message) + 1; messages[i]?.role === "tool"; i++) results.push(messages[i].content);
  return results;
}

/** Whether a call has come to its end. Others cannot be sent back; the server would refuse their arguments. */
export function isWholeCall(call) {
  try {
    return typeof call.id === "string" && typeof call.name === "string" && isObject(JSON.parse(call.arguments));
  } catch {
    return false;
  }
}

export function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

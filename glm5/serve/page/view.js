// How messages look: what the user said, and answers with their thinking, text, tool calls and figures.
//
// `actions` is what the page lets the reader do with a message: edit(message, text), again(message),
// sendResults(message, texts), editResults(message).

import { duration, summary } from "./answer.js";
import { copyButton, el, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/** A message of the user, with an editor in its place when asked for. */
export class UserView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.text = el("div", { class: "bubble", dir: "auto" }, message.content);
    this.bar = el("div", { class: "bar" },
      copyButton("Copy message", () => message.content),
      iconButton("edit", "Edit message", () => this.edit()));
    this.element = el("li", { class: "message user", "aria-label": "You" }, this.text, this.bar);
  }

  edit() {
    openEditor(this.element, this.message.content, "Edited message", "Send", (text) => (
      text.trim() && this.actions.edit(this.message, text)
    ));
  }
}

/** An answer. `update(live)` shows what the message holds now; `live` while it still comes. */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.thinking = new ThinkingView();
    this.text = el("div", { class: "text", dir: "auto" });
    this.markdown = new MarkdownView(this.text);
    this.wait = el("div", { class: "wait" }, el("span", { class: "hidden" }, "Waiting for the answer"));
    this.calls = el("div", { class: "calls" });
    this.error = el("div", { class: "error", role: "alert" });
    this.figures = el("span", { class: "figures" });
    this.bar = el("div", { class: "bar" },
      copyButton("Copy answer", () => message.content),
      iconButton("again", "Answer again", () => actions.again(message)),
      iconButton("edit", "Edit answer", () => this.edit()),
      this.figures);
    this.element = el("li", { class: "message answer", "aria-label": "Answer" },
      this.thinking.element, this.text, this.wait, this.calls, this.error, this.bar);
  }

  update(live, results = []) {
    const { message } = this;
    const said = Boolean(message.content || message.calls.length);
    this.thinking.update(message, live && !said);
    this.markdown.update(message.content);
    this.text.hidden = !message.content;
    this.element.classList.toggle("live", live);
    this.wait.hidden = !live || Boolean(message.reasoning) || said;
    this.calls.replaceChildren(...callCards(message, live, results, this.actions));
    this.error.hidden = !message.error;
    this.error.textContent = message.error ?? "";
    this.bar.hidden = live;
    this.figures.textContent = summary(message.info ?? {});
  }

  edit() {
    openEditor(this.element, this.message.content, "Edited answer", "Save", (text) => (
      this.actions.edit(this.message, text)
    ));
  }
}

/** The reasoning: open while it comes, folded once the answer begins, unless the reader has chosen otherwise. */
class ThinkingView {
  constructor() {
    this.title = el("span", {}, "Thinking");
    this.text = document.createTextNode("");
    this.chosen = false;
    const head = el("summary", { onclick: () => (this.chosen = true) }, icon("fold"), this.title);
    this.element = el("details", { class: "thinking" }, head, el("div", { class: "thought", dir: "auto" }, this.text));
  }

  update({ reasoning, info }, live) {
    this.element.hidden = !reasoning.trim();
    if (reasoning.startsWith(this.text.data)) this.text.appendData(reasoning.slice(this.text.data.length));
    else this.text.data = reasoning;
    this.element.classList.toggle("live", live);
    const seconds = info?.thinkingSeconds;
    this.title.textContent = live ? "Thinking…" : seconds ? `Thought for ${duration(seconds)}` : "Thought";
    if (!this.chosen && this.element.open !== live) this.element.open = live;
  }
}

/** One card per tool call. Calls without results have a box for them, and one button for all. */
function callCards(message, live, results, actions) {
  const calls = message.calls.filter(Boolean);
  if (!calls.length) return [];
  const boxes = [];
  const cards = calls.map((call, at) => {
    const known = results[at];
    const card = el("div", { class: "call" },
      el("div", { class: "call-head" }, icon("tool"), el("span", { class: "hidden" }, "Tool call: "),
        el("strong", {}, call.name), copyButton("Copy arguments", () => pretty(call.arguments))),
      el("pre", { class: "arguments", tabindex: "0" }, pretty(call.arguments)));
    if (known !== undefined) {
      card.append(el("div", { class: "result-head" }, "Result",
        iconButton("edit", `Edit result of ${call.name}`, () => actions.editResults(message))),
      el("pre", { class: "result", tabindex: "0" }, pretty(known)));
    } else if (!live) {
      const box = el("textarea", { rows: "2", spellcheck: "false", placeholder: "What the tool gives back, as text or JSON" });
      box.value = message.drafts?.[at] ?? "";
      boxes.push(box);
      card.append(el("label", { class: "result-box" }, `Result of ${call.name}`, box));
    }
    return card;
  });
  if (!boxes.length) return cards;
  const send = el("button", { type: "button", class: "primary small", disabled: !boxes.every((box) => box.value.trim()) },
    boxes.length > 1 ? "Send results" : "Send result");
  const submit = () => send.disabled || actions.sendResults(message, boxes.map((box) => box.value));
  send.addEventListener("click", submit);
  for (const box of boxes) {
    box.addEventListener("input", () => (send.disabled = !boxes.every((other) => other.value.trim())));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
    });
  }
  return [...cards, send];
}

/** JSON with indentation; anything else, such as arguments that are still coming, as it is. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Whether the reader edits one of the messages, or writes the result of a call. */
export function isWrittenIn(log) {
  return [...log.querySelectorAll("textarea")].some((box) => box.value || box.closest(".editor"));
}

/** Puts a text box over a message. Escape or Cancel leaves the message as it was. */
function openEditor(element, text, label, action, save) {
  if (element.querySelector(".editor")) return;
  const before = document.activeElement;
  const box = el("textarea", { "aria-label": label, rows: "3", dir: "auto" });
  box.value = text;
  const close = () => {
    editor.remove();
    element.classList.remove("editing");
    before?.focus();
  };
  const done = () => {
    close();
    save(box.value);
  };
  const editor = el("div", { class: "editor" }, box,
    el("div", { class: "editor-buttons" },
      el("button", { type: "button", class: "plain small", onclick: close }, "Cancel"),
      el("button", { type: "button", class: "primary small", onclick: done }, action)));
  editor.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
    if (event.key === "Escape") event.stopPropagation();
  });
  element.append(editor);
  element.classList.add("editing");
  box.focus();
}

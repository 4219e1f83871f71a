// The page: one conversation on screen, answers that stream into it, and everything the reader can press.

import { Answer, emptyAnswer } from "./answer.js";
import { Composer } from "./composer.js";
import { announce } from "./dom.js";
import { exportFile, importFile, titleOf, toApi } from "./exchange.js";
import { Models } from "./models.js";
import { Scroll } from "./scroll.js";
import { SettingsSheet, requestFields } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { toast } from "./toast.js";
import { AnswerView, UserView, isWrittenIn } from "./view.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.running = new Map(); // conversation id -> { answer, conversation }
    this.views = new Map(); // message -> view, of the conversation on screen
    this.frames = new Set(); // conversations that have something to show at the next frame
    this.keeping = new Set(); // and those that will be kept within a second
    this.log = byId("log");
    this.scroll = new Scroll(byId("scroller"), byId("to-end"));
    this.sidebar = new Sidebar((id) => this.choose(id));
    this.settings = new SettingsSheet(() => this.changedSettings());
    this.composer = new Composer({
      send: (text) => this.say(text),
      stop: () => this.running.get(this.conversation.id)?.answer.stop(),
      editLast: () => this.editLast(),
    });
    this.actions = {
      edit: (message, text) => this.edit(message, text),
      again: (message) => this.again(message),
      sendResults: (message, texts) => this.sendResults(message, texts),
      editResults: (message) => this.editResults(message),
    };
    this.connect();
    const current = store.currentConversation.get();
    this.show(store.loadConversation(current) ?? store.newConversation(store.conversations()[0]));
    this.models = new Models(() => this.needKey());
    this.composer.focus();
  }

  connect() {
    byId("new").addEventListener("click", () => this.startNew());
    byId("open-settings").addEventListener("click", () => this.settings.open());
    byId("export").addEventListener("click", () => exportFile(this.conversation, this.models.chosen));
    byId("delete").addEventListener("click", () => this.delete());
    byId("import").addEventListener("change", (event) => this.import(event.target));
    byId("title").addEventListener("input", (event) => this.rename(event.target.value));
    byId("think").addEventListener("click", () => {
      this.conversation.settings.thinking = !this.conversation.settings.thinking;
      this.settings.show(this.conversation);
      this.changedSettings();
    });
    addEventListener("storage", (event) => this.changedElsewhere(event));
    addEventListener("focus", () => this.catchUp());
    this.settings.sheet.addEventListener("close", () => this.catchUp());
    addEventListener("pagehide", () => this.running.forEach(({ answer, conversation }) => {
      answer.stop();
      this.keep(conversation);
    }));
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.defaultPrevented && !this.settings.sheet.open) this.composer.stop();
      if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.startNew();
      }
    });
  }

  // ---- which conversation
  show(conversation) {
    this.conversation = this.running.get(conversation.id)?.conversation ?? conversation;
    store.currentConversation.set(this.conversation.id);
    this.settings.show(this.conversation);
    this.changedSettings(false);
    this.sidebar.show(this.conversation);
    this.showMessages();
    this.scroll.toEnd();
  }

  choose(id) {
    const found = store.loadConversation(id);
    if (found) this.show(found);
    this.sidebar.leave();
    this.composer.focus();
  }

  startNew() {
    if (this.conversation.messages.length) this.show(store.newConversation(this.conversation));
    this.sidebar.leave();
    this.composer.focus();
  }

  rename(title) {
    this.conversation.title = title;
    this.save();
  }

  delete() {
    const removed = this.conversation;
    this.running.get(removed.id)?.answer.stop();
    store.deleteConversation(removed.id);
    this.show(store.conversations()[0] ?? store.newConversation(removed));
    this.composer.focus();
    if (!removed.messages.length) return;
    toast("Conversation deleted.", "Undo", () => {
      store.saveConversation(removed);
      this.show(removed);
    });
  }

  async import(field) {
    const [file] = field.files;
    field.value = "";
    if (!file) return;
    try {
      const conversation = await importFile(file);
      store.saveConversation(conversation);
      this.show(conversation);
      this.sidebar.leave();
    } catch (error) {
      toast(error.message);
    }
  }

  save() {
    if (!this.conversation.messages.length) return;
    this.keep(this.conversation);
    this.sidebar.show(this.conversation);
  }

  keep(conversation) {
    if (store.changedSince(conversation)) this.part(conversation);
    if (!store.saveConversation(conversation)) {
      toast("The browser's storage is full: this conversation is not kept. Export it, or delete others.");
    }
  }

  // ---- other tabs
  /** What this tab holds of a conversation goes on as one of its own, beside what another tab made of it. */
  part(conversation) {
    const running = this.running.get(conversation.id);
    this.running.delete(conversation.id);
    conversation.id = store.newId();
    if (running) this.running.set(conversation.id, running);
    if (conversation === this.conversation) store.currentConversation.set(conversation.id);
    toast(`Another tab changed “${conversation.title}” too: what this tab has is kept as a second conversation.`);
  }

  /** Another tab wrote or deleted a conversation. */
  changedElsewhere({ key, newValue }) {
    const id = store.conversationOf(key);
    if (key !== null && id === null) return;
    if (id !== null && newValue === null) this.running.get(id)?.answer.stop();
    if (id === this.conversation.id && newValue === null) {
      this.show(store.newConversation(this.conversation));
      toast("The conversation was deleted in another tab.");
    }
    this.catchUp();
    this.sidebar.show(this.conversation);
  }

  /** Shows what another tab made of the conversation on screen, unless something is going on with it here. */
  catchUp() {
    if (this.isBusy() || !store.changedSince(this.conversation)) return;
    this.conversation = store.loadConversation(this.conversation.id);
    this.settings.show(this.conversation);
    this.changedSettings(false);
    this.showMessages();
    this.scroll.follow();
  }

  /** Whether an answer comes into the conversation on screen, or the reader writes into it. */
  isBusy() {
    return this.running.has(this.conversation.id) || this.settings.sheet.open || isWrittenIn(this.log);
  }

  changedSettings(save = true) {
    const { thinking, tools } = this.conversation.settings;
    byId("think").setAttribute("aria-pressed", String(thinking));
    byId("has-tools").hidden = !tools.trim();
    byId("has-system").hidden = !this.conversation.system.trim();
    if (save) this.save();
  }

  // ---- what is on screen
  showMessages() {
    const { messages, title } = this.conversation;
    this.views.clear();
    this.log.replaceChildren();
    for (const message of messages) if (message.role !== "tool") this.add(message);
    byId("title").value = title;
    document.title = title ? `${title} · glm5` : "glm5";
    byId("welcome").hidden = messages.length > 0;
    byId("title").hidden = byId("delete").hidden = byId("export").hidden = !messages.length;
    this.composer.running(this.running.has(this.conversation.id));
  }

  add(message) {
    const view = message.role === "user" ? new UserView(message, this.actions) : new AnswerView(message, this.actions);
    this.views.set(message, view);
    this.log.append(view.element);
    if (message.role === "assistant") view.update(this.isLive(message), store.resultsOf(this.conversation, message));
  }

  isLive(message) {
    return this.running.get(this.conversation.id)?.answer.message === message;
  }

  // ---- what the reader does
  say(text) {
    this.catchUp(); // the browser may hold what another tab did before it tells this one
    this.conversation.messages.push({ role: "user", content: text });
    this.conversation.title ||= titleOf(this.conversation);
    this.ask();
  }

  edit(message, text) {
    if (message.role === "user") this.offerUndo(message);
    message.content = text;
    if (message.role === "assistant") {
      this.save();
      this.views.get(message).update(false, store.resultsOf(this.conversation, message));
      return;
    }
    this.cutAfter(message);
    this.ask();
  }

  editLast() {
    const last = this.conversation.messages.findLast((message) => message.role === "user");
    this.views.get(last)?.edit();
  }

  again(message) {
    this.offerUndo(message);
    this.cutAfter(message);
    this.conversation.messages.pop();
    this.ask();
  }

  sendResults(message, texts) {
    this.cutAfter(message);
    delete message.drafts;
    message.calls.forEach((call, at) => {
      this.conversation.messages.push({ role: "tool", callId: call.id, content: texts[at] });
    });
    this.ask();
  }

  editResults(message) {
    message.drafts = store.resultsOf(this.conversation, message);
    this.cutAfter(message);
    this.save();
    this.showMessages();
    this.views.get(message).element.querySelector(".result-box textarea").focus();
  }

  /** What was said after a message that is done again goes; until the toast does, the reader can have it back. */
  offerUndo(message) {
    const { conversation } = this;
    const { messages } = conversation;
    if (!messages.slice(messages.indexOf(message) + 1).some(({ role }) => role === "user")) return;
    const before = structuredClone(messages);
    toast("What was said after that is removed.", "Undo", () => {
      this.running.get(conversation.id)?.answer.stop();
      conversation.messages = before;
      this.keep(conversation);
      this.show(conversation);
    });
  }

  cutAfter(message) {
    this.running.get(this.conversation.id)?.answer.stop();
    const { messages } = this.conversation;
    messages.length = messages.indexOf(message) + 1;
  }

  // ---- asking the server
  async ask() {
    const { conversation } = this;
    this.running.get(conversation.id)?.answer.stop();
    let body;
    try {
      if (!this.models.chosen) await this.models.find();
      body = { model: this.models.chosen ?? "glm5", messages: toApi(conversation), ...requestFields(conversation.settings) };
    } catch (error) {
      this.save();
      this.showMessages();
      toast(error.message, "Settings", () => this.settings.open("tools"));
      return;
    }
    const message = emptyAnswer();
    const answer = new Answer(message, () => this.streamed(conversation, message));
    conversation.messages.push(message);
    this.running.set(conversation.id, { answer, conversation });
    this.keep(conversation);
    this.sidebar.show(conversation);
    this.showMessages();
    this.scroll.toEnd();
    if (document.activeElement === document.body) this.composer.focus(); // the button that asked is gone
    announce("Answering.");
    const error = await answer.run(body, store.apiKey.get());
    if (this.running.get(conversation.id)?.answer === answer) this.running.delete(conversation.id);
    this.ended(conversation, message, error);
  }

  /** Shows and keeps what came of a conversation, at most once a frame and once a second. */
  streamed(conversation, message) {
    if (!this.frames.has(conversation)) {
      this.frames.add(conversation);
      requestAnimationFrame(() => {
        this.frames.delete(conversation);
        if (conversation === this.conversation) this.refresh(message);
      });
    }
    if (!this.keeping.has(conversation)) {
      this.keeping.add(conversation);
      setTimeout(() => {
        this.keeping.delete(conversation);
        if (this.running.has(conversation.id)) this.keep(conversation);
      }, 1000);
    }
  }

  refresh(message) {
    this.views.get(message)?.update(this.isLive(message), store.resultsOf(this.conversation, message));
    this.scroll.follow();
  }

  ended(conversation, message, error) {
    if (conversation.messages.includes(message) && store.loadConversation(conversation.id)) this.keep(conversation);
    this.sidebar.show(this.conversation);
    if (conversation !== this.conversation) return;
    this.refresh(message);
    this.composer.running(this.running.has(conversation.id));
    if (error?.status === 401) this.needKey();
    announce(message.error ?? (message.content || (message.calls.length ? "The answer is a tool call." : "No answer.")));
  }

  needKey() {
    byId("key-problem").textContent = "This server wants an API key.";
    this.settings.open("api-key");
  }
}

new Page();

// The page: one conversation on screen, answers that stream into it, and everything the reader can press.

import { Answer, emptyAnswer } from "./answer.js";
import { listModels } from "./api.js";
import { Composer } from "./composer.js";
import { announce, el } from "./dom.js";
import { Scroll } from "./scroll.js";
import { SettingsSheet, download, requestFields } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { toast } from "./toast.js";
import { AnswerView, UserView } from "./view.js";

const byId = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.models = [];
    this.running = new Map(); // conversation id -> { answer, conversation }
    this.views = new Map(); // message -> view, of the conversation on screen
    this.frames = new Set(); // conversation ids that have something to show at the next frame
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
    const { current } = store.preferences();
    this.show((current && store.loadConversation(current)) || store.newConversation());
    this.findModels();
    this.composer.focus();
  }

  connect() {
    byId("new").addEventListener("click", () => this.startNew());
    byId("open-settings").addEventListener("click", () => this.settings.open());
    byId("export").addEventListener("click", () => this.export());
    byId("delete").addEventListener("click", () => this.delete());
    byId("import").addEventListener("change", (event) => this.import(event.target));
    byId("title").addEventListener("input", (event) => this.rename(event.target.value));
    byId("think").addEventListener("click", () => {
      this.conversation.settings.thinking = !this.conversation.settings.thinking;
      this.settings.show(this.conversation);
      this.changedSettings();
    });
    byId("api-key").addEventListener("change", () => this.findModels());
    addEventListener("storage", (event) => {
      if (store.isConversationKey(event.key)) this.sidebar.show(this.conversation);
    });
    addEventListener("pagehide", () => this.running.forEach(({ answer, conversation }) => {
      answer.stop();
      store.saveConversation(conversation);
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
    store.savePreferences({ current: this.conversation.id });
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

  export() {
    const { title } = this.conversation;
    const name = `${title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "conversation"}.json`;
    const content = { kind: "conversation", title, model: this.model?.id ?? null, messages: store.toApi(this.conversation) };
    download(name, JSON.stringify(content, null, 2));
  }

  async import(field) {
    const [file] = field.files;
    field.value = "";
    if (!file) return;
    try {
      const conversation = store.fromApi(JSON.parse(await file.text()));
      conversation.title ||= titleOf(conversation) || file.name;
      store.saveConversation(conversation);
      this.show(conversation);
      this.sidebar.leave();
    } catch (error) {
      toast(error instanceof SyntaxError ? "The file is not JSON." : error.message);
    }
  }

  save() {
    if (!this.conversation.messages.length) return;
    this.keep(this.conversation);
    this.sidebar.show(this.conversation);
  }

  keep(conversation) {
    conversation.updated = Date.now();
    if (!store.saveConversation(conversation)) {
      toast("The browser's storage is full: this conversation is not kept. Export it, or delete others.");
    }
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
    if (message.role === "assistant") view.update(this.isLive(message), this.resultsOf(message));
  }

  isLive(message) {
    return this.running.get(this.conversation.id)?.answer.message === message;
  }

  /** The results that follow an answer with tool calls, in the order of its calls. */
  resultsOf(message) {
    const { messages } = this.conversation;
    const results = [];
    for (let i = messages.indexOf(message) + 1; messages[i]?.role === "tool"; i++) results.push(messages[i].content);
    return results;
  }

  // ---- what the reader does
  say(text) {
    this.conversation.messages.push({ role: "user", content: text });
    this.conversation.title ||= titleOf(this.conversation);
    this.ask();
  }

  edit(message, text) {
    message.content = text;
    if (message.role === "assistant") {
      this.save();
      this.views.get(message).update(false, this.resultsOf(message));
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
    message.drafts = this.resultsOf(message);
    this.cutAfter(message);
    this.save();
    this.showMessages();
    this.views.get(message).element.querySelector(".result-box textarea").focus();
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
      if (!this.models.length) await this.findModels();
      body = { model: this.model?.id ?? "glm5", messages: store.toApi(conversation), ...requestFields(conversation.settings) };
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
    announce("Answering.");
    const error = await answer.run(body, store.apiKey.get());
    if (this.running.get(conversation.id)?.answer === answer) this.running.delete(conversation.id);
    this.ended(conversation, message, error);
  }

  /** Shows and keeps what came of a conversation, at most once a frame and once a second. */
  streamed(conversation, message) {
    const { id } = conversation;
    if (!this.frames.has(id)) {
      this.frames.add(id);
      requestAnimationFrame(() => {
        this.frames.delete(id);
        if (conversation === this.conversation) this.refresh(message);
      });
    }
    if (!this.keeping.has(id)) {
      this.keeping.add(id);
      setTimeout(() => {
        this.keeping.delete(id);
        if (this.running.has(id)) this.keep(conversation);
      }, 1000);
    }
  }

  refresh(message) {
    this.views.get(message)?.update(this.isLive(message), this.resultsOf(message));
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

  async findModels() {
    try {
      this.models = await listModels(store.apiKey.get());
      byId("key-problem").textContent = "";
    } catch (error) {
      this.models = [];
      if (error.status === 401) this.needKey();
      else toast(error.message, "Try again", () => this.findModels());
    }
    const choice = byId("model");
    choice.replaceChildren(...this.models.map((model) => el("option", { value: model.id }, model.id)));
    byId("model-box").hidden = this.models.length < 2;
    byId("served").textContent = this.models.length ? describe(this.models[0]) : "";
  }

  get model() {
    return this.models.find((model) => model.id === byId("model").value) ?? this.models[0];
  }

  needKey() {
    byId("key-problem").textContent = "This server wants an API key.";
    this.settings.open("api-key");
  }
}

function describe(model) {
  const length = model.max_model_len ? ` · ${model.max_model_len.toLocaleString("en")} tokens of context` : "";
  return `${model.id}${length}`;
}

function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line;
}

new Page();

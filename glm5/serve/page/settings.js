// The settings sheet: system prompt, sampling, tools, key and theme; and what of them a request carries.

import { apiKey, preferences, savePreferences } from "./store.js";

export const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a town today.",
      parameters: { type: "object", properties: { town: { type: "string" } }, required: ["town"] },
    },
  },
];

/** The fields of a chat request that the settings give. Raises an Error with a sentence for what cannot be sent. */
export function requestFields(settings) {
  const fields = {};
  const put = (name, value) => {
    if (value !== "") fields[name] = Number(value);
  };
  put("temperature", settings.temperature);
  put("top_p", settings.topP);
  put("max_tokens", settings.maxTokens);
  put("seed", settings.seed);
  const tools = parseTools(settings.tools);
  if (tools.length) fields.tools = tools;
  fields.chat_template_kwargs = { enable_thinking: settings.thinking };
  return fields;
}

/** A list of tools in OpenAI's shape; bare function descriptions are wrapped. Raises an Error with a sentence. */
export function parseTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`The tools are not valid JSON: ${error.message}`);
  }
  tools = (Array.isArray(tools) ? tools : [tools]).map((tool) => (tool?.function ? tool : { type: "function", function: tool }));
  for (const { function: described } of tools) {
    if (typeof described?.name !== "string" || !described.name) throw new Error("A tool lacks its name.");
  }
  return tools;
}

/** Connects the sheet to a conversation. `changed()` is called after every change of its settings. */
export class SettingsSheet {
  constructor(changed) {
    this.sheet = document.getElementById("settings");
    this.changed = changed;
    this.problem = document.getElementById("tools-problem");
    for (const [id, name] of Object.entries(FIELDS)) {
      this.field(id).addEventListener("input", () => this.take(name, this.field(id)));
    }
    this.field("system").addEventListener("input", (event) => {
      this.conversation.system = event.target.value;
      this.changed();
    });
    this.field("api-key").addEventListener("input", (event) => apiKey.set(event.target.value.trim()));
    document.getElementById("example-tools").addEventListener("click", () => this.insertExample());
    for (const choice of this.sheet.querySelectorAll("input[name=theme]")) {
      choice.checked = (preferences().theme ?? "system") === choice.value;
      choice.addEventListener("change", () => useTheme(choice.value));
    }
    this.sheet.addEventListener("click", (event) => {
      if (event.target === this.sheet) this.sheet.close(); // beside the sheet
    });
  }

  field(id) {
    return document.getElementById(id);
  }

  /** Shows the settings of a conversation. */
  show(conversation) {
    this.conversation = conversation;
    this.field("system").value = conversation.system;
    this.field("api-key").value = apiKey.get();
    for (const [id, name] of Object.entries(FIELDS)) {
      const field = this.field(id);
      if (field.type === "checkbox") field.checked = conversation.settings[name];
      else field.value = conversation.settings[name];
    }
    this.check();
  }

  open(focus) {
    if (!this.sheet.open) this.sheet.showModal();
    if (focus) this.field(focus).focus();
  }

  take(name, field) {
    if (field.type === "number" && !field.validity.valid) return; // shown as wrong, not taken
    this.conversation.settings[name] = field.type === "checkbox" ? field.checked : field.value;
    this.check();
    this.changed();
  }

  check() {
    let sentence = "";
    try {
      parseTools(this.conversation.settings.tools);
    } catch (error) {
      sentence = error.message;
    }
    this.problem.textContent = sentence;
    this.field("tools").setAttribute("aria-invalid", String(Boolean(sentence)));
  }

  insertExample() {
    const field = this.field("tools");
    field.value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
    this.take("tools", field);
    field.focus();
    field.setSelectionRange(0, 0);
    field.scrollTop = 0;
  }
}

const FIELDS = {
  "temperature": "temperature", "top-p": "topP", "max-tokens": "maxTokens", "seed": "seed", "thinking": "thinking", "tools": "tools",
};

function useTheme(theme) {
  savePreferences({ theme });
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

// The models that the server has, and which of them answers.

import { listModels } from "./api.js";
import { el } from "./dom.js";
import { apiKey } from "./store.js";
import { toast } from "./toast.js";

export class Models {
  /** `needKey()` is called when the server wants a key that it did not get. */
  constructor(needKey) {
    this.needKey = needKey;
    this.known = [];
    this.choice = document.getElementById("model");
    document.getElementById("api-key").addEventListener("change", () => this.find());
    this.find();
  }

  /** Asks the server, and shows what it says. */
  async find() {
    const problem = document.getElementById("key-problem");
    try {
      this.known = await listModels(apiKey.get());
      problem.textContent = "";
    } catch (error) {
      this.known = [];
      if (error.status === 401) this.needKey();
      else toast(error.message, "Try again", () => this.find());
    }
    this.choice.replaceChildren(...this.known.map((model) => el("option", { value: model.id }, model.id)));
    document.getElementById("model-box").hidden = this.known.length < 2;
    document.getElementById("served").textContent = this.known.length ? describe(this.known[0]) : "";
  }

  /** The name of the chosen model; null while none is known. */
  get chosen() {
    return (this.known.find((model) => model.id === this.choice.value) ?? this.known[0])?.id ?? null;
  }
}

function describe(model) {
  const length = model.max_model_len ? ` · ${model.max_model_len.toLocaleString("en")} tokens of context` : "";
  return `${model.id}${length}`;
}

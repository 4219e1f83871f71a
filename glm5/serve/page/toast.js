// A sentence that passes by, with one thing that can be done about it.

import { el } from "./dom.js";

const SHOWN_MS = 8000;

export function toast(sentence, action, act) {
  const place = document.getElementById("toasts");
  const note = el("div", { class: "toast" }, el("span", {}, sentence));
  if (action) {
    note.append(el("button", { type: "button", class: "plain small", onclick: () => {
      note.remove();
      act();
    } }, action));
  }
  place.replaceChildren(note);
  setTimeout(() => note.remove(), SHOWN_MS);
}

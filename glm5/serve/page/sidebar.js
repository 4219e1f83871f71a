// The list of conversations: beside the page where there is room, over it on a phone.

import { el } from "./dom.js";
import { conversations } from "./store.js";

const NARROW = matchMedia("(max-width: 52rem)");

/** `choose(id)` is called when the reader picks a conversation. */
export class Sidebar {
  constructor(choose) {
    this.choose = choose;
    this.element = document.getElementById("sidebar");
    this.list = document.getElementById("conversations");
    this.toggle = document.getElementById("show-sidebar");
    this.toggle.addEventListener("click", () => this.open(!this.isOpen));
    document.getElementById("shade").addEventListener("click", () => this.open(false));
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && NARROW.matches) {
        this.open(false);
        this.toggle.focus();
      }
    });
    NARROW.addEventListener("change", () => this.open(!NARROW.matches));
    this.open(!NARROW.matches);
  }

  open(isOpen) {
    this.isOpen = isOpen;
    document.body.classList.toggle("with-sidebar", isOpen);
    this.element.inert = !isOpen;
    this.toggle.setAttribute("aria-expanded", String(isOpen));
  }

  /** Makes way on a phone once a choice was made. */
  leave() {
    if (NARROW.matches) this.open(false);
  }

  show(current) {
    const found = conversations();
    this.list.replaceChildren(...found.map((conversation) => el("li", {},
      el("button", {
        type: "button", class: "conversation", "aria-current": conversation.id === current.id ? "true" : null,
        onclick: () => this.choose(conversation.id),
      }, el("span", { class: "name", dir: "auto" }, conversation.title || "Untitled"),
      el("span", { class: "when" }, ago(conversation.updated))))));
    document.getElementById("no-conversations").hidden = found.length > 0;
  }
}

/** "now", "5 min", "3 h", or the day. */
function ago(time) {
  const minutes = (Date.now() - time) / 60_000;
  if (minutes < 1) return "now";
  if (minutes < 60) return `${Math.floor(minutes)} min`;
  if (minutes < 24 * 60) return `${Math.floor(minutes / 60)} h`;
  return new Date(time).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}

// The box at the bottom: write, send, stop. Enter sends with a keyboard; with a touch screen it begins a new line.

const TOUCH = matchMedia("(pointer: coarse)");

/** `actions`: send(text), stop(), editLast(). */
export class Composer {
  constructor(actions) {
    this.actions = actions;
    this.form = document.getElementById("composer");
    this.box = document.getElementById("say");
    this.button = document.getElementById("send");
    this.halt = document.getElementById("stop");
    this.isRunning = false;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.halt.addEventListener("click", () => this.stop());
    this.box.addEventListener("input", () => this.fit());
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.fit();
  }

  key(event) {
    if (event.isComposing) return; // Enter chooses a character there
    if (event.key === "Enter" && !event.shiftKey && !TOUCH.matches) {
      event.preventDefault();
      this.send();
    }
    if (event.key === "ArrowUp" && !this.box.value && !this.isRunning) {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    const text = this.box.value;
    if (!text.trim() || this.isRunning) return;
    this.box.value = "";
    this.fit();
    this.actions.send(text);
  }

  stop() {
    if (!this.isRunning) return;
    this.actions.stop();
    this.focus();
  }

  /** Shows whether an answer comes, which is when it can be stopped. */
  running(isRunning) {
    this.isRunning = isRunning;
    this.halt.hidden = !isRunning;
    this.button.hidden = isRunning;
    this.fit();
  }

  /** As high as the text, up to a limit that the style sets. */
  fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${this.box.scrollHeight}px`;
    this.button.disabled = !this.box.value.trim();
  }

  focus() {
    if (!TOUCH.matches) this.box.focus();
  }
}

// Keeps the end of the conversation in view while it grows, unless the reader has scrolled up to read.

const NEAR = 80; // pixels from the end that still count as the end

export class Scroll {
  constructor(scroller, button) {
    this.scroller = scroller;
    this.button = button;
    this.sticks = true;
    scroller.addEventListener("scroll", () => this.look(), { passive: true });
    button.addEventListener("click", () => this.toEnd());
  }

  look() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    this.sticks = scrollHeight - scrollTop - clientHeight < NEAR;
    this.button.hidden = this.sticks;
  }

  follow() {
    if (this.sticks) this.scroller.scrollTop = this.scroller.scrollHeight;
    else this.button.hidden = false;
  }

  toEnd() {
    this.sticks = true;
    this.follow();
    this.button.hidden = true;
  }
}

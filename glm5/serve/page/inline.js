// Markdown inside a line: code, bold, italic, struck, links. Text in, DOM nodes out.
//
// Links lead to http, https and mailto addresses only; anything else stays the text that it is. Searches for a closing
// mark are bounded, so that no text, however odd, takes more than linear time.

import { el } from "./dom.js";

const LONGEST = 10_000; // characters of a paragraph that is looked into
const WINDOW = 800; // how far a closing mark may lie
const DEEPEST = 5;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const ADDRESS = /^https?:\/\/[^\s<>"'`]{1,1000}/i;
const LINK = /^\[([^[\]\n]{1,500})\]\(\s*<?([^\s()<>]{1,1000}(?:\([^\s()<>]{0,200}\))?[^\s()<>]{0,200})>?(?:\s+"[^"\n]{0,300}")?\s*\)/;
const PLAIN = /[^\\`*_~[h]+|h(?!ttps?:\/\/)/iy;

/** The nodes of a text. */
export function renderInline(text, depth = 0) {
  if (text.length > LONGEST || depth > DEEPEST) return [text];
  const nodes = [];
  let plain = "";
  const put = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  for (let at = 0; at < text.length; ) {
    PLAIN.lastIndex = at;
    const skipped = PLAIN.exec(text);
    if (skipped) {
      plain += skipped[0];
      at = PLAIN.lastIndex;
      continue;
    }
    const found = special(text, at, depth);
    if (typeof found.node === "string") plain += found.node;
    else put(found.node);
    at = found.end;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

/** What begins at a position where a special character stands: { node, end }. */
function special(text, at, depth) {
  const letter = text[at];
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { node: text[at + 1], end: at + 2 };
  const found = (letter === "`" && code(text, at)) || ("*_~".includes(letter) && marked(text, at, depth)) ||
    (letter === "[" && link(text, at, depth)) || (/h/i.test(letter) && address(text, at));
  return found || { node: letter, end: at + 1 };
}

function code(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 100))[0];
  const end = closing(text, ticks, at + ticks.length);
  if (end < 0) return { node: ticks, end: at + ticks.length };
  const inside = text.slice(at + ticks.length, end).replaceAll("\n", " ");
  const shown = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
  return { node: el("code", {}, shown), end: end + ticks.length };
}

function marked(text, at, depth) {
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const start = at + mark.length;
    const inWord = mark[0] === "_" && /[\p{L}\p{N}_]/u.test(text[at - 1] ?? "");
    if (inWord || /\s/.test(text[start] ?? " ")) continue;
    for (let end = closing(text, mark, start + 1); end > 0; end = closing(text, mark, end + 1, start)) {
      const after = text[end + mark.length] ?? "";
      const single = mark.length === 2 || (text[end - 1] !== mark && after !== mark);
      if (/\s/.test(text[end - 1]) || !single || (mark[0] === "_" && /[\p{L}\p{N}_]/u.test(after))) continue;
      return { node: el(tag, {}, renderInline(text.slice(start, end), depth + 1)), end: end + mark.length };
    }
  }
  return null;
}

function link(text, at, depth) {
  const found = LINK.exec(text.slice(at, at + 3000));
  if (!found) return null;
  const node = anchor(found[2], renderInline(found[1], Math.max(depth + 1, DEEPEST)));
  return node && { node, end: at + found[0].length };
}

function address(text, at) {
  const found = ADDRESS.exec(text.slice(at, at + 1100));
  if (!found) return null;
  const shown = found[0].replace(/[.,;:!?)\]}*_~]+$/, "");
  const node = anchor(shown, [shown]);
  return node && { node, end: at + shown.length };
}

/** A link, or null when the address is not one that a text may lead to. */
function anchor(target, children) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return el("a", { href: url.href, title: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

/** Where a mark stands again, not far away; -1 when it does not. */
function closing(text, mark, from, start = from) {
  const found = text.slice(from, start + WINDOW).indexOf(mark);
  return found < 0 ? -1 : from + found;
}

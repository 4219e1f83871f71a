// A small subset of Markdown, made into DOM nodes: headings, lists, quotes, tables, rules and code blocks.
//
// The text is a model's and untrusted: nothing is parsed as HTML, images are not loaded, and nesting has a limit.
// While a text streams in, only its last block changes; `MarkdownView` keeps the nodes of the others.

import { copyButton, el } from "./dom.js";
import { renderInline } from "./inline.js";

const DEEPEST = 6;

// Each takes linear time on any line: no two parts beside each other can match the same run of characters.
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]{0,3}([\w+#.-]{0,30})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITER = /^:?-+:?$/;

/** Shows a text that may still grow. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.shown = []; // the blocks that have nodes: { key, node }
  }

  update(source) {
    const blocks = split(source.split("\n"));
    let same = 0;
    while (same < blocks.length && same < this.shown.length && blocks[same].key === this.shown[same].key) same++;
    for (const { node } of this.shown.splice(same)) node.remove();
    for (const block of blocks.slice(same)) {
      const node = render(block, 0);
      this.element.append(node);
      this.shown.push({ key: block.key, node });
    }
  }
}

// ---- lines to blocks

function split(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [kind, end] = blockAt(lines, at);
    const own = lines.slice(at, end);
    blocks.push({ kind, lines: own, key: `${kind}\n${own.join("\n")}` });
    at = end;
  }
  return blocks;
}

/** The kind of the block that begins at a line, and the line after its last. */
function blockAt(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return ["code", endOfCode(lines, at)];
  if (HEADING.test(line)) return ["heading", at + 1];
  if (RULE.test(line)) return ["rule", at + 1];
  if (QUOTE.test(line)) return ["quote", endWhere(lines, at + 1, (next) => !QUOTE.test(next))];
  if (ITEM.test(line)) return ["list", endOfList(lines, at)];
  if (isTable(lines, at)) return ["table", endWhere(lines, at + 2, (next) => !next.includes("|"))];
  return ["paragraph", endWhere(lines, at + 1, (next, i) => !next.trim() || startsBlock(lines, i))];
}

function startsBlock(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function isTable(lines, at) {
  if (at + 1 >= lines.length || !lines[at].includes("|")) return false;
  const sides = cells(lines[at + 1]);
  return sides.every((side) => DELIMITER.test(side)) && cells(lines[at]).length === sides.length;
}

function endWhere(lines, at, ends) {
  while (at < lines.length && !ends(lines[at], at)) at++;
  return at;
}

/** A code block ends at a fence as long as its own, or with the text. */
function endOfCode(lines, at) {
  const fence = FENCE.exec(lines[at])[1];
  const close = endWhere(lines, at + 1, (line) => {
    const found = line.trim();
    return found.length >= fence.length && found.startsWith(fence) && !found.replaceAll(fence[0], "");
  });
  return Math.min(close + 1, lines.length);
}

/** A list goes on over its items of the same sort, lines indented below them, and blank lines between those. */
function endOfList(lines, at) {
  const sort = numbered(lines[at]);
  let inside = ITEM.exec(lines[at])[0].length; // where the text of the item begins
  let end = at + 1;
  for (let i = at + 1; i < lines.length; i++) {
    if (!lines[i].trim()) continue;
    if (isNested(lines[i], inside)) {
      end = i + 1;
      continue;
    }
    const item = ITEM.exec(lines[i]);
    const goesOn = item ? numbered(lines[i]) === sort && !RULE.test(lines[i]) : lines[i - 1].trim() && !startsBlock(lines, i);
    if (!goesOn) break;
    if (item) inside = item[0].length;
    end = i + 1;
  }
  return end;
}

function numbered(line) {
  return /\d/.test(ITEM.exec(line)[2]);
}

/** Whether a line belongs to what is inside an item; two spaces are enough, as models often write. */
function isNested(line, inside) {
  return /^ */.exec(line)[0].length >= Math.min(inside, 2);
}

// ---- blocks to nodes

function render({ kind, lines }, depth) {
  if (kind === "code") return renderCode(lines);
  if (kind === "heading") {
    const [opening, marks] = HEADING.exec(lines[0]);
    const text = withoutClosing(lines[0].slice(opening.length).trim());
    return el(`h${Math.min(marks.length + 2, 6)}`, {}, renderInline(text)); // h1 and h2 are the page's own
  }
  if (kind === "rule") return el("hr");
  if (kind === "quote") return el("blockquote", {}, renderInside(lines.map((line) => line.replace(QUOTE, "")), depth));
  if (kind === "list") return renderList(lines, depth);
  if (kind === "table") return renderTable(lines);
  return el("p", {}, renderInline(lines.map((line) => line.trimStart()).join("\n")));
}

/** A heading may end in number signs, which are no part of it. */
function withoutClosing(text) {
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trimEnd() : text;
}

/** The blocks inside a quote or an item; too deep, they are shown as plain text. */
function renderInside(lines, depth) {
  if (depth >= DEEPEST) return [el("p", {}, lines.join("\n"))];
  return split(lines).map((block) => render(block, depth + 1));
}

function renderCode(lines) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const last = lines.length > 1 ? lines.at(-1).trim() : "";
  const closed = last.startsWith(fence) && !last.replaceAll(fence[0], "");
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  return el("div", { class: "code" },
    el("div", { class: "code-head" }, el("span", {}, language || "code"), copyButton("Copy code", () => text)),
    el("pre", { tabindex: "0" }, el("code", {}, text)));
}

function renderList(lines, depth) {
  const items = [];
  let inside = 0;
  for (const line of lines) {
    const found = items.length && isNested(line, inside) ? null : ITEM.exec(line);
    if (found) {
      inside = found[0].length;
      items.push([line.slice(inside)]);
    } else {
      items.at(-1).push(line.replace(new RegExp(`^\\s{0,${inside}}`), ""));
    }
  }
  const first = parseInt(ITEM.exec(lines[0])[2], 10);
  const start = Number.isNaN(first) || first === 1 ? null : String(first);
  return el(numbered(lines[0]) ? "ol" : "ul", { start }, items.map((item) => el("li", {}, renderItem(item, depth))));
}

/** One paragraph of an item stands without a box of its own. */
function renderItem(lines, depth) {
  const nodes = renderInside(lines, depth);
  if (nodes[0]?.tagName === "P" && !lines.slice(0, -1).some((line) => !line.trim())) {
    nodes.splice(0, 1, ...nodes[0].childNodes);
  }
  return nodes;
}

function renderTable(lines) {
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : null));
  const row = (line, tag) => el("tr", {}, cells(line).slice(0, sides.length).map((cell, i) => (
    el(tag, { class: sides[i], scope: tag === "th" ? "col" : null }, renderInline(cell))
  )));
  return el("div", { class: "table", tabindex: "0" },
    el("table", {},
      el("thead", {}, row(lines[0], "th")),
      el("tbody", {}, lines.slice(2).map((line) => row(line, "td")))));
}

function cells(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
}

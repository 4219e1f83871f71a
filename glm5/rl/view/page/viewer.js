"use strict";
// The rollouts of a run: filters and groups on the left, the samples of a group side by side. Everything that comes from
// a rollout is put into the page as text. Bodies lie in compressed chunks that are opened when they are needed.
const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("index").textContent);
const rows = index.rows;
const LONG = 4000; // tokens of a path that are shown at once
const state = { group: null, hits: null, view: "talk", colour: index.ratios ? "ratio" : "logprob", pinned: null };

function make(tag, cls, text) {
  const element = document.createElement(tag);
  if (cls) element.className = cls;
  if (text !== undefined && text !== null) element.textContent = text;
  return element;
}

// ---- bodies
const opened = new Map();
async function inflate(number) {
  const bytes = Uint8Array.from(atob(byId("chunk-" + number).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}
function chunk(number) {
  if (!opened.has(number)) opened.set(number, inflate(number));
  return opened.get(number);
}
const bodyOf = async (row) => (await chunk(row.chunk))[row.place];

// ---- filters
function choices(id, values) {
  const select = byId(id);
  select.append(new Option("any", ""), ...[...new Set(values)].sort().map((value) => new Option(value, value)));
}
const reasonText = (row) => (row.because ? `${row.fate}: ${row.because}` : row.fate);
const number = (id) => (byId(id).value.trim() === "" ? null : Number(byId(id).value));

function passes(row) {
  const wanted = (id, value) => byId(id).value === "" || byId(id).value === value;
  const least = number("least"), most = number("most"), step = number("step");
  return wanted("environment", row.environment) && wanted("outcome", row.outcome)
    && (wanted("fate", row.fate) || wanted("fate", reasonText(row)))
    && (step === null || row.step === step)
    && (least === null || (row.reward !== null && row.reward >= least))
    && (most === null || (row.reward !== null && row.reward <= most))
    && (state.hits === null || state.hits.has(row));
}

let searches = 0;
async function search() {
  const words = byId("search").value.trim().toLowerCase();
  const mine = ++searches;
  if (words === "") {
    state.hits = null;
    return list();
  }
  state.hits = new Set(rows.filter((row) => JSON.stringify([row.id, row.question, row.category]).toLowerCase().includes(words)));
  list();
  for (let i = 0; i < index.chunks; i++) {
    const bodies = await chunk(i);
    if (mine !== searches) return;
    for (const row of rows) if (row.chunk === i && textOf(bodies[row.place]).includes(words)) state.hits.add(row);
  }
  list();
}
function textOf(body) {
  if (body.text === undefined) {
    const said = body.branches.flatMap((branch) => branch.messages).map((m) => [m.content, m.reasoning_content, JSON.stringify(m.tool_calls || "")].map(shown).join("\n"));
    body.text = [body.reason, body.failure, body.answer, ...said].join("\n").toLowerCase();
  }
  return body.text;
}

// ---- groups
const groups = new Map();
for (const row of rows) {
  if (!groups.has(row.group)) groups.set(row.group, []);
  groups.get(row.group).push(row);
}
const highest = new Map(); // of each environment: they have scales of their own
for (const row of rows) highest.set(row.environment, Math.max(highest.get(row.environment) ?? 0, row.reward ?? 0));
const level = (row) => (row.reward === null ? "none" : row.reward <= 0 ? "r0" : row.reward < highest.get(row.environment) ? "r1" : "r2");
const DOTS = { r2: "highest reward of its environment", r1: "less", r0: "0 or below", none: "no reward" };
const rewardText = (row) => (row.reward === null ? "no reward" : String(Math.round(row.reward * 1e4) / 1e4));
const fateText = (row) => row.fate + (row.step === null ? "" : ` in step ${row.step}`) + (row.weight > 1 ? ` ×${row.weight}` : "")
  + (row.because ? `: ${row.because}` : "");

function list() {
  const shownGroups = [];
  let count = 0;
  for (const [name, members] of groups) {
    const matching = members.filter(passes);
    count += matching.length;
    if (matching.length) shownGroups.push([name, members, new Set(matching)]);
  }
  byId("groups").replaceChildren(...shownGroups.map(([name, members, matching]) => {
    const button = make("button");
    button.type = "button";
    button.dataset.group = name;
    button.append(make("span", "question", members[0].question || members[0].id), make("span", "faint", name));
    const pips = make("span", "pips");
    pips.append(...members.map((row) => {
      const pip = make("span", `pip ${level(row)}${matching.has(row) ? "" : " off"}`);
      pip.title = `${row.sample}: ${rewardText(row)}, ${row.outcome}, ${fateText(row)}`;
      return pip;
    }));
    button.append(pips);
    button.addEventListener("click", () => choose(name));
    return button;
  }));
  byId("found").textContent = `${count} of ${rows.length} episodes in ${shownGroups.length} group${shownGroups.length === 1 ? "" : "s"}`;
  if (!shownGroups.some(([name]) => name === state.group)) choose(shownGroups.length ? shownGroups[0][0] : null);
  else choose(state.group);
}

let drawn = 0;
async function choose(name) {
  state.group = name;
  for (const button of byId("groups").children) button.setAttribute("aria-current", String(button.dataset.group === name));
  history.replaceState(null, "", name === null ? "#" : "#" + encodeURIComponent(name));
  const mine = ++drawn;
  const members = groups.get(name) || [];
  const bodies = await Promise.all(members.map(bodyOf));
  if (mine !== drawn) return;
  const head = byId("group-head");
  head.replaceChildren();
  if (members.length) {
    const asked = bodies[0].branches.flatMap((branch) => branch.messages).find((message) => message.role !== "assistant");
    head.append(make("h2", "", name), make("p", "", shown(asked && asked.content).slice(0, 600) || members[0].question));
    if (bodies[0].answer) head.append(make("p", "faint", `expected: ${bodies[0].answer.slice(0, 300)}`));
  } else head.append(make("p", "faint", "No episode passes the filters."));
  byId("columns").replaceChildren(...members.map((row, i) => column(row, bodies[i])));
  byId("columns").dataset.group = name ?? "";
}

function column(row, body) {
  const article = make("article", passes(row) ? "" : "off");
  const title = make("h3", "", `sample ${row.sample}: `);
  title.append(make("span", `reward ${row.reward === null ? "" : row.reward > 0 ? "good" : "bad"}`, rewardText(row)));
  const facts = make("dl");
  const fact = (name, value) => value && facts.append(make("dt", "", name), make("dd", "", value));
  fact("outcome", row.outcome);
  fact("fate", fateText(row));
  fact("why", body.reason || body.failure);
  fact("tokens", `${row.tokens} in ${row.turns} turn${row.turns === 1 ? "" : "s"}, ${body.paths.length} path${body.paths.length === 1 ? "" : "s"}`);
  fact("versions", row.versions === null ? "" : row.versions[0] === row.versions[1] ? String(row.versions[0]) : row.versions.join(" to "));
  fact("seconds", `${body.seconds} (environment ${body.tool_seconds})`);
  article.append(title, facts, ...(state.view === "talk" ? talk(body) : tokens(body)));
  return article;
}

// ---- conversation
function shown(content) {
  if (content === null || content === undefined) return "";
  return typeof content === "string" ? content : JSON.stringify(content, null, 1);
}
function talk(body) {
  return body.branches.flatMap((branch, number) => {
    const boxes = branch.messages.map((message, i) => said(message, branch.turns[i], body.turns));
    const begins = branch.shared === 0 ? "begins anew" : `its first ${branch.shared} messages are those of branch ${branch.like + 1}`;
    const head = `branch ${number + 1}` + (number === 0 ? "" : `: ${begins}`);
    return body.branches.length > 1 ? [make("h4", "faint branch", head), ...boxes] : boxes;
  });
}
function said(message, turn, turns) {
  const box = make("div", `message ${["assistant", "tool"].includes(message.role) ? message.role : "user"}`);
  const timed = turn === null ? undefined : turns[turn];
  box.append(make("span", "role", shown(message.role)
    + (timed ? `, turn ${turn + 1}: ${timed.output} tokens after ${timed.prompt} (${timed.cached} cached), ${timed.seconds} s, ${timed.finish}` : "")));
  if (message.reasoning_content) box.append(make("div", "thought", shown(message.reasoning_content)));
  if (message.content) box.append(document.createTextNode(shown(message.content)));
  for (const call of message.tool_calls || []) {
    const made = call.function || {};
    box.append(make("div", "call", `${shown(made.name)}(${shown(made.arguments)})`));
  }
  return box;
}

// ---- tokens
function versionsOf(runs) {
  return runs.flatMap(([version, count]) => Array(count).fill(version));
}
const step4 = (value, bounds) => bounds.reduce((n, bound) => n + (value > bound), 0);
function tokenClass(logprob, trainer, version) {
  if (state.colour === "mask") return "mask1";
  if (state.colour === "version") return `version${((version % 6) + 6) % 6}`;
  if (state.colour === "logprob") return `low${step4(-logprob, [0.1, 0.7, 2.3, 4.6])}`;
  if (trainer === undefined) return "";
  const gap = trainer - logprob;
  return `${gap > 0 ? "up" : "down"}${step4(Math.abs(gap), [1e-3, 0.05, 0.2, 0.7])}`;
}
function tokens(body) {
  return body.paths.map((path, number) => {
    const box = make("div", "path");
    const sampled = path.filter((part) => typeof part !== "string");
    const count = sampled.reduce((sum, part) => sum + part.text.length, 0);
    const gaps = sampled.flatMap((part) => (part.trainer || []).map((value, i) => Math.abs(value - part.logprobs[i])));
    const largest = gaps.reduce((most, gap) => Math.max(most, gap), 0);
    box.append(make("span", "faint", `path ${number + 1}: ${count} sampled tokens are trained here`
      + (gaps.length ? `; largest |trainer − sampler| ${largest.toPrecision(3)}, ${gaps.filter((gap) => gap > 0).length} differ` : "")));
    let left = LONG;
    for (const part of path) {
      if (typeof part === "string") box.append(make("span", "context", part));
      else left = sampledPart(box, part, left);
    }
    return box;
  });
}
function sampledPart(box, part, left) {
  const versions = versionsOf(part.versions);
  const spans = (first, last) => part.text.slice(first, last).map((text, k) => {
    const i = first + k, trainer = part.trainer ? part.trainer[i] : undefined;
    const span = make("i", tokenClass(part.logprobs[i], trainer, versions[i]) + (text === "" ? " blank" : ""), text === "" ? "·" : text);
    span.about = { text, logprob: part.logprobs[i], trainer, version: versions[i] };
    return span;
  });
  const now = Math.min(part.text.length, Math.max(left, 0));
  box.append(...spans(0, now));
  if (now < part.text.length) {
    const more = make("button", "more", `${part.text.length - now} more tokens`);
    more.addEventListener("click", () => more.replaceWith(...spans(now, part.text.length)));
    box.append(more);
  }
  return left - now;
}
function tell(event) {
  const about = event.target.about;
  if (!about) return;
  if (event.type === "click") {
    if (state.pinned) state.pinned.classList.remove("pinned");
    state.pinned = state.pinned === event.target ? null : event.target;
    event.target.classList.toggle("pinned", state.pinned === event.target);
  } else if (state.pinned) return;
  const gap = about.trainer === undefined ? "" : `  trainer ${about.trainer}  ratio ${Math.exp(about.trainer - about.logprob).toPrecision(5)}`;
  byId("token").textContent = `${JSON.stringify(about.text)}  log-probability ${about.logprob}  p ${Math.exp(about.logprob).toPrecision(4)}${gap}  version ${about.version}`;
}
const LEGENDS = {
  ratio: [["down4", "−0.7"], ["down3", "−0.2"], ["down2", "−0.05"], ["down1", "−0.001"], ["", "0"], ["up1", "0.001"], ["up2", "0.05"], ["up3", "0.2"], ["up4", "0.7 nats"]],
  logprob: [["low0", "p 0.9 to 1"], ["low1", "0.5"], ["low2", "0.1"], ["low3", "0.01"], ["low4", "less"]],
  version: [["version0", "0, 6, …"], ["version1", "1"], ["version2", "2"], ["version3", "3"], ["version4", "4"], ["version5", "5"]],
  mask: [["mask1", "trained here"], ["context", "context"]],
};
function redraw() {
  byId("colours").hidden = byId("legend").hidden = state.view !== "tokens";
  byId("legend").replaceChildren(...LEGENDS[state.colour].map(([cls, text]) => make("span", cls, text)));
  choose(state.group);
}

// ---- begin
byId("note").textContent = index.note;
choices("environment", rows.map((row) => row.environment));
choices("outcome", rows.map((row) => row.outcome));
choices("fate", rows.flatMap((row) => [row.fate, reasonText(row)]));
byId("key").append(...Object.entries(DOTS).flatMap(([cls, text]) => [make("span", `pip ${cls}`), make("span", "", text)]));
if (!index.ratios) byId("colour").querySelector("[value=ratio]").remove();
byId("colour").value = state.colour;
let waiting;
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("input", (event) => {
  if (event.target.id === "search") {
    clearTimeout(waiting);
    waiting = setTimeout(search, 150);
  } else if (event.target.tagName === "INPUT") list();
});
byId("filters").addEventListener("change", (event) => event.target.tagName === "SELECT" && list());
byId("filters").addEventListener("reset", () => setTimeout(search));
byId("views").addEventListener("change", (event) => { state.view = event.target.value; redraw(); });
byId("colour").addEventListener("change", (event) => { state.colour = event.target.value; redraw(); });
for (const type of ["mouseover", "click"]) byId("columns").addEventListener(type, tell);
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select") || !["j", "k"].includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
  const buttons = [...byId("groups").children];
  const at = buttons.findIndex((button) => button.dataset.group === state.group) + (event.key === "j" ? 1 : -1);
  if (buttons[at]) { buttons[at].scrollIntoView({ block: "nearest" }); buttons[at].click(); }
});
try {
  state.group = decodeURIComponent(location.hash.slice(1)) || null;
} catch { state.group = null; }
redraw();
list();

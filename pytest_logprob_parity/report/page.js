// One file: it is copied into the page whole, and shares its few helpers.
"use strict";
const $ = (selector, from = document) => from.querySelector(selector);
const $$ = (selector, from = document) => [...from.querySelectorAll(selector)];
const make = (name, text, kind) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;  // never markup: token texts are hostile
  if (kind) node.className = kind;
  return node;
};

// -- filters: kept in the address, so that a view can be linked to ----------------------------------------------------

const checks = $$(".check");
const search = $("#search");
const selects = $$(".bar select");
const chips = $$(".chips button");

function wanted() {
  const state = Object.fromEntries(selects.map((s) => [s.name, s.value]));
  state.verdict = chips.filter((c) => c.getAttribute("aria-pressed") === "true").map((c) => c.dataset.verdict);
  state.words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  return state;
}

function apply() {
  const state = wanted();
  let shown = 0;
  for (const check of checks) {
    const { verdict, layers, causes, file, text } = check.dataset;
    const fits = (!state.verdict.length || state.verdict.includes(verdict))
      && (!state.layer || layers.split(" ").includes(state.layer))
      && (!state.cause || causes.split(" ").includes(state.cause))
      && (!state.file || file === state.file)
      && state.words.every((word) => text.includes(word));
    check.hidden = !fits;
    shown += fits;
  }
  const all = checks.length === 1 ? "1 check" : `${checks.length} checks`;
  $("#shown").textContent = shown === checks.length ? all : `${shown} of ${all}`;
  $("#none").hidden = shown > 0;
}

function remember() {
  const address = new URLSearchParams();
  if (search.value) address.set("q", search.value);
  for (const select of selects) if (select.value) address.set(select.name, select.value);
  const verdicts = wanted().verdict;
  if (verdicts.length) address.set("verdict", verdicts.join(","));
  try { history.replaceState(null, "", "#" + address); } catch { /* a page without an address */ }
}

function restore() {
  const target = location.hash.length > 1 && !location.hash.includes("=") ? document.getElementById(location.hash.slice(1)) : null;
  if (target) { target.open = true; target.scrollIntoView(); }
  const address = new URLSearchParams(location.hash.slice(1));
  search.value = address.get("q") ?? "";
  for (const select of selects) select.value = [...select.options].some((o) => o.value === address.get(select.name)) ? address.get(select.name) : "";
  const verdicts = (address.get("verdict") ?? "").split(",");
  for (const chip of chips) chip.setAttribute("aria-pressed", verdicts.includes(chip.dataset.verdict));
  apply();
}

for (const chip of chips) chip.addEventListener("click", () => {
  chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") !== "true");
  apply(); remember();
});
for (const field of [search, ...selects]) field.addEventListener("input", () => { apply(); remember(); });
$("#unfold").addEventListener("click", () => {
  const all = checks.filter((c) => !c.hidden);
  const open = all.some((c) => !c.open);
  for (const check of all) check.open = open;
});
addEventListener("hashchange", restore);
addEventListener("keydown", (event) => {
  if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) { event.preventDefault(); search.focus(); }
});

// -- theme ------------------------------------------------------------------------------------------------------------

const root = document.documentElement;
const themes = ["auto", "light", "dark"];
function theme(name) {
  if (name === "auto") delete root.dataset.theme; else root.dataset.theme = name;
  $("#theme").textContent = `theme: ${name}`;
  try { localStorage.setItem("logprob-parity-theme", name); } catch { /* opened from a file */ }
}
$("#theme").addEventListener("click", () => theme(themes[(themes.indexOf(root.dataset.theme ?? "auto") + 1) % 3]));
let kept = "auto";
try { kept = localStorage.getItem("logprob-parity-theme") ?? "auto"; } catch { /* opened from a file */ }
theme(themes.includes(kept) ? kept : "auto");

// -- copying ----------------------------------------------------------------------------------------------------------

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const code = button.previousElementSibling;
  try {
    await navigator.clipboard.writeText(code.textContent);
  } catch {  // not a secure context: let the reader copy what is selected
    getSelection().selectAllChildren(code);
    document.execCommand("copy");
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
});

// -- tokens -----------------------------------------------------------------------------------------------------------

const tip = $("#tip");
const data = new Map();
const dataOf = (check) => {
  if (!data.has(check)) data.set(check, JSON.parse($("script[type='application/json']", check).textContent));
  return data.get(check);
};
const nats = (value) => (value === null || value === undefined ? "–" : value.toFixed(Math.abs(value) < 0.001 && value !== 0 ? 7 : 4));
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * Math.exp(value)).toPrecision(3)} %`);

function row(...cells) {
  const line = make("tr");
  for (const cell of cells) line.append(cell instanceof Node ? cell : make("td", cell));
  return line;
}

function side(values, texts, id) {
  const table = make("table");
  for (let i = 0; i < values.length; i += 2) {
    const line = row(make("td", texts[values[i]] ?? `<${values[i]}>`, "tok"), make("td", nats(values[i + 1]), "num"));
    if (values[i] === id) line.className = "here";
    table.append(line);
  }
  return table;
}

function describe(token) {
  const { sequences, texts } = dataOf(token.closest(".check"));
  const box = token.closest(".tokens");
  const s = sequences[Number(box.dataset.sequence)], i = Number(token.dataset.i), id = s.ids[i], state = s.states[i];
  const content = [make("b", texts[id] ?? `<${id}>`), make("span", `  token ${id}, position ${s.start + i}`, "dim")];
  if (state) content.push(make("div", { masked: "written by the environment: never compared", "not compared": "the other side has no such token here",
    "no number": "NaN or +inf", excluded: "truncation excludes it on one side" }[state] ?? state, "dim"));
  const numbers = make("table");
  numbers.append(row(make("th"), make("th", "golden"), make("th", "this run")));
  numbers.append(row("logprob", nats(s.golden[i]), nats(s.now[i])), row("probability", percent(s.golden[i]), percent(s.now[i])));
  numbers.append(row("rank", s.golden_ranks[i] || "?", s.now_ranks[i] || "?"));
  if (s.diff[i] !== null) numbers.append(row("d", nats(s.diff[i]), `ratio ${Math.exp(s.diff[i]).toFixed(4)}`));
  content.push(numbers);
  if (s.golden_top[i].length || s.now_top[i].length) {
    const top = make("table"), line = make("tr");
    top.append(row(make("th", "golden's top"), make("th", "this run's top")));
    for (const values of [s.golden_top[i], s.now_top[i]]) { const cell = make("td"); cell.append(side(values, texts, id)); line.append(cell); }
    top.append(line);
    content.push(top);
  }
  tip.replaceChildren(...content);
}

function showTip(token) {
  describe(token);
  tip.hidden = false;
  token.setAttribute("aria-describedby", "tip");
  const at = token.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = at.bottom + size.height + 8 < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 12)) + scrollX}px`;
  tip.style.top = `${(below ? at.bottom + 6 : Math.max(4, at.top - size.height - 6)) + scrollY}px`;
}
function hideTip() { tip.hidden = true; }

const tokenOf = (event) => (event.target.closest ? event.target.closest(".tokens span[data-i]") : null);
document.addEventListener("mouseover", (event) => { const token = tokenOf(event); if (token) showTip(token); else hideTip(); });
document.addEventListener("focusin", (event) => { const token = tokenOf(event); if (token) showTip(token); else hideTip(); });
document.addEventListener("focusout", hideTip);
document.addEventListener("keydown", (event) => {
  const token = tokenOf(event);
  if (!token) return;
  if (event.key === "Escape") { hideTip(); return; }
  const all = $$("span[data-i]", token.closest(".tokens")), at = all.indexOf(token);
  const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined || !all[next]) return;
  event.preventDefault();
  token.tabIndex = -1;
  all[next].tabIndex = 0;
  all[next].focus();
});

restore();

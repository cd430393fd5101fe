// What the page does beyond HTML: follow what happens, fold the waterfall, move by keyboard, copy ids.
// Without this script everything is still there. Text from the server is parsed by the browser, never built here.
"use strict";

const main = document.getElementById("main");
const said = document.getElementById("said");
const POLL_MS = Number(main.dataset.live || 0);
const folded = new Set(); // ids of the rows of the waterfall whose branches are closed

// --- times -----------------------------------------------------------------------------------------------------

function ago(seconds) {
  const distance = Math.abs(seconds);
  const [size, unit] = distance >= 86400 ? [86400, "d"] : distance >= 3600 ? [3600, "h"] : distance >= 60 ? [60, "min"] : [1, "s"];
  const text = `${Math.floor(distance / size)} ${unit}`;
  return seconds >= 0 ? `${text} ago` : `in ${text}`;
}

function lasting(seconds) {
  if (seconds < 100) return `${Number(Math.max(0, seconds).toPrecision(3))}s`;
  return `${Math.floor(seconds / 60)}m${String(Math.floor(seconds % 60)).padStart(2, "0")}s`;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function tick() {
  const now = Date.now();
  for (const time of document.querySelectorAll("time.ago")) {
    const then = Date.parse(time.dateTime);
    if (!Number.isNaN(then)) put(time, ago((now - then) / 1000));
  }
  for (const running of document.querySelectorAll("[data-since]")) {
    const then = Date.parse(running.dataset.since);
    if (!Number.isNaN(then)) put(running, lasting((now - then) / 1000));
  }
}

// --- what only a script can offer ------------------------------------------------------------------------------

function reveal(root) {
  for (const button of root.querySelectorAll("button.twig, button.copy, button[data-all]")) button.hidden = false;
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.matches(".copy")) {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      put(said, "Copied");
      put(button, "Copied");
    } catch {
      getSelection().selectAllChildren(button.previousElementSibling); // no clipboard here: at least it is marked
      put(button, "Marked");
    }
    setTimeout(() => put(button, "Copy"), 1500);
  } else if (button.matches(".twig")) {
    fold(button.closest("li"), button.getAttribute("aria-expanded") === "true");
  } else if (button.dataset.all) {
    for (const row of document.querySelectorAll(".waterfall details")) row.open = button.dataset.all === "open";
  }
});

for (const form of document.querySelectorAll("form.filters")) {
  form.addEventListener("submit", () => {
    for (const field of form.elements) if (field.name && !field.value) field.disabled = true; // a short address
    setTimeout(() => { for (const field of form.elements) field.disabled = false; });
  });
}

// --- the waterfall ---------------------------------------------------------------------------------------------

function level(row) {
  return Number(row.dataset.level);
}

function fold(row, close) {
  const twig = row.querySelector(":scope > .twig");
  if (!twig) return;
  twig.setAttribute("aria-expanded", String(!close));
  if (close) folded.add(row.id);
  else folded.delete(row.id);
  applyFolds();
}

function applyFolds() {
  let hiddenBelow = Infinity;
  for (const row of document.querySelectorAll(".waterfall > li")) {
    if (level(row) <= hiddenBelow) hiddenBelow = Infinity;
    row.hidden = hiddenBelow !== Infinity;
    const twig = row.querySelector(":scope > .twig");
    if (twig) twig.setAttribute("aria-expanded", String(!folded.has(row.id)));
    if (hiddenBelow === Infinity && folded.has(row.id)) hiddenBelow = level(row);
  }
}

// --- keys: j and k (and the arrows in the waterfall) move from row to row, / goes to the first field --------------

function rows() {
  const spans = [...document.querySelectorAll(".waterfall > li:not([hidden]) > details > summary")];
  return spans.length ? spans : [...document.querySelectorAll("tbody a.row, tbody .name a")];
}

function move(step) {
  const all = rows();
  if (!all.length) return;
  const at = all.indexOf(document.activeElement);
  const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + step))];
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

function waterfallKey(key, row) {
  switch (key) {
    case "ArrowDown": move(1); return true;
    case "ArrowUp": move(-1); return true;
    case "ArrowLeft":
      if (row.querySelector(":scope > .twig") && !folded.has(row.id)) fold(row, true);
      else parentOf(row)?.querySelector("summary").focus();
      return true;
    case "ArrowRight":
      if (folded.has(row.id)) fold(row, false);
      else row.querySelector(":scope > details").open = true;
      return true;
    default: return false;
  }
}

function parentOf(row) {
  let above = row.previousElementSibling;
  while (above && level(above) >= level(row)) above = above.previousElementSibling;
  return above;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, select, textarea")) return;
  const row = event.target.matches(".waterfall summary") ? event.target.closest("li") : null;
  if (row && waterfallKey(event.key, row)) event.preventDefault();
  else if (event.key === "j") move(1);
  else if (event.key === "k") move(-1);
  else if (event.key === "/") {
    event.preventDefault();
    document.querySelector(".filters input, .find input")?.focus();
  }
});

// --- live ------------------------------------------------------------------------------------------------------

const live = document.getElementById("live");
let tag = "";
let waiting = 0;

function isBusy() {
  const marked = getSelection();
  return document.hidden || (marked && !marked.isCollapsed && main.contains(marked.anchorNode));
}

function swap(fresh) {
  const open = new Set([...main.querySelectorAll("details[open]")].map((element) => element.id));
  const known = new Set([...main.querySelectorAll("tbody tr[id]")].map((element) => element.id));
  const scrolled = new Map([...main.querySelectorAll("[data-swap]")].map((part) => [part.dataset.swap, part.querySelector(".scroll")]));
  const focus = focusPath();
  let changed = false;
  for (const part of main.querySelectorAll("[data-swap]")) {
    const other = fresh.querySelector(`[data-swap="${CSS.escape(part.dataset.swap)}"]`);
    if (!other) continue;
    const before = scrolled.get(part.dataset.swap);
    const atEnd = before && before.scrollTop + before.clientHeight >= before.scrollHeight - 4;
    const top = before ? before.scrollTop : 0;
    part.replaceWith(document.adoptNode(other));
    changed = true;
    const box = other.querySelector(".scroll");
    if (box) box.scrollTop = atEnd ? box.scrollHeight : top;
  }
  if (!changed) return;
  for (const id of open) document.getElementById(id)?.setAttribute("open", "");
  let arrived = 0;
  if (known.size) {
    for (const row of main.querySelectorAll("tbody tr[id]")) {
      if (known.has(row.id)) continue;
      row.classList.add("new");
      arrived += 1;
    }
  }
  if (arrived) put(said, `${arrived} new`);
  reveal(main);
  applyFolds();
  if (focus) focus()?.focus({ preventScroll: true });
}

// What has the focus is replaced: say how to find its successor.
function focusPath() {
  const element = document.activeElement;
  if (!element || !main.contains(element) || element === main) return null;
  const home = element.closest("[id]");
  if (!home || home === main) return null;
  const among = [home, ...home.querySelectorAll("a, button, summary, [tabindex]")].indexOf(element);
  return () => {
    const again = document.getElementById(home.id);
    return again && [again, ...again.querySelectorAll("a, button, summary, [tabindex]")][among];
  };
}

async function poll() {
  waiting = 0;
  if (live.getAttribute("aria-pressed") !== "true") return;
  if (!isBusy()) {
    try {
      const response = await fetch(location.pathname + location.search, {
        headers: tag ? { "If-None-Match": tag } : {}, credentials: "same-origin", redirect: "error",
      });
      live.classList.toggle("lost", !response.ok && response.status !== 304);
      if (response.status === 401) location.reload();
      else if (response.ok) {
        tag = response.headers.get("ETag") || "";
        const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
        if (!isBusy()) swap(fresh);
        if (!fresh.getElementById("main")?.dataset.live) { // it is over: nothing changes any more
          live.hidden = true;
          return;
        }
      }
    } catch {
      live.classList.add("lost"); // the daemon is away: go on asking
    }
  }
  schedule();
}

function schedule() {
  if (!waiting) waiting = setTimeout(poll, POLL_MS);
}

if (POLL_MS && live) {
  live.hidden = false;
  live.addEventListener("click", () => {
    const on = live.getAttribute("aria-pressed") !== "true";
    live.setAttribute("aria-pressed", String(on));
    if (on) schedule();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) tick(); });
  schedule();
}

reveal(document);
for (const box of main.querySelectorAll("[data-swap=logs] .scroll")) box.scrollTop = box.scrollHeight;
tick();
setInterval(tick, 1000);

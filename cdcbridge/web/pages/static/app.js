// Renews the parts of a page that are marked with data-live, every three seconds while the page is visible.
// Without this script everything works, and a person reloads the page.
"use strict";

const EVERY = 3000; // milliseconds
const LONGEST = 30000; // between two looks while the server does not answer
const PATIENCE = 10000;

let since = new Date();
let pause = EVERY;

function say(text) {
  const banner = document.getElementById("stale");
  banner.hidden = !text;
  if (banner.textContent !== text) banner.textContent = text;
}

// Put the new content into the place of the old one. What a person has opened, selected, scrolled or focused stays.
function renew(old, fresh) {
  for (const open of old.querySelectorAll("details[open][id]")) {
    fresh.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  if (old.isEqualNode(fresh)) return;
  const selected = document.getSelection();
  if (selected && !selected.isCollapsed && selected.containsNode(old, true)) return;
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  if (focused?.matches("input, textarea, select")) return;
  const scrolled = [...old.querySelectorAll(".scroll, pre")].map((one) => [one.scrollLeft, one.scrollTop]);
  const place = focused && same(old, focused);
  old.replaceWith(document.adoptNode(fresh));
  [...fresh.querySelectorAll(".scroll, pre")].forEach((one, n) => {
    if (scrolled[n]) [one.scrollLeft, one.scrollTop] = scrolled[n];
  });
  if (place) fresh.querySelector(place)?.focus();
}

// Return a selector for the element that will have the place of a focused one.
function same(part, focused) {
  const href = focused.getAttribute("href");
  if (href) return `a[href="${CSS.escape(href)}"]`;
  if (focused.tagName === "SUMMARY" && focused.parentElement.id) return `#${CSS.escape(focused.parentElement.id)} > summary`;
  const label = focused.getAttribute("aria-label");
  return label ? `${focused.tagName}[aria-label="${CSS.escape(label)}"]` : null;
}

async function pageOf(answer) {
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

async function look() {
  const answer = await fetch(location.href, { signal: AbortSignal.timeout(PATIENCE), headers: { Accept: "text/html" } });
  if (answer.redirected && new URL(answer.url).pathname === "/login") return location.assign(answer.url);
  const page = await pageOf(answer);
  if (!answer.ok) {
    const reason = page.querySelector("main section p")?.textContent ?? "";
    throw new Error(reason);
  }
  for (const old of document.querySelectorAll("[data-live]")) {
    const fresh = page.getElementById(old.id);
    if (fresh) renew(old, fresh);
  }
  since = new Date();
  say("");
}

// One look after another, never two at a time. While the server does not answer, the looks become rarer.
async function live() {
  if (!document.hidden && document.querySelector("[data-live]")) {
    try {
      await look();
      pause = EVERY;
    } catch (error) {
      const reason = error instanceof TypeError || error.name === "TimeoutError" ? "The server does not answer." : error.message;
      say(`Not renewed since ${since.toISOString().slice(11, 19)} UTC. ${reason}`);
      pause = Math.min(LONGEST, pause * 1.5);
    }
  }
  setTimeout(live, pause * (0.9 + 0.2 * Math.random()));
}

// A change in steps: send each one, and show its progress, until the answer is another page.
async function carryOut() {
  for (let form = document.querySelector("form[data-continue]"); form; form = document.querySelector("form[data-continue]")) {
    const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    if (answer.redirected) return location.assign(answer.url);
    const fresh = (await pageOf(answer)).getElementById("progress");
    if (!fresh) return form.requestSubmit(); // it failed, and the page says why
    const old = document.getElementById("progress");
    const focused = old.contains(document.activeElement);
    old.replaceWith(document.adoptNode(fresh));
    if (focused) document.getElementById("ask-title").focus();
  }
}

setTimeout(live, EVERY);
carryOut();

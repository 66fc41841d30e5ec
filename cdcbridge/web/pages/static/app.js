// Renews the parts of a page that are marked with data-live, every three seconds while the page is visible.
// Without this script everything works, and a person reloads the page.
"use strict";

const EVERY = 3000; // milliseconds
const PATIENCE = 10000;

let since = new Date();

function say(text) {
  const banner = document.getElementById("stale");
  banner.hidden = !text;
  if (banner.textContent !== text) banner.textContent = text;
}

// Put the new content into the place of the old one. What a person has opened stays open, and the focus stays where it is.
function renew(old, fresh) {
  for (const open of old.querySelectorAll("details[open][id]")) {
    fresh.querySelector(`#${CSS.escape(open.id)}`)?.setAttribute("open", "");
  }
  if (old.isEqualNode(fresh)) return;
  const focused = old.contains(document.activeElement) ? document.activeElement : null;
  const href = focused?.getAttribute("href");
  const selected = document.getSelection();
  if (selected && !selected.isCollapsed && old.contains(selected.anchorNode)) return;
  if (focused && !href && focused.tagName !== "SUMMARY") return;
  const place = focused?.tagName === "SUMMARY" ? focused.parentElement.id : null;
  old.replaceWith(document.adoptNode(fresh));
  if (href) fresh.querySelector(`a[href="${CSS.escape(href)}"]`)?.focus();
  if (place) fresh.querySelector(`#${CSS.escape(place)} > summary`)?.focus();
}

async function look() {
  if (document.hidden || !document.querySelector("[data-live]")) return;
  try {
    const answer = await fetch(location.href, { signal: AbortSignal.timeout(PATIENCE), headers: { Accept: "text/html" } });
    if (answer.redirected && new URL(answer.url).pathname === "/login") return location.assign(answer.url);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!answer.ok) {
      const reason = page.querySelector("main p:not([id])")?.textContent ?? "";
      return say(`Not renewed since ${time(since)} UTC. ${reason}`);
    }
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = page.getElementById(old.id);
      if (fresh) renew(old, fresh);
    }
    since = new Date();
    say("");
  } catch {
    say(`Not renewed since ${time(since)} UTC. The server does not answer.`);
  }
}

function time(at) {
  return at.toISOString().slice(11, 19);
}

const next = document.querySelector("form[data-continue]");
if (next) setTimeout(() => next.requestSubmit(), 300);
setInterval(look, EVERY);
document.addEventListener("visibilitychange", look);

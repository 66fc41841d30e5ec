"""What the tests of the dashboard share: a store with life, a browser, and pages that may have no error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.harness.world import World
from tests.web.conftest import declare, serving

CHROMIUM = "/usr/bin/chromium"
expect.set_options(timeout=30_000)  # milliseconds, since a page is renewed every three seconds, on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. It ends with the module, because Playwright's loop must not run during tests of asyncio."""
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Watched:
    """A page in a context of its own, and what went wrong in it."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.url = url
        self.problems: list[str] = []
        self.expected: set[int] = set()  # statuses that this test provokes
        self._context = browser.new_context(base_url=url, **context)
        self._context.set_default_timeout(30_000)
        self.page: Page = self._context.new_page()
        self.page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        self.page.on("console", self._said)
        self.page.on("request", self._requested)

    def close(self) -> None:
        self._context.close()
        assert not self.problems, self.problems

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(
            f"status of {one}" in message.text for one in self.expected
        ):
            self.problems.append(f"console: {message.text}")

    def _requested(self, request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.problems.append(f"a request to another host: {request.url}")


@contextmanager
def visiting(browser: Browser, url: str, **context: Any) -> Iterator[Watched]:
    """A page; the test fails at the end of the block if its script failed or it asked another host."""
    watched = Watched(browser, url, **context)
    try:
        yield watched
    except BaseException:
        watched.problems.clear()  # the first failure counts
        watched.close()
        raise
    watched.close()


def live(world: World) -> None:
    """Messages in each state: waiting, in flight, delayed, dead, and blocked keys."""
    declare(world)
    run = world.sql.execute
    run("set search_path = cdcbridge")
    publish = "select publish('t', 'k' || n, json_build_object('id', n, 'email', 'ada' || n || '@example.com'))"
    run(f"{publish} from generate_series(1, 40) n".encode())
    for reason in ("card declined", "card declined"):
        run("select nack('billing', array(select receipt from receive('billing', 6)), '0', %s)", (reason,))
    run("select nack('billing', array(select receipt from receive('billing', 3)), '0', 'no template', true)")
    run("select count(*) from receive('billing', 2, '1 hour')")
    taken = [row[0] for row in run("select receipt from receive('search', 4, '1 hour')")]
    run("select nack('search', %s, '10 min', 'the index is locked')", (taken[:2],))


@pytest.fixture
def dashboard(world18: World) -> Iterator[str]:
    """The address of a dashboard without tokens, over a store with life."""
    live(world18)
    with serving(world18) as url:
        yield url

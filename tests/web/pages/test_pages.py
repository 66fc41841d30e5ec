"""Every page, in Chromium: no error of a script, no request to another host, and usable by keyboard and screen reader."""

from __future__ import annotations

from pathlib import Path

import httpx
import psycopg
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, store_database
from tests.web.conftest import serving
from tests.web.pages.conftest import live, visiting

PAGES = (
    "/", "/consumers", "/consumers?q=bil", "/consumers/billing", "/consumers/search", "/consumers/audit", "/streams", "/dead",
    "/consumers/billing/dead", "/consumers/billing/dead?reason=nacked", "/consumers/billing/dead/1", "/log",
    "/log?topic=t&key=k3", "/log/history?topic=t&key=k3", "/log/3", "/sinks", "/mirrors", "/backfills", "/alarms", "/audit",
    "/consumers/billing/pause", "/consumers/billing/dead/purge", "/consumers/billing/dead/1/retry",
    "/consumers/billing/filter",
)  # fmt: skip
EMPTY = {
    "/": "cdcbridge run",
    "/consumers": "cdcbridge consumers apply",
    "/streams": "mode: stream",
    "/dead": "No consumer has a dead letter",
    "/log": "The log has no message yet",
    "/sinks": "No consumer has a sink",
    "/mirrors": "The file has no mirror",
    "/backfills": "cdcbridge backfill start",
    "/alarms": "No alarm",
    "/audit": "Nobody has changed anything yet",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_works_for_everybody(dashboard: str, browser: Browser, scheme: str) -> None:
    with visiting(browser, dashboard, color_scheme=scheme) as visit:
        for path in PAGES:
            answer = visit.page.goto(path)
            assert answer is not None and answer.status == 200, path
            expect(visit.page.locator("h1")).to_have_count(1)
            results = Axe().run(visit.page)
            assert results.violations_count == 0, f"{path}: {results.generate_report()}"


def test_each_page_of_an_empty_store_says_what_to_do(world18: World, browser: Browser) -> None:
    world18.consumers = []
    with serving(world18) as url, visiting(browser, url) as visit:
        for path, said in EMPTY.items():
            answer = visit.page.goto(path)
            assert answer is not None and answer.status == 200, path
            expect(visit.page.locator("main")).to_contain_text(said)
            assert Axe().run(visit.page).violations_count == 0, path


def test_a_narrow_window_shows_everything(dashboard: str, browser: Browser) -> None:
    with visiting(browser, dashboard, viewport={"width": 390, "height": 800}) as visit:
        for path in ("/", "/consumers/billing", "/log"):
            visit.page.goto(path)
            widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            scroll, client = visit.page.evaluate(widths)
            assert scroll <= client, path


def test_the_keyboard_leads_everywhere(dashboard: str, browser: Browser) -> None:
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing")
        page.keyboard.press("Tab")
        expect(page.locator(":focus")).to_have_text("Skip to the content")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")  # the path above the title
        page.keyboard.press("Tab")
        expect(page.locator(":focus")).to_have_text("Pause…")
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("Pause billing?")


def test_a_page_renews_itself(dashboard: str, world18: World, browser: Browser) -> None:
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/log")
        expect(page.locator("#messages tbody tr").first).to_contain_text("k40")
        world18.sql.execute("select cdcbridge.publish('t', 'newer', '1')")
        expect(page.locator("#messages tbody tr").first).to_contain_text("newer")


def test_what_a_person_has_opened_stays_open(dashboard: str, world18: World, browser: Browser) -> None:
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing")
        last = page.locator("#next details").last
        last.locator("summary").click()
        number = last.get_attribute("id")
        taken = page.locator("#flight tbody tr")
        expect(taken).to_have_count(2)
        world18.sql.execute("select count(*) from cdcbridge.receive('billing', 1)")
        expect(taken).to_have_count(3)
        expect(page.locator("#next details[open]")).to_have_attribute("id", str(number))
        expect(page.locator(f"#{number} summary")).to_be_focused()


def test_a_page_says_that_it_is_stale(own15: EmbeddedServer, tmp_path: Path, browser: Browser) -> None:
    """While the database is away, the last figures stay, and a banner says since when and why."""
    with store_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)
        live(world)
        world.close()
        with serving(world) as url, visiting(browser, url) as visit:
            visit.expected = {503}
            page = visit.page
            page.goto("/consumers/billing")
            banner = page.locator("#stale")
            expect(banner).to_be_hidden()
            own15.stop()
            expect(banner).to_contain_text("Not renewed since")
            expect(banner).to_contain_text("store")
            expect(page.locator("h1")).to_have_text("billing")
            answer = page.request.get("/consumers")
            assert answer.status == 503 and "store" in answer.text()
            own15.start()
            expect(banner).to_be_hidden()


def test_parts_that_appear_and_vanish(dashboard: str, world18: World, browser: Browser) -> None:
    """A consumer that needs attention appears on the first page, and is gone from it afterwards."""
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/")
        listed = page.locator("#attention tbody tr")
        expect(listed).to_contain_text(["billing"])
        world18.sql.execute("select cdcbridge.purge('billing')")
        expect(listed).to_have_count(0)
        expect(page.locator("#attention")).to_contain_text("None.")
        world18.sql.execute("update cdcbridge.consumers set paused = true where name = 'search'")
        expect(listed).to_contain_text(["search"])


def test_a_measurement_that_fails_costs_no_page_its_time(world18: World) -> None:
    """Without a bridge, and with a source that does not answer, only the first page waits."""
    live(world18)
    world18.settings["dsn"] = "postgresql://nobody@127.0.0.1:1/none"
    world18.store_dsn = world18.dsn
    with serving(world18) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        client.get("/")
        text = eventually(lambda: (found := client.get("/").text) and "does not answer" in found and found)
        assert "A database does not answer" in text and "Everything works" not in text
        assert "No slot yet" not in text


def test_figures_come_from_the_bridge(world18: World, browser: Browser) -> None:
    """A bridge keeps its measurements, and the overview shows the slot and the leader."""
    world18.sql.execute("create table t (id int primary key)")
    world18.consumers = []
    world18.consumer("billing", ("public.t",))
    world18.start_process()
    eventually(world18.active, "the bridge streams")
    world18.sql.execute("insert into t select generate_series(1, 7)")
    kept = "select lag -> 'consumers' -> 0 ->> 'pending' from cdcbridge_internal.measurements"
    eventually(lambda: world18.sql.execute(kept).fetchone() == ("7",), "the bridge keeps its measurement")
    with serving(world18) as url, visiting(browser, url) as visit:
        visit.page.goto("/")
        expect(visit.page.locator("#slot")).to_contain_text("read by a bridge")
        expect(visit.page.locator("#bridges")).to_contain_text("Leader")
        expect(visit.page.locator("#measured")).to_contain_text("by the bridge")
        samples = world18.sql.execute(
            "select subject, figures ->> 'pending' from cdcbridge_internal.samples where subject <> ''"
        )
        assert ("billing", "7") in samples.fetchall()


def test_the_streams_page_names_the_members(dashboard: str, world18: World) -> None:
    def shown() -> str:
        return httpx.get(f"{dashboard}/streams", trust_env=False, timeout=30).text

    row = "select partition, seq, receipt from cdcbridge.read_stream('audit', 1, '1 hour')"
    assert "report-7" not in shown()
    with psycopg.connect(world18.dsn, application_name="report-7", autocommit=True) as member:
        partition, seq, receipt = member.execute(row).fetchone() or (0, 0, "")
        assert "report-7 <small>until" in shown()
        member.execute("select cdcbridge.extend_lease('audit', %s, %s, '2 hours')", (partition, receipt))
        assert "report-7 <small>until" in shown(), "a longer lease has the same member"
        member.execute("select cdcbridge.commit_offset('audit', %s, %s, %s)", (partition, seq, receipt))
    assert "report-7" not in shown()

"""What the dashboard changes: it asks first, needs the role, and is in the audit log."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psycopg
import pytest
from playwright.sync_api import Browser, expect

from tests.harness.world import World, eventually
from tests.web.conftest import ADMIN, BILLING, OPERATOR, TOKENS, VIEWER, declare, serving
from tests.web.pages.conftest import live, visiting

PAUSED = "select paused from cdcbridge.consumers where name = 'billing'"
DEAD = "select count(*) from cdcbridge.dead_letters('billing')"


def audited(world: World) -> list[tuple[Any, ...]]:
    return world.sql.execute(
        "select caller, role, action, subject, details from cdcbridge.audit order by id"
    ).fetchall()


def test_pause_asks_first_and_resume_does_not(dashboard: str, world18: World, browser: Browser) -> None:
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing")
        page.get_by_role("link", name="Pause…").click()
        assert world18.value(PAUSED) is False, "a question changes nothing"
        page.get_by_role("link", name="Cancel").click()
        page.get_by_role("link", name="Pause…").click()
        page.get_by_role("button", name="Pause").click()
        expect(page.get_by_role("status").filter(has_text="Paused.")).to_be_visible()
        expect(page.locator("#verdict")).to_contain_text("Paused")
        assert world18.value(PAUSED) is True
        page.get_by_role("link", name="Resume…").click()
        assert world18.value(PAUSED) is True, "a question changes nothing"
        page.get_by_role("button", name="Resume").click()
        expect(page.get_by_role("status").filter(has_text="Resumed.")).to_be_visible()
        assert world18.value(PAUSED) is False
        page.goto("/audit")
        expect(page.locator("tbody tr")).to_have_count(2)
    assert [row[:4] for row in audited(world18)] == [
        ("local", "admin", "pause", "billing"),
        ("local", "admin", "resume", "billing"),
    ]


def test_retry_one_dead_letter(dashboard: str, world18: World, browser: Browser) -> None:
    before = world18.value(DEAD)
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing/dead")
        page.locator("#letters tbody tr", has_text="no template").first.locator("a").click()
        expect(page.locator("main")).to_contain_text("no template")
        page.get_by_role("link", name="Retry…").click()
        page.get_by_role("button", name="Retry").click()
        expect(page.get_by_role("status").filter(has_text="Retried 1 dead letter.")).to_be_visible()
    assert world18.value(DEAD) == before - 1
    (row,) = audited(world18)
    assert row[2] == "retry" and (row[4]["retried"], row[4]["kept"], len(row[4]["ids"])) == (1, 0, 1)


def test_purge_by_a_filter(dashboard: str, world18: World, browser: Browser) -> None:
    reasons = "select count(*) from cdcbridge.dead_letters('billing', reason => 'nacked: no template')"
    before, chosen = world18.value(DEAD), world18.value(reasons)
    assert before > chosen > 0
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing/dead")
        page.get_by_label("Reason begins with").fill("nacked: no template")
        page.get_by_role("button", name="Filter").click()
        expect(page.locator("#letters tbody tr")).to_have_count(chosen)
        page.get_by_role("link", name="Purge these…").click()
        expect(page.locator("h1")).to_contain_text(f"Purge {chosen} dead letters of billing?")
        expect(page.locator("main")).to_contain_text("nacked: no template")
        page.get_by_role("button", name="Purge").click()
        expect(page.get_by_role("status").filter(has_text=f"Purged {chosen} dead letters.")).to_be_visible()
    assert (world18.value(DEAD), world18.value(reasons)) == (before - chosen, 0)
    (row,) = audited(world18)
    assert row[4] == {
        "filter": {"reason": "nacked: no template"}, "after": 0, "until": row[4]["until"], "purged": chosen,
    }  # fmt: skip


def dead_letters(world: World, count: int, reason: str) -> None:
    """Dead letters of billing, as if their messages had died."""
    world.sql.execute(
        "insert into cdcbridge.dead_messages (consumer_id, seq, topic, data, deliver_count, reason, history, inserted_at)"
        " select c.id, 1000000 + n, 't', '{\"op\": \"message\"}', 1, %s, '[]', now()"
        " from cdcbridge.consumers c, generate_series(1, %s) n where c.name = 'billing'",
        (reason, count),
    )


def test_a_large_retry_goes_step_by_step_and_ends(world18: World, browser: Browser) -> None:
    """Letters that die meanwhile, and those that stay, are not tried again, so it comes to an end."""
    declare(world18)
    dead_letters(world18, 200_000, "nacked: x")
    run = world18.sql.execute
    # A letter stays if the filter fails on it again.
    run(
        "update cdcbridge.dead_messages set topic = 'public.t', reason = 'filter_error: no such column',"
        ' data = \'{"op": "insert", "record": {"id": 1}, "old": null, "unchanged": []}\' where id % 10 = 0'
    )
    run(
        'update cdcbridge.consumers set config = config || \'{"filter": "record.gone == 1", "tables": ["public.t"]}\''
        " where name = 'billing'"
    )
    with serving(world18) as url, visiting(browser, url) as visit:
        page = visit.page
        page.goto("/consumers/billing/dead/retry")
        expect(page.locator("h1")).to_contain_text("Retry 100,000 or more dead letters of billing?")
        dead_letters(world18, 10, "later")
        page.get_by_role("button", name="Retry").click()
        said = page.get_by_role("status").filter(has_text="Retried 180,000 dead letters. 20,000 letters stayed")
        expect(said).to_be_visible(timeout=100_000)
    left = run("select reason, count(*) from cdcbridge.dead_letters('billing') group by 1 order by 1").fetchall()
    assert left == [("filter_error: no such column", 20_000), ("later", 10)]
    assert sum(row[4]["retried"] for row in audited(world18)) == 180_000
    assert len(audited(world18)) > 1, "more than one step"


def test_purge_works_for_a_stream_and_retry_says_why_not(world18: World) -> None:
    """A stream with a sink has dead letters as well. They can be purged, and not be put into a queue."""
    declare(world18)
    sink = {"type": "file", "path": str(world18.folder / "audit.jsonl")}
    world18.consumer("hook", (), mode="stream", topics=["t"], sink=sink)
    world18.json("consumers", "apply", "--json")
    world18.sql.execute("set search_path = cdcbridge, cdcbridge_internal")
    world18.sql.execute(
        "insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history, inserted_at)"
        " select id, n, 't', 'k', '{}', 1, 'refused', '[{\"left_out\": 7}, {\"at\": \"2026-01-01T00:00:00\"}]', now()"
        " from consumers, generate_series(1, 3) n where name = 'hook'"
    )
    count = "select count(*) from cdcbridge.dead_letters('hook')"
    with serving(world18) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        shown = client.get("/consumers/hook/dead").text
        assert "Purge all…" in shown and "Retry all…" not in shown
        letter = client.get("/consumers/hook/dead/1").text
        assert "Retry…" not in letter and "7 deliveries more" in letter
        assert client.post("/consumers/hook/dead/1/retry", data={}).status_code == 422
        fields = {"first": "1", "after": "0", "until": "99"}
        assert client.post("/consumers/hook/dead/purge", data=fields).status_code == 303
    assert world18.value(count) == 0


def test_a_key_or_reason_is_taken_as_it_is(world18: World) -> None:
    """Blanks belong to a key, and a reason with several lines is found by its first one."""
    declare(world18)
    run = world18.sql.execute
    run("select cdcbridge.publish('t', k, '1') from unnest(array['17', ' 17', '  ', 'z']) k")
    run(
        "select cdcbridge.nack('billing', array(select receipt from cdcbridge.receive('billing', 10)), '0',"
        " e'Traceback:\n  File x\nValueError', true)"
    )
    with serving(world18) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        assert 'href="?reason=nacked%3A%20Traceback%3A"' in client.get("/consumers/billing/dead").text
        fields = {"first": "1", "after": "0", "until": "99"}
        client.post("/consumers/billing/dead/purge", data={**fields, "key": " 17"})
        assert run("select key from cdcbridge.dead_letters('billing') order by key").fetchall() == [
            ("  ",),
            ("17",),
            ("z",),
        ]
        client.post("/consumers/billing/dead/purge", data={**fields, "key": "  "})
        assert run("select key from cdcbridge.dead_letters('billing') order by key").fetchall() == [("17",), ("z",)]
        asked = client.get("/consumers/billing/dead/purge", params={"reason": "nacked: Traceback:"}).text
        assert "Purge 2 dead letters of billing?" in asked
        client.post("/consumers/billing/dead/purge", data={**fields, "reason": "nacked: Traceback:"})
        assert world18.value(DEAD) == 0


def test_a_filter_is_tried_without_effect(dashboard: str, world18: World, browser: Browser) -> None:
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.goto("/consumers/billing/filter")
        page.get_by_label("Filter (CEL)").fill("record.id >")
        page.get_by_role("button", name="Try it").click()
        expect(page.get_by_role("alert")).to_be_visible()
        page.get_by_label("Filter (CEL)").fill("record.id > 20")
        page.get_by_role("button", name="Try it").click()
        expect(page.locator("tbody tr")).to_have_count(40)
    assert audited(world18) == []


@pytest.fixture
def guarded(world18: World) -> Any:
    """The address of a dashboard with tokens."""
    live(world18)
    with serving(world18, tokens=TOKENS) as url:
        yield url


def login(page: Any, token: str) -> None:
    page.goto("/login")
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()


def test_a_login_leads_back_and_a_logout_ends_it(guarded: str, browser: Browser) -> None:
    with visiting(browser, guarded) as visit:
        visit.expected = {401}
        page = visit.page
        page.goto("/consumers/billing?x=1")
        expect(page).to_have_url(f"{guarded}/login?next=%2Fconsumers%2Fbilling%3Fx%3D1")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("not known")
        page.get_by_label("Token").fill(ADMIN)
        page.get_by_role("button", name="Log in").click()
        expect(page).to_have_url(f"{guarded}/consumers/billing?x=1")
        (cookie,) = page.context.cookies()
        assert cookie["httpOnly"] and cookie["sameSite"] == "Lax" and ADMIN not in cookie["value"]
        page.get_by_role("button", name="Log out").click()
        page.goto("/consumers")
        expect(page.get_by_label("Token")).to_be_visible()


def test_a_change_in_steps_has_the_focus_on_its_progress(dashboard: str, world18: World, browser: Browser) -> None:
    world18.sql.execute(
        "insert into cdcbridge.dead_messages"
        " (consumer_id, seq, topic, key, data, deliver_count, reason, history, inserted_at)"
        " select (select id from cdcbridge.consumers where name = 'billing'), n, 't', 'k', '{}', 3, 'no', '[]', now()"
        " from generate_series(1, 400000) n"
    )
    watch = (
        "document.addEventListener('focusin', (event) => sessionStorage.setItem('focused',"
        " `${sessionStorage.getItem('focused')} ${event.target.id}`))"
    )
    with visiting(browser, dashboard) as visit:
        page = visit.page
        page.add_init_script(watch)
        page.goto("/consumers/billing/dead/purge")
        page.get_by_role("button", name="Purge").click()
        page.wait_for_url("**/dead?said=purge*", timeout=120_000)
        assert len(audited(world18)) > 1, "there were steps"
        assert "ask-title" in page.evaluate("sessionStorage.getItem('focused')")
    assert world18.value(DEAD) == 0


def test_no_process_accepts_the_cookie_of_a_session_that_ended(guarded: str, world18: World) -> None:
    with serving(world18, tokens=TOKENS) as other, httpx.Client(trust_env=False, timeout=30) as http:
        for _ in range(2):
            http.post(f"{guarded}/login", data={"token": ADMIN})
            (cookie,) = http.cookies.jar
            name, value = cookie.name, str(cookie.value)
            stolen = {"Cookie": f"{name}={value}"}
            for url in (guarded, other):
                assert httpx.get(f"{url}/consumers", headers=stolen, trust_env=False).status_code == 200
            proof = re.findall('name="proof" value="([0-9a-f]{64})"', http.get(f"{guarded}/consumers").text)[0]
            assert http.post(f"{guarded}/logout", data={"proof": proof}).headers["location"] == "/login"
            for url in (guarded, other):
                answer = httpx.get(f"{url}/consumers", headers=stolen, trust_env=False)
                assert answer.headers["location"] == "/login?next=%2Fconsumers"
            assert value not in str(world18.sql.execute("select * from cdcbridge_internal.ended_sessions").fetchall())
            time.sleep(1.1)  # the second session begins in another second, so it has another cookie


def test_an_alert_is_silenced_and_speaks_again(guarded: str, world18: World, browser: Browser) -> None:
    world18.sql.execute(
        "insert into cdcbridge_internal.alert_conditions (rule, subject, severity, message, since, began_at)"
        " values ('dead_letters', 'billing', 'warning', '3 dead letters', now(), now())"
    )
    silences = "select count(*) from cdcbridge_internal.alert_silences where until > now() + interval '3 hours'"
    with visiting(browser, guarded) as visit:
        page = visit.page
        login(page, VIEWER)
        page.goto("/alarms")
        expect(page.locator("#alerts")).to_contain_text("3 dead letters")
        expect(page.get_by_role("link", name="Silence")).to_have_count(0)
        assert page.request.get("/alarms/silence?rule=dead_letters").status == 403
        page.get_by_role("button", name="Log out").click()
        login(page, OPERATOR)
        page.goto("/alarms")
        page.get_by_role("link", name="Silence dead letters").click()
        page.get_by_label("For").select_option("4h")
        assert world18.value(silences) == 0, "a question changes nothing"
        page.get_by_role("button", name="Silence").click()
        expect(page.get_by_role("status").filter(has_text="Silenced.")).to_be_visible()
        expect(page.locator("#alerts")).to_contain_text("Silenced: dead letters until")
        assert world18.value(silences) == 1
        page.get_by_role("link", name="end it…").click()
        page.get_by_role("button", name="End the silence").click()
        expect(page.locator("#alerts")).not_to_contain_text("Silenced: dead letters")
        assert world18.value(silences) == 0
        assert page.request.get("/alarms/silence?rule=nonsense").status == 404
    assert [row[:4] for row in audited(world18)] == [("night", "operator", "silence", "dead_letters")] * 2
    assert [row[4]["for"] for row in audited(world18)] == ["4h", "0s"]


def test_a_viewer_sees_no_button_and_cannot_press_one(guarded: str, world18: World, browser: Browser) -> None:
    with visiting(browser, guarded) as visit:
        page = visit.page
        login(page, VIEWER)
        page.goto("/consumers/billing")
        expect(page.locator("h1")).to_have_text("billing")
        expect(page.get_by_role("link", name="Pause…")).to_have_count(0)
        page.goto("/consumers/billing/dead")
        expect(page.get_by_role("link", name="Purge all…")).to_have_count(0)
        for path in ("/consumers/billing/pause", "/consumers/billing/dead/purge"):
            assert page.request.get(path).status == 403
            assert page.request.post(path, form={"proof": "x"}).status == 403
    assert world18.value(PAUSED) is False and audited(world18) == []


def test_a_consumers_token_sees_its_own_consumers_alone(guarded: str, world18: World, browser: Browser) -> None:
    """Also where others have alarms, transactions that hold messages, and queries with their data."""
    run = world18.sql.execute
    with psycopg.connect(world18.dsn) as worker:
        worker.execute("select count(*) from cdcbridge.receive('search', 2) /* a secret of others */")
        worker.execute("select cdcbridge.publish('t', 'k', '\"a secret of others\"')")
        time.sleep(1.2)  # a transaction is shown when it has been open for a second
        with visiting(browser, guarded) as visit:
            page = visit.page
            login(page, ADMIN)
            page.goto("/alarms")
            expect(page.locator("main")).to_contain_text("a secret of others")
            page.goto("/")
            page.get_by_role("button", name="Log out").click()
            login(page, BILLING)
            for path in (
                "/",
                "/consumers",
                "/consumers/billing",
                "/dead",
                "/alarms",
                "/sinks",
                "/streams",
                "/backfills",
            ):
                page.goto(path)
                text = page.content().replace('role="search"', "")
                assert "search" not in text and "audit" not in text and "secret" not in text, path
                assert "Nobody: vacuum" not in text, path
            for path in (
                "/consumers/search", "/consumers/search/dead", "/consumers/search/dead/purge", "/log", "/log/1", "/audit",
                "/log/history?topic=t&key=k1", "/consumers/billing/filter", "/consumers/billing/transform",
            ):  # fmt: skip
                assert page.request.get(path).status == 403, path
    assert run("select count(*) from cdcbridge.audit").fetchone() == (0,)


@contextmanager
def session(url: str, token: str) -> Iterator[httpx.Client]:
    """A browser's session without a browser."""
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        assert client.post("/login", data={"token": token, "next": "/"}).status_code == 303
        yield client


def proof(client: httpx.Client) -> str:
    text = client.get("/consumers/billing/pause").text
    return text.split('name="proof" value="')[1].split('"')[0]


def test_a_form_of_another_site_changes_nothing(guarded: str, world18: World) -> None:
    with session(guarded, OPERATOR) as client:
        path, good = "/consumers/billing/pause", proof(client)
        assert client.post(path, data={}).status_code == 403
        assert client.post(path, data={"proof": "0" * 64}).status_code == 403
        assert client.post(path, data={"proof": "é"}).status_code == 403
        assert client.post(path, data={"proof": good}, headers={"Origin": "https://evil.example"}).status_code == 403
        with session(guarded, ADMIN) as other:
            assert client.post(path, data={"proof": proof(other)}).status_code == 403, "of another session"
        assert world18.value(PAUSED) is False
        assert client.post(path, data={"proof": good}, headers={"Origin": guarded}).status_code == 303
        assert world18.value(PAUSED) is True


def test_a_cookie_that_was_changed_or_is_old_is_no_session(guarded: str, world18: World) -> None:
    with session(guarded, VIEWER) as client:
        cookie = client.cookies["cdcbridge_session"]
        name, began, signature = cookie.rsplit(".", 2)
        for forged in (
            f"ops.{began}.{signature}",
            f"{name}.{int(began) + 1}.{signature}",
            f"{name}.{began}.{'0' * 64}",
            f"{name}.{began}",
            "",
            "é.1.2",
        ):
            with httpx.Client(base_url=guarded, trust_env=False) as other:
                answer = other.get("/consumers", headers=[(b"Cookie", f"cdcbridge_session={forged}".encode())])
                assert answer.status_code == 303, forged
    changed = [dict(one, token="another") if one["name"] == "screen" else one for one in TOKENS]
    with serving(world18, tokens=changed) as url, httpx.Client(base_url=url, trust_env=False) as other:
        answer = other.get("/consumers", headers={"Cookie": f"cdcbridge_session={cookie}"})
        assert answer.status_code == 303, "its token was replaced"


def test_a_login_never_leads_to_another_site(guarded: str) -> None:
    for there in (
        "https://evil.example/",
        "//evil.example",
        "//[",
        "/\n/evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "evil",
    ):
        with httpx.Client(base_url=guarded, trust_env=False) as client:
            answer = client.post("/login", data={"token": ADMIN, "next": there})
            assert (answer.status_code, answer.headers["location"]) == (303, "/"), there


def test_failed_logins_are_limited(guarded: str) -> None:
    with httpx.Client(base_url=guarded, trust_env=False) as client:
        statuses = [client.post("/login", data={"token": f"guess {n}"}).status_code for n in range(12)]
        assert statuses == [401] * 10 + [429] * 2
        assert client.post("/login", data={"token": ADMIN}).status_code == 303, "a known token is always accepted"


@pytest.mark.parametrize(("browse", "roles"), [(True, "ops screen"), (False, ""), (["admin"], "ops")])
def test_data_is_hidden_by_mask_and_by_role(world18: World, browse: Any, roles: str) -> None:
    live(world18)
    settings: dict[str, Any] = {"tokens": TOKENS, "browse": browse, "mask": {"email": "last4"}}
    shown = ("/consumers/search", "/consumers/billing/dead/1", "/log/1", "/log/history?topic=t&key=k1")
    with serving(world18, **settings) as url:
        for name, token in (("ops", ADMIN), ("screen", VIEWER)):
            with session(url, token) as client:
                assert client.get("/consumers/search/filter").status_code == 403, (
                    "an expression could show what is hidden"
                )
                for path in shown:
                    answer = client.get(path)
                    assert answer.status_code == 200 and "@example" not in answer.text, (name, path)
                    assert (".com" in answer.text) == (name in roles.split()), (name, path)


def test_nobody_can_inject(world18: World, browser: Browser) -> None:
    """Keys, topics, reasons and data are texts on each page, also in addresses."""
    evil = """"><script>document.title='owned'</script><img src=x onerror="document.title='owned'">'"""
    declare(world18)
    world18.sql.execute("select cdcbridge.publish('t', %s, json_build_object(%s::text, %s::text))", (evil, evil, evil))
    world18.sql.execute(
        "select cdcbridge.nack('billing', array(select receipt from cdcbridge.receive('billing')), '0', %s, true)",
        (evil,),
    )
    with serving(world18) as url, visiting(browser, url) as visit:
        page = visit.page
        for path in ("/log", "/log/1", "/consumers/search", "/consumers/billing/dead", "/consumers/billing/dead/1"):
            page.goto(path)
            expect(page.locator("main script, main img")).to_have_count(0)
            assert "onerror" in page.locator("main").inner_text(), path
        page.goto("/log")
        page.locator("#messages tbody a").nth(1).click()
        expect(page.locator("h1")).to_contain_text("onerror")
        assert page.title() != "owned"
        answer = page.request.get("/consumers", params={"q": evil})
        assert answer.status == 200 and "<script>document" not in answer.text()


def test_bad_addresses_get_an_answer(guarded: str) -> None:
    with session(guarded, ADMIN) as client:
        for path, status in (
            ("/consumers/nobody", 404),
            ("/consumers/billing/dead/999999", 404),
            ("/consumers/billing/dead/99999999999999999999", 404),
            (f"/log/{'9' * 5000}", 404),
            (f"/audit?before={'9' * 5000}", 422),
            ("/login?next=//[", 200),
            ("/consumers/billing/dead?before=x", 422),
            ("/consumers/billing/dead/explode", 404),
            ("/log?from=yesterday", 422),
            ("/log/99999999999999999999", 404),
            ("/log/history?key=1", 422),
            ("/audit?before=x", 422),
            ("/consumers/audit/dead", 200),
            ("/static/../app.py", 404),
            ("/static/%2e%2e/site.py", 404),
            ("/consumers/..%2f..%2fetc", 404),
            ("/nothing", 404),
        ):
            answer = client.get(path)
            assert answer.status_code == status, (path, answer.status_code)
            assert "Traceback" not in answer.text
        assert client.post("/login", content=b"x" * 100_000).status_code == 413


def test_every_page_forbids_scripts_of_others(guarded: str) -> None:
    with session(guarded, ADMIN) as client:
        for path in ("/", "/log", "/nothing", "/login"):
            headers = client.get(path).headers
            if path != "/nothing":
                policy = headers["content-security-policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
            assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"


def test_a_change_that_fails_is_in_the_audit_log(guarded: str, world18: World) -> None:
    with session(guarded, ADMIN) as client:
        answer = client.post("/consumers/billing/dead/424242/retry", data={"proof": proof(client)})
        assert answer.status_code == 404
    (row,) = audited(world18)
    assert row[:4] == ("ops", "admin", "retry", "billing") and "424242" in row[4]["error"]
    eventually(lambda: "api.changed" in world18.log("serve.log"), "the log has the change")


def test_nothing_changes_without_its_row_in_the_audit_log(guarded: str, world18: World) -> None:
    """The row comes first: if it cannot be written, the change is not made."""
    world18.sql.execute("alter table cdcbridge.audit add constraint full_disk check (action <> 'pause')")
    with session(guarded, ADMIN) as client:
        answer = client.post("/consumers/billing/pause", data={"proof": proof(client)})
        assert answer.status_code >= 400
    assert world18.value(PAUSED) is False


def test_a_browser_gets_a_page_for_each_error(guarded: str) -> None:
    with httpx.Client(base_url=guarded, trust_env=False, headers={"Accept": "text/html"}) as client:
        answer = client.post("/consumers/billing/pause", data={})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2F"), "the session has ended"
        for method, path in (("GET", "/nothing"), ("GET", "/consumers/"), ("GET", "/logout")):
            answer = client.request(method, path)
            assert answer.status_code == 404 and "<h1" in answer.text and "content-security-policy" in answer.headers
        assert client.get("/api/nothing").headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(("settings", "token", "shown"), [
    ({"tokens": TOKENS}, ADMIN, True),
    ({"tokens": TOKENS, "browse": False}, VIEWER, False),
    ({"tokens": TOKENS, "mask": {"name": "hash"}}, VIEWER, False),
    ({"tokens": TOKENS, "mask": {"name": "hash"}}, ADMIN, True),
])  # fmt: skip
def test_the_query_in_an_alert_is_for_those_who_may_see_data(
    world18: World, settings: dict[str, Any], token: str, shown: bool
) -> None:
    live(world18)
    world18.rows(
        "insert into alert_conditions (rule, subject, severity, message, query, since, began_at)"
        " values ('xmin_held', 'store: pid 7', 'warning', 'It is open.', 'select a_secret', now(), now()) returning 1"
    )
    with serving(world18, **settings) as url, session(url, token) as client:
        page = client.get("/alarms").text
    assert "It is open." in page and ("select a_secret" in page) is shown

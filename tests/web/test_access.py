"""Who may call the API, and what each role may do."""

from __future__ import annotations

import itertools
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from cdcbridge.config.web import ApiToken
from cdcbridge.web.access import LOCAL, Caller, Failures, caller_of
from cdcbridge.web.problems import RequestRefused
from tests.harness.brokers.certificates import Certificates
from tests.harness.world import World
from tests.web.conftest import ADMIN, BILLING, OPERATOR, TOKENS, VIEWER, client, declare, problem, serving

CALLS: dict[str, tuple[str, str, Any]] = {
    "look": ("GET", "/api/consumers/billing", None),
    "read": ("GET", "/api/consumers/billing/messages", None),
    "deliver": ("POST", "/api/consumers/billing/receive", {}),
    "publish": ("POST", "/api/topics/t/publish", {"messages": [{"data": 1}]}),
    "redrive": ("POST", "/api/consumers/billing/dead/redrive", {"ids": []}),
    "operate": ("POST", "/api/consumers/billing/resume", None),
}
MAY = {
    ADMIN: set(CALLS),
    OPERATOR: {"look", "read", "redrive", "operate"},
    BILLING: {"look", "read", "deliver", "publish", "redrive"},
    VIEWER: {"look", "read"},
}


def test_each_role_may_do_what_it_says_and_nothing_else(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url:
        for (token, may), (action, (method, path, body)) in itertools.product(MAY.items(), CALLS.items()):
            with client(url, token) as http:
                answer = http.request(method, path, json=body)
                assert answer.status_code == (200 if action in may else 403), (token, action, answer.text)
        with client(url, BILLING) as http:
            for path in ("/api/consumers/search", "/api/consumers/none", "/api/lag"):
                assert problem(http.get(path), 403)
            assert [one["name"] for one in http.get("/api/consumers").json()["consumers"]] == ["billing"]
            other = http.post("/api/topics/other/publish", json={"messages": [{"data": 1}]})
            assert "other" in problem(other, 403)["detail"]
        with client(url) as http:
            assert http.get("/live").status_code == http.get("/ready").status_code == 200
        log = world18.log("serve.log")
        assert "caller=billing" in log and not any(token in log for token in MAY)


def test_without_a_token_nothing_is_answered_and_ten_failures_are_enough(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url:
        with client(url) as http:
            refused = http.get("/api/consumers")
            assert "missing" in problem(refused, 401)["detail"] and "Bearer" in refused.headers["www-authenticate"]
        wrong = ["x", ADMIN[:-1], ADMIN + "x", ADMIN.upper(), "é", "a b", "x" * 2000, BILLING[::-1]]
        for token in wrong:
            headers = [(b"authorization", b"Bearer " + token.encode())]
            assert problem(httpx.get(f"{url}/api/consumers", headers=headers, trust_env=False), 401)
        with client(url) as http:
            assert problem(http.get("/api/consumers", headers={"Authorization": f"Basic {ADMIN}"}), 401)
        with client(url, "wrong") as http:
            late = http.get("/api/consumers")
            assert "10 logins" in problem(late, 429)["detail"]
            assert 1 <= int(late.headers["retry-after"]) <= 60
        with client(url, ADMIN) as http:
            assert http.get("/api/consumers").status_code == 200, "the others behind a proxy"


def test_an_api_for_others_needs_tokens(world18: World) -> None:
    world18.top_settings = {"api": {"listen": "0.0.0.0:9188"}}
    done = world18.run_program("serve")
    assert done.returncode == 2 and "give `tokens`" in done.stderr
    world18.top_settings = {"api": {"listen": "0.0.0.0:9188", "tokens": TOKENS}}
    done = world18.run_program("serve")
    assert done.returncode == 2 and "'billing', which is not a consumer" in done.stderr


def test_an_address_in_use_is_told(world18: World, url: str) -> None:
    world18.top_settings = {"api": {"listen": url.removeprefix("http://")}}
    done = world18.run_program("serve")
    assert done.returncode == 2 and "cannot listen" in done.stderr and "Traceback" not in done.stderr


def test_a_page_of_another_host_is_refused(world18: World, http: httpx.Client, url: str) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}, {"Host": ""}, {"Origin": "null"}):
        problem(http.post("/api/topics/t/publish", json={"messages": [{"data": 1}]}, headers=headers), 403)
    for headers in ({"Host": "["}, {"Host": "[zz]"}, {"Origin": "http://["}):
        problem(http.get("/api/consumers", headers=headers), 400)
    assert world18.value("select count(*) from messages") == 0
    for headers in ({"Origin": url}, {"Host": "localhost:1"}, {"Host": "[::1]"}):
        assert http.get("/api/consumers", headers=headers).status_code == 200


def test_failures_are_forgotten_after_a_minute() -> None:
    failures = Failures()
    for number in range(10):
        failures.refuse("1.2.3.4", number)
        failures.note("1.2.3.4", number)
    failures.refuse("1.2.3.5", 10)
    with pytest.raises(RequestRefused) as raised:
        failures.refuse("1.2.3.4", 20)
    assert raised.value.status == 429 and raised.value.headers == {"Retry-After": "40"}
    failures.refuse("1.2.3.4", 60.5)


def test_callers() -> None:
    tokens = [
        ApiToken(name="ops", token=SecretStr(ADMIN), role="admin"),
        ApiToken(name="billing", token=SecretStr(BILLING), role="consumer", consumers=("billing",)),
    ]
    assert caller_of(None, []) == LOCAL
    assert caller_of(f"bearer {BILLING}", tokens) == Caller("billing", "consumer", frozenset({"billing"}))
    assert caller_of(f"Bearer  {ADMIN} ", tokens) == Caller("ops", "admin")
    for header in (None, "", "Bearer", f"Basic {ADMIN}", ADMIN, f"Bearer {ADMIN},"):
        with pytest.raises(RequestRefused):
            caller_of(header, tokens)


def test_tls_by_file(world18: World, certificates: Certificates) -> None:
    declare(world18)
    files = {"cert": str(certificates.server), "key": str(certificates.server_key)}
    with serving(world18, tls=files, tokens=TOKENS) as url:
        assert url.startswith("https://127.0.0.1:")
        with client(url, ADMIN, verify=certificates.client_context()) as http:
            assert http.get("/api/consumers").status_code == 200
        with client(url, ADMIN) as http, pytest.raises(httpx.ConnectError, match="certificate"):
            http.get("/api/consumers")
    for wrong in ({**files, "cert": "/none.pem"}, {"cert": files["cert"], "key": files["cert"]}):
        world18.top_settings = {"api": {"listen": "127.0.0.1:0", "tls": wrong}}
        done = world18.run_program("serve")
        assert done.returncode == 2 and "api.tls" in done.stderr, done.stderr


def test_those_who_only_look_see_no_hidden_data(world18: World) -> None:
    """`browse` and `mask` hold for the roles that may not receive the messages anyway."""
    declare(world18)
    publish = "select cdcbridge.publish('t', 'k', '{\"email\": \"ada@example.com\", \"n\": 1.10}')"
    world18.sql.execute(publish.encode())
    world18.sql.execute("select cdcbridge.publish('t', null, '[1]')")
    world18.sql.execute(
        "select cdcbridge.nack('billing', array(select receipt from cdcbridge.receive('billing', 1)), dead => true)"
    )
    paths = ("/api/consumers/search/messages", "/api/consumers/billing/dead", "/api/log")
    with serving(world18, tokens=TOKENS, mask={"email": "last4"}) as url:
        for token, hidden in ((ADMIN, False), (VIEWER, True), (OPERATOR, True)):
            with client(url, token) as http:
                for path in paths:
                    text = http.get(path).text
                    assert ("ada@example" in text, '".com"' in text) == (not hidden, hidden), path
                    assert '"n":1.10' in text.replace(" ", "")
    with serving(world18, tokens=TOKENS, browse=["admin", "operator"]) as url:
        for token, status in ((ADMIN, 200), (VIEWER, 403), (OPERATOR, 200)):
            with client(url, token) as http:
                assert {http.get(path).status_code for path in paths} == {status}


def test_a_change_over_http_is_in_the_audit_log(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url, client(url, OPERATOR) as http:
        assert http.post("/api/consumers/billing/pause").status_code == 200
        assert http.post("/api/consumers/billing/dead/redrive", json={"filter": {"topic": "t"}}).status_code == 200
        problem(http.post("/api/consumers/billing/dead/redrive", json={"ids": [404]}), 404)
        problem(http.post("/api/consumers/billing/ack", json={"receipts": []}), 403)
    rows = world18.sql.execute(
        "select caller, role, action, subject, details from cdcbridge.audit order by id"
    ).fetchall()
    assert [row[:4] for row in rows] == [
        ("night", "operator", action, "billing") for action in ("pause", "redrive", "redrive")
    ]
    assert rows[1][4] == {"filter": {"topic": "t"}, "redriven": 0, "not_wanted": 0, "undecidable": 0}
    assert "404" in rows[2][4]["error"]

"""The endpoints, called over HTTP against a process and a real store."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, store_database
from tests.web.conftest import client, declare, problem, serving

C = "/api/consumers/billing"


def publish(http: httpx.Client, *messages: dict[str, Any], topic: str = "t") -> list[dict[str, Any]]:
    answer = http.post(f"/api/topics/{topic}/publish", json={"messages": list(messages)})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["messages"]
    return found


def receive(http: httpx.Client, consumer: str = "billing", **body: Any) -> list[dict[str, Any]]:
    answer = http.post(f"/api/consumers/{consumer}/receive", json=body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["messages"]
    return found


def test_publish_receive_and_ack(http: httpx.Client) -> None:
    published = publish(http, {"key": "a", "data": {"id": 1}}, {"data": [1, None]}, {"key": "b", "data": None})
    assert [one["duplicate"] for one in published] == [False] * 3
    found = receive(http, max_messages=2)
    assert [(one["seq"], one["topic"], one["key"], one["data"]["record"]) for one in found] == [
        (published[0]["seq"], "t", "a", {"id": 1}),
        (published[1]["seq"], "t", None, [1, None]),
    ]
    assert found[0]["deliver_count"] == 1 and found[0]["receipt"]
    assert http.post(f"{C}/ack", json={"receipts": [one["receipt"] for one in found]}).json() == {"acked": 2}
    stale = {"receipts": [found[0]["receipt"]]}
    assert http.post(f"{C}/ack", json=stale).json() == {"acked": 0}
    assert problem(http.post(f"{C}/ack", json={**stale, "strict": True}), 409)["code"] == "CB006"
    assert [one["seq"] for one in receive(http)] == [published[2]["seq"]]


def test_a_number_keeps_all_its_digits(http: httpx.Client) -> None:
    number = b"12345678901234567890.12345678901234567890"
    body = b'{"messages": [{"data": {"n": ' + number + b"}}]}"
    assert http.post("/api/topics/t/publish", content=body).status_code == 200
    assert number in http.post(f"{C}/receive", json={}).content


def test_a_repeated_message_is_a_duplicate(http: httpx.Client) -> None:
    first = publish(http, {"data": 1, "dedup_id": "x"}, {"data": 2}, {"data": 3, "dedup_id": "y"})
    again = publish(http, {"data": 1, "dedup_id": "x"}, {"data": 4})
    assert [one["duplicate"] for one in first] == [False, False, False]
    assert again[0] == {"seq": first[0]["seq"], "duplicate": True}
    assert not again[1]["duplicate"]


def test_all_messages_of_a_request_are_published_or_none(http: httpx.Client) -> None:
    far = {"data": 1, "deliver_at": "2999-01-01T00:00:00Z"}
    answer = http.post("/api/topics/t/publish", json={"messages": [{"data": 1}, far]})
    assert problem(answer, 422)["code"] == "CB004"
    assert receive(http) == []


def test_nack_extend_and_dead_letters(http: httpx.Client) -> None:
    publish(http, {"key": "k", "data": 1})
    (first,) = receive(http)
    assert http.post(f"{C}/extend", json={"receipts": [first["receipt"]], "visibility_timeout": "1m"}).json() == {
        "extended": 1
    }
    assert http.post(f"{C}/nack", json={"receipts": [first["receipt"]], "delay": 0, "reason": "later"}).json() == {
        "nacked": 1
    }
    (second,) = receive(http, wait=5)
    assert second["deliver_count"] == 2
    http.post(f"{C}/nack", json={"receipts": [second["receipt"]], "reason": "broken"})
    (letter,) = http.get(f"{C}/dead", params={"reason": "max_deliveries"}).json()["dead_letters"]
    assert letter["deliver_count"] == 2 and "broken" in str(letter)
    assert http.get(f"{C}/dead", params={"topic": "none"}).json() == {"dead_letters": []}
    assert problem(http.post(f"{C}/dead/redrive", json={"ids": [letter["id"] + 1]}), 404)["code"] == "CB007"
    assert http.post(f"{C}/dead/redrive", json={"ids": [letter["id"]]}).json() == {"redriven": 1}
    (third,) = receive(http)
    http.post(f"{C}/nack", json={"receipts": [third["receipt"]], "dead": True})
    assert http.post(f"{C}/dead/redrive", json={"filter": {"key": "other"}}).json()["redriven"] == 0
    assert http.post(f"{C}/dead/redrive", json={"filter": {}}).json()["redriven"] == 1
    assert "either" in problem(http.post(f"{C}/dead/redrive", json={}), 422)["detail"]


def test_messages_are_shown_and_not_delivered(http: httpx.Client) -> None:
    publish(http, {"data": 1}, {"data": 2})
    for _ in range(2):
        shown = http.get(f"{C}/messages", params={"limit": 1}).json()["messages"]
        assert [one["receipt"] for one in shown] == [None]
    assert len(receive(http)) == 2


def test_a_stream_is_read_and_committed(http: httpx.Client) -> None:
    publish(http, *({"key": "k", "data": n} for n in range(3)))
    of = "/api/streams/audit"
    found = http.post(f"{of}/read", json={"max_messages": 2, "wait": 5}).json()["messages"]
    assert [one["data"]["record"] for one in found] == [0, 1]
    last = found[-1]
    commit = {"partition": last["partition"], "seq": last["seq"], "receipt": last["receipt"]}
    assert problem(http.post(f"{of}/commit", json={**commit, "receipt": None}), 409)["code"] == "CB006"
    assert http.post(f"{of}/commit", json=commit).json() == {"moved": True}
    assert [one["data"]["record"] for one in http.post(f"{of}/read", json={"wait": 5}).json()["messages"]] == [2]
    assert http.post(f"{of}/seek", json={"target": "earliest"}).json()["partitions"] > 0
    assert len(http.post(f"{of}/read", json={"wait": 5}).json()["messages"]) == 3


def test_pause_and_resume(http: httpx.Client) -> None:
    publish(http, {"data": 1})
    assert http.post(f"{C}/pause").json() == {"paused": "billing"}
    assert receive(http) == []
    assert http.get(C).json()["consumer"]["paused"] is True
    assert http.post(f"{C}/resume").json() == {"resumed": "billing"}
    assert len(receive(http)) == 1


def test_states(http: httpx.Client) -> None:
    publish(http, {"data": 1})
    listed = {one["name"]: one for one in http.get("/api/consumers").json()["consumers"]}
    assert listed.keys() == {"billing", "search", "audit"} and listed["billing"]["pending"] == 1
    shown = http.get(C).json()
    assert shown["lag"]["pending"] == 1 and shown["consumer"]["mode"] == "queue"
    assert {one["name"] for one in http.get("/api/lag").json()["consumers"]} == listed.keys()
    assert http.get("/live").text == "live\n" and http.get("/ready").text == "ready\n"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "told"),
    [
        ("POST", "/api/consumers/none/receive", b"{}", 404, "none"),
        ("GET", "/api/consumers/none", b"", 404, "none"),
        ("POST", "/api/consumers/audit/receive", b"{}", 422, "audit"),
        ("POST", "/api/streams/billing/read", b"{}", 422, "billing"),
        ("POST", f"{C}/receive", b"{", 400, "JSON"),
        ("POST", f"{C}/receive", b"[]", 422, "body"),
        ("POST", f"{C}/receive", b'{"max_messages": 0}', 422, "max_messages"),
        ("POST", f"{C}/receive", b'{"wait": "1h"}', 422, "wait"),
        ("POST", f"{C}/receive", b'{"visibilty_timeout": 1}', 422, "visibilty_timeout"),
        ("POST", f"{C}/receive", b'{"visibility_timeout": "400d"}', 422, "30 days"),
        ("POST", f"{C}/ack", b'{"receipts": ["nonsense"]}', 422, "nonsense"),
        ("POST", f"{C}/ack", b'{"receipts": ["a\\u0000b"]}', 422, "NUL"),
        ("POST", "/api/topics/a.b/publish", b'{"messages": [{"data": 1}]}', 422, "a.b"),
        ("POST", "/api/topics/t/publish", b'{"messages": [{}]}', 422, "data"),
        ("POST", "/api/topics/t/publish", b'{"messages": [{"data": 1, "key": "\\u0000"}]}', 422, "u0000"),
        ("POST", "/api/streams/audit/seek", b'{"target": "nowhere"}', 422, "nowhere"),
        ("POST", "/api/streams/audit/commit", b'{"partition": 0, "seq": 18446744073709551615}', 422, "seq"),
        ("POST", "/api/consumers/none/dead/redrive", b'{"filter": {}}', 404, "none"),
        ("POST", f"{C}/dead/redrive", b'{"filter": {"key": "\\u0000"}}', 422, "NUL"),
        ("POST", f"{C}/dead/redrive", b'{"ids": [' + b'"a",' * 9000 + b"1]}", 422, "ids.0"),
        ("POST", f"{C}/receive", b"{" + b",".join(b'"k%d":1' % n for n in range(90)) + b"}", 422, "90 keys"),
        ("POST", "/api/topics/t/publish", b'{"messages": [{"data": 1, "deliver_at": 20270101}]}', 422, "deliver_at"),
        ("GET", "/api/consumers/", b"", 404, "/api/consumers/"),
        ("GET", "/api/nothing", b"", 404, "/api/nothing"),
        ("GET", f"{C}/receive", b"", 405, "GET"),
        ("GET", "/api/consumers/%00/messages", b"", 422, "NUL"),
    ],
)
def test_what_is_wrong_is_told(http: httpx.Client, method: str, path: str, body: bytes, status: int, told: str) -> None:
    assert told in problem(http.request(method, path, content=body), status)["detail"]


def test_a_request_that_is_too_large(world18: World, url: str) -> None:
    with serving(world18, max_body="1kB") as small, client(small) as http:
        assert "1024 bytes" in problem(http.post(f"{C}/receive", content=b" " * 2000), 413)["detail"]
        pieces = iter([b"x" * 600] * 2)
        assert problem(http.post(f"{C}/receive", content=pieces), 413)


def test_a_long_poll_is_woken_by_the_message(world18: World, http: httpx.Client, url: str) -> None:
    assert receive(http) == []
    found: list[Any] = []
    with client(url) as other:
        poll = threading.Thread(target=lambda: found.extend([receive(other, wait=20), time.monotonic()]))
        poll.start()
        eventually(lambda: world18.value("select count(*) from pg_stat_activity where query like 'listen %'") == 1)
        time.sleep(0.5)  # it waits
        published = time.monotonic()
        publish(http, {"data": 1})
        poll.join(20)
    assert len(found[0]) == 1 and found[1] - published < 1


def test_a_waiting_call_ends_with_the_process(world18: World) -> None:
    declare(world18)
    found: list[Any] = []
    with serving(world18) as url:
        poll = threading.Thread(target=lambda: found.append(receive(http, wait=50)))
        with client(url) as http:
            http.get("/live")
            poll.start()
            eventually(lambda: "next_visible" in str(world18.rows("select query from pg_stat_activity")), "it waits")
            began = time.monotonic()
            world18._processes[-1].terminate()
            poll.join(30)
    assert found == [[]] and time.monotonic() - began < 10


def test_a_caller_that_disconnects_gives_its_messages_back(world18: World, http: httpx.Client, url: str) -> None:
    with client(url) as other, pytest.raises(httpx.ReadTimeout):
        other.post(f"{C}/receive", json={"wait": 20}, timeout=1)
    publish(http, {"data": 1})
    (message,) = eventually(lambda: receive(http, wait=1))
    assert message["deliver_count"] == 1


def test_a_caller_that_disconnects_during_the_claim_gives_its_messages_back(
    world18: World, http: httpx.Client, url: str
) -> None:
    publish(http, {"data": 1})
    with psycopg.connect(world18.dsn) as held, client(url) as other:
        held.execute("lock table cdcbridge_internal.leases in access exclusive mode")
        with pytest.raises(httpx.ReadTimeout):
            other.post(f"{C}/receive", json={}, timeout=1)
        held.rollback()
    (message,) = eventually(lambda: receive(http, wait=1))
    assert message["deliver_count"] == 1


def test_a_restart_of_the_store_costs_no_call(own15: EmbeddedServer, tmp_path: Path) -> None:
    with store_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)
        declare(world)
        with serving(world) as url, client(url) as http:
            found: list[Any] = []
            polls = [
                threading.Thread(target=lambda: found.append(receive(http, max_messages=1, wait=20))) for _ in range(3)
            ]
            publish(http, {"data": 1})
            (message,) = receive(http)
            http.post(f"{C}/ack", json={"receipts": [message["receipt"]]})
            own15.stop()
            told = problem(http.post(f"{C}/receive", json={}), 503)
            assert "No such file" in told["detail"], "the reason"
            assert http.get("/live").status_code == 200 and http.get("/ready").status_code == 503
            own15.start()
            for poll in polls:
                poll.start()
            publish(http, *({"data": n} for n in range(3)))
            for poll in polls:
                poll.join(30)
            assert sum(len(one) for one in found) == 3
        world.close()


def test_a_stream_whose_reader_has_gone_is_free(http: httpx.Client, url: str) -> None:
    with client(url) as other, pytest.raises(httpx.ReadTimeout):
        other.post("/api/streams/audit/read", json={"wait": 20, "lease": "1h"}, timeout=1)
    publish(http, {"key": "k", "data": 1})
    found = http.post("/api/streams/audit/read", json={"wait": 10}).json()["messages"]
    assert [one["data"]["record"] for one in found] == [1]


def test_the_document_describes_every_path(http: httpx.Client) -> None:
    found = http.get("/api/openapi.json").json()
    assert found["openapi"] == "3.1.0"
    assert {f"{method.upper()} {path}" for path, methods in found["paths"].items() for method in methods} >= {
        "GET /api/consumers",
        "POST /api/consumers/{name}/receive",
        "POST /api/topics/{topic}/publish",
        "POST /api/streams/{name}/read",
    }
    for methods in found["paths"].values():
        for one in methods.values():
            assert one["summary"].endswith(".") and "403" in one["responses"]

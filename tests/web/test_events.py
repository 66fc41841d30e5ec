"""Server-sent events, read by a client of another project and by plain sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from httpx_sse import ServerSentEvent, connect_sse

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, store_database
from tests.web.conftest import ADMIN, BILLING, TOKENS, VIEWER, client, declare, problem, serving
from tests.web.test_rest import C, publish, receive

EVENTS = f"{C}/events"
FOLLOW = "/api/consumers/audit/events"


@contextmanager
def events(
    http: httpx.Client, path: str = EVENTS, after: str = "", **query: Any
) -> Iterator[Iterator[ServerSentEvent]]:
    headers = {"Last-Event-ID": after} if after else {}
    limit = 12  # seconds. After 15, a comment would follow, and the next event could be awaited for ever
    with connect_sse(http, "GET", path, params=query or None, headers=headers, timeout=limit) as source:
        assert source.response.status_code == 200, source.response.read()
        yield source.iter_sse()


def records(found: Iterator[ServerSentEvent], count: int) -> list[Any]:
    return [json.loads(message(found).data)["data"]["record"] for _ in range(count)]


def message(found: Iterator[ServerSentEvent]) -> ServerSentEvent:
    return next(one for one in found if one.event == "message")


def in_flight(http: httpx.Client, consumer: str = "billing") -> int:
    return int(http.get(f"/api/consumers/{consumer}").json()["lag"]["in_flight"])


def test_each_event_is_a_delivery_that_is_acked_over_rest(http: httpx.Client, url: str) -> None:
    publish(http, {"key": "a", "data": 1})
    with client(url) as other, events(other) as found:
        first = next(found)
        delivered = json.loads(first.data)
        assert (first.event, first.id) == ("message", str(delivered["seq"]))
        assert delivered["data"]["record"] == 1 and delivered["deliver_count"] == 1
        assert http.post(f"{C}/ack", json={"receipts": [delivered["receipt"]]}).json() == {"acked": 1}
        began = time.monotonic()
        publish(http, {"data": 2}, {"data": 3})
        assert records(found, 2) == [2, 3] and time.monotonic() - began < 8, "a notification wakes it"
    assert in_flight(http) == 2


def test_data_of_several_lines_stays_whole(http: httpx.Client, url: str) -> None:
    body = b'{"messages": [{"data": {"a":\n1,\r\n"b": "x\\ny",\r"c": 3}}]}'
    assert http.post("/api/topics/t/publish", content=body).status_code == 200
    with client(url) as other, events(other) as found:
        assert records(found, 1) == [{"a": 1, "b": "x\ny", "c": 3}]


def test_a_slow_reader_holds_one_batch_and_gives_back_the_unsent_ones(http: httpx.Client, url: str) -> None:
    for _ in range(3):
        publish(http, *({"data": "x" * 1_000_000} for _ in range(10)))
    with slow_reader(url, f"{EVENTS}?max_messages=10"):
        eventually(lambda: in_flight(http) == 10, "the batch is claimed")
        time.sleep(2)
        assert in_flight(http) == 10, "and no other one"
    sent = eventually(lambda: (number := in_flight(http)) < 10 and number, "the unsent ones are given back")
    left = [one for _ in range(8) for one in receive(http, max_messages=5)]
    assert len(left) == 30 - sent and {one["deliver_count"] for one in left} == {1}


@contextmanager
def slow_reader(url: str, path: str) -> Iterator[socket.socket]:
    """A caller that reads nothing, with small buffers."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = urlsplit(url).netloc.split(":")
        raw.connect((host, int(port)))
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        yield raw


def test_a_head_request_claims_nothing(http: httpx.Client) -> None:
    publish(http, {"data": 1})
    answer = http.head(EVENTS)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    assert receive(http)[0]["deliver_count"] == 1


def test_a_stream_is_followed_and_resumed_after_the_last_event(world18: World, http: httpx.Client, url: str) -> None:
    publish(http, *({"key": f"k{n}", "data": n} for n in range(5)))
    with client(url) as other, events(other, f"{FOLLOW}?from=earliest&max_messages=2") as found:
        assert records(found, 2) == [0, 1]
        last = message(found)
    publish(http, *({"key": f"k{n}", "data": n} for n in range(5, 8)))
    with client(url) as other, events(other, FOLLOW, after=last.id) as found:
        assert records(found, 5) == [3, 4, 5, 6, 7]
        began = time.monotonic()
        publish(http, {"data": 8})
        assert records(found, 1) == [8] and time.monotonic() - began < 8
    offsets = "select sum(messages) from cdcbridge.group_lag('audit')"
    assert world18.value(offsets) == 9, "no offset has moved"


def test_a_follower_of_a_sparse_stream_is_told_its_position(world18: World, http: httpx.Client, url: str) -> None:
    world18.execute(
        "insert into cdcbridge.messages (seq, topic, partition, data) select n, 'other', 0, '{}'"
        " from generate_series(1, 250000) n",
        "select setval('cdcbridge.messages_seq', 250000)",
    )
    with client(url) as other, events(other, f"{FOLLOW}?from=earliest") as found:
        positions = [next(found) for _ in range(3)]
        assert [one.id for one in positions] == ["100000", "200000", "250000"]
        assert {one.event for one in positions} == {"position"}
        publish(http, {"data": "x"})
        assert records(found, 1) == ["x"]


def test_all_followers_get_each_message(http: httpx.Client, url: str) -> None:
    with client(url) as one, client(url) as two, events(one, FOLLOW) as first, events(two, FOLLOW) as second:
        for number in range(3):
            publish(http, {"data": number})
            assert records(first, 1) == records(second, 1) == [number]


def test_a_new_follower_begins_at_the_end_and_knows_its_place(http: httpx.Client, url: str) -> None:
    publish(http, {"data": 1})
    with http.stream("GET", FOLLOW) as answer:
        lines = answer.iter_lines()
        told = [next(lines) for _ in range(4)]
        assert told == ["event: position", "id: 1", 'data: {"seq":1}', ""], "so that nothing is missed after a cut"


def test_a_message_of_an_open_transaction_is_not_missed(world18: World, http: httpx.Client, url: str) -> None:
    with psycopg.connect(world18.dsn) as late, client(url) as other, events(other, FOLLOW) as found:
        late.execute("select cdcbridge.publish('t', 'k', '\"late\"')")
        publish(http, {"data": "early"})
        late.commit()
        assert records(found, 2) == ["late", "early"]


def test_an_idle_stream_gets_comments(http: httpx.Client) -> None:
    with http.stream("GET", EVENTS) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(2)] == [":", ":"]


@pytest.mark.parametrize("path", [EVENTS, FOLLOW])
def test_a_stream_ends_with_the_process(world18: World, path: str) -> None:
    declare(world18)
    with serving(world18) as url, client(url) as http:
        with client(url) as other, events(other, path) as found:
            publish(http, {"data": 1})
            assert records(found, 1) == [1]
            began = time.monotonic()
            world18._processes[-1].terminate()
            assert [one for one in found if one.event == "message"] == []
        world18._processes[-1].wait(30)
    assert time.monotonic() - began < 10
    if path == EVENTS:
        assert world18.value("select in_flight from cdcbridge.consumer_lag() where name = 'billing'") == 1


def test_a_reader_that_reads_nothing_does_not_delay_the_end(world18: World) -> None:
    declare(world18)
    with serving(world18) as url, client(url) as http:
        publish(http, *({"data": "x" * 1_000_000} for _ in range(10)))
        with slow_reader(url, EVENTS):
            eventually(lambda: in_flight(http) == 10, "the batch is claimed")
            world18._processes[-1].terminate()
            assert world18._processes[-1].wait(15) == 0
    assert world18.value("select pending from cdcbridge.consumer_lag() where name = 'billing'") > 0, "given back"


def test_the_number_of_streams_is_limited(world18: World) -> None:
    declare(world18)
    with serving(world18, event_streams=1) as url, client(url) as http, client(url) as other:
        with events(other):
            answer = http.get(EVENTS)
            assert "api.event_streams" in problem(answer, 503)["detail"] and answer.headers["retry-after"]
        publish(http, {"data": 1})  # wakes the stream, which then notices that its caller has gone
        eventually(lambda: http.head(EVENTS).status_code == 200)
        assert receive(http)[0]["deliver_count"] == 1


def test_a_restart_of_the_store_ends_no_stream(own15: EmbeddedServer, tmp_path: Path) -> None:
    with store_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)
        declare(world)
        with (
            serving(world) as url,
            client(url) as http,
            client(url) as one,
            client(url) as two,
            events(one) as deliveries,
            events(two, FOLLOW) as followed,
        ):
            publish(http, {"data": 1})
            assert records(deliveries, 1) == records(followed, 1) == [1]
            own15.stop()
            own15.start()
            eventually(lambda: http.get("/ready").status_code == 200)
            publish(http, {"data": 2})
            assert records(deliveries, 1) == records(followed, 1) == [2]
        world.close()


def test_a_consumer_that_is_removed_is_told(world18: World, http: httpx.Client, url: str) -> None:
    with client(url) as other, events(other) as found:
        eventually(lambda: "next_visible" in str(world18.rows("select query from pg_stat_activity")), "it waits")
        world18.execute("update cdcbridge.consumers set name = 'renamed' where name = 'billing'")
        publish(http, {"data": 1})  # wakes it
        told = next(found)
        assert told.event == "problem" and json.loads(told.data)["code"] == "CB001"
        assert list(found) == []


def test_calls_that_are_refused(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url, client(url, BILLING) as http:
        problem(http.get(FOLLOW), 403)
        problem(http.get(EVENTS, params={"max_messages": 0}), 422)
        with client(url, VIEWER) as viewer:
            problem(viewer.get(EVENTS), 403)
        with client(url, ADMIN) as admin:
            problem(admin.get("/api/consumers/none/events"), 404)
            problem(admin.get(FOLLOW, headers={"Last-Event-ID": "x"}), 422)
            problem(admin.get(FOLLOW, headers={"Last-Event-ID": "99"}), 422)
            problem(admin.get(FOLLOW, params={"from": "nowhere"}), 422)
            publish(admin, {"data": 1})
            world18.execute("select setval('cdcbridge.messages_seq', 1000000)")
            world18.execute("select cdcbridge_internal.create_segments()")
            world18.execute("drop table cdcbridge_internal.messages_000000")
            assert problem(admin.get(FOLLOW, headers={"Last-Event-ID": "1"}), 410)["code"] == "CB009"

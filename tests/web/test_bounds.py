"""What bounds an answer, a login and the end of the process."""

from __future__ import annotations

import socket
import threading
import time

import httpx
import pytest

from cdcbridge.web.access import network_of
from tests.harness.world import World, eventually
from tests.web.conftest import client, declare, problem, serving
from tests.web.test_rest import C, publish, receive

LARGE = "x" * 1000  # 10 of them are larger than MOST
MOST = "10kB"


def test_a_large_answer_has_fewer_messages_and_the_others_are_free(world18: World) -> None:
    declare(world18)
    with serving(world18, max_answer=MOST) as url, client(url) as http:
        publish(http, *({"key": f"k{n}", "data": LARGE} for n in range(20)))
        seqs = []
        while found := receive(http, max_messages=100):
            assert 1 < len(found) < 10 and {one["deliver_count"] for one in found} == {1}
            seqs += [one["seq"] for one in found]
            http.post(f"{C}/ack", json={"receipts": [one["receipt"] for one in found]})
        assert seqs == list(range(1, 21))
        assert world18.value("select count(*) from cdcbridge_internal.leases where consumer_id = 1") == 0


def test_one_message_is_always_whole(world18: World) -> None:
    declare(world18)
    with serving(world18, max_answer="100B") as url, client(url) as http:
        publish(http, {"data": LARGE}, {"data": LARGE})
        assert [one["data"]["record"] for one in receive(http, max_messages=5)] == [LARGE]
        assert [one["data"]["record"] for one in receive(http, max_messages=5)] == [LARGE]


def test_a_large_read_of_a_stream_continues_after_the_commit(world18: World) -> None:
    declare(world18)
    of = "/api/streams/audit"
    with serving(world18, max_answer=MOST) as url, client(url) as http:
        publish(http, *({"key": "k", "data": LARGE} for _ in range(20)))
        seqs: list[int] = []
        while found := http.post(f"{of}/read", json={"max_messages": 100}).json()["messages"]:
            assert 1 < len(found) < 10
            seqs += [one["seq"] for one in found]
            last = {name: found[-1][name] for name in ("partition", "seq", "receipt")}
            assert http.post(f"{of}/commit", json=last).json() == {"moved": True}
        assert seqs == list(range(1, 21))


def test_a_large_page_of_the_log_names_the_next_one(world18: World) -> None:
    declare(world18)
    with serving(world18, max_answer=MOST) as url, client(url) as http:
        publish(http, *({"data": LARGE} for _ in range(20)))
        seqs: list[int] = []
        query: dict[str, int] = {"limit": 15}
        while True:
            answer = http.get("/api/log", params=query).json()
            assert 1 < len(answer["messages"]) < 10
            seqs += [one["seq"] for one in answer["messages"]]
            if answer["next"] is None:
                break
            query["from"] = answer["next"]
        assert seqs == list(range(20, 0, -1))


def test_a_topic_with_a_slash(world18: World) -> None:
    world18.consumers = []
    world18.consumer("billing", (), topics=["shop/orders"])
    world18.json("consumers", "apply", "--json")
    with serving(world18) as url, client(url) as http:
        publish(http, {"data": 1}, topic="shop/orders")
        publish(http, {"data": 2}, topic="shop%2Forders")
        assert [one["topic"] for one in receive(http)] == ["shop/orders"] * 2
        problem(http.post("/api/topics//publish", json={"messages": [{"data": 1}]}), 422)


def test_the_lease_of_a_stream_is_extended(http: httpx.Client) -> None:
    of = "/api/streams/audit"
    publish(http, {"key": "k", "data": 1})
    (message,) = http.post(f"{of}/read", json={"lease": 4}).json()["messages"]
    lease = {"partition": message["partition"], "receipt": message["receipt"], "lease": "1m"}
    assert http.post(f"{of}/extend", json=lease).json() == {"extended": True}
    time.sleep(4.5)
    assert http.post(f"{of}/read", json={}).json() == {"messages": []}
    assert (
        problem(http.post(f"{of}/extend", json={**lease, "receipt": f"{message['partition']}-1"}), 409)["code"]
        == "CB006"
    )
    problem(http.post(f"{of}/extend", json={"partition": 0}), 422)


@pytest.mark.parametrize(
    ("address", "network"),
    [("192.0.2.7", "192.0.2.7"), ("2001:db8::7", "2001:db8::/64"), ("2001:db8:0:0:ffff::1", "2001:db8::/64"),
     ("2001:db8:0:1::7", "2001:db8:0:1::/64"), ("::ffff:192.0.2.7", "192.0.2.7"), ("fe80::1%eth0", "fe80::/64"),
     ("", "")],
)  # fmt: skip
def test_the_addresses_of_one_network_count_together(address: str, network: str) -> None:
    assert network_of(address) == network


def test_one_consumer_is_measured_alone(world18: World, http: httpx.Client) -> None:
    publish(http, {"data": 1})
    before = scans(world18)
    assert http.get("/api/consumers/search").json()["lag"]["pending"] == 1
    after = eventually(lambda: (found := scans(world18)) != before and found, "the scan is in the statistics")
    assert after["waiting_2"] > before["waiting_2"] and after["waiting_1"] == before["waiting_1"]


def scans(world: World) -> dict[str, int]:
    query = (
        "select relname, coalesce(seq_scan, 0) + coalesce(idx_scan, 0) from pg_stat_user_tables"
        " where relname like 'waiting__'"
    )
    return dict(world.rows(query))


def test_a_measurement_that_hangs_does_not_delay_the_end(world18: World) -> None:
    declare(world18)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # it accepts, and never answers
        port = deaf.getsockname()[1]
        hosts = ",".join(["127.0.0.1"] * 6)
        world18.store_dsn = world18.dsn
        world18.settings = {**world18.settings, "dsn": f"host={hosts} port={port} user=postgres dbname=none"}
        with serving(world18) as url, client(url) as http:
            found: list[int] = []
            call = threading.Thread(target=lambda: found.append(http.get("/api/lag").status_code))
            call.start()
            deaf.accept()[0].close()
            kept = deaf.accept()
            began = time.monotonic()
            world18._processes[-1].terminate()
            assert world18._processes[-1].wait(15) == 0
            call.join(10)
            kept[0].close()
    assert found == [503] and time.monotonic() - began < 12

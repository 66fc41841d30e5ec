"""/metrics and /api/metrics of `serve`: those of `run`, and those of the API."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cdcbridge.demo.embedded import EmbeddedServer
from tests.harness.world import World, eventually, store_database
from tests.integration.test_monitor import documented
from tests.web.conftest import BILLING, TOKENS, VIEWER, client, declare, problem, serving
from tests.web.test_rest import C, publish, receive

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(http: httpx.Client, path: str = "/metrics") -> Samples:
    answer = http.get(path)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return {
        (
            sample.name,
            tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("source", "slot"))),
        ): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"cdcbridge_{name}", tuple(sorted(labels.items()))))


def test_the_metrics_of_run_and_of_the_api(http: httpx.Client, url: str) -> None:
    publish(http, {"data": 1}, {"data": 2})
    receive(http, max_messages=1)

    def wait() -> None:
        with client(url) as other:
            receive(other, "search", wait=20)

    poll = threading.Thread(target=wait)
    publish(http, {"data": 3})
    receive(http, "search", max_messages=100)
    poll.start()

    def look() -> Samples | None:
        found = samples(http)
        return found if value(found, "api_open_polls") == 1 else None

    found = eventually(look, "the poll waits")
    billing = {"consumer": "billing", "mode": "queue"}
    assert value(found, "consumer_pending_messages", **billing) == 2
    assert value(found, "consumer_in_flight_messages", **billing) == 1
    assert value(found, "up", database="store") == value(found, "up", database="source") == 1
    called = {"method": "POST", "path": "/api/consumers/{name}/receive", "status": "200"}
    assert value(found, "api_request_seconds_count", **called) == 2
    topic = {"method": "POST", "path": "/api/topics/{topic}/publish", "status": "200"}
    assert value(found, "api_request_seconds_count", **topic) == 2
    assert value(found, "api_sessions_in_use") == 0 and value(found, "api_event_streams") == 0
    assert value(found, "leader") is None, "the figures of a bridge are not those of this process"
    assert value(samples(http, "/api/metrics"), "up", database="store") == 1
    publish(http, {"data": 4})
    poll.join(30)


def test_the_reference_page_has_every_metric_of_the_api(http: httpx.Client) -> None:
    samples(http)
    served = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        if family.name.startswith("cdcbridge_api_") and not family.name.endswith("_created"):
            labels = {label for s in family.samples for label in s.labels} - {"source", "slot", "le"}
            served[family.name] = (family.type, frozenset(labels))
    assert served == documented(api=True)


def test_many_callers_cause_one_measurement(world18: World) -> None:
    declare(world18)
    world18.execute(f"alter database {world18.database} set track_functions = 'all'")
    measured = "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname = 'consumer_lag'"
    with serving(world18) as url, client(url) as http:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: samples(http), range(40)))
        eventually(lambda: world18.value(measured), "the call is in the statistics")
        assert world18.value(measured) <= 2


def test_a_store_that_is_away_leaves_no_old_values(own15: EmbeddedServer, tmp_path: Path) -> None:
    with store_database(own15) as database:
        world = World(own15, database, "pgoutput", tmp_path)
        declare(world)
        with serving(world) as url, client(url) as http:
            assert value(samples(http), "up", database="store") == 1
            own15.stop()
            time.sleep(5.1)  # the measurement is kept for five seconds
            found = samples(http)
            assert value(found, "up", database="store") == 0
            assert not any(name.startswith("cdcbridge_consumer") for name, _ in found)
            own15.start()
        world.close()


def test_tokens(world18: World) -> None:
    declare(world18)
    with serving(world18, tokens=TOKENS) as url:
        with client(url) as http:
            problem(http.get("/metrics"), 401)
        with client(url, BILLING) as http:
            problem(http.get("/metrics"), 403)
        with client(url, VIEWER) as http:
            assert value(samples(http), "up", database="store") == 1
            problem(http.post(f"{C}/pause"), 403)

"""What others see of a bridge: metrics, liveness, readiness, the watchdog; and the files in config/ that go by them."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from cdcbridge.config import Http
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import UsageError
from cdcbridge.observe.health import STALLED_AFTER, Health
from cdcbridge.observe.lag import measure
from cdcbridge.observe.metrics import Metrics
from cdcbridge.observe.monitor import HttpServer
from cdcbridge.routing.batch import AppendBatch
from cdcbridge.store.feeds import describe
from tests.harness.world import World, eventually

CONFIG = Path(__file__).parents[2] / "config"
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "METRICS.md"


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def samples(text: str) -> dict[str, float]:
    """Without the labels that every metric has."""
    return {
        f"{s.name}{{{','.join(f'{k}={v}' for k, v in sorted(s.labels.items()) if k not in ('source', 'slot'))}}}": s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


@pytest.fixture
def watched(world18: World) -> Iterator[tuple[World, int]]:
    port = free_port()
    world18.top_settings["http"] = {"listen": f"127.0.0.1:{port}"}
    world18.settings["heartbeat_interval"] = "500ms"
    world18.execute("create table t (id int primary key)")
    world18.consumer("orders")
    yield world18, port


def test_metrics_and_readiness_of_a_leader_and_a_stand_by(watched: tuple[World, int], tmp_path: Path) -> None:
    world, port = watched
    leader = world.start_process()
    eventually(world.active, "it streams")
    assert eventually(lambda: get(port, "/ready") == (200, "streaming\n"))
    assert get(port, "/live") == (200, "streaming\n")
    assert get(port, "/nothing")[0] == 404
    world.execute("insert into t select generate_series(1, 50)")
    world.messages(50)
    waiting = f"cdcbridge_consumer_pending_messages{{consumer=orders,mode=queue}}"  # noqa: F541
    found = eventually(lambda: (s := samples(get(port, "/metrics")[1])).get(waiting) == 50 and s, "the metrics tell")
    assert found["cdcbridge_messages_total{}"] == 50
    assert found["cdcbridge_append_seconds_count{}"] >= 1
    assert found["cdcbridge_leader{}"] == found["cdcbridge_ready{}"] == 1
    assert found["cdcbridge_slot_active{}"] == 1
    assert found["cdcbridge_slot_retained_bytes{}"] > 0
    assert found["cdcbridge_slot_wal_status{status=reserved}"] == 1
    assert found["cdcbridge_slot_wal_status{status=lost}"] == 0
    assert found["cdcbridge_up{database=source}"] == found["cdcbridge_up{database=store}"] == 1

    second = free_port()
    world.top_settings["http"] = {"listen": f"127.0.0.1:{second}"}
    other = world.start_process()
    status, text = eventually(
        lambda: (a := get(second, "/ready") if "standby" in world.log() else None) and a[0] == 200 and a
    )
    assert status == 200 and text.startswith("standby: ") and text.endswith("leads\n")
    assert samples(get(second, "/metrics")[1])["cdcbridge_leader{}"] == 0
    leader.terminate()
    assert leader.wait(30) == 0
    eventually(lambda: get(second, "/ready")[1] == "streaming\n", "the other streams")
    other.terminate()
    assert other.wait(30) == 0


def test_a_database_that_is_away_is_told_and_no_old_value_stands(own15: EmbeddedServer, tmp_path: Path) -> None:
    world = World(own15, "postgres", "wal2json", tmp_path)
    port = free_port()
    world.top_settings["http"] = {"listen": f"127.0.0.1:{port}"}
    world.settings["heartbeat_interval"] = "500ms"
    world.execute("create table t (id int primary key)")
    world.consumer("orders")
    process = world.start_process()
    eventually(
        lambda: "cdcbridge_slot_retained_bytes{" in get(port, "/metrics")[1] if "http.listening" in world.log() else 0
    )
    world.leave()
    own15.stop("immediate")
    _, why = eventually(lambda: (a := get(port, "/ready"))[0] == 503 and a, "it is not ready")
    assert why.startswith("retrying: ")
    assert get(port, "/live") == (200, "retrying\n"), "a new process would not help"
    text = eventually(lambda: samples(t := get(port, "/metrics")[1]).get("cdcbridge_up{database=source}") == 0 and t)
    assert "cdcbridge_slot_retained_bytes" not in text
    own15.start()
    eventually(lambda: get(port, "/ready") == (200, "streaming\n"), "it streams again")
    process.terminate()
    assert process.wait(30) == 0
    world.close()


def test_the_slot_is_told_while_the_store_is_away(own15: EmbeddedServer, world18: World) -> None:
    """That is when its WAL piles up."""
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    with world18.bridge():
        pass
    world18.store_dsn = own15.dsn("nowhere")
    result = world18.run_program("lag")
    assert (
        result.returncode == 1
        and world18.slot in result.stdout
        and "the state of the consumers is unknown" in result.stderr
    )
    found = world18.run_program("lag", "--json")
    told = json.loads(found.stdout)
    assert found.returncode == 1 and told["slots"][0]["name"] == world18.slot and "nowhere" in told["store_error"]
    health = Health()
    metrics = Metrics(health, "1", "src", "s")
    metrics.measurements.measured(measure(world18.config()))
    names = {
        s.name: s.value for family in metrics.registry.collect() for s in family.samples if "consumer" not in s.name
    }
    assert names["cdcbridge_slot_retained_bytes"] >= 0


def test_a_stalled_loop_is_503_on_both() -> None:
    now = [0.0]
    health = Health(lambda: now[0])
    with HttpServer(("127.0.0.1", 0), health, Metrics(health, "1", "src", "s")) as server:
        health.streams(1)
        assert get(server.port, "/live")[0] == get(server.port, "/ready")[0] == 200
        now[0] += STALLED_AFTER + 1
        assert get(server.port, "/live")[0] == get(server.port, "/ready")[0] == 503
        assert samples(get(server.port, "/metrics")[1])["cdcbridge_alive{}"] == 0


def test_an_address_that_is_taken_is_an_error_only_where_it_was_asked_for(watched: tuple[World, int]) -> None:
    world, port = watched
    health = Health()
    with HttpServer(("127.0.0.1", port), health, Metrics(health, "1", "src", "s")):
        with pytest.raises(UsageError, match="cannot listen"):
            HttpServer(("127.0.0.1", port), health, Metrics(health, "1", "src", "s"))
        process = world.start_process()
        assert process.wait(30) == 2
        assert f"cannot listen on 127.0.0.1:{port}" in world.log()
    assert Http(listen="[::1]:9187").address == ("::1", 9187)


def test_systemd_hears_that_it_is_ready_and_goes_on_and_nothing_when_it_hangs(
    watched: tuple[World, int], tmp_path: Path
) -> None:
    import signal

    world, _ = watched
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        process = world.start_process(
            environment={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
        )
        told = eventually(lambda: "READY=1" in (text := systemd.recv(4096).decode()) and text, "READY=1")
        assert "STATUS=streaming" in told
        while "WATCHDOG=1" not in systemd.recv(4096).decode():
            pass
        process.send_signal(signal.SIGSTOP)
        systemd.settimeout(2)
        with pytest.raises(TimeoutError):
            while True:
                systemd.recv(4096)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        systemd.settimeout(30)
        while "STOPPING=1" not in systemd.recv(4096).decode():
            pass
        assert process.wait(30) == 0


def everything() -> list[Metric]:
    """Every metric that a bridge can give, labels filled by a look that has everything."""
    from cdcbridge.alerts.metrics import AlertMetrics
    from cdcbridge.alerts.rules import Key
    from cdcbridge.alerts.tracking import Open
    from cdcbridge.observe.consumer_lag import ConsumerLag
    from cdcbridge.observe.lag import Lag, SlotLag
    from cdcbridge.observe.mirrors import MirrorLag
    from cdcbridge.observe.sinks import SinkState
    from cdcbridge.source.wal_room import OtherSlot, WalRoom
    from cdcbridge.store.holders import ConsumerHolder

    health = Health()
    metrics = Metrics(health, "1", "src", "s")
    moment = dt.datetime(2026, 5, 1, tzinfo=dt.UTC)
    alert = Open(Key("dead_letters", "c"), "warning", "text", moment, moment)
    AlertMetrics(metrics.unlabelled, ["team"]).judged([alert], {"team": 1})
    slot = SlotLag("s", "pgoutput", True, "reserved", "0/1", "0/1", "0/2", 1, 1, 1.0, 1, None, 1.0, 1.0, 1.0, True)
    held = ConsumerHolder("c", "queue", "receiver", 1, "worker", 1.0, "idle", "select", 1, None, False)
    consumer = ConsumerLag("c", "queue", 1, 1, 1, 1.0, 1, 1.0, True, 1)
    room = WalRoom(1, 1, (OtherSlot("o", "physical", None, None, True, "reserved", 1),))
    feeds = describe(1, "host", "file", ["c"], ["c"], [])
    sink = SinkState("c", "file", "out", "delivering", oldest_seconds=1.0)
    mirror = MirrorLag("m", "db", "running", lag_seconds=1.0)
    metrics.measurements.measured(
        Lag([slot], [consumer], consumer_holders=(held,), room=room, feeds=feeds, sinks=(sink,), mirrors=(mirror,))
    )
    health.append_begins()
    batch = AppendBatch()
    batch.refused["published.malformed", "news", "not JSON"] += 1
    health.stored(batch)
    return list(metrics.registry.collect())


def exposed() -> set[str]:
    return {s.name for family in everything() for s in family.samples}


def _described(families: Iterable[Metric]) -> dict[str, tuple[str, frozenset[str]]]:
    """Name -> type and labels, beside those that every metric has; a counter by the name of its sample."""
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for family in families:
        if family.name.endswith("_created"):  # when the counter or histogram began, which the client library adds
            continue
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = frozenset(label for s in family.samples for label in s.labels) - {"source", "slot", "le"}
        found[name] = (family.type, labels)
    return found


def documented(*, api: bool = False) -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(r"^\| `(cdcbridge_\w+)` \| (\w+) \|([^|]*)\|(.*)$", METRICS_PAGE.read_text(), re.MULTILINE)
    for name, _, _, rest in rows:
        unit, meaning, act = (cell.strip() for cell in rest.strip().strip("|").split("|"))
        assert unit and len(meaning) > 10 and len(act) > 3, name
        for suffix, expected in (("_bytes", "bytes"), ("_seconds", "seconds")):
            assert not name.removesuffix("_total").endswith(suffix) or unit == expected, name
    return {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, _ in rows
        if name.startswith("cdcbridge_api_") == api
    }


def test_the_reference_page_has_every_metric_with_its_type_and_labels() -> None:
    assert documented() == _described(everything())


def test_the_reference_page_is_what_a_bridge_serves(watched: tuple[World, int]) -> None:
    world, port = watched
    world.top_settings["alerts"] = {"every": "1s", "to": [{"name": "team", "urls": ["json://127.0.0.1:1/x"]}]}
    process = world.start_process()
    eventually(world.active, "it streams")
    world.execute("insert into t values (1)")
    text = eventually(
        lambda: (
            "cdcbridge_alert_notifications_waiting{" in get(port, "/metrics")[1]
            and "cdcbridge_consumer_fed{" in (t := get(port, "/metrics")[1])
            and "last_append" in t
            and t
        ),
        "all is there",
    )
    served = list(text_string_to_metric_families(text))
    for family in served:
        for sample in family.samples:
            assert sample.labels["slot"] == world.slot and world.database in sample.labels["source"], sample
    page = documented()
    types = {"info": "gauge"}  # as the text format has it
    found = {}
    for family in served:
        if not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            found[name] = family.type
            labels = {label for s in family.samples for label in s.labels} - {"source", "slot", "le"}
            assert labels <= page[name][1], name
    assert found == {name: types.get(kind, kind) for name, (kind, _) in page.items()}
    process.terminate()
    assert process.wait(30) == 0


def test_two_pairs_of_bridges_are_told_apart(
    watched: tuple[World, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two stores fed from one database, by two slots; and a source that has a name."""
    world, port = watched
    second = World(world.server, world.database, world.plugin, tmp_path_factory.mktemp("second"))
    second.slot, second.schema = f"{world.slot}_b", "other"
    second.settings |= {"name": "shop", "publication": "other"}
    other_port = free_port()
    second.top_settings["http"] = {"listen": f"127.0.0.1:{other_port}"}
    second.consumer("orders")
    with contextlib.closing(second):
        processes = []
        for one in (world, second):
            processes.append(one.start_process())
            eventually(one.active, "it streams")

        def series(at: int) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
            families = text_string_to_metric_families(get(at, "/metrics")[1])
            return {(s.name, tuple(sorted(s.labels.items()))) for f in families for s in f.samples}

        eventually(lambda: all("cdcbridge_consumer_fed" in {n for n, _ in series(p)} for p in (port, other_port)))
        assert not series(port) & series(other_port), "no two of them have a series in common"
        assert {dict(labels)["source"] for _, labels in series(other_port)} == {"shop"}
        assert all(world.database in dict(labels)["source"] for _, labels in series(port))
        for process in processes:
            process.terminate()
            assert process.wait(30) == 0


@pytest.mark.parametrize("name", ["prometheus-alerts.yaml", "grafana-dashboard.json"])
def test_alerts_and_dashboard_go_by_metrics_that_exist(name: str) -> None:
    text = (CONFIG / name).read_text()
    document = json.loads(text) if name.endswith("json") else yaml.safe_load(text)
    if name.endswith("json"):
        expressions = [t["expr"] for panel in document["panels"] for t in panel.get("targets", [])]
    else:
        rules = [rule for group in document["groups"] for rule in group["rules"]]
        expressions = [rule["expr"] for rule in rules]
        for rule in rules:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert rule["annotations"]["summary"] and "docs/OPERATIONS.md" in rule["annotations"]["runbook"]
    used = {name for expression in expressions for name in re.findall(r"cdcbridge_\w+", expression)}
    assert len(used) > 8
    assert used <= exposed(), used - exposed()
    for expression in expressions:
        for kept in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {"source", "slot"} <= set(kept.split(", ")), expression
        for aggregated in re.findall(r"\b(?:sum|max|min|count|avg)\b(.{5})", expression):
            assert aggregated.startswith(" by ("), expression
    if name.endswith("yaml"):
        for rule in rules:
            assert "$labels.source" in rule["annotations"]["summary"] or rule["alert"] == "CdcbridgeDown"


def test_lag_names_who_holds_the_horizon_and_what_is_an_alarm(world: World) -> None:
    world.settings |= {"max_slot_inactive": "1s", "max_retained_wal": "16MB"}
    world.execute("create table t (id int primary key, v text)")
    world.consumer()
    with world.bridge():
        world.execute("insert into t values (1, '')")
        world.messages(1)
    world.execute("insert into t select g, repeat('x', 500) from generate_series(2, 60000) g")
    with psycopg.connect(world.dsn) as old:
        old.execute("set application_name = 'report'")
        old.execute("set transaction isolation level repeatable read")
        old.execute("select count(*) from t")
        lag = eventually(
            lambda: (found := world.json("lag", "--json"))["xmin_holders"] and len(found["alarms"]) == 2 and found,
            "the holder and the alarms",
        )
        holder = next(h for h in lag["xmin_holders"] if h["name"] == "report")
        assert holder["pid"] == old.info.backend_pid and holder["age_seconds"] >= 1
        assert "count(*)" in holder["query"] and holder["kind"] == "transaction" and holder["server"] == "both"
        shown = world.run_program("lag")
        assert shown.returncode == 0 and f"pid {old.info.backend_pid} (report)" in shown.stderr
    assert [a["code"] for a in lag["alarms"]] == ["slot_retains_too_much", "slot_inactive"]
    assert (
        "ALARM no bridge has read the slot" in shown.stderr and "more than max_retained_wal (16.0 MB)" in shown.stderr
    )
    assert lag["slot_health"][0]["inactive_seconds"] >= 1

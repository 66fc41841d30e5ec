"""The program as people and scripts use it: output, exit codes, and messages for what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import Any

import psycopg

from cdcbridge.store.migrate import newest_version
from tests.harness.world import PATIENCE, Running, World, clean_environment, eventually


def lines(result: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def ready(world: World) -> Running:
    world.execute("create table t (id int primary key, amount numeric)")
    world.consumer("billing", visibility_timeout="60s")
    process = world.start_process()
    eventually(world.active, "the bridge streams")
    return process


def test_from_run_to_ack(world: World) -> None:
    process = ready(world)
    world.execute("insert into t values (1, 12.50), (2, 'NaN'), (3, null)")
    got = lines(world.run_program("receive", "billing", "-n", "2", "--wait", "20"))
    assert list(got[0]) == [
        "receipt", "seq", "topic", "key", "data", "deliver_count", "not_visible_until", "commit_lsn", "ordinal",
        "commit_time", "inserted_at",
    ]  # fmt: skip
    assert [row["seq"] for row in lines(world.run_program("peek", "billing"))] == [3]
    lag = world.json("lag", "--json")
    (slot,) = lag["slots"]
    assert list(slot) == [
        "name", "plugin", "active", "wal_status", "restart_lsn", "confirmed_flush_lsn", "current_lsn",
        "retained_bytes", "lag_bytes", "lag_seconds",
    ]  # fmt: skip
    assert (
        slot["active"] is True and slot["plugin"] == world.plugin and slot["retained_bytes"] >= slot["lag_bytes"] >= 0
    )
    (consumer,) = lag["consumers"]
    assert consumer.pop("oldest_age_seconds") > 0
    assert consumer == {"name": "billing", "mode": "queue", "pending": 1, "in_flight": 2, "dead": 0}
    receipts = [str(row["receipt"]) for row in got]
    assert lines(world.run_program("extend", "billing", receipts[0], "--by", "5m")) == [{"extended": 1}]
    assert lines(world.run_program("nack", "billing", receipts[1], "--dead", "--reason", "poison")) == [{"nacked": 1}]
    both = world.run_program("ack", "billing", "-", stdin="\n".join(json.dumps(row) for row in got))
    assert (both.returncode, json.loads(both.stdout)) == (1, {"acked": 1})
    assert "1 of 2 receipts are stale" in both.stderr
    (dead,) = world.json("dead", "list", "billing", "--json")
    assert dead["reason"] == "nacked: poison"
    (whole,) = lines(world.run_program("dead", "show", "billing", str(dead["id"])))
    assert whole["history"] and whole["data"]
    assert lines(world.run_program("dead", "redrive", "billing")) == [{"redriven": 1}]
    (longer,) = lines(world.run_program("receive", "billing", "-n", "1", "--visibility-timeout", "2h"))
    left = world.value("select extract(epoch from %s::timestamptz - clock_timestamp())", longer["not_visible_until"])
    assert 7100 < left < 7201
    assert lines(world.run_program("nack", "billing", str(longer["receipt"]), "--delay", "0s")) == [{"nacked": 1}]
    rest = lines(world.run_program("receive", "billing", "--ack"))
    assert [row["seq"] for row in rest] == [3, 2]
    empty = world.run_program("receive", "billing")
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert world.json("lag", "--json")["slots"][0]["active"] is False, "works with the bridge stopped"


def test_lag_seconds_is_zero_when_idle(world: World) -> None:
    ready(world)
    world.execute("insert into t values (1, 1)")
    world.messages(1)
    eventually(lambda: world.json("lag", "--json")["slots"][0]["lag_seconds"] == 0, "idle")


def test_a_waiting_reader_is_woken(world18: World) -> None:
    ready(world18)
    reader = subprocess.Popen(
        [sys.executable, "-m", "cdcbridge", "-c", str(world18.folder / "cdcbridge.yaml"), "receive", "billing",
         "--wait", "30"], stdout=subprocess.PIPE, text=True, env=clean_environment(),
    )  # fmt: skip
    listening = (
        "select count(*) from pg_stat_activity where application_name = 'cdcbridge cli' and query ~ 'next_visible'"
    )
    eventually(lambda: world18.sql.execute(listening.encode()).fetchone() == (1,), "the reader waits")
    started = time.monotonic()
    world18.execute("insert into t values (1, 1)")
    output, _ = reader.communicate(timeout=PATIENCE)
    assert json.loads(output)["key"] == "1"
    assert time.monotonic() - started < 3, "woken, not by its timer"


def test_names_and_files_that_are_wrong_exit_with_2_and_say_so(world18: World) -> None:
    ready(world18).terminate()
    for arguments, message in (
        (("receive", "nobody"), "no consumer named 'nobody'"),
        (("ack", "billing", "rubbish"), "'rubbish' is not a receipt"),
        (("dead", "list", "nobody"), "no consumer named 'nobody'"),
        (("dead", "show", "billing", "77"), "has no dead letter 77"),
        (("consumers", "show", "nobody"), "no consumer named 'nobody'"),
        (("slot", "skip", "--to", "xyz", "--yes"), "not an LSN: 'xyz'"),
        (("frobnicate",), "No such command"),
        (("-c", "absent.yaml", "lag"), "absent.yaml: no such file"),
    ):
        result = world18.run_program(*arguments)
        assert result.returncode == 2, (arguments, result)
        assert message in result.stderr and "Traceback" not in result.stderr
        assert result.stdout == ""
    assert "Known: billing" in world18.run_program("receive", "nobody").stderr


def test_an_unmigrated_store_exits_with_3_and_migrate_makes_it(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer()
    result = world18.run_program("receive", "c")
    assert result.returncode == 3 and "cdcbridge migrate" in result.stderr
    newest = newest_version()
    assert f"version 0 → {newest}" in world18.run_program("migrate").stdout
    done = {"schema": "cdcbridge", "before": newest, "after": newest, "code_replaced": False}
    assert world18.json("migrate", "--json") == done
    assert "added: c" in world18.run_program("consumers", "apply").stdout
    assert world18.run_program("receive", "c").returncode == 0


def test_messages_are_published_and_dead_letters_chosen(world18: World) -> None:
    world18.execute("create table t (id int primary key)")
    world18.consumer(topics=["invoices"], max_deliveries=1)
    world18.run_program("migrate")
    world18.run_program("consumers", "apply")
    published = lines(world18.run_program("publish", "invoices", '{"id": 1}', "2", "--key", "k"))
    published += lines(world18.run_program("publish", "invoices", stdin='"a"\n\n"b"\n'))
    assert [row["seq"] for row in published] == [1, 2, 3, 4]
    refused = world18.run_program("publish", "invoices", stdin="1\n{\n")
    assert refused.returncode == 2 and "stdin: line 2: not JSON" in refused.stderr
    assert world18.run_program("publish", "public.t", "1").returncode == 2
    assert len(lines(world18.run_program("publish", "invoices", "1", "--dedup-id", "x"))) == 1
    got: list[Any] = lines(world18.run_program("receive", "c"))
    assert [row["data"]["record"] for row in got] == [{"id": 1}, 2, "a", "b", 1, 1]
    world18.run_program("nack", "c", got[0]["receipt"], "--dead", "--reason", "poison")
    world18.run_program("nack", "c", *(row["receipt"] for row in got[1:]))
    assert len(world18.json("dead", "list", "c", "--reason", "max_deliveries:", "--json")) == 5
    assert len(world18.json("dead", "list", "c", "--key", "k", "--json")) == 2
    assert lines(world18.run_program("dead", "redrive", "c", "--reason", "nacked: poison")) == [{"redriven": 1}]
    assert lines(world18.run_program("dead", "purge", "c", "--key", "k", "--yes")) == [{"purged": 1}]
    assert lines(world18.run_program("dead", "redrive", "c", "--rate", "20")) == [{"redriven": 4}]
    assert world18.run_program("dead", "redrive", "c", "1", "--key", "k").returncode == 2


def test_consumers_are_listed_paused_and_removed(world18: World) -> None:
    ready(world18).terminate()
    world18.run_program("consumers", "pause", "billing")
    (row,) = world18.json("consumers", "list", "--json")
    assert row["paused"] is True
    result = world18.run_program("receive", "billing")
    assert result.returncode == 0 and "paused" in result.stderr
    world18.run_program("consumers", "resume", "billing")
    assert world18.json("consumers", "show", "billing", "--json")["config"]["visibility_timeout"] == 60
    refused = world18.run_program("consumers", "remove", "billing", stdin="n\n")
    assert refused.returncode == 1
    assert world18.run_program("consumers", "remove", "billing", "--yes").returncode == 0
    assert world18.json("consumers", "list", "--json") == []


def test_a_lost_slot_is_told_by_lag_with_exit_code_3(world15: World) -> None:
    process = ready(world15)
    process.terminate()
    assert process.wait(PATIENCE) == 0
    world15.execute("alter system set max_slot_wal_keep_size = '1MB'", "select pg_reload_conf()")
    try:
        for _ in range(3):
            world15.execute("create table filler as select repeat('x', 500) from generate_series(1, 40000)")
            world15.execute("drop table filler", "select pg_switch_wal()", "checkpoint")
        result = world15.run_program("lag", "--json")
        assert result.returncode == 3, result
        assert json.loads(result.stdout)["slots"][0]["wal_status"] == "lost"
        assert "slot recreate" in result.stderr
        run = world15.run_program("run")
        assert run.returncode == 3 and "is lost" in run.stderr + world15.log()
    finally:
        world15.execute("alter system reset max_slot_wal_keep_size", "select pg_reload_conf()")


def test_decode_reads_both_formats_plain_and_pretty(world15: World) -> None:
    world15.execute(
        "create table t (id int primary key, n numeric, j json, a int[], b bytea, at timestamp)",
        "select pg_create_logical_replication_slot('d', 'wal2json')",
        "insert into t values (1, 123456789012345678901234567890.12, '{\"a\": [1, 2.50]}', '{1,NULL}', '\\x00ff',"
        " '2024-02-29 12:00')",
        "update t set n = 'NaN'",
        "delete from t",
    )
    first = {
        "id": 1, "n": 123456789012345678901234567890.12, "j": {"a": [1, 2.5]}, "a": [1, None], "b": "\\x00ff",
        "at": "2024-02-29T12:00:00",
    }  # fmt: skip
    for options in (
        "'format-version', '2', 'include-lsn', '1', 'include-pk', '1'",
        "'format-version', '2', 'include-type-oids', '1', 'include-types', '0', 'include-pk', '1'",
        "'format-version', '1', 'include-pk', '1'",
        "'format-version', '1', 'include-pk', '1', 'pretty-print', '1', 'include-type-oids', '1', 'include-lsn', '1'",
    ):
        rows = world15.sql.execute(
            f"select data from pg_logical_slot_peek_changes('d', null, null, {options})".encode()
        )
        text = "\n".join(row[0] for row in rows)
        result = world15.run_program("decode", "--plugin", "wal2json", stdin=text + "\n")
        got = lines(result)
        assert [row["key"] for row in got] == ["1", "1", "1"], options
        assert [row["topic"] for row in got] == ["public.t"] * 3
        assert [row["ordinal"] for row in got] == [0, 0, 0]
        assert got[0]["data"] == {"op": "insert", "record": first, "old": None, "unchanged": []}, options
        assert "123456789012345678901234567890.12" in result.stdout
        assert got[2]["data"] == {"op": "delete", "record": {"id": 1}, "old": None, "unchanged": []}
        assert (got[0]["commit_lsn"] is not None) == ("include-lsn" in options and "'2'" in options)
    world15.execute("select pg_drop_replication_slot('d')")


def test_decode_refuses_what_is_malformed_and_names_the_place(world18: World) -> None:
    for text, message in (
        ('{"action":"I","schema":"public"', "the input ends inside a document"),
        ('{"action":"X","table":"t"}', "unknown action 'X'"),
        ('{"action":"B"}\n{"action":"I","schema":"s"}', "byte 15"),
        ('{"action":"I","table":"t","columns":[{"name":"a","type":"S"."T","value":1}]}', "include-types=0"),
        ("nonsense\n", "not JSON"),
        ('{"change":[{"kind":"insert","table":"t","columnnames":["a"],"columnvalues":[]}]}', "1 columnnames and 0"),
    ):
        result = world18.run_program("decode", "--plugin", "wal2json", stdin=text)
        assert result.returncode == 2 and message in result.stderr, (text, result.stderr)
        assert "Traceback" not in result.stderr


def test_config_is_shown_without_secrets(world18: World) -> None:
    world18.consumer()
    path = world18.write_config()
    path.write_text(path.read_text().replace(world18.dsn, world18.dsn + " password=hush"))
    for arguments in (("show",), ("show", "--json")):
        result = subprocess.run(
            [sys.executable, "-m", "cdcbridge", "-c", str(path), "config", *arguments],
            capture_output=True, text=True, check=True, env=clean_environment(),
        )  # fmt: skip
        assert "hush" not in result.stdout and "****" in result.stdout and "visibility_timeout" in result.stdout
    schema = json.loads(world18.run_program("config", "schema").stdout)
    assert "consumers" in schema["properties"]
    assert "ok, 1 consumer" in world18.run_program("config", "check").stdout


def test_the_shell_completes_commands_and_consumers(world18: World) -> None:
    world18.consumer("billing")
    assert "_CDCBRIDGE_COMPLETE" in world18.run_program("completion", "bash").stdout
    words = f"cdcbridge -c {world18.folder}/cdcbridge.yaml receive bil"
    environment = {
        **clean_environment(),
        "_CDCBRIDGE_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": "4",
    }
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'cdcbridge'; from cdcbridge.cli import main; main()"]
    result = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout == "plain,billing\n", result


def test_the_demo_shows_messages_acked_and_the_lag() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cdcbridge", "demo"],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert 'insert  {"id":1,"customer":"Ada","status":"paid","amount":120.00}' in result.stdout
    assert 'ack → {"acked":3}' in result.stdout and 'ack → {"acked":4}' in result.stdout
    assert "RETAINED" in result.stdout and "Everything was removed" in result.stdout
    assert "→ the dashboard: http://127.0.0.1:" in result.stdout


def test_a_streams_offsets_are_shown_and_moved(world: World) -> None:
    world.execute("create table t (id int primary key, note text)")
    world.consumer("audit", mode="stream")
    world.start_process()
    eventually(world.active, "the bridge streams")
    world.execute("insert into t select g, 'x' from generate_series(1, 50) g", "delete from t where id = 7")
    eventually(lambda: world.value("select count(*) from messages") == 51, "all is in the log")
    (consumer,) = world.json("lag", "--json")["consumers"]
    assert (consumer["name"], consumer["mode"], consumer["pending"], consumer["dead"]) == ("audit", "stream", 51, 0)
    shown = world.json("offsets", "show", "audit", "--json")
    assert (len(shown), sum(row["messages"] for row in shown)) == (16, 51)
    assert max(row["seconds"] or 0 for row in shown) > 0
    rows = world.rows("select seq, topic, key, partition, commit_lsn is not null from read_stream('audit')")
    assert rows and {(topic, positioned) for _, topic, _, _, positioned in rows} == {("public.t", True)}
    assert world.value("select commit_offset('audit', %s, %s)", rows[-1][3], rows[-1][0]) is True
    table = world.run_program("offsets", "show", "audit")
    assert table.returncode == 0 and "PARTITION" in table.stdout and str(rows[-1][0]) in table.stdout
    assert lines(world.run_program("offsets", "seek", "audit", "latest"))[0]["partitions"] == 16
    assert world.json("lag", "--json")["consumers"][0]["pending"] == 0
    one = str(rows[-1][3])
    assert lines(world.run_program("offsets", "seek", "audit", "earliest", "--partition", one))[0]["partitions"] == 1
    assert world.json("lag", "--json")["consumers"][0]["pending"] == len(rows)
    for arguments, message in (
        (("seek", "audit", "whenever"), "'whenever' is not a place in the log"),
        (("seek", "audit", "latest", "--partition", "99"), "there is no partition 99"),
        (("show", "nobody"), "no consumer named 'nobody'"),
    ):
        refused = world.run_program("offsets", *arguments)
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr
    received = world.run_program("receive", "audit")
    assert received.returncode == 2 and "reads the log as a stream" in received.stderr


def test_lag_names_who_holds_streams_back(world15: World) -> None:
    world15.consumer("audit", (), topics=["news"], mode="stream")
    world15.start_process()
    eventually(world15.active, "the bridge streams")
    with psycopg.connect(world15.dsn) as hung:
        hung.execute("select cdcbridge.publish('news', 'k', '1')")
        eventually(lambda: world15.json("lag", "--json")["holders"], "it is told after a second")
        (holder,) = world15.json("lag", "--json")["holders"]
        assert (holder["pid"], holder["seq"], holder["state"]) == (hung.info.backend_pid, 1, "idle in transaction")
        told = world15.run_program("lag").stderr
        assert f"audit waits for the transaction of pid {hung.info.backend_pid} (" in told
        assert f"`select pg_terminate_backend({hung.info.backend_pid})`. That transaction published a message" in told
    assert world15.json("lag", "--json")["holders"] == []


def counts(replayed: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """How many messages a replay put into the queue, and skipped."""
    (line,) = lines(replayed)
    return {name: line[name] for name in ("replayed", "skipped")}


def test_a_range_of_the_log_is_replayed(world15: World) -> None:
    ready(world15)
    world15.execute("insert into t select g, 1 from generate_series(1, 5) g")
    eventually(lambda: world15.value("select count(*) from messages") == 5, "all is logged")
    assert len(lines(world15.run_program("receive", "billing", "-n", "4", "--ack"))) == 4
    replayed = world15.run_program("consumers", "replay", "billing", "--from", "3")
    assert counts(replayed) == {"replayed": 2, "skipped": 1}
    assert "billing: 1 skipped, because they already wait or are in flight" in replayed.stderr
    first = world15.run_program("consumers", "replay", "billing", "--from", "earliest", "--to", "2")
    assert counts(first) == {"replayed": 1, "skipped": 0}
    got = lines(world15.run_program("receive", "billing", "-n", "10", "--ack"))
    assert [row["seq"] for row in got] == [5, 3, 4, 1]
    for arguments, message in (
        (("billing", "--from", "whenever"), "not a place in the log"),
        (("billing", "--from", "99"), "is after the end of the log"),
        (("nobody", "--from", "earliest"), "no consumer named"),
    ):
        refused = world15.run_program("consumers", "replay", *arguments)
        assert (refused.returncode, message in refused.stderr) == (2, True), refused.stderr

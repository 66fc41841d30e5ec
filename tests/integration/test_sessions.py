"""A session depends on nothing around it: hostile settings of the server, the database, the role and libpq's environment.

What a row is as a change, as a row of a snapshot, in `verify`, for each client and for each command stays the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest

from cdcbridge import AsyncQueue, AsyncStream, Queue, Stream
from cdcbridge.backfill.verify import verify
from cdcbridge.backfill.worker import connect_reader
from cdcbridge.checks.server import check
from cdcbridge.database import connect_source, connect_store
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import BehindPooler, CheckFailed, OperatorNeeded
from cdcbridge.source.replication import ReplicationStream
from tests.conftest import DEBIAN_15, FAST, NEWER, major
from tests.harness import hostile
from tests.harness.standby import Standby
from tests.harness.world import World, eventually, fresh_database
from tests.integration.test_types import CASES, SPECIAL, Cases, create_types, differences, insert_cases

LEVELS = ("server", "database", "role", "environment", "service")
LATER = {"transaction_timeout": "1s"} if major(NEWER) >= 17 else {}
KINDS = ("pg18-pgoutput", "pg15-pgoutput", "pg15-wal2json")
KEYED = (
    "create table public.f (a float8, b timestamptz, c bytea, d interval, e money, primary key (a, b, c))",
    (
        r"insert into public.f select 0.1 + n * 0.2, timestamptz '2024-03-10 06:30+00' + n * interval '1 hour',"
        r" decode('00ff5c', 'hex') || n::text::bytea, n * interval '-1 day 02:00', n from generate_series(1, {0}) n"
    ),
)


@pytest.fixture(autouse=True)
def own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own sessions behave, so that they tell what the program does."""
    if hostile.SWITCH not in os.environ:
        monkeypatch.setattr(psycopg, "connect", hostile.connect(psycopg.connect))


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, EmbeddedServer]]:
    """A server of each version whose configuration is hostile."""
    settings = {**FAST, **hostile.WORSE, **hostile.PRIVILEGED}
    with (
        EmbeddedServer(DEBIAN_15, settings=settings) as pg15,
        EmbeddedServer(NEWER, settings={**settings, **LATER}) as pg18,
    ):
        yield {"pg15": pg15, "pg18": pg18}


def _hostile_world(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, level: str
) -> Iterator[World]:
    name, plugin = kind.split("-")
    server = request.getfixturevalue("servers")[name] if level == "server" else request.getfixturevalue(name)
    settings = {**hostile.WORSE, **hostile.PRIVILEGED}
    with fresh_database(server) as database:
        world = World(server, database, plugin, folder)
        if level == "database":
            world.execute(*(f"alter database {database} set {name} = '{value}'" for name, value in settings.items()))
        elif level == "role":
            world.user = f"r_{database}"
            with psycopg.connect(server.dsn(database), autocommit=True) as admin:
                admin.execute(f"create role {world.user} superuser login".encode())
                for name, value in settings.items():
                    admin.execute(f"alter role {world.user} set {name} = '{value}'".encode())
        elif level != "server":
            given = hostile.environment(settings, folder)
            for name, value in given.items():
                if (level == "environment" and "SERVICE" not in name) or (level == "service" and name != "PGOPTIONS"):
                    monkeypatch.setenv(name, value)
        world.leave()
        yield world
        world.close()
    if world.user != "postgres":
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(f"drop role {world.user}".encode())


@pytest.fixture(params=[(kind, level) for kind in KINDS for level in LEVELS], ids="-".join)
def anywhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """Each server and plugin, under hostile settings at each level."""
    yield from _hostile_world(request, monkeypatch, tmp_path, *request.param)


@pytest.fixture(params=LEVELS)
def hostile15(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    """PostgreSQL 15 with wal2json, under hostile settings at each level."""
    yield from _hostile_world(request, monkeypatch, tmp_path, "pg15-wal2json", request.param)


def _cases(world: World) -> Cases:
    return CASES if world.plugin == "wal2json" else CASES + SPECIAL


def test_every_type_is_the_same_as_change_and_as_row_of_a_snapshot(anywhere: World) -> None:
    cases = _cases(anywhere)
    count = create_types(anywhere, cases)
    insert_cases(anywhere, cases)
    anywhere.consumer(start="snapshot")
    with anywhere.bridge():
        anywhere.messages(count)
        insert_cases(anywhere, cases)
        anywhere.messages(2 * count)
    assert differences(anywhere, cases) == []
    query = "select (data -> 'record')::jsonb - 'id' from messages where data ->> 'op' = %s order by (data -> 'record' ->> 'id')::int"
    reads, inserts = anywhere.rows(query, "read"), anywhere.rows(query, "insert")
    assert len(reads) == count
    assert reads == inserts


def test_keys_are_the_same_in_reads_and_changes_and_verify_agrees(anywhere: World) -> None:
    anywhere.execute(KEYED[0], KEYED[1].format(450))
    anywhere.consumer(tables=("public.f",), start="snapshot")
    with anywhere.bridge():
        anywhere.messages(450)
        anywhere.execute("update public.f set d = d")
        anywhere.messages(900)
        assert verify(anywhere.config(), "public.f").ok
    keys = "select count(*), count(distinct key), count(distinct (data -> 'record')::text) from messages"
    assert anywhere.rows(keys) == [(900, 450, 450)]


def test_a_backfill_with_a_condition(hostile15: World) -> None:
    hostile15.execute(KEYED[0], KEYED[1].format(300))
    hostile15.consumer(tables=("public.f",))
    with hostile15.bridge():
        hostile15.json("backfill", "start", "c", "public.f", "--where", "e >= '1'::money")
        hostile15.messages(300)
        eventually(lambda: hostile15.value("select state from backfills") == "done")


@pytest.mark.parametrize("columns", ["k", "k, n", "n, k"])
def test_a_key_whose_operators_are_in_a_schema_of_their_own_is_read_whole(world15: World, columns: str) -> None:
    """In the order of text all capital letters come first; in that of citext they stand among the others."""
    world15.execute(
        "create schema ext",
        "create extension citext schema ext",
        f"create table public.t (k ext.citext, n int, primary key ({columns}))",
        "insert into public.t select chr((case n % 2 when 0 then 65 else 97 end) + n % 26) || n / 26, n / 400"
        " from generate_series(0, 2599) n",
    )
    world15.consumer(start="snapshot")
    with world15.bridge():
        world15.messages(2600)
        assert verify(world15.config(), "public.t").ok


def test_the_commands_of_a_queue(hostile15: World) -> None:
    world = hostile15
    world.execute("create table public.t (id int primary key, at timestamptz)")
    world.consumer(topics=["notes"], max_deliveries=2)
    world.consumer("s", mode="stream")
    assert world.json("migrate", "--json")["before"] == 0
    with world.bridge():
        assert world.json("check", "--json")["ok"]
        world.execute("insert into public.t values (1, '2024-02-29 12:34:56.789+01')")
        world.messages(1)
        assert world.run_program("publish", "notes", '{"n": 1}', "--key", "🦀é").returncode == 0
        lines = [json.loads(line) for line in world.run_program("receive", "c", "--ack", "-n", "1").stdout.splitlines()]
        assert [line["data"]["record"] for line in lines] == [{"id": 1, "at": "2024-02-29T11:34:56.789+00:00"}]
        (again,) = (json.loads(line) for line in world.run_program("receive", "c").stdout.splitlines())
        assert (again["data"]["record"], again["key"]) == ({"n": 1}, "🦀é")
        assert again["inserted_at"].endswith("+00:00")
        assert world.run_program("nack", "c", again["receipt"], "--dead", "--reason", "🦀ü").returncode == 0
        ((history,),) = world.rows("select history from dead_messages")
        assert [line["reason"] for line in history] == ["🦀ü"]
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:.]+\+00:00", line["at"]) for line in history)
        (lag,) = (c for c in world.json("lag", "--json")["consumers"] if c["name"] == "c")
        assert (lag["pending"], lag["dead"]) == (0, 1)
        # The published message's time in UTC: read in the hostile zone or date style it would be another.
        moment = world.value(
            "select (inserted_at at time zone 'UTC')::text || '+00' from messages where topic = 'notes'"
        )
        assert world.run_program("offsets", "seek", "s", moment).returncode == 0
        assert world.value("select max(seq) from consumer_group_offsets where consumer_name = 's'") == 1


def test_the_python_clients(hostile15: World) -> None:
    world = hostile15
    world.execute("create table public.t (id int primary key, at timestamptz)")
    world.consumer(topics=["notes"])
    world.consumer("s", mode="stream")
    with world.bridge():
        world.execute("insert into public.t values (1, now()), (2, now())")
        world.messages(2)
        with Queue.connect(world.dsn, consumer="c") as queue:
            first, second = queue.receive(wait=5)
            assert abs((first.inserted_at - datetime.now(UTC)).total_seconds()) < 60
            assert first.position is not None and re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", first.position[0])
            assert first.ack() and second.nack(delay=0)
            queue.publish("notes", {"é": 1}, key="ü")
            got = queue.receive(wait=5)
            assert [m.data["record"] for m in got if m.topic == "notes"] == [{"é": 1}]
            assert queue.ack(got) == 2
        with Stream.connect(world.dsn, consumer="s") as stream:
            assert stream.seek(datetime(2024, 1, 1, tzinfo=UTC)) == 16
            assert sum(len(batch) for batch in stream.batches(wait=0, stop_when_empty=True)) == 2
            assert len(stream.offsets()) == 16
        asyncio.run(_asynchronous(world.dsn))


async def _asynchronous(dsn: str) -> None:
    async with await AsyncQueue.connect(dsn, consumer="c") as queue:
        await queue.publish("notes", 3, delay=0.01)
        (message,) = await queue.receive(wait=5)
        assert message.not_visible_until > datetime.now(UTC)
        assert await message.extend(60)
        assert await message.ack()
    async with await AsyncStream.connect(dsn, consumer="s") as stream:
        assert await stream.seek("earliest") == 16
        batch = await stream.read(wait=5)
        assert batch is not None and await batch.commit()


def test_sql_functions_do_not_depend_on_the_session_that_calls_them(world15: World) -> None:
    world15.execute("create table public.t (id int primary key)")
    world15.consumer(max_deliveries=1)
    world15.consumer("s", mode="stream")
    settings = {**hostile.WORSE, **hostile.PRIVILEGED, "default_transaction_isolation": "read committed"}
    settings |= {"default_transaction_read_only": "off", "exit_on_error": "off", "plpgsql.extra_errors": "all"}
    with world15.bridge():
        world15.execute("insert into public.t select generate_series(1, 3)")
        world15.messages(3)
    foreign = psycopg.connect(world15.dsn, autocommit=True)
    with foreign:
        for name, value in settings.items():
            foreign.execute("select set_config(%s, %s, false)", (name, value))
        row = foreign.execute("select array_agg(receipt) from cdcbridge.receive('c', 3)").fetchone()
        assert row is not None
        nack = "select cdcbridge.nack('c', %s, null, 'sorry')"
        assert foreign.execute(nack, (row[0],)).fetchone() == (3,)
        histories = world15.rows("select history from dead_messages")
        assert len(histories) == 3
        assert all(line["at"].endswith("+00:00") for (history,) in histories for line in history)
        number = "select cdcbridge.publish('t', 'k', '{}', clock_timestamp() - interval '1 hour', 'once')"
        assert foreign.execute(number).fetchone() == foreign.execute(number).fetchone()
        partitions = foreign.execute(
            "select partition, receipt, seq from cdcbridge.read_stream('s', 1, '1 min')"
        ).fetchone()
        assert partitions is not None
        commit = "select cdcbridge.commit_offset('s', %s, %s, %s)"
        assert foreign.execute(commit, (partitions[0], partitions[2], partitions[1])).fetchone() == (True,)
        assert foreign.execute("select cdcbridge.seek('s', '2024-02-03 04:05Z')").fetchone() == (16,)
        with pytest.raises(psycopg.Error, match="is not a place in the log") as refused:
            foreign.execute("select cdcbridge.seek('s', '03.02.2024 04:05')")
        assert refused.value.sqlstate == "CB004"
        assert foreign.execute("select cdcbridge.redrive('c')").fetchone() == (3,)
        assert foreign.execute("select count(*) from cdcbridge.receive('c', 3)").fetchone() == (3,)


@pytest.mark.parametrize("call", ["nack", "extend", "receive"])
def test_a_day_has_24_hours_in_every_zone(world15: World, call: str) -> None:
    """A day that is added to a time in Chatham is 23 or 25 hours twice a year."""
    world15.consumer(tables=(), topics=["notes"])
    with world15.bridge():
        pass
    with psycopg.connect(world15.dsn, autocommit=True) as foreign:
        foreign.execute("set timezone = 'Pacific/Chatham'; set search_path = cdcbridge, cdcbridge_internal")
        for moment in ("2024-04-06 12:00+00", "2024-09-28 12:00+00"):
            row = foreign.execute(
                "select extract(epoch from later(%s, '1 day') - %s)::int", (moment, moment)
            ).fetchone()
            assert row == (86400,)
    code = world15.value(
        "select prosrc from pg_proc where proname = %s and pronamespace = 'cdcbridge'::regnamespace", call
    )
    code += world15.value("select prosrc from pg_proc where proname = 'delay_deliveries'")
    assert "later(" in code


def test_a_session_of_a_role_that_may_not_change_a_setting_says_so(world15: World) -> None:
    role = f"r_{world15.database}"
    world15.execute(
        f"create role {role} login replication",
        f"alter role {role} set session_replication_role = replica",
        f"grant create on database {world15.database} to {role}",
    )
    try:
        with pytest.raises(OperatorNeeded, match="session_replication_role is replica, and must be origin") as refused:
            connect_source(world15.server.dsn(world15.database, role))
        assert refused.value.hint is not None
        world15.execute(refused.value.hint.removeprefix("As a superuser: "))
        connect_source(world15.server.dsn(world15.database, role)).close()
    finally:
        world15.execute(f"drop owned by {role}", f"drop role {role}")


# row-level security


@pytest.fixture
def restricted(world: World) -> Iterator[World]:
    """A table with a policy, and a role that is not its owner."""
    role = f"r_{world.database}"
    world.execute(
        "drop schema cdcbridge, cdcbridge_internal cascade",  # the role makes its own
        f"create role {role} login replication",
        f"grant create on database {world.database} to {role}",
        "create table public.t (id int primary key)",
        "insert into public.t select generate_series(1, 10)",
        "alter table public.t enable row level security",
        "create policy few on public.t using (id <= 5)",
        f"grant select on public.t to {role}",
        "create publication cdcbridge for table only public.t with (publish_via_partition_root)",
    )
    world.user = role
    own = world.server.dsn(world.database)
    world.leave()
    world._sql = psycopg.connect(own, autocommit=True)
    yield world
    with psycopg.connect(own, autocommit=True) as admin:
        admin.execute(
            f"drop schema if exists cdcbridge, cdcbridge_internal cascade; drop owned by {role}; drop role {role}".encode()
        )


def _execute_as_owner(world: World, *statements: str) -> None:
    with psycopg.connect(world.server.dsn(world.database), autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement.encode())


@pytest.mark.parametrize("forced", [False, True], ids=["not the owner", "forced on the owner"])
def test_a_snapshot_of_which_row_security_hides_rows_is_refused_with_the_fix(restricted: World, forced: bool) -> None:
    world = restricted
    if forced:
        _execute_as_owner(
            world, f"alter table public.t owner to {world.user}", "alter table public.t force row level security"
        )
    world.consumer(operations=["insert", "truncate"], start="snapshot")
    problems = world.run_program("check", "--json")
    assert problems.returncode == 2
    (problem,) = (p for p in json.loads(problems.stdout)["problems"] if p["severity"] == "error")
    assert (problem["code"], problem["object"]) == ("row_security", "public.t")
    assert isinstance(world.bridge_error(), CheckFailed)
    _execute_as_owner(world, problem["fix"].split(" -- ")[0])
    with world.bridge():
        world.messages(10)


def test_a_backfill_fails_with_a_note_where_row_security_would_hide_rows(restricted: World) -> None:
    world = restricted
    world.consumer(operations=["insert", "truncate"])
    refused = None
    with world.bridge():
        refused = world.run_program("backfill", "start", "c", "public.t")
        assert refused.returncode != 0 and "bypassrls" in refused.stderr
        # One that was ordered before the policy was there.
        world.rows("select start_backfill('c', 'public.t')")
        eventually(lambda: world.value("select state from backfills") == "failed")
        assert "row-level security of public.t" in world.value("select note from backfills")
        assert world.value("select count(*) from messages") == 0


def test_postgresql_itself_refuses_rows_that_row_security_would_hide(restricted: World) -> None:
    with connect_reader(restricted.config()) as reader, pytest.raises(psycopg.errors.InsufficientPrivilege):
        reader.execute("select * from public.t")


# replication sessions and poolers


@pytest.mark.settings(max_wal_senders="0", max_replication_slots="5")
def test_check_and_run_name_a_server_without_wal_senders(own15: EmbeddedServer, tmp_path: Path) -> None:
    world = World(own15, "postgres", "wal2json", tmp_path)
    world.execute("create table public.t (id int primary key)")
    world.consumer()
    (problem,) = (p for p in check(world.config()) if p.severity == "error")
    assert problem.code == "no_wal_sender"
    error = world.bridge_error()
    assert isinstance(error, CheckFailed) and problem.message in str(error)
    world.execute(problem.fix.split(" -- ")[0])
    world.close()
    own15.stop()
    own15.start()
    with world.bridge():
        world.execute("insert into public.t values (1)")
        world.messages(1)
    world.close()


@pytest.mark.settings(max_wal_senders="1")
def test_a_bridge_waits_for_a_wal_sender_that_another_session_holds(own15: EmbeddedServer, tmp_path: Path) -> None:
    world = World(own15, "postgres", "pgoutput", tmp_path)
    world.execute("create table public.t (id int primary key)")
    world.consumer()
    holder = psycopg.connect(own15.dsn(), autocommit=True, replication="database")
    (problem,) = (p for p in check(world.config()) if p.severity == "error")
    assert (problem.code, "all 1 WAL senders" in problem.message) == ("no_wal_sender", True)
    process = world.start_process()
    eventually(lambda: "all 1 WAL senders" in world.log())
    assert process.poll() is None
    holder.close()
    eventually(world.active)
    world.close()


def test_check_names_a_server_whose_pg_hba_has_no_entry(own15: EmbeddedServer, tmp_path: Path) -> None:
    world = World(own15, "postgres", "wal2json", tmp_path)
    world.execute("create table public.t (id int primary key)", "create role r login superuser")
    world.consumer()
    file = own15.data / "pg_hba.conf"
    file.write_text(f"local all r reject\n{file.read_text()}")
    world.execute("select pg_reload_conf()")
    world.user = "r"
    (problem,) = (p for p in eventually(lambda: check(world.config())) if p.severity == "error")
    assert (problem.code, problem.object) == ("pg_hba", "source.dsn")
    world.close()


@pytest.fixture
def pooler(pg15: EmbeddedServer, tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Start PgBouncer with these lines of configuration; its port."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program is not None, "PgBouncer is not installed: run `make servers`"
    running: list[subprocess.Popen[bytes]] = []

    def start(lines: str) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        tmp_path.chmod(0o755)
        file = tmp_path / "pgbouncer.ini"
        file.write_text(
            f"[databases]\n* = host=127.0.0.1 port={pg15.port} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n"
            f"server_login_retry = 1\n{lines}\n"
        )
        command = [program, str(file)]
        if os.geteuid() == 0:
            command = [program, "-u", "nobody", str(file)]
            for folder in (tmp_path, *tmp_path.parents):
                if folder.owner() == "root" and folder != folder.parent and not folder.stat().st_mode & 1:
                    folder.chmod(0o711)
        running.append(subprocess.Popen(command))  # what it logs is shown if the test fails

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers, "PgBouncer answers")
        return port

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ignored", ["", "ignore_startup_parameters = options"], ids=["strict", "options ignored"])
def test_check_and_run_refuse_a_pooler(world15: World, pooler: Callable[[str], int], ignored: str) -> None:
    port = pooler(ignored)
    world15.execute("create table public.t (id int primary key)")
    world15.consumer()
    through = f"host=127.0.0.1 port={port} user=postgres dbname={world15.database}"
    world15.store_dsn = through
    (problem,) = (p for p in check(world15.config()) if p.severity == "error")
    assert (problem.code, problem.object) == ("pooler", "store.dsn")
    assert isinstance(world15.bridge_error(), BehindPooler)
    world15.store_dsn = world15.dsn
    world15.settings["dsn"] = through
    (problem,) = (p for p in check(world15.config()) if p.severity == "error")
    assert (problem.code, problem.object) == ("pooler", "source.dsn")
    assert isinstance(world15.bridge_error(), BehindPooler)


def test_a_client_behind_a_pooler_leaves_nothing_in_the_servers_sessions(
    world15: World, pooler: Callable[[str], int]
) -> None:
    port = pooler("default_pool_size = 1")
    for name, value in hostile.SERVER.items():
        if name != "client_encoding":
            world15.execute(f"alter database {world15.database} set {name} = '{value}'")
    world15.leave()
    world15.consumer(tables=(), topics=["notes"])
    world15.consumer("s", (), mode="stream", topics=["notes"])
    with world15.bridge():
        pass
    through = f"host=127.0.0.1 port={port} user=postgres dbname={world15.database}"
    with Queue.connect(through, consumer="c") as queue, Stream.connect(through, consumer="s") as stream:
        assert queue._pooled and stream._pooled
        queue.publish("notes", {"n": "é"})
        (message,) = queue.receive(wait=5)
        assert abs((message.inserted_at - datetime.now(UTC)).total_seconds()) < 60
        assert message.data["record"] == {"n": "é"}
        assert message.ack()
        with pytest.raises(Exception, match="not a receipt"):
            queue._write(queue._sql.ack, ("c", ["nonsense"]))
        batch = stream.read(wait=5)
        assert batch is not None and batch.commit()
        names = "statement_timeout", "default_transaction_isolation", "default_transaction_read_only", "intervalstyle"
        with Queue.connect(through, consumer="c") as other:
            connection = other._reader_session()
            found = connection.execute("select current_setting(n) from unnest(%s::text[]) n", (list(names),)).fetchall()
    assert [value for (value,) in found] == [hostile.SERVER[name] for name in names]


def test_an_isolation_level_and_read_only_of_the_server_do_not_reach_the_store(world15: World) -> None:
    world15.execute(
        f"alter database {world15.database} set default_transaction_isolation = 'serializable'",
        f"alter database {world15.database} set default_transaction_read_only = on",
    )
    with connect_store(world15.dsn, "public") as store:
        shown = store.execute(
            "select current_setting('transaction_isolation'), current_setting('transaction_read_only')"
        )
        assert shown.fetchone() == ("read committed", "off")


def test_a_standby_is_read_under_a_serializable_default(own15: EmbeddedServer) -> None:
    """A hot standby refuses every statement of a serializable session, the first one included."""
    settings = {**FAST, "default_transaction_isolation": "serializable"}
    with Standby(own15, settings=settings) as standby, connect_source(standby.dsn(), reads=True) as reader:
        assert reader.execute("select pg_is_in_recovery()").fetchone() == (True,)
        ReplicationStream(standby.dsn()).close()


@pytest.mark.parametrize("binaries", [DEBIAN_15, NEWER], ids=["pg15", "pg18"])
def test_an_embedded_server_takes_nothing_from_libpqs_environment(
    binaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that was started with PGCLIENTENCODING fails with it in its sessions, whenever its settings are reloaded."""
    for name, value in {**hostile.ENVIRONMENT, "PGPORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with EmbeddedServer(binaries, settings=FAST) as server:
        with psycopg.connect(server.dsn(), client_encoding="UTF8", autocommit=True) as session:
            for text in ("á", "ж", "🦀"):
                session.execute("select pg_reload_conf()")
                assert session.execute("select %s::text", (text,)).fetchone() == (text,)
            sources = session.execute("select distinct source from pg_settings").fetchall()
        assert ("environment variable",) not in sources

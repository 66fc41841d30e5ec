"""Groups whose members are killed, roll back, dawdle and seek, beside publishers that hang and a bridge that is killed under
pgbench: `make soak-streams`.

In the end each group has seen every message of every partition, in order; and once, where it read in a transaction with its effect (the
ledger's primary key would refuse a second time). Prints its seed.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer
from tests.campaigns.soak import Processes, main
from tests.harness.hostile import own_environment
from tests.harness.world import World, eventually, fresh_database

GROUPS = {"once": True, "again": False, "tables": True}  # whether it reads in transactions
SETUP = """
    create table once (grp text, partition int, seq bigint, id bigserial, primary key (grp, seq));
    create table again (grp text, partition int, seq bigint, id bigserial);
    create index on again (grp, seq);
"""
NOBODY_GOES_BACK = 4711  # an advisory lock


def read_in_a_transaction(dsn: str, group: str, seed: int) -> None:
    """A member, until it is killed: reading, effect and offset in one transaction; now and then it goes back, effects too."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        while True:
            with session.transaction(force_rollback=chance.random() < 0.05):
                for _ in range(chance.choice((1, 1, 3))):
                    rows = session.execute(
                        "select partition, seq from cdcbridge.read_stream(%s, %s)", (group, chance.choice((1, 20, 300)))
                    ).fetchall()
                    if not rows:
                        break
                    done = rows[: chance.randint(1, len(rows))] if chance.random() < 0.2 else rows
                    session.cursor().executemany("insert into once (grp, partition, seq) values (%s, %s, %s)",
                                                 [(group, *row) for row in done])  # fmt: skip
                    session.execute("select cdcbridge.commit_offset(%s, %s, %s)", (group, *done[-1]))
                if chance.random() < 0.02:
                    time.sleep(chance.uniform(0, 1))
            if not rows:
                time.sleep(0.05)
            if chance.random() < 0.005:
                _go_back(session, group, chance)


def _go_back(session: psycopg.Connection[Any], group: str, chance: random.Random) -> None:
    with session.transaction():
        if session.execute(f"select pg_try_advisory_xact_lock_shared({NOBODY_GOES_BACK})").fetchone() == (False,):
            return  # the end: the groups are compared as soon as they have read everything
        partition = chance.randrange(16)
        row = session.execute("select seq from once where grp = %s and partition = %s and random() < 0.01 limit 1",
                              (group, partition)).fetchone()  # fmt: skip
        if row is not None:
            # The lock first, then the effects: another member may be at work there.
            session.execute("select cdcbridge.seek(%s, %s, %s)", (group, str(row[0]), partition))
            session.execute(
                "delete from once where grp = %s and partition = %s and seq >= %s", (group, partition, row[0])
            )


def read_under_a_lease(dsn: str, group: str, seed: int) -> None:
    """A member, until it is killed: notes what it reads, then commits the offset, if it still may."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        while True:
            rows = session.execute(
                "select partition, seq, receipt from cdcbridge.read_stream(%s, %s, make_interval(secs => %s))",
                (group, chance.choice((1, 20, 300)), chance.uniform(0.5, 2)),
            ).fetchall()
            if not rows:
                time.sleep(0.05)
                continue
            what = chance.random()
            if what < 0.03:
                continue  # as if it had died
            if what < 0.06:
                time.sleep(chance.uniform(0, 3))
            session.cursor().executemany("insert into again (grp, partition, seq) values (%s, %s, %s)",
                                         [(group, *row[:2]) for row in rows])  # fmt: skip
            try:
                session.execute("select cdcbridge.commit_offset(%s, %s, %s, %s)", (group, *rows[-1]))
            except psycopg.Error as error:
                if error.sqlstate != "CB006":
                    raise


def publish(dsn: str, rate: float, seed: int) -> None:
    """A publisher, until it is killed: commits late, rolls back, hangs."""
    chance = random.Random(seed)
    with psycopg.connect(dsn, autocommit=True) as session:
        while True:
            with session.transaction(force_rollback=chance.random() < 0.1):
                for _ in range(chance.choice((1, 1, 10))):
                    session.execute("select cdcbridge.publish('events', %s, '{}')", (f"k{chance.randint(1, 200)}",))
                if chance.random() < 0.05:
                    time.sleep(chance.uniform(0, 1.5))
            time.sleep(chance.expovariate(rate))


def soak(server: EmbeddedServer, folder: Path, seconds: float, seed: int) -> None:
    """All of it."""
    chance = random.Random(seed)
    with fresh_database(server) as database:
        world = World(server, database, "wal2json", folder)
        pgbench = [str(server.binaries / "pgbench"), "-h", server.dsn().split()[0].removeprefix("host="),
                   "-p", str(server.port), "-U", "postgres"]  # fmt: skip
        subprocess.run(
            [*pgbench, "-i", "-q", "-s", "1", database], check=True, capture_output=True, env=own_environment()
        )
        world.execute(SETUP)
        tables = ("public.pgbench_accounts", "public.pgbench_tellers")
        for group in GROUPS:
            world.consumer(group, tables, topics=[] if group == "tables" else ["events"], mode="stream")
        bridge = world.start_process()
        eventually(world.active, "the bridge streams")
        members, publishers = Processes(chance), Processes(chance)
        for group, transactional in GROUPS.items():
            for _ in range(2):
                members.start(read_in_a_transaction if transactional else read_under_a_lease, world.dsn, group)
        for _ in range(3):
            publishers.start(publish, world.dsn, 20.0)
        load = subprocess.Popen([*pgbench, "-n", "-c", "2", "-R", "100", "-T", str(int(seconds)), database],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=own_environment())  # fmt: skip
        end = time.monotonic() + seconds
        next_bridge = time.monotonic() + 5
        while time.monotonic() < end:
            threading.Event().wait(chance.uniform(0.2, 1))
            members.kill_one()
            if time.monotonic() > next_bridge:
                bridge.kill()
                bridge.wait()
                bridge = world.start_process()
                next_bridge = time.monotonic() + chance.uniform(5, 20)
        load.wait()
        publishers.stop()
        eventually(lambda: world.json("lag", "--json")["slots"][0]["lag_seconds"] == 0, "the bridge has caught up", 120)
        with psycopg.connect(world.dsn, autocommit=True) as session:
            session.execute(f"select pg_advisory_lock({NOBODY_GOES_BACK})".encode())
            eventually(
                lambda: world.value("select sum(pending) from consumer_lag()") == 0, "all groups have read all", 120
            )
            members.stop()
        _compare(world)
        world.close()


def _compare(world: World) -> None:
    """The ledgers with the log."""
    for group, transactional in GROUPS.items():
        ledger = "once" if transactional else "again"
        wanted = "topic like 'public.%%'" if group == "tables" else "true"
        (total, seen, rows), = world.rows(
            f"""select (select count(*) from messages where {wanted}),
                       (select count(*) from messages m where {wanted}
                          and exists (select from public.{ledger} l where l.grp = %s and l.seq = m.seq)),
                       (select count(*) from public.{ledger} where grp = %s)""", group, group,
        )  # fmt: skip
        print(f"{group}: {total:,} messages, {seen:,} seen, {rows:,} times in all")
        assert total == seen > 100
        assert not transactional or rows == total, "once each"
        overtaken = world.rows(
            f"""select * from (
                    select partition, seq, lag(seq) over (partition by partition order by first) as before
                    from (select partition, seq, min(id) as first from public.{ledger} where grp = %s group by 1, 2) f
                ) o where seq < before""", group,
        )  # fmt: skip
        assert not overtaken, f"the order of {group} (partition, seq, seq seen before it): {overtaken[:10]}"


if __name__ == "__main__":
    sys.exit(main("python -m tests.campaigns.stream_soak", soak))

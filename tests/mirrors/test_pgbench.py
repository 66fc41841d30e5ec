"""pgbench's TPC-B on both sides at once, each with a branch of its own: no amount is lost or counted twice."""

from __future__ import annotations

import subprocess

from tests.harness.hostile import own_environment
from tests.harness.world import World
from tests.mirrors.pair import Pair

SCRIPT = r"""
\set bid {branch}
\set aid random(1, 20) + 100 * :bid
\set tid random(1, 3) + 10 * :bid
\set delta random(-5000, 5000)
begin;
update pgbench_accounts set abalance = abalance + :delta where aid = :aid;
update pgbench_tellers set tbalance = tbalance + :delta where tid = :tid;
update pgbench_branches set bbalance = bbalance + :delta where bid = :bid;
insert into pgbench_history (side, tid, bid, aid, delta) values (:bid, :tid, :bid, :aid, :delta);
end;
"""
TABLES = (
    "create table pgbench_branches (bid int primary key, bbalance int not null)",
    "create table pgbench_tellers (tid int primary key, bid int, tbalance int not null)",
    "create table pgbench_accounts (aid int primary key, bid int, abalance int not null)",
    """create table pgbench_history (id int generated always as identity, side int, tid int, bid int, aid int, delta int,
       primary key (side, id))""",
    "insert into pgbench_branches select b, 0 from generate_series(1, 2) b",
    "insert into pgbench_tellers select 10 * b + t, b, 0 from generate_series(1, 2) b, generate_series(1, 3) t",
    "insert into pgbench_accounts select 100 * b + a, b, 0 from generate_series(1, 2) b, generate_series(1, 20) a",
)
NAMES = ("pgbench_branches", "pgbench_tellers", "pgbench_accounts", "pgbench_history")


def start(side: World, branch: int) -> subprocess.Popen[bytes]:
    script = side.folder / "script.sql"
    script.write_text(SCRIPT.format(branch=branch))
    command = [str(part) for part in (side.server.binaries / "pgbench", "-n", "-c", "2", "-t", "150", "-f", script,
               "-h", side.server.dsn().split("host=")[1].split()[0], "-p", str(side.server.port), "-U", "postgres",
               side.database)]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=own_environment())


def test_the_sums_are_equal(pair18: Pair) -> None:
    pair18.both(*TABLES)
    pair18.two_way(create_tables=False)
    with pair18.running():
        running = [start(side, number) for number, side in enumerate(pair18.sides, 1)]
        for process in running:
            _, error = process.communicate(timeout=60)
            assert process.returncode == 0, error.decode()
        pair18.settle(*NAMES)
    for side in pair18.sides:
        sums = side.rows(
            "select (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers),"
            " (select sum(abalance) from pgbench_accounts), (select sum(delta) from pgbench_history),"
            " (select count(*) from pgbench_history)"
        )[0]
        assert len(set(sums[:4])) == 1, sums
        assert sums[4] == 600
        assert pair18.conflicts(side) == []

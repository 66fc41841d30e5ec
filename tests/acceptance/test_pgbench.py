"""pgbench against PostgreSQL 15 with wal2json, three consumers, and kill -9 ten times in mid-load."""

from __future__ import annotations

import random
import subprocess
import threading

from tests.harness.hostile import own_environment
from tests.harness.world import PATIENCE, World, eventually


def test_ten_kills_under_pgbench_end_with_its_own_counts(world15: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    pgbench = [str(world15.server.binaries / "pgbench"), "-h", world15.dsn.split()[0].removeprefix("host="),
               "-p", str(world15.server.port), "-U", "postgres"]  # fmt: skip
    environment = own_environment()
    subprocess.run(
        [*pgbench, "-i", "-q", "-s", "1", world15.database], check=True, capture_output=True, env=environment
    )
    world15.consumer("history", ("public.pgbench_history",), operations=["insert"])
    world15.consumer("accounts", ("public.pgbench_accounts",))
    world15.consumer("all", ("public.pgbench_accounts", "public.pgbench_tellers", "public.pgbench_branches"))
    world15.consumer("audit", ("public.pgbench_accounts", "public.pgbench_branches"), mode="stream")
    process = world15.start_process()
    eventually(world15.active, "the bridge streams")
    load = subprocess.Popen([*pgbench, "-n", "-c", "4", "-R", "350", "-T", "32", world15.database],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)  # fmt: skip
    pause = threading.Event()
    for _ in range(10):
        pause.wait(moments.uniform(0.1, 0.8))
        process.kill()
        process.wait()
        process = world15.start_process()
        eventually(world15.active, "the next bridge streams")
    assert load.poll() is None, "the kills were in mid-load"
    output, _ = load.communicate()
    assert "number of failed transactions: 0 (0.000%)" in output, output
    counted = world15.sql.execute("select count(*), sum(abs(delta)) from pgbench_history").fetchone()
    assert counted is not None and counted[0] > 1000
    total = counted[0]
    eventually(lambda: world15.value("select count(*) from messages") >= 4 * total, f"{total} transactions", PATIENCE)
    lag = world15.json("lag", "--json")
    assert lag["slots"][0]["active"] is True
    assert {c["name"]: c["pending"] for c in lag["consumers"]} == {
        "history": total,
        "accounts": total,
        "all": 3 * total,
        "audit": 2 * total,
    }
    eventually(lambda: world15.json("lag", "--json")["slots"][0]["lag_seconds"] == 0, "it has kept up")
    assert world15.rows("select count(*), count(distinct (commit_lsn, ordinal)) from messages") == [
        (4 * total, 4 * total)
    ]
    deltas = "select sum(abs((data -> 'record' ->> 'delta')::int)) from messages where topic = 'public.pgbench_history'"
    assert world15.value(deltas) == counted[1]
    assert world15.rows(
        "select c.name, count(distinct m.seq) from consumer_messages m join consumers c on c.id = m.consumer_id"
        " group by 1 order by 1"
    ) == [("accounts", total), ("all", 3 * total), ("history", total)]
    seen: dict[str, list[int]] = {}
    while rows := world15.rows("select topic, key, seq, partition, receipt from read_stream('audit', 1000, '1 min')"):
        for topic, key, seq, _, _ in rows:
            seen.setdefault(f"{topic} {key}", []).append(seq)
        assert world15.rows("select commit_offset('audit', %s, %s, %s)", rows[-1][3], rows[-1][2], rows[-1][4])
    assert sum(map(len, seen.values())) == 2 * total, "the group has read everything once"
    assert all(seqs == sorted(seqs) for seqs in seen.values()), "and each key in order"

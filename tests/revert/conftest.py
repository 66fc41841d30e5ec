"""What the tests of `cdcbridge revert` share: changes through a real bridge, and checksums of tables."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from tests.harness.world import World, eventually


def caught_up(world: World) -> int:
    """Wait until the log has everything that is committed now. Returns the last seq."""
    lsn = world.sql.execute("select pg_current_wal_insert_lsn()").fetchone()
    assert lsn is not None
    eventually(
        lambda: world.value("select coalesce(max(end_lsn), '0/0') >= %s::pg_lsn from positions", lsn[0]),
        "the log has all changes",
    )
    return int(world.value("select coalesce(max(seq), 0) from messages"))


def checksum(world: World, *tables: str) -> list[Any]:
    """Number and checksum of the rows of each table, which differ if a single value does."""
    return [
        world.sql.execute(
            f"select count(*), md5(coalesce(string_agg(t::text, E'\\n' order by t::text), '')) from {table} t".encode()
        ).fetchone()
        for table in tables
    ]


def revert(world: World, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command, and expect its exit code."""
    done = world.run_program("revert", *arguments)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def planned(world: World, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Return the plan as JSON."""
    document: dict[str, Any] = json.loads(revert(world, *arguments, "--json", code=code).stdout)
    return document


def rows(world: World, query: str) -> list[tuple[Any, ...]]:
    """Rows of the source."""
    return world.sql.execute(query.encode()).fetchall()

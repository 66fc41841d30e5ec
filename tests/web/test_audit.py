"""The audit log is kept as long as the configuration says."""

from __future__ import annotations

from tests.harness.world import World, eventually

ROWS = "select subject from audit order by id"


def test_the_bridge_deletes_old_rows(world18: World) -> None:
    world18.store_settings = {"audit_retention": "30d"}
    world18.consumer("billing", (), topics=["t"])
    with world18.bridge():
        world18.rows(
            "insert into audit (at, caller, role, address, action, subject)"
            " select now() - make_interval(days => n), 'ops', 'admin', '::1', 'pause', n::text"
            " from unnest('{31,29,3000,0}'::int[]) n returning 1"
        )
        eventually(lambda: world18.rows(ROWS) == [("29",), ("0",)], "the rows of more than 30 days are gone")

"""The metrics and alerts of mirrors."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from cdcbridge.alerts.facts import Facts
from cdcbridge.alerts.rules import Limits, judge
from cdcbridge.config.alerts import Rules
from cdcbridge.observe.lag import measure
from cdcbridge.observe.metrics import Measurements
from tests.harness.world import World, eventually
from tests.mirrors.pair import Pair


def samples(world: World) -> dict[str, float]:
    """The samples of the mirror `to_b`, by the name of their metric."""
    made = Measurements("1")
    made.measured(measure(world.config()))
    registry = CollectorRegistry()
    registry.register(made)
    found = {}
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("cdcbridge_mirror_") and 'mirror="to_b"' in line:
            name, _, value = line.partition(" ")
            found[name.partition("{")[0].removeprefix("cdcbridge_mirror_")] = float(value)
    return found


def rules(world: World) -> dict[str, str]:
    """The texts of the conditions about mirrors, by the name of their rule."""
    judged = judge(Facts(measure(world.config())), Rules(), Limits(10 << 30, 300.0))
    return {one.key.rule: one.text for one in judged.conditions if one.key.rule.startswith("mirror_")}


def test_metrics_and_alerts_of_a_mirror(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1), (2)")
        pair18.settle("t")
        eventually(lambda: samples(a).get("changes_total") == 2, "the changes are counted")
        shown = samples(a)
        assert shown["transactions_total"] >= 1 and shown["conflicts_total"] == shown["held_conflicts"] == 0
        assert shown["running"] == 1 and shown["stopped"] == 0 and shown["behind_messages"] == 0
        assert "behind_seconds" not in shown and rules(a) == {}
        a.execute("alter table t add column extra int", "insert into t values (4, 1)")
        eventually(lambda: samples(a)["stopped"] == 1, "stopped")
        assert samples(a)["running"] == 0 and samples(a)["behind_messages"] >= 1
        text = rules(a)["mirror_stopped"]
        assert "The mirror to_b has stopped" in text and "cdcbridge mirror resume to_b" in text, text


def test_conflicts_on_hold_are_counted(pair18: Pair) -> None:
    a = pair18.a
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with pair18.running():
        pair18.settle()
        pair18.b.execute(
            "insert into cdcbridge.conflicts (mirror, table_name, key, kind, source_position, rule, state)"
            " values ('to_b', 'public.t', '1', 'update_exists', '0/1#0', 'hold', 'held')"
        )
        a.json("mirror", "pause", "to_b")
        eventually(lambda: not a.value("select mirror_runs(id) from consumers"), "paused")
        a.json("mirror", "resume", "to_b")
        eventually(lambda: samples(a)["held_conflicts"] == 1, "the hold is counted")
        assert "to_b has 1 conflict on hold" in rules(a)["mirror_held"]

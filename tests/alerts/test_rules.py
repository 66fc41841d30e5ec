"""The rules, in a table: for each fact the conditions that it makes, and what their texts say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cdcbridge.alerts.facts import Facts
from cdcbridge.alerts.rules import Judgement, Limits, judge
from cdcbridge.config.alerts import RULES, Rules
from cdcbridge.observe.consumer_lag import ConsumerLag
from cdcbridge.observe.lag import Lag, SlotLag
from cdcbridge.observe.lag_store import OpenPublisher
from cdcbridge.observe.mirrors import MirrorLag
from cdcbridge.observe.sinks import SinkState
from cdcbridge.observe.xmin_holders import HorizonHolder
from cdcbridge.source.wal_room import OtherSlot, WalRoom
from cdcbridge.store.feeds import Feed, Feeds
from cdcbridge.store.holders import ConsumerHolder

GB = 1 << 30
LIMITS = Limits(10 * GB, 300.0)
SLOT = SlotLag(
    "s", "pgoutput", True, "reserved", "0/1", "0/2", "0/3", 100, 50, 0.0, 5 * GB, None, None, 0.0, None, None
)
QUEUE = ConsumerLag("billing", "queue", 5, 1, 0, 10.0, 0, 10.0)
OTHER = replace(QUEUE, name="audit")
RECEIVER = ConsumerHolder(
    "billing", "queue", "receiver", 4711, "worker", 61.0, "idle in transaction", "select 1", 3, None, False
)
PUBLISHER = OpenPublisher(815, 42, 61.0, "idle in transaction", "select publish(…)")
HOLDER = HorizonHolder("source", "transaction", 7, "pg_dump", 9, 3601.0, "active", "copy t to stdout", False, "backup")
BACKFILL = {"consumer": "billing", "table_name": "public.t", "state": "failed", "note": "no right on t", "rows": 7}
SINK = SinkState("events", "kafka", "t", "failing", "no broker answers", behind=4, oldest_seconds=70.0)
MIRROR = MirrorLag("to_b", "h/b", "stopped", "no column x")


def lag(slot: dict[str, Any] | None = None, **changes: Any) -> Lag:
    return replace(Lag([replace(SLOT, **(slot or {}))], [QUEUE, OTHER]), **changes)


def judged(facts: Facts, **rules: Any) -> Judgement:
    return judge(facts, Rules.model_validate(rules), LIMITS)


def test_healthy_facts_make_no_condition() -> None:
    assert judged(Facts(lag())) == Judgement((), frozenset(), frozenset(RULES))


WRONG: list[tuple[str, str, str, bool, Facts, list[str]]] = [
    # rule, subject, severity, at once, facts, parts of the text
    ("slot_retained", "s", "critical", False, Facts(lag({"retained_bytes": 11 * GB})),
     ["The slot s retains 11.0 GB of WAL, more than max_retained_wal (10.0 GB)", "`cdcbridge lag` names it"]),
    ("slot_retained", "z", "critical", False,
     Facts(lag(room=WalRoom(None, None, (OtherSlot("z", "logical", "pgoutput", "other", False, "reserved", 11 * GB),)))),
     ["The slot z, which is not this bridge's, retains 11.0 GB", "`select pg_drop_replication_slot('z')`"]),
    ("slot_lost", "s", "critical", True, Facts(lag({"wal_status": "lost", "invalidation_reason": "wal_removed"})),
     ["The slot s is lost (wal_removed)", "`cdcbridge slot recreate`"]),
    ("slot_lost", "s", "critical", False, Facts(replace(lag(gone=("s",)), slots=[])),
     ["The slot s no longer exists", "`cdcbridge slot recreate`"]),
    ("slot_inactive", "s", "critical", False, Facts(lag({"active": False, "inactive_seconds": 301.0})),
     ["No bridge has read the slot s for 5m 1s", "`cdcbridge run`"]),
    ("slot_limit", "s", "critical", False,
     Facts(lag({"growth_bytes_per_second": 5.0 * GB / 1800, "growth_basis": "in the last 30 s"})),
     ["max_slot_wal_keep_size is reached in 30m 0s", "the slot s is lost"]),
    ("slot_limit", "s", "critical", False, Facts(lag({"wal_status": "unreserved"})), ["the next checkpoint may remove"]),
    ("slot_limit", "s", "critical", False,
     Facts(lag({"growth_bytes_per_second": 1.0 * GB, "safe_wal_bytes": None}, room=WalRoom(None, 60 * GB))),
     ["the slot s fills the disk in 1m 0s", "alter system set max_slot_wal_keep_size"]),
    ("no_leader", "bridge", "critical", False, Facts(lag(), led=False, leaderless=61.0, why="source: refused"),
     ["No bridge has led for 1m 1s", "This one cannot: source: refused.", "`cdcbridge status`"]),
    ("no_leader", "bridge", "critical", True, Facts(lag(), led=False, leaderless=1.0, ended="another history. Do this"),
     ["The bridge has ended, and no other leads", "Another history. Do this."]),
    ("bridge_stalled", "bridge", "critical", False, Facts(lag(), stalled="its main loop has not run for 16 s"),
     ["its main loop has not run for 16 s. Restart it"]),
    ("bridge_stalled", "bridge", "critical", False, Facts(lag({"lag_seconds": 301.0})),
     ["The oldest commit that is not stored yet is 5m 1s old", "`cdcbridge lag`"]),
    ("dead_letters", "billing", "warning", False, Facts(lag(consumers=[replace(QUEUE, dead=1)])),
     ["billing has 1 dead letter.", "`cdcbridge dead list billing`", "`cdcbridge dead redrive billing`"]),
    ("oldest_age", "billing", "warning", False, Facts(lag(consumers=[replace(QUEUE, oldest_due_age_seconds=901.0)])),
     ["has waited for 15m 1s: 5 wait, 1 are in flight", "`cdcbridge peek billing`"]),
    ("oldest_age", "billing", "warning", False,
     Facts(lag(consumers=[replace(QUEUE, oldest_due_age_seconds=901.0)],
               consumer_holders=(replace(RECEIVER, age_seconds=2.0),))),
     ["billing: 3 messages are held by the transaction of pid 4711 (worker)", "pg_terminate_backend(4711)"]),
    ("paused", "billing", "warning", False, Facts(lag(consumers=[replace(QUEUE, paused=True)])),
     ["billing is paused, and 5 messages wait.", "`cdcbridge consumers resume billing`"]),
    ("sink_failing", "events", "critical", False, Facts(lag(sinks=(SINK,))),
     ["The sink of events (kafka) delivers nothing: no broker answers; 4 messages wait", "`cdcbridge sinks check events`"]),
    ("mirror_stopped", "to_b", "critical", False, Facts(lag(mirrors=(MIRROR,))),
     ["The mirror to_b has stopped: no column x.", "`cdcbridge mirror resume to_b`"]),
    ("mirror_stopped", "to_b", "critical", False,
     Facts(lag(mirrors=(replace(MIRROR, state="waiting", reason="no server", behind=4, lag_seconds=61.0),))),
     ["The mirror to_b applies nothing: no server; 4 messages wait, the oldest for 1m 1s"]),
    ("mirror_held", "to_b", "warning", False, Facts(lag(mirrors=(replace(MIRROR, state="running", held=2),))),
     ["to_b has 2 conflicts on hold", "`cdcbridge mirror conflicts list --mirror to_b --held`"]),
    ("consumer_faulty", "billing", "critical", False,
     Facts(lag(feeds=Feeds(1, "h", "f", {"billing": Feed("refused", "no table t", "create it")}))),
     ["The consumer billing gets nothing: no table t. Fix: create it."]),
    ("backfill_failed", "billing public.t", "warning", False, Facts(lag(backfills=(BACKFILL,))),
     ["failed after 7 rows: No right on t.", "`cdcbridge backfill resume billing public.t`"]),
    ("consumer_held", "billing", "warning", False, Facts(lag(consumer_holders=(RECEIVER,)), users={4711: "app"}),
     ["pid 4711 (worker)", "Its user is app.", "`select pg_terminate_backend(4711)`"]),
    ("safe_seq_held", "pid 815", "warning", False, Facts(lag(holders=(PUBLISHER,)), users={815: "app"}),
     ["pid 815 (user app) has published and been open for 1m 1s", "reads seq 42 or a later one",
      "`select pg_terminate_backend(815)`"]),
    ("xmin_held", "source: pid 7", "warning", False, Facts(lag(horizon=(HOLDER,))),
     ["On the source, the transaction pid 7 (pg_dump, user backup) has been open for 1h 0m",
      "`select pg_terminate_backend(7)`"]),
    ("xmin_held", "store: prepared transaction two'phase", "warning", False,
     Facts(lag(horizon=(replace(HOLDER, server="store", kind="prepared transaction", pid=None, name="two'phase",
                                query="owner app, database shop", writes=True),))),
     ["and slots keep the WAL since then", "owner app, database shop", "`rollback prepared 'two''phase'`"]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "subject", "severity", "at_once", "facts", "parts"), WRONG)
def test_each_wrong_fact_makes_one_condition(
    rule: str, subject: str, severity: str, at_once: bool, facts: Facts, parts: list[str]
) -> None:
    (found,) = judged(facts).conditions
    assert (found.key, found.severity, found.at_once) == ((rule, subject), severity, at_once)
    for part in parts:
        assert part in found.text, found.text
    assert judged(facts, **{rule: "off"}).conditions == (), "off"
    other = "warning" if severity == "critical" else "critical"
    (found,) = judged(facts, **{rule: {"severity": other}}).conditions
    assert found.severity == other


@pytest.mark.parametrize(("rule", "query", "facts"), [
    ("consumer_held", "select 1", Facts(lag(consumer_holders=(replace(RECEIVER, query="select\n 1"),)))),
    ("safe_seq_held", "select publish(…)", Facts(lag(holders=(PUBLISHER,)))),
    ("xmin_held", "copy t to stdout", Facts(lag(horizon=(HOLDER,)))),
    ("xmin_held", "", Facts(lag(horizon=(replace(HOLDER, pid=None, query="owner app, database shop"),)))),
])  # fmt: skip
def test_a_query_is_apart_from_the_text_that_everybody_may_read(rule: str, query: str, facts: Facts) -> None:
    (found,) = judged(facts).conditions
    assert found.key.rule == rule and found.query == query
    assert not query or query not in found.text


def test_every_rule_is_in_the_table() -> None:
    # store_away is about the judge itself: test_bridge.py shows it.
    assert {row[0] for row in WRONG} == set(RULES) - {"store_away"}


@pytest.mark.parametrize(
    ("facts", "rules"),
    [
        (Facts(lag({"retained_bytes": 11 * GB})), {"slot_retained": {"above": "11GB"}}),
        (Facts(lag({"active": False, "inactive_seconds": 301.0})), {"slot_inactive": {"above": "302s"}}),
        (Facts(lag({"growth_bytes_per_second": 5.0 * GB / 1800})), {"slot_limit": {"within": "10m"}}),
        (Facts(lag(), led=False, leaderless=60.0), {}),
        (Facts(lag(), led=True, leaderless=100.0), {}),
        (Facts(lag({"lag_seconds": 301.0}), led=False), {}),
        (Facts(lag({"lag_seconds": 301.0, "active": False})), {}),
        (Facts(lag(consumers=[replace(QUEUE, dead=3)])), {"dead_letters": {"above": 3}}),
        (Facts(lag(consumers=[replace(QUEUE, dead=3)])), {"dead_letters": {"consumers": ["audit"]}}),
        (Facts(lag(consumers=[replace(QUEUE, oldest_due_age_seconds=901.0, paused=True)])), {"paused": "off"}),
        (Facts(lag(consumers=[replace(QUEUE, paused=True)])), {"paused": {"consumers": ["audit"]}}),
        (Facts(lag(consumers=[replace(QUEUE, oldest_age_seconds=901.0)])), {}),
        (Facts(lag(consumers=[replace(QUEUE, oldest_due_age_seconds=901.0)])), {"oldest_age": {"above": "16m"}}),
        (Facts(lag(sinks=(replace(SINK, behind=0),))), {}),
        (Facts(lag(backfills=({**BACKFILL, "state": "running"},))), {}),
        (Facts(lag(consumer_holders=(replace(RECEIVER, age_seconds=60.0),))), {}),
        (Facts(lag(consumer_holders=(replace(RECEIVER, kind="publisher"),))), {}),
        (Facts(lag(horizon=(replace(HOLDER, age_seconds=None),))), {}),
    ],
)
def test_facts_within_the_limits(facts: Facts, rules: dict[str, Any]) -> None:
    if facts.lag and facts.lag.slots[0].lag_seconds == 301.0 and facts.lag.slots[0].active:
        rules = {"bridge_stalled": {"above": "302s"}}
    assert judged(facts, **rules).conditions == ()


SOURCE = {"slot_retained", "slot_lost", "slot_inactive", "slot_limit", "bridge_stalled", "xmin_held"}
STORE = {
    "dead_letters", "oldest_age", "paused", "sink_failing", "mirror_stopped", "mirror_held", "consumer_faulty",
    "backfill_failed", "consumer_held", "safe_seq_held",
}  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "unknown"),
    [
        (Facts(None), SOURCE | STORE),
        (Facts(replace(lag(source_error="away"), slots=[])), SOURCE),
        (Facts(lag(store_error="away")), STORE | {"xmin_held", "slot_lost"}),
    ],
)
def test_what_could_not_be_looked_at_is_unknown(facts: Facts, unknown: set[str]) -> None:
    found = judged(facts)
    assert found.unknown == unknown and found.conditions == ()


def test_a_lost_slot_is_one_condition_and_not_three() -> None:
    lost = {"wal_status": "lost", "active": False, "inactive_seconds": 999.0}
    assert [one.key.rule for one in judged(Facts(lag(lost), led=False, ended="lost")).conditions] == ["slot_lost"]
    quiet = Facts(lag({"active": False, "inactive_seconds": 999.0}), led=False, leaderless=999.0)
    assert [one.key.rule for one in judged(quiet).conditions] == ["no_leader"]


def test_critical_conditions_are_first_and_one_subject_has_one_condition() -> None:
    facts = Facts(
        lag(
            {"wal_status": "unreserved", "growth_bytes_per_second": 5.0 * GB / 1800},
            consumers=[replace(QUEUE, dead=1)],
            consumer_holders=(RECEIVER, replace(RECEIVER, pid=4712)),
        )
    )
    found = judged(facts).conditions
    assert [one.key for one in found] == [
        ("slot_limit", "s"),
        ("dead_letters", "billing"),
        ("consumer_held", "billing"),
    ]
    assert "1 more transactions hold messages" in found[2].text


@pytest.mark.parametrize("severity", ["warning", "critical"])
def test_a_pause_has_to_last(severity: str) -> None:
    facts = Facts(lag(consumers=[replace(QUEUE, paused=True)]), ended="broken")
    (found,) = (one for one in judged(facts, paused={"severity": severity}).conditions if one.key.rule == "paused")
    assert (found.at_once, found.after) == (False, 3600.0)

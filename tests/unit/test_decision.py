"""Each case of a start, as a row: the facts that were found, and what is decided. Needs no server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr

from cdcbridge.changes.position import Position
from cdcbridge.checks.decision import Branch, Plan, TimelineGap, decide, refusal, wanted_plugin
from cdcbridge.checks.facts import Facts
from cdcbridge.checks.store import as_problem
from cdcbridge.config import Config, Source
from cdcbridge.errors import CdcbridgeError, OperatorNeeded, SourceUnavailable
from cdcbridge.source.facts import SourceFacts
from cdcbridge.source.slots import Identity, Slot
from cdcbridge.store.facts import History, StoreFacts, Tail

SHOP = Identity("7000", "shop", 16384)
SLOT = Slot("cdcbridge", "pgoutput", "shop", None, "reserved", restart_lsn=90, confirmed_flush_lsn=100, failover=False)
SOURCE = SourceFacts(SHOP, 180001, on_standby=False, timeline=1, encoding="UTF8", slot=SLOT)
HISTORY = History("7000", 1, "shop", "cdcbridge", "pgoutput", 16384)
STORE = StoreFacts(HISTORY, Tail(Position(140, 3), 150))
RUNNING = Facts(SOURCE, STORE, wal_end=200, timeline=1)  # a bridge has run here, and nothing has changed since
FRESH = Facts(replace(SOURCE, slot=None), StoreFacts(), wal_end=200, timeline=1)
PART = Tail(Position(170, 5), 150, unfinished={"options": {}})  # it has a part of the transaction that commits at 170


def config(**source: Any) -> Config:
    return Config(source=Source(dsn=SecretStr("host=db"), failover=False, **source), consumers=())


def with_slot(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, source=replace(facts.source, slot=replace(SLOT, **changes)))


def with_source(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, source=replace(facts.source, **changes))


def with_history(facts: Facts, **changes: Any) -> Facts:
    return replace(facts, store=replace(facts.store, history=replace(HISTORY, **changes)))


def with_tail(facts: Facts, tail: Tail) -> Facts:
    return replace(facts, store=replace(facts.store, tail=tail))


def promoted(tail: Tail, branch: int | None, slot_lsn: int = 100) -> Facts:
    """The source is on timeline 2, which left timeline 1 at LSN `branch`."""
    return replace(with_tail(with_slot(RUNNING, confirmed_flush_lsn=slot_lsn), tail), timeline=2, branch=branch)


PLAN = Plan("pgoutput", SHOP, 1)
FIRST = replace(PLAN, first=True)
TAIL = STORE.tail


@pytest.mark.parametrize(
    ("facts", "plan"),
    [
        pytest.param(FRESH, replace(FIRST, make_slot=True), id="first start"),
        pytest.param(replace(RUNNING, store=StoreFacts()), FIRST, id="first start, with a slot made by hand"),
        pytest.param(RUNNING, PLAN, id="restart"),
        pytest.param(with_slot(RUNNING, confirmed_flush_lsn=150), PLAN, id="slot at the store's end"),
        pytest.param(with_slot(RUNNING, confirmed_flush_lsn=None), PLAN, id="slot that was never confirmed"),
        pytest.param(with_slot(RUNNING, wal_status="unreserved"), PLAN, id="slot that is nearly lost"),
        pytest.param(replace(RUNNING, wal_end=150), PLAN, id="nothing written since"),
        pytest.param(with_tail(RUNNING, PART), replace(PLAN, finishing=True), id="unfinished transaction"),
        pytest.param(with_source(RUNNING, identity=Identity("7000", "store", 16384)),
                     replace(PLAN, identity=Identity("7000", "store", 16384)), id="renamed database"),
        pytest.param(with_history(RUNNING, database_oid=None), PLAN, id="history of an older version"),
        pytest.param(with_source(RUNNING, on_standby=True), PLAN, id="standby"),
        pytest.param(promoted(TAIL, 160), replace(PLAN, timeline=2, branch=Branch(1, 160, None)),
                     id="promoted behind the store's end"),
        pytest.param(promoted(TAIL, 150), replace(PLAN, timeline=2, branch=Branch(1, 150, None)),
                     id="promoted at the store's end"),
        pytest.param(promoted(TAIL, 120), replace(PLAN, timeline=2, branch=Branch(1, 120, TimelineGap(120, 150))),
                     id="promoted before the store's end"),
        pytest.param(promoted(TAIL, 120, slot_lsn=130), replace(PLAN, timeline=2, branch=Branch(1, 120, None)),
                     id="promoted, and the slot was read on the new timeline"),
        pytest.param(promoted(PART, 160), replace(PLAN, timeline=2, branch=Branch(1, 160, TimelineGap(150, 171))),
                     id="promoted inside the unfinished transaction"),
        pytest.param(promoted(PART, 180), replace(PLAN, timeline=2, branch=Branch(1, 180, None), finishing=True),
                     id="promoted behind the unfinished transaction"),
    ],
)  # fmt: skip
def test_what_a_start_does(facts: Facts, plan: Plan) -> None:
    assert decide(config(), facts) == plan


OTHER = "this store holds the changes of another source: "


@pytest.mark.parametrize(
    ("facts", "code", "message", "hint"),
    [
        pytest.param(with_source(RUNNING, identity=SHOP._replace(system_identifier="8000")), "other_source",
                     f"{OTHER}its system identifier is '7000', the source's is '8000'", "correct source.dsn", id="server"),
        pytest.param(with_source(RUNNING, identity=Identity("7000", "other", 20000)), "other_source",
                     f"{OTHER}its database is 'shop', the source's is 'other'", "correct source.dsn", id="database"),
        pytest.param(with_source(RUNNING, identity=SHOP._replace(database_oid=20000)), "other_source",
                     f"{OTHER}the database shop was dropped and created again", "another name", id="database made anew"),
        pytest.param(with_history(RUNNING, slot="old"), "other_source",
                     f"{OTHER}its slot is 'old', the source's is 'cdcbridge'", "Set source.slot back to old", id="slot"),
        pytest.param(with_source(RUNNING, slot=None), "slot_gone",
                     "cdcbridge: the slot no longer exists", "slot recreate", id="slot gone"),
        pytest.param(with_slot(RUNNING, wal_status="lost"), "slot_lost",
                     "the slot 'cdcbridge' is lost (its WAL was removed): changes after 0/64 are lost", "slot recreate",
                     id="slot lost"),
        pytest.param(with_slot(RUNNING, wal_status="lost", invalidation="idle_timeout"), "slot_lost",
                     "is lost (idle_timeout)", "slot recreate", id="slot invalidated"),
        pytest.param(with_slot(FRESH, wal_status="lost"), "slot_lost", "is lost", "slot recreate", id="lost at first"),
        pytest.param(replace(RUNNING, wal_end=149), "source_set_back",
                     "the store ends at 0/96, but the source's WAL at 0/95", "a new store.schema", id="restored source"),
        pytest.param(with_slot(RUNNING, confirmed_flush_lsn=151), "slot_beyond_store",
                     "has confirmed 0/97, but the store ends at 0/96", "slot skip --to 0/97", id="slot was advanced"),
    ],
)  # fmt: skip
def test_what_check_and_run_refuse_in_the_same_words(facts: Facts, code: str, message: str, hint: str) -> None:
    found = refusal(config(), facts)
    assert found is not None and found.code == code
    with pytest.raises(OperatorNeeded) as raised:
        decide(config(), facts)
    assert message in str(raised.value) and hint in str(raised.value.hint)
    problem = as_problem("cdcbridge", found)
    assert (problem.code, problem.severity) == (code, "error")
    assert problem.message == str(raised.value).removeprefix("cdcbridge: ") and problem.fix == raised.value.hint


@pytest.mark.parametrize(
    ("facts", "source", "error", "message"),
    [
        pytest.param(with_source(replace(RUNNING, wal_end=149), on_standby=True), {}, SourceUnavailable,
                     "the standby has replayed up to 0/95, and the store ends at 0/96", id="standby that is behind"),
        pytest.param(RUNNING, {"plugin": "wal2json"}, OperatorNeeded,
                     "the store's changes were decoded by pgoutput, and source.plugin is wal2json", id="plugin"),
        pytest.param(promoted(TAIL, None), {}, OperatorNeeded,
                     "the source is on timeline 2, which does not descend from timeline 1. The store holds changes of that one up to 0/96",
                     id="timeline of another history"),
        pytest.param(promoted(PART, None), {}, OperatorNeeded, "up to 0/AB", id="timeline, inside a transaction"),
        pytest.param(promoted(TAIL, 160, slot_lsn=170), {}, OperatorNeeded,
                     "has confirmed 0/AA, but the store ends at 0/96", id="promoted, and the slot was advanced"),
        pytest.param(replace(promoted(TAIL, 140), wal_end=130), {}, OperatorNeeded,
                     "the store ends at 0/8C, but the source's WAL at 0/82", id="promoted, and set back"),
    ],
)  # fmt: skip
def test_what_run_alone_refuses(
    facts: Facts, source: dict[str, Any], error: type[CdcbridgeError], message: str
) -> None:
    with pytest.raises(error) as raised:
        decide(config(**source), facts)
    assert message in str(raised.value)


def test_the_first_reason_is_told() -> None:
    """A slot that is lost matters less than a store of another source."""
    facts = with_history(with_slot(RUNNING, wal_status="lost"), system_identifier="1")
    found = refusal(config(), facts)
    assert found is not None and found.code == "other_source"


@pytest.mark.parametrize(
    ("configured", "facts", "plugin"),
    [
        ("auto", RUNNING, "pgoutput"),
        ("auto", with_history(with_slot(RUNNING, plugin="pgoutput"), plugin="wal2json"), "wal2json"),  # the history's
        ("auto", with_slot(FRESH, plugin="wal2json"), "wal2json"),  # the slot's
        ("auto", replace(FRESH, wal2json=True), "wal2json"),
        ("auto", replace(FRESH, wal2json=False), "pgoutput"),
        ("auto", replace(FRESH, wal2json=None), "pgoutput"),
        ("auto", with_source(replace(FRESH, wal2json=True), encoding="LATIN1"), "pgoutput"),
        ("pgoutput", replace(FRESH, wal2json=True), "pgoutput"),
        ("wal2json", FRESH, "wal2json"),
    ],
)
def test_which_plugin_is_meant(configured: str, facts: Facts, plugin: str) -> None:
    assert wanted_plugin(config(plugin=configured), facts) == plugin


@pytest.mark.parametrize(
    ("setting", "version", "on_standby", "slot", "failover"),
    [
        ("auto", 180001, False, False, True),
        (True, 180001, False, False, True),
        ("auto", 180001, False, True, None),
        (False, 180001, False, True, False),
        (False, 180001, False, False, None),
        ("auto", 180001, True, False, None),  # a standby alters no slot
        (False, 180001, True, True, None),
        ("auto", 150000, False, None, None),  # the server does not know of it
    ],
)
def test_the_failover_property(
    setting: Any, version: int, on_standby: bool, slot: bool | None, failover: bool | None
) -> None:
    facts = with_source(with_slot(RUNNING, failover=slot), version=version, on_standby=on_standby)
    given = config().model_copy(update={"source": config().source.model_copy(update={"failover": setting})})
    assert decide(given, facts).failover is failover


@pytest.mark.parametrize(("facts", "snapshot"), [(FRESH, True), (RUNNING, False), (with_slot(FRESH), False)])
def test_a_snapshot_comes_with_a_new_slot_alone(facts: Facts, snapshot: bool) -> None:
    assert decide(config(), facts, consistent=True).snapshot is snapshot


def test_a_transaction_that_cannot_be_decoded_is_not_finished() -> None:
    assert not decide(config(), with_tail(RUNNING, PART), unpublished=True).finishing

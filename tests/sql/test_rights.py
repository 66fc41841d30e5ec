"""Who may read what: a consumer's role alone, and nobody by way of another schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdcbridge.errors import UsageError
from cdcbridge.store import sql_files
from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts

NO_CONSUMER = "This role may read no consumer. `cdcbridge consumers apply` adds those of the configuration file."


@pytest.fixture
def roles(queue: StoreQueue) -> Iterator[None]:
    queue.session.execute("drop role if exists reader; drop role if exists stranger")
    queue.session.execute("create role reader login; create role stranger login")
    yield
    queue.session.execute("drop owned by reader, stranger; drop role reader; drop role stranger")


def session_of(queue: StoreQueue, role: str) -> psycopg.Connection[Any]:
    session = psycopg.connect(queue.dsn, user=role, autocommit=True, row_factory=psycopg.rows.dict_row)
    queue.sessions.append(session)
    return session


CALLS = ("receive('c')", "peek('c')", "ack('c', '{}')", "nack('c', '{}')", "extend('c', '{}', '1 s')", "redrive('c')",
         "purge('c')")  # fmt: skip


def test_a_role_reads_its_own_queue_with_no_right_on_any_table(queue: StoreQueue, roles: None) -> None:
    queue.declare(role="reader")
    queue.append(3)
    reader = session_of(queue, "reader")
    batch = queue.receive(session=reader)
    assert len(batch) == 3
    assert queue.ack(batch[0]["receipt"], session=reader) == 1
    assert queue.value("select cdcbridge.nack('c', %s, dead => true)", receipts(batch[1:]), session=reader) == 2
    assert queue.value("select cdcbridge.redrive('c')", session=reader) == 2
    assert queue.value("select pending from cdcbridge.consumer_lag()", session=reader) == 2
    internal = ("leases", "waiting_1", "messages_000000", "dead_messages_1")
    public = ("messages", "dead_messages", "consumers", "consumer_messages", "audit")
    for table in (*(f"cdcbridge.{name}" for name in public), *(f"cdcbridge_internal.{name}" for name in internal)):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            queue.all(f"select * from {table}", session=reader)


@pytest.mark.parametrize("call", CALLS)
def test_others_are_refused(queue: StoreQueue, roles: None, call: str) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    stranger = session_of(queue, "stranger")
    with pytest.raises(
        psycopg.errors.DatabaseError, match="consumer 'c' may be read by the role reader alone"
    ) as raised:
        queue.all(f"select * from cdcbridge.{call}", session=stranger)
    assert raised.value.sqlstate == "CB008"
    assert queue.all("select * from cdcbridge.consumer_lag()", session=stranger) == []


def test_a_role_that_was_set_counts_and_not_the_session(queue: StoreQueue, roles: None) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    queue.append(1)
    session = queue.open()
    session.execute("set role stranger")
    with pytest.raises(psycopg.errors.DatabaseError, match="may be read by the role reader alone"):
        queue.receive(session=session)
    session.execute("set role reader")
    assert len(queue.receive(session=session)) == 1


def test_members_of_the_role_may_read_it(queue: StoreQueue, roles: None) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant reader to stranger")
    assert queue.receive(session=session_of(queue, "stranger")) == []


def test_a_role_that_is_not_there_is_named(queue: StoreQueue) -> None:
    with pytest.raises(UsageError, match="no role named 'nobody'"):
        queue.declare(role="nobody")


def test_what_is_not_for_everybody_cannot_be_called(queue: StoreQueue, roles: None) -> None:
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    stranger = session_of(queue, "stranger")
    for call in (
        "cdcbridge_internal.begin_append(1, 1)",
        "cdcbridge_internal.take_lead('x')",
        "cdcbridge_internal.remove_consumer('c')",
        "cdcbridge.publish('t', null, '1')",
        "cdcbridge_internal.make_code()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            queue.all(f"select {call}", session=stranger)
    queue.session.execute("grant execute on function cdcbridge.publish to stranger")
    assert queue.value("select cdcbridge.publish('t', null, '1')", session=stranger) == 1


PUBLIC = {
    "audit", "consumers", "messages", "consumer_messages", "message_key_seqs", "dead_messages", "consumer_group_offsets",
}  # fmt: skip
IN_SCHEMA = """
    select relname as name, relkind in ('r', 'p', 'v', 'm', 'f') as relation from pg_class
    where relnamespace = 'cdcbridge'::regnamespace
    union all select proname, null from pg_proc where pronamespace = 'cdcbridge'::regnamespace
"""


def test_the_stores_schema_has_what_applications_use_and_nothing_else(queue: StoreQueue, roles: None) -> None:
    """So that `\\dt`, `\\dv` and `\\df cdcbridge.*` in psql list the public surface."""
    for mode in ("queue", "fifo", "stream"):
        queue.declare(mode, mode=mode, topics=("news",))
    queue.value("select cdcbridge.publish('news', 'k', '1')")
    queue.next_segment()
    queue.all("select cdcbridge.nack('queue', array(select receipt from cdcbridge.receive('queue')), dead => true)")
    found = queue.all(IN_SCHEMA)
    assert {row["name"] for row in found if row["relation"]} == PUBLIC
    assert {row["name"] for row in found if row["relation"] is None} == {one.name for one in sql_files.code().public}


def test_no_other_role_has_a_right_on_the_internal_schema(queue: StoreQueue, roles: None) -> None:
    queue.declare(role="reader")
    for privilege in ("usage", "create"):
        query = "select has_schema_privilege('reader', 'cdcbridge_internal', %s)"
        assert queue.value(query, privilege) is False, privilege
    others = """
        select c.oid::regclass from pg_class c cross join aclexplode(c.relacl) a
        where c.relnamespace = 'cdcbridge_internal'::regnamespace and a.grantee <> c.relowner
    """
    assert queue.all(others) == []
    reader = session_of(queue, "reader")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="schema cdcbridge_internal"):
        queue.all("select cdcbridge_internal.low_half(1)", session=reader)


def test_functions_are_not_led_astray_by_a_search_path(queue: StoreQueue, roles: None) -> None:
    """Tables and operators of the same names in a schema of the caller's are not looked at."""
    queue.declare(role="stranger")
    queue.append(1)
    queue.session.execute("grant usage on schema cdcbridge to stranger; grant create on schema public to stranger")
    stranger = session_of(queue, "stranger")
    stranger.execute(
        "create function public.moment() returns timestamptz language sql as $$ select 1/0; select now() $$"
    )
    stranger.execute("create temp table messages (seq int); create temp table consumers (id int)")
    stranger.execute("set search_path = pg_temp, public, cdcbridge")
    (row,) = queue.receive(session=stranger)
    assert queue.ack(row["receipt"], session=stranger) == 1


@pytest.mark.parametrize("call", ["receive('no')", "ack('no', '{}')", "read_stream('no')", "group_lag('no')"])
def test_the_hint_for_an_unknown_name_tells_those_that_the_caller_may_read(
    queue: StoreQueue, roles: None, call: str
) -> None:
    queue.session.execute("grant usage on schema cdcbridge to reader, stranger")
    reader, stranger = (session_of(queue, role) for role in ("reader", "stranger"))

    def hint(session: psycopg.Connection[Any]) -> str:
        with pytest.raises(psycopg.DatabaseError) as raised:
            queue.all(f"select * from cdcbridge.{call}", session=session)
        assert raised.value.sqlstate == "CB001"
        return str(raised.value.diag.message_hint)

    assert hint(reader) == NO_CONSUMER
    queue.declare("mine", role="reader")
    assert hint(stranger) == NO_CONSUMER
    queue.declare("theirs", role="stranger")
    queue.declare("owners")
    assert (hint(reader), hint(stranger)) == ("Known: mine", "Known: theirs")
    assert hint(queue.session) == "Known: mine, owners, theirs", "the owner"


@pytest.mark.parametrize("call", [*CALLS, "consumer_holders('c')", "show_consumer('c')", "dead_letters('c')",
                                  "queue_settings('c')", "next_visible('c')"])  # fmt: skip
def test_a_consumer_without_a_role_is_the_owners_alone(queue: StoreQueue, roles: None, call: str) -> None:
    queue.declare()
    queue.append(1)
    queue.declare("mine", role="stranger")
    stranger = session_of(queue, "stranger")
    with pytest.raises(
        psycopg.errors.DatabaseError, match="names no role, so only the store's owner postgres"
    ) as raised:
        queue.all(f"select * from cdcbridge.{call}", session=stranger)
    assert raised.value.sqlstate == "CB008"
    assert [row["name"] for row in queue.all("select * from cdcbridge.consumer_lag()", session=stranger)] == ["mine"]
    assert queue.states() == {"pending": 1, "in_flight": 0, "dead": 0}
    queue.session.execute("set role stranger")
    with pytest.raises(psycopg.errors.DatabaseError, match="names no role"):
        queue.receive()
    queue.session.execute("reset role")
    assert len(queue.receive()) == 1, "the owner"


def test_a_stream_without_a_role_is_the_owners_alone(queue: StoreQueue, roles: None) -> None:
    queue.declare("s", mode="stream")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    stranger = session_of(queue, "stranger")
    for call in ("read_stream('s')", "seek('s', 'latest')", "group_lag('s')", "commit_offset('s', 0, 1)"):
        with pytest.raises(psycopg.errors.DatabaseError, match="names no role") as raised:
            queue.all(f"select * from cdcbridge.{call}", session=stranger)
        assert raised.value.sqlstate == "CB008"


def test_whoever_was_granted_the_owner_or_the_table_of_consumers_reads_it_too(queue: StoreQueue, roles: None) -> None:
    queue.declare()
    queue.append(2)
    queue.session.execute("grant usage on schema cdcbridge to reader, stranger; grant postgres to reader")
    queue.session.execute("grant update on cdcbridge.consumers to stranger")
    for role in ("reader", "stranger"):
        assert len(queue.receive(1, session=session_of(queue, role))) == 1


def test_a_role_sees_its_own_dead_letters_and_its_own_row(queue: StoreQueue, roles: None) -> None:
    queue.declare(role="reader")
    queue.append(3)
    reader = session_of(queue, "reader")
    queue.value("select cdcbridge.nack('c', %s, dead => true)", receipts(queue.receive(session=reader)), session=reader)
    letters = queue.all("select * from cdcbridge.dead_letters('c')", session=reader)
    assert [row["seq"] for row in letters] == [3, 2, 1]
    ids = [row["id"] for row in letters]
    call = "select id from cdcbridge.dead_letters('c', "
    assert queue.all(call + "at_most => 1)", session=reader) == [{"id": ids[0]}]
    assert queue.all(call + "ids => %s)", ids[1:2], session=reader) == [{"id": ids[1]}]
    assert queue.all(call + "reason => 'oversized:')", session=reader) == []
    assert len(queue.all(call + "topic => 'public.t', reason => 'nacked:')", session=reader)) == 3
    with pytest.raises(psycopg.errors.DatabaseError, match="has no dead letter 99") as raised:
        queue.all(call + "ids => '{99}')", session=reader)
    assert raised.value.sqlstate == "CB007"
    (row,) = queue.all(
        "select name, paused, config ->> 'role' as role from cdcbridge.show_consumer('c')", session=reader
    )
    assert row == {"name": "c", "paused": False, "role": "reader"}

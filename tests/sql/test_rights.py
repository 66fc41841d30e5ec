"""Who may read what: a consumer's role alone, and nobody by way of another schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from cdcbridge.errors import UsageError
from tests.sql.queue import Queue
from tests.sql.test_queue import receipts


@pytest.fixture
def roles(queue: Queue) -> Iterator[None]:
    queue.session.execute("drop role if exists reader; drop role if exists stranger")
    queue.session.execute("create role reader login; create role stranger login")
    yield
    queue.session.execute("drop owned by reader, stranger; drop role reader; drop role stranger")


def session_of(queue: Queue, role: str) -> psycopg.Connection[Any]:
    session = psycopg.connect(queue.dsn, user=role, autocommit=True, row_factory=psycopg.rows.dict_row)
    queue.sessions.append(session)
    return session


CALLS = ("receive('c')", "peek('c')", "ack('c', '{}')", "nack('c', '{}')", "extend('c', '{}', '1 s')", "redrive('c')",
         "purge('c')")  # fmt: skip


def test_a_role_reads_its_own_queue_with_no_right_on_any_table(queue: Queue, roles: None) -> None:
    queue.declare(role="reader")
    queue.append(3)
    reader = session_of(queue, "reader")
    batch = queue.receive(session=reader)
    assert len(batch) == 3
    assert queue.ack(batch[0]["receipt"], session=reader) == 1
    assert queue.value("select cdcbridge.nack('c', %s, dead => true)", receipts(batch[1:]), session=reader) == 2
    assert queue.value("select cdcbridge.redrive('c')", session=reader) == 2
    assert queue.value("select pending from cdcbridge.consumer_lag()", session=reader) == 2
    for table in ("messages", "leases", "dead_messages", "consumers", "waiting_1"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            queue.all(f"select * from cdcbridge.{table}", session=reader)


@pytest.mark.parametrize("call", CALLS)
def test_others_are_refused(queue: Queue, roles: None, call: str) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    stranger = session_of(queue, "stranger")
    with pytest.raises(
        psycopg.errors.DatabaseError, match="consumer 'c' may be read by the role reader alone"
    ) as raised:
        queue.all(f"select * from cdcbridge.{call}", session=stranger)
    assert raised.value.sqlstate == "CB008"
    assert queue.all("select * from cdcbridge.consumer_lag()", session=stranger) == []


def test_a_role_that_was_set_counts_and_not_the_session(queue: Queue, roles: None) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    queue.append(1)
    session = queue.open()
    session.execute("set role stranger")
    with pytest.raises(psycopg.errors.DatabaseError, match="may be read by the role reader alone"):
        queue.receive(session=session)
    session.execute("set role reader")
    assert len(queue.receive(session=session)) == 1


def test_members_of_the_role_may_read_it(queue: Queue, roles: None) -> None:
    queue.declare(role="reader")
    queue.session.execute("grant reader to stranger")
    assert queue.receive(session=session_of(queue, "stranger")) == []


def test_a_role_that_is_not_there_is_named(queue: Queue) -> None:
    with pytest.raises(UsageError, match="no role named 'nobody'"):
        queue.declare(role="nobody")


def test_what_is_not_for_everybody_cannot_be_called(queue: Queue, roles: None) -> None:
    queue.session.execute("grant usage on schema cdcbridge to stranger")
    stranger = session_of(queue, "stranger")
    for call in (
        "begin_append(1, 1)",
        "take_lead('x')",
        "remove_consumer('c')",
        "publish('t', null, '1')",
        "make_code()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            queue.all(f"select cdcbridge.{call}", session=stranger)
    queue.session.execute("grant execute on function cdcbridge.publish to stranger")
    assert queue.value("select cdcbridge.publish('t', null, '1')", session=stranger) == 1


def test_functions_are_not_led_astray_by_a_search_path(queue: Queue, roles: None) -> None:
    """Tables and operators of the same names in a schema of the caller's are not looked at."""
    queue.declare()
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
    queue: Queue, roles: None, call: str
) -> None:
    queue.session.execute("grant usage on schema cdcbridge to reader, stranger")
    reader, stranger = (session_of(queue, role) for role in ("reader", "stranger"))

    def hint(session: psycopg.Connection[Any]) -> str:
        with pytest.raises(psycopg.DatabaseError) as raised:
            queue.all(f"select * from cdcbridge.{call}", session=session)
        assert raised.value.sqlstate == "CB001"
        return str(raised.value.diag.message_hint)

    assert hint(reader) == "No consumer has been applied yet, or none that this role may read."
    queue.declare("mine", role="reader")
    assert hint(stranger) == "No consumer has been applied yet, or none that this role may read."
    queue.declare("theirs", role="stranger")
    queue.declare("open")
    assert (hint(reader), hint(stranger)) == ("Known: mine, open", "Known: open, theirs")
    assert hint(queue.session) == "Known: mine, open, theirs", "the owner"

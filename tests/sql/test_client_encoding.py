"""Callers of the SQL functions whose client encoding lacks a character: what happens, and how they get past it."""

from __future__ import annotations

import psycopg
import pytest

from tests.sql.queue import StoreQueue

CRAB = "🦀 ž"


@pytest.fixture(params=["LATIN1", "WIN1252"])
def session(request: pytest.FixtureRequest, queue: StoreQueue) -> psycopg.Connection[dict[str, object]]:
    """A caller's session; three messages wait, of which the second has a character that it lacks."""
    queue.declare(topics=("news",), max_deliveries=3)
    for text in ("é", CRAB, "ü"):
        queue.session.execute("select cdcbridge.publish('news', %s, to_json(%s::text))", (text, text))
    session = queue.open()
    session.execute(f"set client_encoding = {request.param}".encode())
    return session


def test_one_character_fails_the_statement_and_takes_nothing(
    queue: StoreQueue, session: psycopg.Connection[dict[str, object]]
) -> None:
    for _ in range(5):
        with pytest.raises(psycopg.errors.UntranslatableCharacter):
            queue.all("select * from cdcbridge.receive('c')", session=session)
    assert queue.states() == {"pending": 3, "in_flight": 0, "dead": 0}, "not one delivery is counted"
    first = queue.all("select key, deliver_count from cdcbridge.receive('c', 1)", session=session)
    assert first == [{"key": "é", "deliver_count": 1}]


def test_utf8_reads_everything(queue: StoreQueue, session: psycopg.Connection[dict[str, object]]) -> None:
    session.execute("set client_encoding = 'UTF8'")
    rows = queue.all("select * from cdcbridge.receive('c')", session=session)
    assert [row["key"] for row in rows] == ["é", CRAB, "ü"]


def test_a_caller_that_cannot_change_its_encoding_reads_bytes(
    queue: StoreQueue, session: psycopg.Connection[dict[str, object]]
) -> None:
    """As docs/CONSUMERS.md has it."""
    rows = queue.all(
        "select receipt, seq, convert_to(key, 'UTF8') as key, convert_to(data::text, 'UTF8') as data"
        " from cdcbridge.receive('billing', 10)".replace("billing", "c"),
        session=session,
    )
    assert [bytes(row["key"]).decode() for row in rows] == ["é", CRAB, "ü"]
    done = "select cdcbridge.ack('c', array_agg(receipt)) as n from unnest(%s::text[]) receipt"
    assert queue.value(done, [row["receipt"] for row in rows], session=session) == 3


def test_one_message_becomes_a_dead_letter_by_its_receipt(
    queue: StoreQueue, session: psycopg.Connection[dict[str, object]]
) -> None:
    rows = queue.all("select receipt, seq from cdcbridge.receive('c', 10)", session=session)
    dead = "select cdcbridge.nack('c', array[%s], dead => true, reason => 'not in Latin-1') as n"
    assert queue.value(dead, rows[1]["receipt"], session=session) == 1
    assert queue.states() == {"pending": 0, "in_flight": 2, "dead": 1}
    with pytest.raises(psycopg.errors.UntranslatableCharacter):
        queue.all("select key from cdcbridge.dead_messages", session=session)
    assert queue.all("select id, seq, reason from cdcbridge.dead_messages", session=session)


def test_published_text_is_converted(queue: StoreQueue, session: psycopg.Connection[dict[str, object]]) -> None:
    queue.value("select cdcbridge.publish('news', %s, %s::json) as seq", "clé", '"déjà"', session=session)
    assert queue.all("select key from cdcbridge.messages order by seq desc limit 1") == [{"key": "clé"}]

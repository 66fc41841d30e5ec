"""Keep open conditions, silences and undelivered notifications in the store.

A notification is inserted in the transaction that changes its conditions. So none is lost and none is made twice,
wherever a bridge is killed. This module never evaluates a rule, and never contacts a destination.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from psycopg.rows import dict_row

from cdcbridge.alerts.notices import Notice
from cdcbridge.alerts.rules import Key
from cdcbridge.alerts.tracking import Open
from cdcbridge.database import Connection

GIVEN_UP_AFTER: Final = dt.timedelta(days=14)  # longer than a holiday of the people who look after a destination
SILENCE: Final = (  # takes the rule and the seconds
    "insert into alert_silences values (%s, clock_timestamp() + make_interval(secs => %s))"
    " on conflict (rule) do update set until = excluded.until returning until"
)
_OPEN: Final = "rule, subject, severity, message, since, began_at, notified_at, missing_at, query, told"
# The lock of one URL: while a bridge delivers to it, no other bridge does.
_LOCK: Final = "select pg_try_advisory_lock('alert_notifications'::regclass::oid::int, hashtext(%s))"
_WAITING: Final = """
    select n.id, coalesce(d.refusals, 0), n.kind, n.severity, n.title, n.body
    from alert_notifications n
    left join alert_deliveries d on d.notification_id = n.id and d.url_id = %(url)s
    where n.destination = %(destination)s and d.done_at is null
    order by n.id
"""
_NOTE: Final = """
    insert into alert_deliveries as d (notification_id, url_id, service, attempts, refusals, tried_at, error, done_at)
    select n.id, %(url)s, %(service)s, 1, %(refused)s::boolean::int, clock_timestamp(), %(error)s,
           case when %(error)s::text is null then clock_timestamp() end
    from alert_notifications n where n.id = %(id)s for key share
    on conflict (notification_id, url_id) do update
        set attempts = d.attempts + 1, tried_at = excluded.tried_at, error = excluded.error,
            refusals = case when excluded.refusals > 0 then d.refusals + 1 else 0 end,
            service = excluded.service, done_at = excluded.done_at
"""
_FORGET: Final = """
    delete from alert_notifications n
    where n.destination = %s and not exists (
        select from unnest(%s::text[]) u(url) where not exists (
            select from alert_deliveries d
            where d.notification_id = n.id and d.url_id = u.url and d.done_at is not null))
"""
_UNDELIVERED: Final = """
    select n.id, n.destination, n.kind, n.severity, n.title, n.created_at,
           coalesce(jsonb_agg(jsonb_build_object('service', d.service, 'attempts', d.attempts,
                                                 'tried_at', d.tried_at, 'error', d.error,
                                                 'delivered', d.done_at is not null) order by d.service)
                    filter (where d.url_id is not null), '[]') as deliveries
    from alert_notifications n left join alert_deliveries d on d.notification_id = n.id
    group by n.id order by n.id
"""


@dataclass(slots=True, frozen=True)
class Waiting:
    """A notification that a URL has not received.

    Attributes:
        number: Its id.
        refusals: How often in succession the service has refused it.
    """

    number: int
    refusals: int
    notice: Notice


@dataclass(slots=True, frozen=True)
class Turn:
    """The right to evaluate the rules, until the end of the transaction.

    Attributes:
        now: The time of the store.
        leaderless: Seconds since a bridge led last.
        before: The conditions that are open.
        silences: The silenced rules, each with the end of its silence.
    """

    now: dt.datetime
    leaderless: float
    before: list[Open]
    silences: dict[str, dt.datetime]


def take_turn(store: Connection, *, led: bool) -> Turn:
    """Lock the state of the alerts until the end of the transaction, and return it.

    Args:
        store: A session in a transaction.
        led: Whether a bridge leads.
    """
    row = store.execute(
        "update alert_state set judged_at = clock_timestamp(), leader_seen_at ="
        " case when %s or leader_seen_at is null then clock_timestamp() else leader_seen_at end"
        " returning judged_at, extract(epoch from judged_at - leader_seen_at)::float8",
        (led,),
    ).fetchone()
    now, leaderless = row or (dt.datetime.now(dt.UTC), 0.0)
    return Turn(now, leaderless, open_conditions(store), silences(store))


def open_conditions(store: Connection) -> list[Open]:
    """Return the open conditions, the oldest first."""
    rows = store.execute(f"select {_OPEN} from alert_conditions order by since, rule, subject").fetchall()  # noqa: S608
    return [Open(Key(rule, subject), *rest) for rule, subject, *rest in rows]


def silences(store: Connection) -> dict[str, dt.datetime]:
    """Return the silenced rules, each with the end of its silence."""
    rows = store.execute("select rule, until from alert_silences where until > clock_timestamp()").fetchall()
    return dict(rows)


def silence(store: Connection, rule: str, seconds: float) -> dt.datetime:
    """Make no notifications of a rule for some time, and return the end of that time."""
    row = store.execute(SILENCE, (rule, seconds)).fetchone()
    until: dt.datetime = row[0] if row else dt.datetime.now(dt.UTC)
    return until


def write(store: Connection, conditions: Sequence[Open], notices: Iterable[Notice]) -> None:
    """Replace the open conditions, and queue notifications, in the transaction of the caller."""
    store.execute(
        "delete from alert_conditions c where not exists ("
        " select from unnest(%s::text[], %s::text[]) k(rule, subject) where (k.rule, k.subject) = (c.rule, c.subject))",
        ([one.key.rule for one in conditions], [one.key.subject for one in conditions]),
    )
    with store.cursor() as cursor:
        cursor.executemany(
            f"insert into alert_conditions ({_OPEN}) values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"  # noqa: S608
            " on conflict (rule, subject) do update set severity = excluded.severity, message = excluded.message,"
            " query = excluded.query, began_at = excluded.began_at, notified_at = excluded.notified_at,"
            " missing_at = excluded.missing_at, told = excluded.told",
            [
                (
                    *(*one.key, one.severity, one.text, one.since, one.began_at, one.notified_at, one.missing_at),
                    *(one.query, one.told),
                )
                for one in conditions
            ],
        )
        cursor.executemany(
            "insert into alert_notifications (destination, kind, severity, title, body) values (%s, %s, %s, %s, %s)",
            [(one.destination, one.kind, one.severity, one.title, one.body) for one in notices],
        )


def give_up(store: Connection) -> list[tuple[str, str, str | None]]:
    """Delete notifications that could not be delivered for GIVEN_UP_AFTER.

    Returns:
        For each of them the destination, the title, and the last error.
    """
    rows = store.execute(
        "delete from alert_notifications n where created_at < clock_timestamp() - %s returning destination, title,"
        " (select d.error from alert_deliveries d where d.notification_id = n.id and d.error is not null limit 1)",
        (GIVEN_UP_AFTER,),
    ).fetchall()
    return [(destination, title, error) for destination, title, error in rows]


def waiting_destinations(store: Connection) -> dict[str, int]:
    """Return how many notifications each destination has yet to receive."""
    return dict(store.execute("select destination, count(*)::int from alert_notifications group by 1").fetchall())


def lock_url(store: Connection, url_id: str) -> bool:
    """Become the only bridge that delivers to a URL, until the session ends. Return False if another one is."""
    return store.execute(_LOCK, (url_id,)).fetchone() == (True,)


def waiting(store: Connection, destination: str, url_id: str) -> list[Waiting]:
    """Return the notifications that a URL of a destination has not received, the oldest first."""
    rows = store.execute(_WAITING, {"destination": destination, "url": url_id}).fetchall()
    return [Waiting(number, refusals, Notice(destination, *rest)) for number, refusals, *rest in rows]


def note_attempt(
    store: Connection, number: int, url_id: str, service: str, error: str | None, *, refused: bool = False
) -> None:
    """Store the result of an attempt. An error of None means that the URL has the notification."""
    values = {"id": number, "url": url_id, "service": service, "error": error, "refused": refused}
    store.execute(_NOTE, values)


def give_up_at(store: Connection, number: int, url_id: str) -> str | None:
    """Never try a notification at this URL again, and return its last error."""
    row = store.execute(
        "update alert_deliveries set done_at = clock_timestamp() where (notification_id, url_id) = (%s, %s)"
        " returning error",
        (number, url_id),
    ).fetchone()
    return row[0] if row else None


def forget_delivered(store: Connection, destination: str, url_ids: Sequence[str]) -> None:
    """Delete the notifications that every URL of a destination has received, or that were given up there."""
    store.execute(_FORGET, (destination, list(url_ids)))


def undelivered(store: Connection) -> list[dict[str, Any]]:
    """Return the notifications that are not delivered yet, each with the attempts at its URLs."""
    with store.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_UNDELIVERED).fetchall()

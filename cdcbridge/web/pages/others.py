"""The pages of sinks, mirrors, backfills, alarms and the audit log."""

from __future__ import annotations

from typing import Final

from cdcbridge.web.pages.site import Page, View, Visit, visible_alarms

_BACKFILLS: Final = (
    "select consumer, table_name, state, note, rows, percent, rows_per_second, seconds_left, condition, created_at"
    " from backfill_status() order by id desc limit 100"
)
_HAS_CONFLICTS: Final = "select to_regclass('conflicts') is not null"
_CONFLICTS: Final = (
    "select id, at, mirror, table_name, key, kind, rule, winner, state from conflicts order by id desc limit 100"
)
_AUDIT: Final = (
    "select id, at, caller, role, address, action, subject, details::text from audit where id < %s order by id desc"
    " limit 100"
)


_ALERTS: Final = (
    "select rule, subject, severity, message, query, since, notified_at from alert_conditions"
    " where began_at is not null order by severity, since limit 100"
)
_UNDELIVERED: Final = """
    select n.destination, n.title, n.created_at, d.service, d.attempts, d.error
    from alert_notifications n left join alert_deliveries d on d.notification_id = n.id and d.done_at is null
    order by n.id limit 20"""
_SILENCES: Final = "select rule, until from alert_silences where until > clock_timestamp() order by rule"


async def sinks(visit: Visit) -> Page:
    """Show the sinks: what they deliver, and why they do not."""
    found = [one for one in visit.figures.rows("sinks") if visit.caller.sees(one["name"])]
    return Page("sinks.html", {"title": "Sinks", "sinks": found})


async def mirrors(visit: Visit) -> Page:
    """Show the mirrors, and the conflicts that mirrors to this database have decided.

    A conflict that one of these mirrors decided is in its target.
    """
    found = [one for one in visit.figures.rows("mirrors") if visit.caller.sees(one["name"])]
    store = visit.services.store
    shown = visit.caller.consumers is None and visit.shows_data
    known = shown and (await store.rows(_HAS_CONFLICTS))[0][0]
    decided = await store.records(_CONFLICTS) if known else []
    return Page("mirrors.html", {"title": "Mirrors", "mirrors": found, "conflicts": decided, "shown": shown})


async def backfills(visit: Visit) -> Page:
    """Show the backfills, the newest first."""
    rows = await visit.services.store.records(_BACKFILLS)
    found = [row for row in rows if visit.caller.sees(row["consumer"])]
    return Page("backfills.html", {"title": "Backfills", "backfills": found})


async def alarms(visit: Visit) -> Page:
    """Show what needs attention now, and who holds old row versions, old WAL and the log's safe seq."""
    caller, figures = visit.caller, visit.figures
    mine = caller.consumers is None
    holders = [one for one in figures.rows("consumer_holders") if caller.sees(one["consumer"])]
    store = visit.services.store
    return Page("alarms.html", {
        "title": "Alarms",
        "alerts": visit.sessions(await store.records(_ALERTS)) if mine else [],
        "undelivered": await store.records(_UNDELIVERED) if mine else [],
        "silences": await store.rows(_SILENCES) if mine else [],
        "found_alarms": visible_alarms(caller, figures),
        "holders": visit.sessions(holders),
        "xmin": visit.sessions(figures.rows("xmin_holders")),
        "publishers": visit.sessions(figures.rows("holders")),
        "errors": [text for text in (figures.lag.get("source_error"), figures.lag.get("store_error")) if text and mine],
    })  # fmt: skip


async def audit(visit: Visit) -> Page:
    """Show who changed something, the newest change first."""
    visit.caller.refuse_restricted("The page of a consumer shows its state.")
    rows = await visit.services.store.rows(_AUDIT, (visit.number("before") or (1 << 63) - 1,))
    return Page("audit.html", {"title": "Audit log", "rows": rows, "older": rows[-1][0] if len(rows) == 100 else None})


VIEWS: Final = (
    View("GET", "/sinks", "look", sinks),
    View("GET", "/mirrors", "look", mirrors),
    View("GET", "/backfills", "look", backfills),
    View("GET", "/alarms", "look", alarms),
    View("GET", "/audit", "look", audit),
)

"""The pages of sinks, mirrors, backfills, alarms and the audit log."""

from __future__ import annotations

from typing import Final

from cdcbridge.alerts.store import SILENCE
from cdcbridge.config.alerts import RULES
from cdcbridge.units import parse_duration
from cdcbridge.web.audit import audited
from cdcbridge.web.pages.site import Elsewhere, Page, View, Visit, visible_alarms
from cdcbridge.web.problems import RequestRefused

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
_TIMES: Final = ("1h", "4h", "12h", "24h", "7d")
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


async def ask_silence(visit: Visit) -> Page:
    """Ask before a rule of the alerts is silenced, or speaks again."""
    rule = _rule(visit)
    ends = visit.given("end") is not None
    text = (
        "From now on, the bridge makes notifications of this rule again. A condition that still holds is told at once."
        if ends
        else "The bridge makes no notifications of this rule for some time. A condition that still holds afterwards is"
        " told then. The end of a condition that was told before is told in any case."
    )
    verb = "End the silence of" if ends else "Silence"
    return Page("ask.html", {
        "title": f"{verb} {rule.replace('_', ' ')}?", "text": text, "to": "/alarms/silence", "back": "/alarms",
        "button": "End the silence" if ends else "Silence", "fields": {"rule": rule, **({"for": "0s"} if ends else {})},
        "choice": None if ends else ("For", "for", _TIMES), "danger": False,
    })  # fmt: skip


async def silence(visit: Visit) -> Elsewhere:
    """Silence a rule of the alerts, or let it speak again."""
    rule, wanted, store = _rule(visit), visit.given("for"), visit.services.store
    if wanted not in {*_TIMES, "0s"}:
        raise RequestRefused(422, f"for is {wanted!r}, which is none of {', '.join(_TIMES)}")
    async with audited(store, visit.caller, visit.address, "silence", rule, {"for": wanted}) as result:
        result["until"] = await store.value(SILENCE, (rule, parse_duration(wanted)))
    return Elsewhere(f"/alarms?said={'spoken' if wanted == '0s' else 'silenced'}")


def _rule(visit: Visit) -> str:
    rule = visit.given("rule")
    if rule not in RULES:
        raise RequestRefused(404, f"there is no rule {rule!r}", hint=f"The rules are {', '.join(RULES)}.")
    return str(rule)


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
    View("GET", "/alarms/silence", "operate", ask_silence),
    View("POST", "/alarms/silence", "operate", silence),
    View("GET", "/audit", "look", audit),
)

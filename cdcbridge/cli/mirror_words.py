"""The table of mirrors that `lag` and `mirror list` print, and the facts of `mirror show`.

Results are printed on stdout, the reasons of failures on stderr.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cdcbridge.cli.context import print_table, say
from cdcbridge.config import Mirror
from cdcbridge.observe.mirrors import MirrorLag
from cdcbridge.routing.patterns import is_name
from cdcbridge.units import human_duration
from cdcbridge.words import as_text

_HEADINGS: Final = ("MIRROR", "TARGET", "STATE", "BEHIND", "LAG", "TRANSACTIONS", "CHANGES", "CONFLICTS", "HELD")


def print_mirrors(mirrors: Sequence[MirrorLag], *, empty: str = "") -> None:
    """Print the mirrors, and the reason of each one that does not apply."""
    print_table(_HEADINGS, [_row(one) for one in mirrors], empty=empty)
    for one in mirrors:
        if one.reason:
            hint = f" ({one.hint})" if one.hint and one.state == "stopped" else ""
            waits = "waits for: " if one.state == "waiting" else ""
            say(f"{one.name}: {waits}{one.reason}{hint}")


def _row(one: MirrorLag) -> Sequence[Any]:
    lag = "-" if one.lag_seconds is None else human_duration(one.lag_seconds)
    counts = (one.transactions, one.changes, one.conflicts, one.held)
    return (one.name, one.target, one.state, one.behind, lag, *counts)


def mirror_facts(found: MirrorLag, mirror: Mirror, place: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return everything about a mirror as names and values for people."""
    rows = [("mirror", f"{found.name} to {found.target}, schema {mirror.target.schema_}"), ("state", found.state)]
    if found.reason:
        since = f" (since {found.stopped_at:%Y-%m-%d %H:%M:%S%z})" if found.stopped_at else ""
        rows.append(("reason", f"{found.reason}{since}"))
    if found.hint:
        rows.append(("next step", found.hint))
    lag = "nothing waits" if found.lag_seconds is None else f"the oldest for {human_duration(found.lag_seconds)}"
    rows.append(("behind", f"{found.behind} messages, {lag}"))
    rows.append(("applied", f"{found.changes} changes in {found.transactions} transactions"))
    rows.append(("conflicts", f"{found.conflicts}, {found.held} on hold"))
    tables = mirror.tables.items() if isinstance(mirror.tables, dict) else ((one, one) for one in mirror.tables)
    rows += [("table", _table(pattern, mirror)) for pattern, _ in tables]
    rows.append(("apply", f"{mirror.apply}, start {mirror.start}, triggers {mirror.triggers}"))
    if mirror.two_way is not None:
        rule = mirror.conflict if isinstance(mirror.conflict, str) else as_text(mirror.conflict)
        rows.append(("two-way", f"peer {mirror.two_way.peer}, conflict {rule}, unique {mirror.unique}"))
    if "error" in place:
        rows.append(("place", f"unknown: {place['error']}"))
    else:
        rows.append(("place", f"seq {place['seq']}, {place['commit_lsn']}" if place else "the target has none yet"))
    if found.note and found.note_at:
        rows.append(("note", f"{found.note_at:%Y-%m-%d %H:%M:%S%z}: {found.note}"))
    return rows


def _table(pattern: str, mirror: Mirror) -> str:
    route = mirror.route(pattern) if is_name(pattern) else None
    to = f" to {route.to}" if route is not None and route.to != pattern else ""
    columns = ", some columns" if route is not None and route.columns is not None else ""
    return f"{pattern}{to}{columns}"

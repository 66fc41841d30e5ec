"""`cdcbridge status`: one screen that shows whether everything is healthy, and the reasons if it is not."""

from __future__ import annotations

import click

from cdcbridge.cli.context import App, as_json, pass_app, print_json
from cdcbridge.cli.screen import bullets, facts
from cdcbridge.config import Config
from cdcbridge.observe import status as looking
from cdcbridge.observe.lag import SlotLag
from cdcbridge.observe.status import Status
from cdcbridge.source.wal_room import WalRoom
from cdcbridge.units import human_duration, human_size


@click.command()
@as_json
@pass_app
def status(app: App, as_json: bool) -> int:
    """Report whether the bridge is healthy, and why not.

    Exits with 0 if it is healthy, with 1 if it is not, and with 3 if the slot is lost.

    It works on any machine and while the bridge is stopped. Dead letters, paused consumers and old messages are listed,
    and do not change the exit code.
    """
    found = looking.look(app.config)
    if as_json:
        print_json(found.as_json())
        return found.exit_code
    if found.healthy:
        click.echo(click.style("healthy", fg="green", bold=True))
    else:
        click.echo(click.style("NOT healthy", fg="red", bold=True))
        bullets(found.reasons)
    if found.notes:
        click.echo("Notes:")
        bullets(found.notes)
    click.echo()
    facts(_facts(app.config, found))
    return found.exit_code


def _facts(config: Config, found: Status) -> list[tuple[str, str]]:
    rows = [("bridge", _bridges(found))]
    room = found.lag.room if found.lag else WalRoom()
    for slot in found.lag.slots if found.lag else ():
        state = "active" if slot.active else "inactive"
        rows.append(("slot", f"{slot.name} ({slot.plugin}), {state}, wal_status {slot.wal_status}"))
        rows.append(("WAL", _lost(slot, room) if slot.wal_status == "lost" else _wal(config, slot)))
    if found.lag is None or found.lag.source_error:
        rows.append(("slot", f"{config.source.slot}, unknown: the source cannot be read"))
    rows.append(("store", f"schema {config.store.schema_}, {_store(found)}"))
    if found.lag and (found.version or found.guest) and not found.lag.store_error:
        consumers = found.lag.consumers
        waiting, flying, dead = (sum(getattr(c, name) for c in consumers) for name in ("pending", "in_flight", "dead"))
        rows.append(("consumers", f"{len(consumers)}: {waiting} pending, {flying} in flight, {dead} dead"))
    error = found.last_error
    if error is not None:
        ago = f"{human_duration(max(0.0, error.seconds))} ago"
        mended = f", fixed since {error.mended}" if error.mended else ""
        rows.append(("last error", f"{ago}{mended}, {error.holder}: {error.message}"))
        if error.hint and not error.mended:
            rows.append(("", f"hint: {error.hint}"))
    return rows


def _wal(config: Config, slot: SlotLag) -> str:
    wal = [f"{_size(slot.retained_bytes)} retained, alarm above {human_size(config.source.max_retained_wal)}"]
    wal.append(
        "the server has no limit (max_slot_wal_keep_size)"
        if slot.safe_wal_bytes is None
        else f"{human_size(max(0, slot.safe_wal_bytes))} left until the slot is lost"
    )
    if slot.lag_seconds is not None:
        wal.append("nothing waits" if slot.lag_seconds == 0 else f"{human_duration(slot.lag_seconds)} behind")
    if slot.quiet:
        wal.append(slot.quiet.removeprefix("WAL: "))
    return "; ".join(wal)


def _lost(slot: SlotLag, room: WalRoom) -> str:
    """Return the reason why a slot is lost, and its consequences.

    Before PostgreSQL 17 the server does not report since when the slot has not been read. Then the time
    is an upper limit, and the text contains "at most".
    """
    why = slot.invalidation_reason or "the server removed WAL that it had not sent yet"
    since = ""
    if slot.inactive_seconds is not None:
        most = " at most" if slot.failover is None else ""
        since = f". No bridge has read it for {human_duration(slot.inactive_seconds)}{most}"
    limit = "has no limit now" if room.limit_bytes is None else f"is {human_size(room.limit_bytes)}"
    after = f". Changes after {slot.confirmed_flush_lsn} are lost" if slot.confirmed_flush_lsn else ""
    return (
        f"lost: {why}{since}{after}. max_slot_wal_keep_size {limit}. `cdcbridge slot recreate` continues after a gap"
        " message"
    )


def _store(found: Status) -> str:
    if found.unknown:
        return "unknown: it cannot be read"
    if found.guest is not None:
        return f"of which the role {found.guest.role} sees only its own consumers"
    return f"version {found.version}" if found.version else "not created yet"


def _bridges(found: Status) -> str:
    if found.unknown:
        return "unknown: the store cannot be read"
    told = []
    for bridge in found.bridges:
        who = bridge.holder if bridge.leads and bridge.holder else f"session pid {bridge.pid}"
        long = f" since {bridge.since} ({human_duration(max(0.0, bridge.seconds or 0.0))})" if bridge.since else ""
        told.append(f"{who} {'leads' if bridge.leads else 'stands by'}{long}")
    return "; ".join(told) or "none"


def _size(size: int | None) -> str:
    return "?" if size is None else human_size(size)


COMMANDS = (status,)

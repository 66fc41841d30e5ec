"""`cdcbridge consumers …`: apply the consumers of the file, and list, pause, replay and remove those of the store."""

from __future__ import annotations

from dataclasses import asdict
from socket import gethostname
from typing import Final

import click

from cdcbridge.checks.server import check
from cdcbridge.cli.context import App, as_json, name_argument, pass_app, print_json, print_line, print_table, say
from cdcbridge.cli.screen import facts
from cdcbridge.cli.where import PLACE, PLACE_HELP
from cdcbridge.database import Connection
from cdcbridge.database.patience import patiently
from cdcbridge.database.rights import guest
from cdcbridge.observe.consumer_lag import ConsumerLag
from cdcbridge.observe.lag_store import HELD_FOR
from cdcbridge.problem import refuse
from cdcbridge.routing.subscription import Subscription
from cdcbridge.store import consumers as applying
from cdcbridge.store import replay as backlog
from cdcbridge.store.consumer_changes import difference
from cdcbridge.store.feed_watch import await_feeds, bridge_runs, stored_feeds
from cdcbridge.store.feeds import Feeds, feed_of
from cdcbridge.store.holders import consumer_holders, told
from cdcbridge.units import human_duration
from cdcbridge.words import as_text, one_line

_WHEN: Final = "%Y-%m-%d %H:%M:%S%z"
# The first and the last message of a range of the log, each with its time.
_ENDS: Final = """
    select f.seq, coalesce(f.commit_time, f.inserted_at), l.seq, coalesce(l.commit_time, l.inserted_at)
    from (select * from messages where seq between %(low)s and %(high)s order by seq limit 1) f,
         (select * from messages where seq between %(low)s and %(high)s order by seq desc limit 1) l
"""


@click.group()
def consumers() -> None:
    """Apply, list, pause, replay and remove consumers."""


@consumers.command()
@click.option("--dry-run", is_flag=True, help="Show the changes, without making them.")
@as_json
@pass_app
def apply(app: App, dry_run: bool, as_json: bool) -> None:
    """Bring the store's consumers to the state of the file.

    `run` does the same when it starts.


    It refuses what `check` refuses, with exit code 2. A running bridge reads its own file again and uses it from
    its next append on. A consumer that is missing from that file receives nothing, and a warning reports it.

    \b
    Examples:
      cdcbridge consumers apply --dry-run    added, changed (each setting: old → new), unchanged, not in the file
      cdcbridge consumers apply
    """
    with app.store() as store:
        would = difference(store, app.config.consumers)
        if dry_run:
            print_json(would.as_json()) if as_json else click.echo("\n".join(would.as_text()) or "no consumers")
        found = check(app.config)
        refuse(found)
        if dry_run:
            return
        runs = bridge_runs(store)  # before apply(): the bridge gives up the lead for a moment to take the change up
        done = applying.apply(store, app.config.consumers, fence=True)
        silent = _silent(store, app, done, runs=runs or bridge_runs(store))
    for why in silent.values():
        say(f"warning: {why}")
    if as_json:
        applied = {"added": done.added, "changed": done.changed, "not_in_file": done.left}
        print_json({**applied, "otherwise_in_bridge": list(silent)})
        return
    for verb, names in (("added", done.added), ("changed", done.changed), ("not in the file", done.left)):
        for name in names:
            click.echo(f"{verb}: {name}")
    if not (done.added or done.changed):
        click.echo("the store already has the consumers of the file")


def _silent(store: Connection, app: App, done: applying.Applied, *, runs: bool) -> dict[str, str]:
    """Return the consumers that the running bridge does not treat as this file declares them, each with a sentence.

    Wait a few seconds until the bridge has taken the change up. If no bridge runs, or if it has not taken the change up
    by then, print that and return an empty dict.
    """
    if not runs:
        if done.added or done.changed:
            say("no bridge runs on this store now: the consumers get messages when one starts")
        return {}
    taken_up, feeds = await_feeds(store)
    if feeds is None or not taken_up:
        say("warning: the running bridge has not applied this yet: `cdcbridge consumers list` shows when it has")
        return {}
    names = [consumer.name for consumer in app.config.consumers]
    silent = {name: why for name in names if (why := feeds.silence(name))}
    for name in difference(store, app.config.consumers).changed:
        silent.setdefault(
            name,
            f"{name} does not have the settings of this file: the bridge ({feeds.holder}) has another version in its"
            f" file {feeds.file}, and restored that. Change it there",
        )
    for name in done.left:
        if (feed := feeds.of(name)) is not None and feed.state in ("fed", "as_before"):
            silent[name] = (
                f"{name} is not in this file, but still gets messages: the bridge ({feeds.holder}) has it in its file"
                f" {feeds.file}. Remove it there"
            )
    return silent


@consumers.command("list")
@as_json
@pass_app
def list_command(app: App, as_json: bool) -> None:
    """List the consumers and their unfinished messages."""
    with app.store(pooled=True) as store:
        rows = [ConsumerLag(*row) for row in store.execute("select * from consumer_lag()").fetchall()]
        feeds = None if guest(store) else stored_feeds(store)  # a consumer's role may not read the feeds
        holders = consumer_holders(store, seconds=HELD_FOR)
    if as_json:
        print_json([{**asdict(row), **feed_of(feeds, row.name)} for row in rows])
        return
    print_consumers(rows, feeds)
    for alarm in feeds.alarms() if feeds else ():
        say(alarm.message)
    for line in told(holders):
        say(line)


def print_consumers(rows: list[ConsumerLag], feeds: Feeds | None = None) -> None:
    """Print the table of consumers that `consumers list` and `lag` show.

    After it, print a line for each consumer that gets nothing, unless an alarm already reports it.
    """
    print_table(
        ("CONSUMER", "MODE", "PENDING", "DELAYED", "HELD", "IN FLIGHT", "DEAD", "OLDEST"),
        [
            (
                r.name
                + (" (paused)" if r.paused else "")
                + (f" ({mark})" if feeds and (mark := feeds.mark(r.name)) else ""),
                r.mode,
                r.pending,
                r.delayed,
                r.held,
                r.in_flight,
                r.dead,
                None if r.oldest_due_age_seconds is None else human_duration(r.oldest_due_age_seconds),
            )
            for r in rows
        ],
        empty="no consumers yet: `cdcbridge consumers apply` or `cdcbridge run` adds those of the file",
    )
    for line in feeds.warnings([r.name for r in rows]) if feeds else ():
        say(line)


@consumers.command()
@name_argument
@as_json
@pass_app
def show(app: App, name: str, as_json: bool) -> None:
    """Show a consumer's configuration, and who holds its messages.

    Durations are in seconds and sizes in bytes, as the store keeps them. An open transaction that holds messages is
    named with its session.
    """
    with app.store(pooled=True) as store:
        row = store.execute(
            "select id, name, mode, paused, created_at, updated_at, config from show_consumer(%s)", (name,)
        ).fetchone()
        holders = consumer_holders(store, name, seconds=HELD_FOR)
    if row is None:
        return
    shown = dict(zip(("id", "name", "mode", "paused", "created_at", "updated_at", "config"), row, strict=True))
    if as_json:
        print_json({**shown, "consumer_holders": [holder.as_json() for holder in holders]})
        return
    settings = shown.pop("config")
    shown["paused"] = "yes: `cdcbridge consumers resume` lets receivers continue" if shown["paused"] else "no"
    facts([(key, one_line(as_text(value))) for key, value in [*shown.items(), *settings.items()]])
    for line in told(holders):
        say(line)


@consumers.command()
@name_argument
@pass_app
def pause(app: App, name: str) -> None:
    """Pause deliveries, while messages are still queued."""
    with app.store(pooled=True) as store:
        _set_paused(store, name, paused=True)
    click.echo(f"paused: {name}")


@consumers.command()
@name_argument
@pass_app
def resume(app: App, name: str) -> None:
    """Resume the deliveries of a paused consumer."""
    with app.store(pooled=True) as store:
        _set_paused(store, name, paused=False)
    click.echo(f"resumed: {name}")


def _set_paused(store: Connection, name: str, *, paused: bool) -> None:
    query = "update consumers set paused = %s, updated_at = now() where id = (consumer_named(%s)).id"
    patiently(
        store, lambda: store.execute(query, (paused, name)), what=f"consumers {'pause' if paused else 'resume'} {name}"
    )


@consumers.command()
@name_argument
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_app
def remove(app: App, name: str, yes: bool) -> None:
    """Remove a consumer and all its messages and dead letters.

    If another transaction uses the consumer, this command retries for 30 s while all other sessions continue. Then it
    names the session, removes nothing and exits with 1. The running bridge adds a consumer that is still in its file
    again, without messages: the command warns before it removes anything.
    """
    with app.store() as store:
        row = store.execute("select l.* from consumer_lag((consumer_named(%s)).name) l", (name,)).fetchone()
        found = ConsumerLag(*row) if row else None
        runs = bridge_runs(store)
        if returns := _returns(store, app, name, runs=runs):
            say(f"warning: {returns}")
        if found and not yes:
            say(
                f"{name}: {found.pending} pending, {found.in_flight} in flight, {found.dead} dead. All of them will"
                " be deleted."
            )
            click.confirm(f"Remove {name}?", abort=True, err=True)
        applying.remove(store, name)
        feeds = await_feeds(store)[1] if runs else None
    click.echo(f"removed: {name}")
    if feeds is not None and feeds.of(name) is not None:
        say(f"warning: the bridge ({feeds.holder}) has {name} in its file {feeds.file}, and has added it again, empty")


def _returns(store: Connection, app: App, name: str, *, runs: bool) -> str:
    """Return a sentence if a bridge would add the consumer again after its removal, else ''.

    The sentence names the file that lists the consumer.
    """
    in_file = name in {consumer.name for consumer in app.config.consumers}
    feeds = stored_feeds(store) if runs else None
    if feeds is None:
        again = f"{name} is still in {app.path}: the next `run` adds it again, empty. Remove it from that file first."
        return again if in_file else ""
    feed = feeds.of(name)
    # The bridge reads its file again after a removal. If that is this file, the text that it has now
    # decides, and not the text that the bridge has read before.
    ours = feeds.holder.rpartition(" pid ")[0] == gethostname() and feeds.file == str(app.config.path.absolute())
    if in_file if ours else feed is not None and feed.state != "not_in_file":
        return (
            f"the running bridge ({feeds.holder}) has {name} in its file {feeds.file}, and will add it again, empty,"
            " within seconds. Remove it from that file first."
        )
    return ""


@consumers.command()
@name_argument
@click.option("--from", "start", required=True, type=PLACE, help=f"The first message of the range. {PLACE_HELP}")
@click.option(
    "--to",
    "end",
    default="latest",
    show_default=True,
    type=PLACE,
    help="The first message after the range.",
)
@pass_app
def replay(app: App, name: str, start: str, end: str) -> None:
    """Put a range of the log into a consumer's queue again.

    The messages are queued after all waiting ones, and their delivery count starts again at zero.

    The consumer's current tables, topics, operations, filter and key decide which messages it receives. Messages that
    still wait or are in flight are skipped. The command prints the number of replayed and of skipped messages, and the
    first and last seq of the range with their times.

    \b
    Examples:
      cdcbridge consumers replay billing --from "2026-05-01 12:00+02" --to "2026-05-01 13:00+02"
      cdcbridge consumers replay billing --from -1h
      cdcbridge consumers replay billing --from 1742 --to 1743
    """
    with app.store() as store, app.store() as reader:
        row = store.execute(
            "select c.id, c.name, c.mode, c.config, seq_before(%s) + 1, seq_until(%s) from queue_named(%s) c",
            (start, end, name),
        ).fetchone()
        if row is None:
            return
        with reader.transaction():
            replayed, skipped = backlog.replay(store, reader, Subscription.from_config(*row[:4]), row[4], row[5])
        ends = reader.execute(_ENDS, {"low": row[4], "high": row[5]}).fetchone() or (None,) * 4
    if skipped:
        say(f"{name}: {skipped} skipped, because they already wait or are in flight")
    first, first_time, last, last_time = ends
    if first is None:
        say(f"{name}: the log has no message from {start} up to {end}")
    else:
        say(f"{name}: from seq {first} of {first_time:{_WHEN}} to seq {last} of {last_time:{_WHEN}}")
    where = {"from_seq": first, "from_time": first_time, "to_seq": last, "to_time": last_time}
    print_line({"replayed": replayed, "skipped": skipped, **where})


COMMANDS = (consumers,)

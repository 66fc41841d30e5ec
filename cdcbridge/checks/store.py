"""Check that the store can be written, and that it holds the changes of this source.

This module never changes a database.
"""

from __future__ import annotations

from collections.abc import Iterator

from cdcbridge.checks.decision import Refusal, refusal
from cdcbridge.checks.facts import Facts
from cdcbridge.checks.other_stores import slot_problems
from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.problem import Problem
from cdcbridge.routing.patterns import whole
from cdcbridge.schemas import both
from cdcbridge.source.capture import Capture, look, losses
from cdcbridge.store.consumers import mode_conflict
from cdcbridge.store.migrate import newest_version, schema_version


def store_problems(config: Config, store: Connection) -> Iterator[Problem]:
    """Yield the reasons why `run` cannot bring the store's schema to this version."""
    schema = config.store.schema_
    version, newest = schema_version(store), newest_version()
    if version > newest:
        yield Problem(
            "store_newer",
            "error",
            schema,
            f"the store's schema has version {version}, newer than this program's {newest}",
            "Install the cdcbridge that made it, or a newer one.",
        )
    if version == 0:
        row = store.execute(
            "select has_database_privilege(current_database(), 'CREATE'), quote_ident(current_database()),"
            " quote_ident(current_user), 2 = (select count(*) from pg_namespace where nspname = any (%s))",
            (list(both(schema)),),
        ).fetchone()
        if row and not row[0] and not row[3]:
            yield Problem(
                "privilege_store",
                "error",
                schema,
                f"the role {row[2]} may not create the schemas {' and '.join(both(schema))} in {row[1]}; the database's"
                " owner gives that right",
                f"grant create on database {row[1]} to {row[2]};",
            )


def filled_consumers(store: Connection | None) -> list[str]:
    """Return the names of the consumers whose snapshot was begun already, so that they need no other."""
    if store is None or schema_version(store) == 0:
        return []
    return [n for (n,) in store.execute("select name from consumers where snapshot_at is not null").fetchall()]


def role_problems(config: Config, store: Connection) -> Iterator[Problem]:
    """Yield roles that do not exist, and a warning if only some of the consumers name a role."""
    for consumer in config.consumers:
        if consumer.role is None:
            continue
        row = store.execute(
            "select to_regrole(quote_ident(%s)) is null, quote_ident(%s)", (consumer.role,) * 2
        ).fetchone()
        if row and row[0]:
            message = f"consumer {consumer.name}: there is no role {consumer.role} in the store's server"
            yield Problem("role_missing", "error", consumer.role, message, f"create role {row[1]} login;")
    with_role = [consumer.name for consumer in config.consumers if consumer.role is not None]
    without = [consumer.name for consumer in config.consumers if consumer.role is None]
    if with_role and without:
        yield Problem(
            "roles_mixed",
            "warning",
            ", ".join(without),
            f"the consumers {', '.join(with_role)} have a role, and {', '.join(without)} have none: only the store's"
            " owner may read a consumer without a role",
            "Set role: in the file for each consumer that an application reads. Leave it out for those of the owner.",
        )


def mode_problems(config: Config, store: Connection) -> Iterator[Problem]:
    """Yield consumers whose mode differs from the mode in the store. The store's tables are made for one mode."""
    if schema_version(store) == 0:
        return
    modes: dict[str, str] = dict(store.execute("select name, mode from consumers").fetchall())
    for consumer in config.consumers:
        mode = modes.get(consumer.name, consumer.mode)
        if mode != consumer.mode:
            yield Problem("mode_changed", "error", consumer.name, *mode_conflict(consumer, mode))


def applied_config(config: Config, store: Connection | None) -> Config | None:
    """Return the configuration with only those consumers whose tables and operations a bridge has applied already.

    The result is None before the first run.
    """
    if store is None or schema_version(store) == 0 or store.execute("select from source").fetchone() is None:
        return None
    rows = store.execute("select name, config -> 'tables', config -> 'operations' from consumers").fetchall()
    kept = [c for c in config.consumers if (c.name, list(c.tables), list(c.operations)) in rows]
    return config.model_copy(update={"consumers": tuple(kept)})


def history_problems(config: Config, facts: Facts, connection: Connection, store: Connection) -> Iterator[Problem]:
    """Yield the differences between the store's history and the source, by the same rules as `run`.

    `run` also compares timelines, because it has a replication session.
    """
    history, capture, name = facts.store.history, facts.store.capture, config.source.slot
    if history is not None and capture is not None and history.plugin == "pgoutput":  # for wal2json, it holds gaps
        yield from _capture(config, connection, Capture(**capture))
    found = refusal(config, facts)
    if found is None or found.code != "other_source":
        yield from slot_problems(config, facts.source, connection, store, begun=history is not None)
    if found is not None:
        yield as_problem(name, found)


def as_problem(name: str, found: Refusal) -> Problem:
    """Return a refusal of `run` as a problem with the same message and fix."""
    return Problem(found.code, "error", name, str(found.error).removeprefix(f"{name}: "), found.error.hint or "")


def _capture(config: Config, connection: Connection, before: Capture) -> Iterator[Problem]:
    """Find changes of publications and tables since a bridge last streamed: changes made since may be missing."""
    patterns = [pattern for consumer in config.consumers for pattern in whole(consumer.tables)]
    for loss in losses(before, look(connection, list(before.publications), patterns)):
        yield Problem(
            "capture_changed",
            "warning",
            config.source.publication,
            f"{loss}, so changes made since then may be missing",
            "cdcbridge run -- with a correct publication, it sends every consumer a gap message",
        )

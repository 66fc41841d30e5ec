"""Compare the publications with those of the last streaming session, and adapt them to the consumers.

This happens before the next streaming session begins. The module reads and writes the source, and reports which changes
can be missing. It never decides how the log treats such a loss.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import structlog

from cdcbridge.checks.facts import Facts
from cdcbridge.config import Config
from cdcbridge.database import Connection
from cdcbridge.routing.patterns import whole, without
from cdcbridge.source import publications
from cdcbridge.source.capture import LEFT_OUT, Capture, look, losses

log = structlog.get_logger()


@dataclass(slots=True, frozen=True)
class Publishing:
    """The publications that a streaming session reads through.

    Attributes:
        names: The names of the publications.
        capture: The publications and tables as they are when it begins. None with wal2json, which uses no publications.
        losses: The changes that may be missing, as sentences.
    """

    names: list[str]
    capture: Capture | None = None
    losses: list[str] = field(default_factory=list)


def bring_into_step(config: Config, facts: Facts, connection: Connection, left_out: Collection[str]) -> Publishing:
    """Adapt the publications to the consumers.

    Args:
        config: The configuration with the consumers to publish for.
        facts: The facts of both sides, with the capture of the last streaming session.
        connection: A session on the source.
        left_out: Tables that cannot be captured now, for example `public.orders` after it lost its key.

    Returns:
        The publications, their state, and the changes that may be missing since the last streaming session.

    Raises:
        OperatorNeeded: The role may not make a change that is needed.
    """
    patterns = [pattern for consumer in config.consumers for pattern in whole(consumer.tables)]
    before = facts.store.capture
    missing: list[str] = []
    unknown: set[str] = set()  # tables that are left out and were never captured, so that no change of them is missing
    if before is not None:
        began = Capture(**before)
        missing = [*began.untold, *losses(began, look(connection, list(began.publications), patterns))]
        unknown = set(left_out) - began.tables.keys()
        for loss in missing:
            log.error("capture.changed", what=loss)
    spare = f"{config.source.publication}_inserts"
    if facts.source.slot is None:
        publications.create_spare_publication(connection, config.source.publication)
    kept = tuple(
        consumer.model_copy(update={"tables": without(consumer.tables, left_out)}) for consumer in config.consumers
    )
    wanted = publications.needed(config.model_copy(update={"consumers": kept}), connection)
    for statement in publications.ensure_publications(connection, wanted):
        log.info("publication.changed", sql=statement)
    names = [publication.name for publication in wanted]
    if spare not in names and publications.publication(connection, spare) is not None:
        names.append(spare)
    now = look(connection, names, patterns)
    tables = {
        name: LEFT_OUT if name in left_out and oid else oid for name, oid in now.tables.items() if name not in unknown
    }
    schemas = {name: LEFT_OUT if f"{name}.*" in left_out and oid else oid for name, oid in now.schemas.items()}
    return Publishing(names, Capture(now.publications, tables, schemas), missing)

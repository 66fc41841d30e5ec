"""The publications before a session streams: compared with the last session's, and brought into step. Part of the rim.

Never decides what a difference means for the log: it tells which changes can be missing.
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
    """What a session streams: the publications' names, the capture that it begins with, and what may be missing."""

    names: list[str]
    capture: Capture | None = None
    losses: list[str] = field(default_factory=list)


def bring_into_step(config: Config, facts: Facts, connection: Connection, left_out: Collection[str]) -> Publishing:
    """Bring the publications into step with the consumers.

    left_out: tables that cannot be captured now, for example `public.orders` after it lost its key.
    Raises OperatorNeeded where the role may not do what is missing.
    """
    patterns = [pattern for consumer in config.consumers for pattern in whole(consumer.tables)]
    before = facts.store.capture
    missing: list[str] = []
    unknown: set[str] = set()  # tables that are left out and were never captured, so that nothing of them is missing
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

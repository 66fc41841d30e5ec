"""Look twice at the end of the source's WAL, for a forecast of one look alone. Part of the rim; reads only."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from cdcbridge.database import connect_source
from cdcbridge.errors import SourceUnavailable
from cdcbridge.source.slots import current_lsn

_PAUSE: Final = 0.5  # seconds between the looks


class Grown(NamedTuple):
    """Bytes that were written between the two looks, and the seconds between them."""

    size: int
    seconds: float


def look_again(dsn: str) -> Grown | None:
    """Look at the end of the WAL, and once more after a pause. None where the source went away meanwhile."""
    try:
        with connect_source(dsn, "cdcbridge lag") as connection:
            before, began = current_lsn(connection), time.monotonic()
            time.sleep(_PAUSE)
            return Grown(current_lsn(connection) - before, time.monotonic() - began)
    except SourceUnavailable:
        return None

"""Look again at the end of the source's WAL, for a forecast of one look alone. Part of the rim; reads only."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Final, NamedTuple

from cdcbridge.database import connect_source
from cdcbridge.errors import SourceUnavailable
from cdcbridge.observe.alarms import NOTHING
from cdcbridge.source.slots import current_lsn

_PAUSE: Final = 0.5  # seconds between the looks


class Grown(NamedTuple):
    """Bytes that were written between each two looks, and the seconds between the first and the last one."""

    sizes: list[int]
    seconds: float


def look_again(dsn: str) -> Grown | None:
    """Look at the end of the WAL, and after a pause; once more where it grew. None where the source went away."""
    try:
        with connect_source(dsn, "cdcbridge lag") as connection:
            looks, began = [current_lsn(connection)], time.monotonic()
            while len(looks) < 2 or (len(looks) == 2 and looks[1] - looks[0] >= NOTHING):
                time.sleep(_PAUSE)
                looks.append(current_lsn(connection))
            return Grown([after - before for before, after in pairwise(looks)], time.monotonic() - began)
    except SourceUnavailable:
        return None

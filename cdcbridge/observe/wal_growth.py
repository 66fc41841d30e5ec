"""Measure the growth of the source's WAL again, before a forecast is made from a single look.

This module only reads the source, and never looks longer than about a second.
"""

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
    """The growth of the WAL between a few looks.

    Attributes:
        sizes: Bytes that were written between each two successive looks.
        seconds: Seconds between the first and the last look.
    """

    sizes: list[int]
    seconds: float


def look_again(dsn: str) -> Grown | None:
    """Look at the end of the WAL twice, half a second apart, and a third time if it grew.

    Return None if the source became unreachable.
    """
    try:
        with connect_source(dsn, "cdcbridge lag") as connection:
            looks, began = [current_lsn(connection)], time.monotonic()
            while len(looks) < 2 or (len(looks) == 2 and looks[1] - looks[0] >= NOTHING):
                time.sleep(_PAUSE)
                looks.append(current_lsn(connection))
            return Grown([after - before for before, after in pairwise(looks)], time.monotonic() - began)
    except SourceUnavailable:
        return None

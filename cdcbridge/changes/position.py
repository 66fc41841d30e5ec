"""Where the bridge is: the identity of a change, and how far things have come. Pure.

A position is (commit LSN, ordinal); it counts within one history (system identifier, timeline) of one source.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from cdcbridge.lsn import format_lsn

_POSTGRES_EPOCH: Final = 946_684_800  # 2000-01-01 UTC in Unix seconds


class Position(NamedTuple):
    """A change's identity. The ordinal counts, from 0, all that the plugin sent for the transaction."""

    commit_lsn: int
    ordinal: int

    def __str__(self) -> str:
        # -1 is before the first change of the commit, as after a gap.
        lsn = format_lsn(self.commit_lsn)
        return lsn if self.ordinal < 0 else f"{lsn}#{self.ordinal}"


START = Position(0, -1)  # before the first change


@dataclass(slots=True)
class Progress:
    """confirmed ≤ vouched ≤ durable ≤ received, each only rising.

    received: end of the last transaction that was read whole.
    durable: everything up to here is committed in the store, or no consumer wants it.
    vouched: up to here the source sent everything that the consumers want (see source/capture.py).
    confirmed: PostgreSQL was told that it may forget the WAL up to here.
    """

    received: int
    durable: int
    vouched: int
    confirmed: int

    def receive(self, lsn: int) -> None:
        self.received = max(self.received, lsn)

    def stored(self, lsn: int) -> None:
        """The store has committed everything up to `lsn`. Raises ValueError if that was never received."""
        if lsn > self.received:
            raise ValueError(f"stored up to {format_lsn(lsn)}, but received only up to {format_lsn(self.received)}")
        self.durable = max(self.durable, lsn)

    def vouch(self, lsn: int) -> None:
        """Nothing up to `lsn` is missing. Raises ValueError if it is not durable."""
        if lsn > self.durable:
            raise ValueError(f"vouched up to {format_lsn(lsn)}, but durable only up to {format_lsn(self.durable)}")
        self.vouched = max(self.vouched, lsn)

    def confirm(self) -> int:
        """The LSN to report to PostgreSQL as flushed."""
        self.confirmed = max(self.confirmed, self.vouched)
        return self.confirmed


def postgres_now() -> int:
    """The clock here, as PostgreSQL stores time: microseconds since 2000-01-01 UTC."""
    return int((time.time() - _POSTGRES_EPOCH) * 1_000_000)

"""The identity of a change, and the progress of the bridge through the WAL.

A position is (commit LSN, ordinal). It is valid within one history (system identifier, timeline) of one source. This
module is pure, and reads nothing but the clock. Never stores a position.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, NamedTuple

from cdcbridge.lsn import format_lsn

_POSTGRES_EPOCH: Final = 946_684_800  # 2000-01-01 UTC in Unix seconds


class Position(NamedTuple):
    """The identity of a change.

    The ordinal counts from 0 the changes, logical messages and ignored output of the plugin in the transaction. A
    TRUNCATE counts once for each table that it names.
    """

    commit_lsn: int
    ordinal: int

    def __str__(self) -> str:
        # The ordinal -1 is before the first change of the transaction, for example after a gap.
        lsn = format_lsn(self.commit_lsn)
        return lsn if self.ordinal < 0 else f"{lsn}#{self.ordinal}"


START = Position(0, -1)  # before every change


@dataclass(slots=True)
class Progress:
    """The LSNs up to which changes were received, stored, vouched for and confirmed.

    The order is always confirmed ≤ vouched ≤ durable ≤ received. None of the four ever decreases.

    Attributes:
        received: The end of the last transaction that was read completely.
        durable: Up to here, each change is committed in the store, or no consumer wants it.
        vouched: Up to here, the source has sent every change that the consumers want (see source/capture.py).
        confirmed: Up to here, the bridge has allowed PostgreSQL to remove the WAL.
    """

    received: int
    durable: int
    vouched: int
    confirmed: int

    def receive(self, lsn: int) -> None:
        self.received = max(self.received, lsn)

    def stored(self, lsn: int) -> None:
        """Note that the store has committed everything up to `lsn`.

        Raises:
            ValueError: The bridge has not received everything up to `lsn`.
        """
        if lsn > self.received:
            raise ValueError(f"stored up to {format_lsn(lsn)}, but received only up to {format_lsn(self.received)}")
        self.durable = max(self.durable, lsn)

    def vouch(self, lsn: int) -> None:
        """Note that nothing up to `lsn` is missing.

        Raises:
            ValueError: `lsn` is not durable yet.
        """
        if lsn > self.durable:
            raise ValueError(f"vouched up to {format_lsn(lsn)}, but durable only up to {format_lsn(self.durable)}")
        self.vouched = max(self.vouched, lsn)

    def confirm(self) -> int:
        """Return the LSN to report to PostgreSQL as flushed, and note it as confirmed."""
        self.confirmed = max(self.confirmed, self.vouched)
        return self.confirmed


def postgres_now() -> int:
    """Return the time of this machine as PostgreSQL stores time: microseconds since 2000-01-01 UTC."""
    return int((time.time() - _POSTGRES_EPOCH) * 1_000_000)

"""Keep the state of the bridge for observers: whether it is alive, whether it is ready, and its current activity.

The bridge's loops write the state. HTTP, the metrics and systemd's watchdog read it, from threads of their own. The
state is judged by signs of work and not by open sockets, because a loop that hangs gives no sign. This module never
reads anything but a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from cdcbridge.routing.batch import AppendBatch

STALLED_AFTER: Final = 15.0  # seconds without a turn of the loop; a turn takes a second at most, except for a huge row
APPEND_STALLED_AFTER: Final = 30.0  # seconds that an append may take before the bridge is no longer ready
State = Literal["starting", "preparing", "streaming", "standby", "retrying", "stopped"]


@dataclass(slots=True)
class Health:
    """The state of the bridge: single values that the bridge writes and others read, each whole at any moment."""

    clock: Callable[[], float] = time.monotonic
    on_append: Callable[[AppendBatch, float], None] = lambda _batch, _seconds: None
    state: State = "starting"
    reason: str = ""  # standby: the leader; retrying: the error; streaming: consumers with a fault
    epoch: int = 0
    rows_waiting: int = 0  # read, and not handed to an append yet
    bytes_waiting: int = 0
    retried: int = 0
    _seen: float = field(default=0.0)
    _append_began: float | None = field(default=None)

    # called by the bridge

    def prepares(self) -> None:
        self._enter("preparing")

    def streams(self, epoch: int, trouble: str = "") -> None:
        """Enter the state `streaming`.

        Args:
            epoch: The epoch in which this bridge leads.
            trouble: The consumers that have a fault, for people. The bridge is ready nevertheless.
        """
        self.epoch = epoch
        self._enter("streaming", trouble)

    def stands_by(self, leader: str) -> None:
        self._enter("standby", leader)

    def retries(self, error: str) -> None:
        self.retried += 1
        self._enter("retrying", error)

    def stops(self) -> None:
        self._enter("stopped")

    def beat(self, rows: int, size: int) -> None:
        """Note that the loop turns, and how many rows and bytes are collected."""
        self._seen, self.rows_waiting, self.bytes_waiting = self.clock(), rows, size

    def append_begins(self) -> None:
        self._append_began = self.clock()

    def stored(self, batch: AppendBatch) -> None:
        began, self._append_began = self._append_began, None
        if began is not None:
            self.on_append(batch, self.clock() - began)

    def _enter(self, state: State, reason: str = "") -> None:
        self.state, self.reason, self._append_began = state, reason, None
        self.rows_waiting = self.bytes_waiting = 0
        self._seen = self.clock()

    # called by observers

    def alive(self) -> tuple[bool, str]:
        """Return whether the bridge works by itself, and its state.

        If it does not, only a new process helps. Preparation and retries may take long, so neither is limited.
        """
        silent = self.clock() - self._seen
        if self.state in ("streaming", "standby") and silent > STALLED_AFTER:
            return False, f"{self.state}, but its main loop has not run for {silent:.0f} s"
        return self.state != "stopped", self.state

    def ready(self) -> tuple[bool, str]:
        """Return whether the bridge does its work, and its state.

        The work is to stream and append, or to wait as a standby.
        """
        alive, what = self.alive()
        if not alive or self.state not in ("streaming", "standby"):
            return False, f"{what}: {self.reason}" if self.reason else what
        began = self._append_began
        if began is not None and self.clock() - began > APPEND_STALLED_AFTER:
            return False, f"streaming, but the store has been busy with one append for {self.clock() - began:.0f} s"
        if self.state == "standby":
            return True, f"standby: {self.reason} leads"
        return True, f"{self.state}, {self.reason}" if self.reason else self.state

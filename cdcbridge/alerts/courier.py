"""Deliver the notifications of one URL, in a thread of its own, so that a slow destination delays no other one.

At least once, in order, and again after a failure: first after 5 s, later every 5 minutes. Never judges a rule.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

import structlog

from cdcbridge.alerts import store as queue
from cdcbridge.alerts.delivery import AlertUrl
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.alerts.notices import Notice
from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.database import connect_store
from cdcbridge.instants import reach

_SHORTEST: Final = 5.0  # seconds before the second attempt
_LONGEST: Final = 300.0  # seconds between two attempts
_IN_SUCCESSION: Final = 3  # failures after which the destination counts as away
_NOBODY: Final = 2.0  # seconds before another look while another bridge delivers to the URL
Left = Literal["", "failed", "elsewhere"]  # why something is left to deliver: another bridge may be delivering it
log = structlog.get_logger()


class Courier(Background):
    """The thread.

    It sleeps until wake() says that notifications wait, and works until all are delivered.

    Args:
        config: The configuration.
        url: The URL.
        url_ids: The ids of all URLs of the destination. A notification is done when each of them has it.
        metrics: The metrics of the alerts.
    """

    def __init__(self, config: Config, url: AlertUrl, url_ids: Sequence[str], metrics: AlertMetrics) -> None:
        super().__init__(f"alerts-{url.destination}")
        self._config = config
        self._url = url
        self._url_ids = url_ids
        self._metrics = metrics
        self._woken = threading.Event()
        self._hurried = threading.Event()  # ends a pause after a failure, too
        self._direct: deque[Notice] = deque()  # notices without the store; any thread appends, the courier removes
        self._last_round = threading.Event()
        self._failed_rounds = 0

    @property
    def destination(self) -> str:
        return self._url.destination

    def wake(self) -> None:
        """Say that notifications wait in the store. Safe from any thread.

        This does not shorten the pause after a failure.
        """
        self._woken.set()

    def tell(self, notice: Notice) -> None:
        """Deliver a notification that is not in the store, because the store is away. Safe from any thread.

        It is lost if the process ends before it is delivered.
        """
        self._direct.append(notice)
        self._hurry()

    def finish(self) -> None:
        """Ask the thread to try once more to deliver everything, and to end. Safe from any thread."""
        self._last_round.set()
        self._hurry()

    def stop(self) -> None:
        super().stop()
        self._hurry()

    def _hurry(self) -> None:
        self._hurried.set()
        self._woken.set()

    def _work(self) -> None:
        wait: float | None = None
        while not self._stop.is_set():
            (self._woken if wait is None else self._hurried).wait(wait)
            self._woken.clear()
            self._hurried.clear()
            last = self._last_round.is_set()
            wait = None if self._stop.is_set() else self._round()
            if last:
                return

    def _round(self) -> float | None:
        """Deliver everything that waits. Return the seconds until the next attempt, or None if nothing is left."""
        try:
            left = self._from_memory() or self._from_store()
        except Exception as error:  # noqa: BLE001 - otherwise this URL would get nothing any more
            log.warning("alert.queue_failed", destination=self.destination, error=" ".join(str(error).split()))
            left = "failed"
        self._failed_rounds = self._failed_rounds + 1 if left == "failed" else 0
        if left == "failed":
            return pause_after(self._failed_rounds)
        return _NOBODY if left == "elsewhere" else None

    def _from_memory(self) -> Left:
        while self._direct and not self._stop.is_set():
            if self._send(self._direct[0]) is not None:
                return "failed"
            self._direct.popleft()
        return ""

    def _from_store(self) -> Left:
        """Deliver the notifications in the store, the oldest first.

        A message that a service refuses for good does not hold up the later ones. After a few failures in succession
        the destination counts as away.
        """
        with connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge alerts") as store:
            if not queue.lock_url(store, self._url.id):
                return "elsewhere"
            left: Left = ""
            failed = 0
            for number, notice in queue.waiting(store, self.destination, self._url.id):
                if self._stop.is_set() or failed == _IN_SUCCESSION:
                    return "failed"
                error = self._send(notice)
                if error is None:
                    reach("alert accepted")
                failed, left = (0, left) if error is None else (failed + 1, "failed")
                queue.note_attempt(store, number, self._url.id, self._url.service, error)
            queue.forget_delivered(store, self.destination, self._url_ids)
            return left

    def _send(self, notice: Notice) -> str | None:
        """Send a notification. Return None, or the reason why it was not accepted."""
        error = self._url.send(notice)
        about = {"destination": self.destination, "service": self._url.service, "title": notice.headline}
        if error is None:
            self._metrics.sent(self.destination)
            log.info("alert.sent", **about)
        else:
            self._metrics.failed(self.destination)
            log.warning("alert.failed", **about, error=error)
        return error


def pause_after(failures: int) -> float:
    """Return the seconds to wait after so many failed rounds in succession: 5, 10, 20, and at most 300."""
    doublings = min(failures - 1, 10)  # otherwise a number becomes too large after some days
    return min(_LONGEST, _SHORTEST * 2.0**doublings)

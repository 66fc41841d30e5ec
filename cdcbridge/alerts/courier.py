"""Deliver the notifications of one URL, in a thread of its own, so that a slow destination delays no other one.

At least once, in order, and again after a failure: first after 5 s, later every 5 minutes. A notification that fails
holds up the later ones, unless the service refuses only that one. Never evaluates a rule.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final, Literal

import structlog

from cdcbridge.alerts import store as queue
from cdcbridge.alerts.delivery import AlertUrl, is_refusal
from cdcbridge.alerts.metrics import AlertMetrics
from cdcbridge.alerts.notices import Notice
from cdcbridge.background import Background
from cdcbridge.config import Config
from cdcbridge.database import Connection, connect_store
from cdcbridge.instants import reach

_SHORTEST: Final = 5.0  # seconds before the second attempt
_LONGEST: Final = 300.0  # seconds between two attempts
_REFUSALS: Final = 3  # refusals in succession of a notification after which a later one is tried
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
        self._direct_refusals = 0  # of the first one
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
            error = self._send(self._direct[0])
            self._direct_refusals = self._direct_refusals + 1 if is_refusal(error) else 0
            given_up = error is not None and self._direct_refusals == _REFUSALS
            if error is not None and not given_up:
                return "failed"
            notice = self._direct.popleft()
            self._direct_refusals = 0
            if given_up:
                self._gave_up(notice, error)
        return ""

    def _from_store(self) -> Left:
        with connect_store(self._config.store_dsn, self._config.store.schema_, "cdcbridge alerts") as store:
            if not queue.lock_url(store, self._url.id):
                return "elsewhere"
            done = self._deliver(store)
            queue.forget_delivered(store, self.destination, self._url_ids)
            return "" if done else "failed"

    def _deliver(self, store: Connection) -> bool:
        """Deliver the notifications in the store in their order, stop at the first failure, and return whether all are.

        If a service has refused a notification a few times, the first later one that it has not refused as often is
        tried, too. If that is accepted, the service works and refuses only the earlier ones. They are given up, because
        they may no longer arrive: a beginning after its end would look like a new incident. If it is refused as well,
        the reason is the destination, for example a token that has expired. Then all of them wait.
        """
        passed: list[queue.Waiting] = []
        for one in queue.waiting(store, self.destination, self._url.id):
            if self._stop.is_set():
                return False
            if passed and one.refusals >= _REFUSALS:
                passed.append(one)
                continue
            error = self._send(one.notice)
            if error is None:
                reach("alert accepted")
            refused = is_refusal(error)
            queue.note_attempt(store, one.number, self._url.id, self._url.service, error, refused=refused)
            if error is None:
                self._give_up(store, passed)
                passed = []
            elif passed or not refused or one.refusals + 1 < _REFUSALS:
                return False
            else:
                passed.append(one)
        return not passed

    def _give_up(self, store: Connection, refused: Sequence[queue.Waiting]) -> None:
        for one in refused:
            error = queue.give_up_at(store, one.number, self._url.id)
            self._gave_up(one.notice, error)

    def _gave_up(self, notice: Notice, error: str | None) -> None:
        log.error("alert.gave_up", destination=self.destination, title=notice.headline, error=error)

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

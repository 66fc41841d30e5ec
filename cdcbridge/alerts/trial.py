"""Send a test message to each URL, for `cdcbridge alerts test`.

Never touches the store.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cdcbridge.alerts.delivery import AlertUrl, urls
from cdcbridge.alerts.notices import Notice
from cdcbridge.config.alerts import Alerts


@dataclass(slots=True, frozen=True)
class UrlAnswer:
    """The answer of one URL.

    Attributes:
        service: The kind of service, for example `Slack`.
        error: Why the message was not accepted, or None.
    """

    destination: str
    service: str
    error: str | None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.error is None}


def try_out(alerts: Alerts, name: str | None, source: str) -> Iterator[UrlAnswer]:
    """Send a message to each URL of one destination, or of all, and yield each answer."""
    for url in urls(alerts):
        if name in (None, url.destination):
            yield UrlAnswer(url.destination, url.service, _send(url, source))


def _send(url: AlertUrl, source: str) -> str | None:
    text = (
        f"This is a test from `cdcbridge alerts test` on {socket.gethostname()}. Alerts of {source} arrive here."
        " Nothing is wrong."
    )
    return url.send(Notice(url.destination, "begins", "warning", f"{source}: test of the alerts", text))

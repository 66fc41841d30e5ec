"""Send a notification to one URL by Apprise, and report the answer of the destination.

URLs are secrets. No part of one, apart from the kind of service, is ever in a log line, an error or an output.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import unquote

import apprise

from cdcbridge.alerts.notices import Notice
from cdcbridge.config.alerts import AlertDestination, Alerts
from cdcbridge.errors import UsageError

_PATIENCE: Final = 15.0  # seconds for an answer; Apprise's own limit of 4 s would send slow services a second message
_LEAST_SECRET: Final = 4  # characters of a part of a URL that is hidden; shorter parts are words such as `to`
_TOO_SHORT: Final = 2000  # characters; a service that takes fewer gets the beginning of a longer message
_SHOWN: Final = 400  # characters of a reason that are shown
_RESPONSE: Final = re.compile(r"""Response Details:\s*b?['"](.*)['"]\s*$""", re.DOTALL)
_EXCEPTION: Final = re.compile(r"Exception: (.+)", re.DOTALL)
# The cause inside the text of an exception of urllib3, which otherwise repeats the URL.
_CAUSE: Final = re.compile(r"\[Errno -?\d+\] [\w ]+|[Tt]imed? ?out|certificate verify failed[\w :-]*")
# The status in a reason: Apprise writes `error=403` for HTTP, and an exception of SMTP begins with `(554, `.
_STATUS: Final = re.compile(r"\berror=(\d{3})\b|\((\d{3}), ")
_PASSING: Final = frozenset({408, 425, 429})  # statuses 4xx of HTTP that say nothing about the message
_TYPES: Final = {"critical": apprise.NotifyType.FAILURE, "warning": apprise.NotifyType.WARNING}


def quiet() -> None:
    """Keep the log lines of Apprise and urllib3, which may contain parts of URLs, away from stderr.

    They are made nevertheless, because only they say why something was not accepted.
    """
    for name in ("apprise", "urllib3"):
        logging.getLogger(name).propagate = False
        logging.getLogger(name).addHandler(logging.NullHandler())
    logging.getLogger("apprise").setLevel(logging.DEBUG)


class AlertUrl:
    """One URL of a destination.

    Args:
        destination: The destination.
        url: The URL.

    Attributes:
        destination: The name of the destination.
        service: The kind of service, for example `Slack`.
        id: The first characters of the URL's SHA-256, which tell nothing about the URL.

    Raises:
        UsageError: Apprise does not accept the URL.
    """

    def __init__(self, destination: AlertDestination, url: str) -> None:
        quiet()
        self.destination = destination.name
        self.id = hashlib.sha256(url.encode()).hexdigest()[:8]
        self._secrets = sorted(_secrets(url), key=len, reverse=True)
        asset = apprise.AppriseAsset(
            app_id="cdcbridge",
            app_desc="cdcbridge",
            image_url_mask="",
            image_url_logo="",
            image_path_mask="",
            # With a limit, Apprise sends in a few threads that all URLs share.
            service_timeout=0,
        )
        made = apprise.Apprise(asset=asset)
        scheme = url.partition("://")[0]
        if not made.add(url) or len(made) != 1:
            number = [one.get_secret_value() for one in destination.urls].index(url) + 1
            raise UsageError(
                f"alerts.to.{destination.name}.urls: Apprise does not accept entry {number}, which begins with"
                f" {scheme}://",
                hint="https://appriseit.com/services/ shows the form of each URL.",
            )
        self._apprise = made
        self._plugin: Any = made[0]
        self.service = str(self._plugin.service_name)
        if "rto=" not in url:
            self._plugin.socket_read_timeout = _PATIENCE
        if "overflow=" not in url and self._plugin.body_maxlen < _TOO_SHORT:
            self._plugin.overflow_mode = apprise.OverflowMode.TRUNCATE

    def send(self, notice: Notice) -> str | None:
        """Send a notification, and return None, or the reason why it was not accepted."""
        # PagerDuty and Opsgenie find the incident that is over by its title, if their URL has `action=map`.
        maps = str(getattr(self._plugin, "action", "")) == "map"
        kind = apprise.NotifyType.SUCCESS if notice.kind == "ends" else _TYPES[notice.severity]
        try:
            result = self._apprise.notify(
                body=notice.body,
                title=notice.title if maps else notice.headline,
                notify_type=kind,
                body_format=apprise.NotifyFormat.TEXT,
                log_level=logging.DEBUG,
            )
        except Exception as error:  # noqa: BLE001 - a plugin that fails must not end the thread
            return self._without_secrets(f"{type(error).__name__}: {error}")
        if result:
            return None
        return self._without_secrets(_reason((entry.level, str(entry.message)) for entry in result.logs()))

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "…")
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_refusal(reason: str | None) -> bool:
    """Return whether a service refused the message, as by 400, and would probably refuse it again.

    A service that is away, overloaded or limits the rate of messages does not refuse it.

    Example:
        `is_refusal("Failed to send to Slack: Forbidden, error=403")` is true. It is false for error=503 and None.
    """
    found = _STATUS.search(reason or "")
    if found is None:
        return False
    if found[1]:
        return 400 <= int(found[1]) < 500 and int(found[1]) not in _PASSING
    return found[2].startswith("5")


def urls(alerts: Alerts) -> list[AlertUrl]:
    """Return the URLs of all destinations.

    Raises:
        UsageError: Apprise does not accept a URL.
    """
    return [AlertUrl(one, url.get_secret_value()) for one in alerts.to for url in one.urls]


def _reason(entries: Iterable[tuple[str, str]]) -> str:
    """Return the warnings of a failed attempt, with the error of the connection or the answer if Apprise has it."""
    said: list[str] = []
    more: list[str] = []
    for level, message in entries:
        if level in ("WARNING", "ERROR"):
            said.append(message.strip().rstrip("."))
        elif (response := _RESPONSE.search(message)) and response[1]:
            more.append(response[1])
        elif exception := _EXCEPTION.search(message):
            cause = _CAUSE.search(exception[1])
            more.append(cause[0].strip() if cause else "" if "Pool(" in exception[1] else exception[1])
    return (
        ": ".join(dict.fromkeys(text for text in (*said, *more) if text))
        or "it was not accepted, and Apprise does not say why"
    )


def _secrets(url: str) -> set[str]:
    """Return the parts of a URL that must not be shown: users, passwords, hosts, paths and values of parameters."""
    rest = url.partition("://")[2]
    pieces = re.split(r"[/@:?&=#,]", rest)
    return {text for piece in pieces for text in (piece, unquote(piece)) if len(text) >= _LEAST_SECRET}

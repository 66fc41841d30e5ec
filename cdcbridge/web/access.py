"""Recognise the callers of the API, and refuse calls without the right for them.

This module is pure. Never logs or returns a token.

Source: RFC 6750, "The OAuth 2.0 Authorization Framework: Bearer Token Usage", for the header and its answers.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple
from urllib.parse import urlsplit

from cdcbridge.config.web import ApiToken, Role, is_loopback
from cdcbridge.web.problems import RequestRefused

Action = Literal["look", "read", "deliver", "publish", "redrive", "operate"]

# look: states and figures. read: the data of messages. deliver: receive, ack and the like.
_RIGHTS: Final[Mapping[Role, frozenset[Action]]] = {
    "viewer": frozenset({"look", "read"}),
    "operator": frozenset({"look", "read", "redrive", "operate"}),
    "consumer": frozenset({"look", "read", "deliver", "publish", "redrive"}),
    "admin": frozenset({"look", "read", "deliver", "publish", "redrive", "operate"}),
}
_MOST_FAILURES: Final = 10  # failed attempts of an address within _WINDOW, before the next ones are refused unseen
_WINDOW: Final = 60.0  # seconds
_MOST_ADDRESSES: Final = 10_000


class Caller(NamedTuple):
    """A caller of the API.

    Attributes:
        name: The name of its token, for the log.
        role: Its role.
        consumers: The consumers that it may name. None means all.
    """

    name: str
    role: Role
    consumers: frozenset[str] | None = None

    @classmethod
    def of(cls, token: ApiToken) -> Caller:
        """Return the caller with this token."""
        return cls(token.name, token.role, frozenset(token.consumers) or None)

    def may(self, action: Action) -> bool:
        """Return whether the caller's role has this right."""
        return action in _RIGHTS[self.role]

    def refuse(self, action: Action, consumer: str | None = None) -> None:
        """Raise RequestRefused if the caller may not do this.

        Args:
            action: The right that the call needs.
            consumer: The consumer that the call names, or None.
        """
        if not self.may(action):
            raise RequestRefused(403, f"the token {self.name!r} has the role {self.role}, which may not {action}",
                          hint=f"Use a token with the role {' or '.join(_roles(action))}.")  # fmt: skip
        if consumer is not None and not self.sees(consumer):
            raise RequestRefused(403, f"the token {self.name!r} does not list the consumer {consumer!r}",
                          hint="Add the consumer to `consumers` of the token in api.tokens.")  # fmt: skip

    def refuse_restricted(self, hint: str) -> None:
        """Raise RequestRefused if the caller may name some consumers alone.

        Args:
            hint: Another request that such a caller may use.
        """
        if self.consumers is not None:
            raise RequestRefused(403, f"the token {self.name!r} sees its own consumers alone", hint=hint)

    def sees(self, consumer: str) -> bool:
        """Return whether the caller may name this consumer."""
        return self.consumers is None or consumer in self.consumers


LOCAL: Final = Caller("local", "admin")  # everybody, if no tokens are configured


def _roles(action: Action) -> list[str]:
    return [role for role, actions in _RIGHTS.items() if action in actions]


def refuse_other_pages(origin: str | None, host: str | None, *, protected: bool) -> None:
    """Raise RequestRefused for a call that a page of another host made in a browser.

    For example, a page that is open on the machine of `serve` could publish messages to 127.0.0.1. A name that
    an attacker resolves to 127.0.0.1 is refused as well, if no token protects the API.

    Args:
        origin: The header `Origin`, which browsers send.
        host: The header `Host`.
        protected: Whether the API has tokens.
    """
    try:
        page = None if origin is None else urlsplit(origin).netloc
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        raise RequestRefused(400, "the header Host or Origin cannot be read") from None
    if page is not None and page != (host or ""):
        raise RequestRefused(403, f"a page of {origin} may not call this API")
    if not protected and not is_loopback(name):
        raise RequestRefused(403, f"the header Host is {host!r}, and without tokens it must be a loopback address",
                             hint="Call http://127.0.0.1, or configure api.tokens.")  # fmt: skip


def caller_of(authorization: str | None, tokens: Sequence[ApiToken]) -> Caller:
    """Return the caller that a header names.

    The time does not depend on the token, because all tokens are compared, by their hashes.

    Args:
        authorization: The header `Authorization`, for example "Bearer 7f3a…", or None.
        tokens: The tokens of the configuration. If there are none, the caller may do everything.

    Raises:
        RequestRefused: 401. The header is missing, or its token is not one of these.
    """
    if not tokens:
        return LOCAL
    scheme, _, given = (authorization or "").partition(" ")
    found = token_of(given.strip(), tokens)
    if scheme.lower() != "bearer" or found is None:
        reason = "the header Authorization is missing" if authorization is None else "the token is not known"
        raise RequestRefused(401, reason, hint="Send `Authorization: Bearer TOKEN` with a token of api.tokens.",
                      headers={"WWW-Authenticate": 'Bearer realm="cdcbridge"'})  # fmt: skip
    return Caller.of(found)


def token_of(secret: str, tokens: Sequence[ApiToken]) -> ApiToken | None:
    """Return the token with this secret, or None. All tokens are compared, by their hashes."""
    found: ApiToken | None = None
    digest = hashlib.sha256(secret.encode(errors="replace")).digest()
    for token in tokens:
        own = hashlib.sha256(token.token.get_secret_value().encode()).digest()
        if hmac.compare_digest(own, digest):
            found = token
    return found


def network_of(address: str) -> str:
    """Return the network whose failed logins count together.

    One caller has a whole network of IPv6 addresses, at least a /64. For example, 2001:db8::7 is in 2001:db8::/64.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return address


class Failures:
    """Failed logins by the caller's network. After ten within a minute, further ones get 429 for the rest of it.

    A known token is always accepted, because all callers of one proxy have one address.
    """

    def __init__(self) -> None:
        self._times: dict[str, deque[float]] = {}

    def refuse(self, address: str, now: float) -> None:
        """Raise RequestRefused with 429 if the address failed too often.

        Args:
            address: The IP address of the caller.
            now: Seconds of a monotonic clock.
        """
        network = network_of(address)
        times = self._times.get(network)
        while times and times[0] <= now - _WINDOW:
            times.popleft()
        if times and len(times) >= _MOST_FAILURES:
            wait = max(1, round(times[0] + _WINDOW - now))
            raise RequestRefused(429, f"{len(times)} logins from {network} failed within a minute",
                          headers={"Retry-After": str(wait)})  # fmt: skip

    def note(self, address: str, now: float) -> None:
        """Note that a login from this address failed at the time `now`."""
        if len(self._times) >= _MOST_ADDRESSES:
            self._times = {one: times for one, times in self._times.items() if times and times[-1] > now - _WINDOW}
        self._times.setdefault(network_of(address), deque(maxlen=_MOST_FAILURES)).append(now)

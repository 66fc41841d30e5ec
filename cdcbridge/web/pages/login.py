"""The session of a browser: a signed cookie after a login with a token, and the proof that a form is from a page.

The signature's key is made from the token, so each process of `serve` knows the sessions of the others, and a session
ends when its token is replaced. The store knows the sessions that ended by a logout. This module is pure. Never puts a
token into a cookie.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from cdcbridge.config.web import ApiToken
from cdcbridge.web.access import LOCAL, Caller

COOKIE: Final = "cdcbridge_session"
LASTS: Final = 12 * 3600  # seconds


def cookie_for(token: ApiToken, now: float) -> str:
    """Return the cookie of a session that begins now.

    Args:
        token: The token with which somebody logged in.
        now: The time, in seconds since 1970.

    Returns:
        For example "ops.1790000000.9f3a…".
    """
    began = str(int(now))
    return f"{token.name}.{began}.{_sign(token, 'session', began)}"


def visitor_of(cookie: str | None, tokens: Sequence[ApiToken], now: float) -> Caller | None:
    """Return the caller whose session a cookie is, or None.

    Args:
        cookie: The value of the cookie, or None.
        tokens: The tokens of the configuration. If there are none, everybody may do everything.
        now: The time, in seconds since 1970.
    """
    if not tokens:
        return LOCAL
    name, began, signature = ([*(cookie or "").rsplit(".", 2), "", "", ""])[:3]
    for token in tokens:
        if token.name == name and same(_sign(token, "session", began), signature):
            return Caller.of(token) if began.isdecimal() and 0 <= now - int(began) < LASTS else None
    return None


def digest_of(cookie: str) -> str:
    """Return the text by which the store knows a session that ended. Nobody can make the cookie from it."""
    return hashlib.sha256(cookie.encode(errors="replace")).hexdigest()


def proof_for(cookie: str | None, tokens: Sequence[ApiToken]) -> str:
    """Return the hidden value of the forms of a session. A page of another site cannot know it."""
    for token in tokens:
        if token.name == (cookie or "").rsplit(".", 2)[0]:
            return _sign(token, "form", cookie or "")
    return ""


def same(expected: str, given: str) -> bool:
    """Return whether two texts are the same. The time does not depend on the place of the first difference."""
    return hmac.compare_digest(expected.encode(), given.encode(errors="replace"))


def _sign(token: ApiToken, purpose: str, text: str) -> str:
    key = hashlib.sha256(token.token.get_secret_value().encode()).digest()
    return hmac.new(key, f"{purpose}:{text}".encode(errors="replace"), hashlib.sha256).hexdigest()

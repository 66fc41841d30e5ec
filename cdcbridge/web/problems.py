"""Turn errors into answers: problem details with a status, the CB code, and the next step.

This module is pure.

Source: RFC 9457, "Problem Details for HTTP APIs", and RFC 9110, section 15, for the statuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import psycopg

from cdcbridge.errors import (
    CdcbridgeError,
    OperatorNeeded,
    SourceUnavailable,
    StaleReceipt,
    StoreUnavailable,
    UsageError,
)

_STATUS: Final[Mapping[str, int]] = {
    "CB001": 404,  # no such consumer
    "CB006": 409,  # stale receipt
    "CB007": 404,  # no such dead letter
    "CB008": 403,  # the role of the store's session may not read the consumer
    "CB009": 410,  # retention dropped messages that the group had not read
}
_HINTS: Final[Mapping[str, str]] = {
    "42P01": "Run `cdcbridge migrate`: the store lacks what this version needs.",
    "42883": "Run `cdcbridge migrate`: the store lacks what this version needs.",
    "42501": "`serve` connects to the store as its owner. Its role in the DSN is another one.",
}
_AWAY: Final = {"Retry-After": "1"}


class RequestRefused(CdcbridgeError):
    """A request that is refused.

    Attributes:
        status: The HTTP status.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, hint: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.headers = dict(headers or {})


def problem_of(error: CdcbridgeError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the status, the problem details and the further headers for an error.

    For example, a stale receipt gives 409 and {"type": "about:blank", "title": "Conflict", "status": 409, "detail": …,
    "code": "CB006", "hint": …}.
    """
    code = str(getattr(error.__cause__, "sqlstate", None) or "")
    headers: dict[str, str] = {}
    if isinstance(error, RequestRefused):
        status, headers = error.status, error.headers
    elif code in _STATUS:
        status = _STATUS[code]
    elif isinstance(error, StaleReceipt):
        status = 409
    elif isinstance(error, StoreUnavailable | SourceUnavailable):
        status, headers = 503, dict(_AWAY)
    elif code.startswith("CB") or isinstance(error.__cause__, psycopg.DataError):
        status = 422
    else:
        # The configuration or the store is at fault, and not the request.
        status = 503 if isinstance(error, OperatorNeeded | UsageError) or code in _HINTS else 500
    found: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": str(error),
    }
    if code.startswith("CB"):
        found["code"] = code
    if hint := error.hint or _HINTS.get(code):
        found["hint"] = hint
    return status, found, headers

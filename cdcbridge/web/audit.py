"""The audit log: who changed something by the dashboard or the API, and how it ended.

The row is in the table `audit` before the change begins, so that no change is without one. Never has the data of a
message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import orjson
import structlog

from cdcbridge.errors import CdcbridgeError
from cdcbridge.web.access import Action, Caller
from cdcbridge.web.store import WebStore

_BEGIN: Final = (
    "insert into audit (caller, role, address, action, subject, details) values (%s, %s, %s, %s, %s, %s::jsonb)"
    " returning id"
)
_END: Final = "update audit set details = details || %s::jsonb where id = %s returning id"
AUDITED: Final[frozenset[Action]] = frozenset({"operate", "redrive"})  # a call that needs one of these rights has a row
log = structlog.get_logger()


@asynccontextmanager
async def audited(
    store: WebStore, caller: Caller, address: str, action: str, subject: str, details: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    """Write a row into the audit log, run the body of the `with` block, and add its result to the row.

    For example, a redrive gives {"filter": {"topic": "t"}, "redriven": 12}. A body that raises gives {"error": …}.

    Args:
        store: The sessions on the store.
        caller: Who asks for the change.
        address: The caller's IP address.
        action: For example `pause`.
        subject: The name of the consumer.
        details: What the caller asks for.

    Yields:
        A dictionary for the result, which the body fills.
    """
    values = (caller.name, caller.role, address, action, subject, _document(details))
    number = await store.value(_BEGIN, values)
    result: dict[str, Any] = {}
    try:
        yield result
    except BaseException as error:
        result["error"] = str(error) or type(error).__name__
        raise
    finally:
        log.info("api.changed", caller=caller.name, action=action, subject=subject, **result)
        try:
            await store.patiently(_END, (_document(result), number))
        except CdcbridgeError as error:
            log.warning("api.audit_incomplete", id=number, error=str(error))


def _document(values: Mapping[str, Any]) -> str:
    """Return values as JSON that a jsonb column takes. It has no place for the character NUL."""
    return orjson.dumps(values, default=str).decode().replace("\\u0000", "\\ufffd")

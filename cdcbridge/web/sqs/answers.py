"""Write answers and errors in the protocol of the request: JSON, or the XML of the query protocol.

This module is pure.

Source: the service model of Amazon SQS, version 2012-11-05, of the JSON protocol and of the older query protocol.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final
from xml.sax.saxutils import escape

import orjson

from cdcbridge.web.sqs.attributes import safe_for_xml
from cdcbridge.web.sqs.errors import SqsError

_NAMESPACE: Final = "http://queue.amazonaws.com/doc/2012-11-05/"
_LISTS: Final = {
    "Messages": "Message",
    "QueueUrls": "QueueUrl",
    "queueUrls": "QueueUrl",
    "Failed": "BatchResultErrorEntry",
}
_MAPS: Final = {"Attributes": "Attribute", "MessageAttributes": "MessageAttribute"}
_WITHOUT_RESULT: Final = {"ChangeMessageVisibility", "DeleteMessage", "PurgeQueue", "SetQueueAttributes"}
_NEW_LINE: Final = {"\r": "&#13;"}  # a reader of XML makes a line feed of it otherwise


def json_answer(answer: Mapping[str, Any]) -> bytes:
    """Return an answer of the JSON protocol."""
    return orjson.dumps(answer)


def json_error(error: SqsError) -> tuple[bytes, dict[str, str]]:
    """Return an error of the JSON protocol, and the header with its older code, which clients show."""
    body = {"__type": f"com.amazonaws.sqs#{error.code.kind}", "message": str(error)}
    return orjson.dumps(body), {"x-amzn-query-error": f"{error.code.old};{_fault(error)}"}


def xml_answer(action: str, answer: Mapping[str, Any], request_id: str) -> bytes:
    """Return an answer of the query protocol.

    Args:
        action: For example SendMessage, whose answer is the element SendMessageResponse.
        answer: The answer in the form of the JSON protocol.
        request_id: The id of the request.
    """
    result = "".join(_fields(answer, f"{action}ResultEntry"))
    return _document(
        f"{action}Response",
        # Clients look for the element of an empty result too, for example of a receive without messages.
        "" if action in _WITHOUT_RESULT else f"<{action}Result>{result}</{action}Result>",
        f"<ResponseMetadata><RequestId>{request_id}</RequestId></ResponseMetadata>",
    )


def xml_error(error: SqsError, request_id: str) -> bytes:
    """Return an error of the query protocol."""
    inner = f"<Type>{_fault(error)}</Type><Code>{error.code.old}</Code><Message>{_text(error)}</Message><Detail/>"
    return _document("ErrorResponse", f"<Error>{inner}</Error>", f"<RequestId>{request_id}</RequestId>")


def _fault(error: SqsError) -> str:
    return "Sender" if error.code.status < 500 else "Receiver"


def _document(name: str, *parts: str) -> bytes:
    return f'<?xml version="1.0"?><{name} xmlns="{_NAMESPACE}">{"".join(parts)}</{name}>'.encode()


def _fields(values: Mapping[str, Any], entry: str) -> Iterable[str]:
    for name, value in values.items():
        if isinstance(value, list):
            one = entry if name == "Successful" else _LISTS[name]
            yield from (_element(one, item, entry) for item in value)
        elif name in _MAPS:
            yield from (
                f"<{_MAPS[name]}><Name>{_text(key)}</Name>{_element('Value', item, entry)}</{_MAPS[name]}>"
                for key, item in value.items()
            )
        else:
            yield _element(name, value, entry)


def _element(name: str, value: Any, entry: str) -> str:
    inner = "".join(_fields(value, entry)) if isinstance(value, Mapping) else _text(value)
    return f"<{name}>{inner}</{name}>"


def _text(value: Any) -> str:
    return escape(safe_for_xml(str(value).lower() if isinstance(value, bool) else str(value)), _NEW_LINE)

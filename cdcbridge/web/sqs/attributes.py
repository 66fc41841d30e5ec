"""The attributes and the body of a message: their limits, and the MD5 sums that clients compare.

This module is pure. The protocol asks for MD5, which protects nothing.

Source: "Amazon SQS message metadata" in the developer guide, with the form of the text whose MD5 sum is taken.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from cdcbridge.web.sqs.errors import BAD_CONTENTS, BAD_VALUE, SqsError

Attributes: TypeAlias = Mapping[str, Mapping[str, str]]

MOST_BYTES: Final = 1 << 20  # of a message and of a batch, with the attributes
_MOST_ATTRIBUTES: Final = 10
_NAME: Final = re.compile(r"(?!\.)(?!.*\.\.)[A-Za-z0-9_.-]{1,256}(?<!\.)")
_RESERVED: Final = ("aws.", "amazon.")
_TYPE: Final = re.compile(r"(String|Number|Binary)(\.[^\x00]*)?")
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NO_CONTENTS: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_TRACE: Final = "AWSTraceHeader"


def md5(text: str) -> str:
    """Return the MD5 sum of a text, in hexadecimal."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def md5_of_attributes(attributes: Attributes) -> str:
    """Return the MD5 sum of attributes: their names in order, each with its type and its value."""
    found = hashlib.md5(usedforsecurity=False)
    for name in sorted(attributes):
        value = attributes[name]
        binary = value["DataType"].startswith("Binary")
        data = base64.b64decode(value["BinaryValue"]) if binary else value["StringValue"].encode()
        for part in (name.encode(), value["DataType"].encode()):
            found.update(struct.pack(">I", len(part)) + part)
        found.update((b"\x02" if binary else b"\x01") + struct.pack(">I", len(data)) + data)
    return found.hexdigest()


def size_of(body: str, attributes: Attributes) -> int:
    """Return the bytes of a message as SQS counts them: body, and names, types and values of attributes."""
    size = len(body.encode())
    for name, value in attributes.items():
        size += len(name.encode()) + len(value["DataType"].encode())
        size += len(base64.b64decode(value["BinaryValue"]) if "BinaryValue" in value else value["StringValue"].encode())
    return size


def safe_for_xml(text: str) -> str:
    """Return a text in which the characters that XML does not know are escaped as in JSON."""
    return _NO_CONTENTS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def check_body(body: str) -> None:
    """Raise SqsError if a body has characters that XML does not know."""
    if (found := _NO_CONTENTS.search(body)) is not None:
        raise SqsError(
            BAD_CONTENTS,
            f"Invalid characters found: the body contains U+{ord(found[0]):04X}. Valid unicode characters are"
            " #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF.",
        )


def sent_attributes(given: Any) -> dict[str, dict[str, str]]:
    """Return the checked attributes of a message to send.

    For example {"n": {"DataType": "Number", "StringValue": "1"}}.

    Raises:
        SqsError: One of them has no valid name, type or value.
    """
    if not isinstance(given, dict):
        raise SqsError(BAD_VALUE, "MessageAttributes must be a map of attributes")
    if len(given) > _MOST_ATTRIBUTES:
        raise SqsError(
            BAD_VALUE, f"Number of message attributes [{len(given)}] exceeds the allowed maximum [{_MOST_ATTRIBUTES}]."
        )
    return {name: _checked(name, value) for name, value in given.items()}


def _checked(name: str, value: Any) -> dict[str, str]:
    if not _NAME.fullmatch(name) or name.lower().startswith(_RESERVED):
        raise SqsError(
            BAD_VALUE,
            f"The name of the message attribute {name!r} is invalid. It has 1 to 256 letters, digits, periods, hyphens"
            " and underscores, no period at an end or twice in a row, and does not begin with AWS. or Amazon.",
        )
    kind = value.get("DataType") if isinstance(value, dict) else None
    if not isinstance(kind, str) or not kind:
        raise SqsError(BAD_VALUE, f"The message attribute '{name}' must contain a non-empty message attribute type.")
    if not _TYPE.fullmatch(kind) or len(kind) > 256 or _NO_CONTENTS.search(kind):
        raise SqsError(
            BAD_VALUE,
            f"The message attribute '{name}' has an invalid message attribute type, the set of supported type"
            " prefixes is Binary, Number, and String.",
        )
    field = "BinaryValue" if kind.startswith("Binary") else "StringValue"
    data = value.get(field)
    if not isinstance(data, str) or not data:
        raise SqsError(
            BAD_VALUE,
            f"The message attribute '{name}' must contain a non-empty message attribute value for message attribute"
            f" type '{kind}'.",
        )
    if _NO_CONTENTS.search(data):
        raise SqsError(BAD_VALUE, f"The message attribute '{name}' contains characters that are not allowed.")
    if kind.startswith("Number") and not _NUMBER.fullmatch(data):
        raise SqsError(BAD_VALUE, f"Can't cast the value of message (user) attribute '{name}' to a number.")
    if field == "BinaryValue":
        try:
            base64.b64decode(data, validate=True)
        except ValueError:
            raise SqsError(BAD_VALUE, f"The message attribute '{name}' is not base64.") from None
    return {"DataType": kind, field: data}


def sent_trace(given: Any) -> str | None:
    """Return the header of AWS X-Ray, the only system attribute that can be sent, or None.

    Raises:
        SqsError: Another attribute is given.
    """
    if not given:
        return None
    if not isinstance(given, dict) or given.keys() != {_TRACE}:
        raise SqsError(BAD_VALUE, f"{_TRACE} is the only message system attribute that can be sent")
    value = given[_TRACE]
    text = value.get("StringValue") if isinstance(value, dict) else None
    if not isinstance(text, str) or value.get("DataType") != "String" or not text or _NO_CONTENTS.search(text):
        raise SqsError(BAD_VALUE, f"the message system attribute {_TRACE} must have the type String and a value")
    return text


def wanted(names: Sequence[str], name: str) -> bool:
    """Return whether a request asks for a name: by All, by .*, by a prefix such as order.*, or by itself."""
    return any(one in {"All", ".*", name} or (one.endswith(".*") and name.startswith(one[:-2])) for one in names)

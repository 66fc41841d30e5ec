"""Read a request in either protocol into one form: the action, and its parameters as in the JSON protocol.

This module is pure. Never trusts a type: each parameter is checked when it is asked for.

Source: the service model of Amazon SQS, version 2012-11-05, of the JSON protocol and of the older query protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

import orjson

from cdcbridge.web.sqs.errors import (
    BAD_ENTRY_ID,
    BAD_VALUE,
    MANY_ENTRIES,
    MISSING,
    NO_BATCH,
    SAME_IDS,
    UNREADABLE,
    SqsError,
)

T = TypeVar("T")
_TARGET: Final = "AmazonSQS."
_MOST_ENTRIES: Final = 10
_DEEPEST: Final = 8  # parts of a name such as SendMessageBatchRequestEntry.1.MessageAttribute.2.Value.StringValue
_MOST_NAMES: Final = 100
_MOST_FIELDS: Final = 1000
# The names of lists in the query protocol, and in the JSON protocol.
_LISTS: Final = {
    "AttributeName": "AttributeNames",
    "MessageAttributeName": "MessageAttributeNames",
    "MessageSystemAttributeName": "MessageSystemAttributeNames",
    "SendMessageBatchRequestEntry": "Entries",
    "DeleteMessageBatchRequestEntry": "Entries",
    "ChangeMessageVisibilityBatchRequestEntry": "Entries",
    "TagKey": "TagKeys",
}
# The same of maps, with the names of the key and of the value.
_MAPS: Final = {
    "Attribute": ("Attributes", "Name", "Value"),
    "MessageAttribute": ("MessageAttributes", "Name", "Value"),
    "MessageSystemAttribute": ("MessageSystemAttributes", "Name", "Value"),
    "Tag": ("Tags", "Key", "Value"),
}


def from_json(target: str, body: bytes) -> tuple[str, dict[str, Any]]:
    """Return the action and the parameters of a request of the JSON protocol.

    Args:
        target: The header X-Amz-Target, for example AmazonSQS.SendMessage.
        body: The body of the request.
    """
    try:
        given = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise SqsError(UNREADABLE, f"the body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise SqsError(UNREADABLE, "the body is not a JSON object")
    return target.removeprefix(_TARGET), given


def from_query(query: str, body: bytes) -> tuple[str, dict[str, Any]]:
    """Return the action and the parameters of a request of the query protocol.

    For example, AttributeName.1=All is {"AttributeNames": ["All"]}.

    Args:
        query: The query of the URL.
        body: A form, or nothing.
    """
    try:
        fields = [
            field
            for text in (query, body.decode())
            for field in parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=_MOST_FIELDS)
        ]
    except ValueError as error:
        raise SqsError(UNREADABLE, f"the form cannot be read: {error}") from None
    tree: dict[str, Any] = {}
    for name, value in fields:
        _put(tree, name.split("."), value)
    action = tree.pop("Action", "")
    return action if isinstance(action, str) else "", _unfolded(tree)


def _put(tree: dict[str, Any], parts: list[str], value: str) -> None:
    if len(parts) > _DEEPEST:
        raise SqsError(UNREADABLE, f"the name of a parameter has more than {_DEEPEST} parts")
    for part in parts[:-1]:
        inner = tree.setdefault(part, {})
        if not isinstance(inner, dict):
            raise SqsError(UNREADABLE, f"the parameter {'.'.join(parts)} is given in two forms")
        tree = inner
    tree[parts[-1]] = value


def _unfolded(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if name in _LISTS:
            found[_LISTS[name]] = [_inner(one) for one in _in_order(value)]
        elif name in _MAPS and isinstance(value, dict):
            plural, key, inner = _MAPS[name]
            pairs = [one for one in _in_order(value) if isinstance(one, dict) and isinstance(one.get(key), str)]
            found[plural] = {one[key]: _inner(one.get(inner)) for one in pairs}
        else:
            found[name] = _inner(value)
    return found


def _inner(value: Any) -> Any:
    return _unfolded(value) if isinstance(value, dict) else value


def _in_order(value: Any) -> list[Any]:
    """Return the values of {"1": …, "2": …} in the order of the numbers. A single value may have no number."""
    if not isinstance(value, dict) or not all(key.isdecimal() and len(key) < 10 for key in value):
        return [value]
    return [value[key] for key in sorted(value, key=int)]


class Given:
    """The parameters of a request, or of an entry of a batch. Each method raises SqsError for a wrong value.

    Args:
        values: The parameters by their names in the JSON protocol.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def optional(self, name: str) -> str | None:
        """Return a text, or None if it is missing."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise SqsError(BAD_VALUE, f"Value {value!r} for parameter {name} is invalid. Reason: Must be a string.")
        return value

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        if not (value := self.optional(name)):
            raise SqsError(MISSING, f"The request must contain the parameter {name}.")
        return value

    def number(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number within limits, or None if it is missing."""
        value = self.values.get(name)
        if value is None:
            return None
        try:
            found = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
        except ValueError:
            found = None
        if found is None or not least <= found <= most:
            raise SqsError(
                BAD_VALUE,
                f"Value {value} for parameter {name} is invalid. Reason: Must be between {least} and {most},"
                " if provided.",
            )
        return found

    def names(self, *lists: str) -> list[str]:
        """Return the texts of these lists."""
        found: list[str] = []
        for name in lists:
            value = [] if self.values.get(name) is None else self.values[name]
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise SqsError(BAD_VALUE, f"the parameter {name} must be a list of strings")
            found += value
        if len(found) > _MOST_NAMES:
            raise SqsError(BAD_VALUE, f"the parameter {lists[0]} has {len(found)} names, and may have {_MOST_NAMES}")
        return found

    def map(self, name: str) -> dict[str, Any]:
        """Return a map, or an empty one if it is missing."""
        value = {} if self.values.get(name) is None else self.values[name]
        if not isinstance(value, dict):
            raise SqsError(BAD_VALUE, f"the parameter {name} must be a map")
        return value

    def entries(self) -> list[tuple[str, Given]]:
        """Return the entries of a batch with their ids, which differ."""
        value = self.values.get("Entries")
        if not value:
            raise SqsError(NO_BATCH, "There should be at least one entry in the request.")
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise SqsError(BAD_VALUE, "the parameter Entries must be a list of entries")
        if len(value) > _MOST_ENTRIES:
            raise SqsError(
                MANY_ENTRIES,
                f"Maximum number of entries per request are {_MOST_ENTRIES}. You have sent {len(value)}.",
            )
        found = [(str(one.get("Id") or ""), Given(one)) for one in value]
        for id_, _ in found:
            if not 1 <= len(id_) <= 80 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in id_):
                raise SqsError(
                    BAD_ENTRY_ID,
                    "A batch entry id can only contain alphanumeric characters, hyphens and underscores."
                    " It can be at most 80 letters long.",
                )
        if len({id_ for id_, _ in found}) < len(found):
            raise SqsError(SAME_IDS, "Two or more batch entries in the request have the same Id.")
        return found


def sorted_out(
    entries: Sequence[tuple[str, Given]], check: Callable[[Given], T]
) -> tuple[list[tuple[str, T]], list[dict[str, Any]]]:
    """Check the entries of a batch one by one.

    Returns:
        The results of those that are right, with their ids, and the errors of the others as entries of an answer.
    """
    right: list[tuple[str, T]] = []
    failed: list[dict[str, Any]] = []
    for id_, given in entries:
        try:
            right.append((id_, check(given)))
        except SqsError as error:
            failed.append(failed_entry(id_, error))
    return right, failed


def failed_entry(id_: str, error: SqsError) -> dict[str, Any]:
    """Return the error of an entry, as it is in the answer."""
    return {"Id": id_, "SenderFault": True, "Code": error.code.old, "Message": str(error)}

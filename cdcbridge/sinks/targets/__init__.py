"""The adapters: one module for each type of sink.

An adapter's client library is an extra, so a module is imported only when a consumer names its type.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from cdcbridge.errors import UsageError
from cdcbridge.sinks.target import Target

_CLASSES: Final = {
    "nats": "NatsTarget",
    "kafka": "KafkaTarget",
    "redis": "RedisTarget",
    "rabbitmq": "RabbitmqTarget",
    "sqs": "SqsTarget",
    "http": "HttpTarget",
    "file": "FileTarget",
}
_EXTRAS: Final = {"http": "webhook"}  # the extra of a type, if it has another name


def target_class(kind: str) -> type[Target[Any]]:
    """Return the adapter for a type of sink.

    Args:
        kind: The value of `sink.type`, for example `kafka`.

    Raises:
        UsageError: The adapter's client library is not installed.
    """
    try:
        module = importlib.import_module(f"cdcbridge.sinks.targets.{kind}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cdcbridge"):
            raise
        extra = _EXTRAS.get(kind, kind)
        raise UsageError(
            f"sink type {kind} needs the Python package {error.name}, which is not installed",
            hint=f"pip install 'cdcbridge[{extra}]'",
        ) from error
    found: type[Target[Any]] = getattr(module, _CLASSES[kind])
    return found

"""The adapters: one module for each type of sink.

An adapter's client library is an extra, so a module is imported only when a consumer names its type.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from cdcbridge.config.sink import CustomSink
from cdcbridge.config.sink_base import SinkBase
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


def target_class(sink: SinkBase) -> type[Target[Any]]:
    """Return the adapter for a sink.

    Args:
        sink: The settings of the sink.

    Raises:
        UsageError: The adapter's client library is not installed, or there is no such adapter.
    """
    if isinstance(sink, CustomSink):
        return _custom(sink.adapter)
    try:
        module = importlib.import_module(f"cdcbridge.sinks.targets.{sink.type}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cdcbridge"):
            raise
        extra = _EXTRAS.get(sink.type, sink.type)
        raise UsageError(
            f"sink type {sink.type} needs the Python package {error.name}, which is not installed",
            hint=f"pip install 'cdcbridge[{extra}]'",
        ) from error
    found: type[Target[Any]] = getattr(module, _CLASSES[sink.type])
    return found


def _custom(adapter: str) -> type[Target[Any]]:
    """Return the class that `adapter` names, for example `mqtt_sink:MqttTarget`."""
    name, _, attribute = adapter.partition(":")
    try:
        found = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the adapter {adapter} cannot be imported: {error}",
            hint="The module must be in a folder of PYTHONPATH, or in an installed package.",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Target)):
        raise UsageError(f"the adapter {adapter} is not a class derived from cdcbridge.sinks.target.Target")
    return found

"""Topics of MQTT, through the adapter of examples/mqtt_sink.py."""

from __future__ import annotations

import threading
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from tests.harness.brokers.mosquitto import Mosquitto
from tests.harness.world import eventually
from tests.sinks.case import Case, Received


class MqttCase(Case):
    """A subscriber that has been there before the first message."""

    type = "mqtt"
    exactly_once = False

    def __init__(self, server: Mosquitto, name: str, *, partitions: int = 4) -> None:
        self.server = server
        self._name = name
        self._found: list[Received] = []
        subscribed = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect(server.host, server.port)
        self._client.loop_start()
        self._client.subscribe(f"{name}/#", qos=1)
        eventually(subscribed.is_set, "the subscription")

    def sink(self) -> dict[str, Any]:
        return {
            "type": "custom",
            "adapter": "examples.mqtt_sink:MqttTarget",
            "destination": f"{self._name}/{{schema}}/{{table}}",
            "options": {"host": self.server.host, "port": self.server.port},
        }

    def received(self) -> list[Received]:
        return list(self._found)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client: Any, _data: Any, message: mqtt.MQTTMessage) -> None:
        headers = dict(getattr(message.properties, "UserProperty", ()))
        body = bytes(message.payload)
        key = None if b'"key":null' in body else body.partition(b'"key":"')[2].partition(b'"')[0].decode()
        self._found.append(Received(headers["cdcbridge-id"], key, body, message.topic))

"""An adapter for MQTT, as an example of a sink of your own: about 100 lines, most of them for errors.

It needs `pip install aiomqtt`, and this consumer:

    - name: events
      tables: ["public.*"]
      sink:
        type: custom
        adapter: mqtt_sink:MqttTarget
        destination: shop/{schema}/{table}
        options: {host: 127.0.0.1, port: 1883}

Start `cdcbridge run` with PYTHONPATH set to the folder of this file. A message is published with QoS 1, so it counts as
delivered when the broker has acknowledged it. MQTT brokers cannot say which message they have last. Therefore each
message arrives at least once, with the user property `cdcbridge-id` by which receivers recognise a repeat.

Source: MQTT Version 5.0, "QoS 1: At least once delivery" and "PUBACK Reason Code".
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cdcbridge.config.sink import CustomSink
from cdcbridge.sinks.target import Failure, Outgoing, Target, TargetAway, Unusable

QOS = 1
REFUSED_LOGIN = (134, 135)  # CONNACK: bad user name or password, not authorized
REFUSED_TOPIC = (135, 144)  # PUBACK: not authorized, topic name invalid
FORBIDDEN = "#+\0"  # characters that a topic must not contain


class MqttTarget(Target[CustomSink]):
    """A connection to an MQTT 5 broker."""

    _client: aiomqtt.Client | None = None

    async def open(self) -> None:
        """Connect. A broker that is away is tried again, and a wrong password needs a person."""
        options = {name: value.get_secret_value() for name, value in self.sink.options.items()}
        client = aiomqtt.Client(
            options.get("host", "127.0.0.1"),
            int(options.get("port", 1883)),
            username=options.get("username"),
            password=options.get("password"),
            protocol=aiomqtt.ProtocolVersion.V5,
            timeout=self.sink.timeout,
        )
        try:
            await client.__aenter__()
        except aiomqtt.MqttCodeError as error:
            if getattr(error.rc, "value", error.rc) in REFUSED_LOGIN:
                raise Unusable(f"MQTT: {error}", hint="Check options.username and options.password.") from error
            raise TargetAway(f"MQTT: {error}") from error
        except aiomqtt.MqttError as error:
            raise TargetAway(f"MQTT: {error}") from error
        self._client = client

    async def deliver(self, batch: Sequence[Outgoing]) -> Mapping[int, Failure]:
        """Publish one message after the other, and wait for each acknowledgement."""
        assert self._client is not None  # open() was called
        failures: dict[int, Failure] = {}
        failed_keys: set[str] = set()
        for index, message in enumerate(batch):
            if message.key in failed_keys:
                failures[index] = Failure("an earlier message of the key was not delivered")
                continue
            failure = self._refusal(message) or await self._publish(self._client, message)
            if failure is not None:
                failures[index] = failure
                if message.key is not None:
                    failed_keys.add(message.key)
        return failures

    async def close(self) -> None:
        """Disconnect."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(aiomqtt.MqttError):  # the connection is gone anyway
                await client.__aexit__(None, None, None)

    def _refusal(self, message: Outgoing) -> Failure | None:
        """Return why no broker would take the message."""
        if any(mark in message.destination for mark in FORBIDDEN):
            return Failure(f"MQTT does not allow the topic {message.destination!r}", for_good=True)
        return None

    async def _publish(self, client: aiomqtt.Client, message: Outgoing) -> Failure | None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = list(message.headers.items())
        try:
            await client.publish(message.destination, message.body, qos=QOS, properties=properties)
        except aiomqtt.MqttCodeError as error:
            code = getattr(error.rc, "value", error.rc)
            return Failure(f"MQTT: {error}", for_good=code in REFUSED_TOPIC)
        except aiomqtt.MqttError as error:
            raise TargetAway(f"MQTT: {error}") from error
        return None

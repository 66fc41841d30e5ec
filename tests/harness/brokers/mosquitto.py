"""Mosquitto of Debian, an MQTT broker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.harness.brokers.server import Server, listening


class Mosquitto(Server):
    """One broker, which keeps every message for its persistent sessions."""

    name = "mosquitto"

    def command(self) -> Sequence[str | Path]:
        file = self.folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} {self.host}",
            "allow_anonymous true",
            "max_queued_messages 0",
            "max_inflight_messages 0",
            "user root",
        ]
        file.write_text("\n".join(lines) + "\n")
        return ["/usr/sbin/mosquitto", "-c", file]

    def ask(self) -> None:
        if not listening(self.port):
            raise ConnectionError(self.port)

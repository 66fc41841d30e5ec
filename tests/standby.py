"""A streaming standby of a server, for the tests."""

from __future__ import annotations

from collections.abc import Mapping

from cdcbridge.embedded import EmbeddedServer


class Standby(EmbeddedServer):
    """From entry to exit of its `with` block; made by pg_basebackup."""

    def __init__(self, primary: EmbeddedServer, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(primary.binaries, settings=settings)
        self._primary = primary

    def initialize(self) -> None:
        self._run(
            "pg_basebackup", "-R", "--no-sync", "--checkpoint=fast", "-h", "127.0.0.1", "-p", str(self._primary.port),
            "-U", "postgres",
        )  # fmt: skip
        self._write_settings()

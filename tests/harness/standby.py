"""A streaming standby of a server, for the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import psycopg

from cdcbridge.demo.embedded import EmbeddedServer


class Standby(EmbeddedServer):
    """From entry to exit of its `with` block; made by pg_basebackup."""

    def __init__(self, primary: EmbeddedServer, *, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(primary.binaries, settings=settings)
        self._primary = primary

    @property
    def slot(self) -> str:
        """Its physical slot on the primary."""
        return f"standby_{self.port}"

    def initialize(self) -> None:
        """A copy, with a slot on the primary, so that slots can be kept in step (PostgreSQL 17+ wants a database, too)."""
        self._run(
            "pg_basebackup", "-R", "--no-sync", "--checkpoint=fast", "-C", "-S", self.slot, "-d", self._primary.dsn(tcp=True),
        )  # fmt: skip
        self._write_settings()

    def promote(self) -> None:
        """It becomes a primary, on a timeline of its own."""
        self._run("pg_ctl", "-w", "promote")

    def remove(self) -> None:
        """With its slot on the primary, where that is there still."""
        super().remove()
        with contextlib.suppress(psycopg.Error), psycopg.connect(self._primary.dsn(), autocommit=True) as primary:
            primary.execute("select pg_drop_replication_slot(%s)", (self.slot,))

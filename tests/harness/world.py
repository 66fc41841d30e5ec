"""A database, a configuration for it, and bridges as threads or processes. What the tests of the whole path share."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import yaml

from cdcbridge.bridge.supervisor import Bridge
from cdcbridge.config import Config, load
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.instants import AnyInstant
from cdcbridge.store.log import BridgeStore
from tests.harness.programs import Program, complete

PATIENCE = 30.0  # seconds that a test waits for an event before it fails
_numbers = itertools.count(1)
Running: TypeAlias = subprocess.Popen[str] | Program
NewDatabase: TypeAlias = Callable[[EmbeddedServer], contextlib.AbstractContextManager[str]]


@contextlib.contextmanager
def fresh_database(server: EmbeddedServer, options: str = "") -> Iterator[str]:
    """A new database; dropped with its slots afterwards."""
    name = f"t{os.getpid()}_{next(_numbers)}"
    _administer(server, f"create database {name} {options}")
    try:
        yield name
    finally:
        _administer(server, f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")
        eventually(lambda: _drop_slots(server, name))
        _administer(server, f"drop database {name} with (force)")


_with_store: weakref.WeakKeyDictionary[EmbeddedServer, str] = weakref.WeakKeyDictionary()
_administrators: weakref.WeakKeyDictionary[EmbeddedServer, psycopg.Connection[Any]] = weakref.WeakKeyDictionary()


def _administer(server: EmbeddedServer, statement: str) -> None:
    """Run a statement in a session on the server that is kept for all tests, and made anew after a restart."""
    kept = _administrators.get(server)
    if kept is not None:
        with contextlib.suppress(psycopg.OperationalError):
            kept.execute("select")
    if kept is None or kept.closed:
        made = psycopg.connect(server.dsn(), autocommit=True, prepare_threshold=None)
        _administrators[server] = made
        weakref.finalize(server, made.close)
    _administrators[server].execute(statement.encode())


@contextlib.contextmanager
def store_database(server: EmbeddedServer) -> Iterator[str]:
    """A new database with a store in it: a copy of one that was migrated once for this server."""
    if server not in _with_store:
        name = f"store{os.getpid()}_{next(_numbers)}"
        _administer(server, f"create database {name}")
        with contextlib.closing(BridgeStore(server.dsn(name), "cdcbridge")) as store:
            store.migrate()
        _with_store[server] = name
    with fresh_database(server, f"template {_with_store[server]} strategy file_copy") as database:
        yield database


def _drop_slots(server: EmbeddedServer, name: str) -> bool:
    with contextlib.suppress(psycopg.errors.ObjectInUse):
        _administer(
            server, f"select pg_drop_replication_slot(slot_name) from pg_replication_slots where database = '{name}'"
        )
        return True
    return False


def eventually(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """The condition's first true value. Fails after `patience` seconds.

    Each look takes time from the processes that it waits for, so the pauses grow from 10 ms to 100 ms.
    """
    deadline = time.monotonic() + patience
    pause = 0.01
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"did not come about in {patience} s: {what or condition}")
        time.sleep(pause)
        pause = min(1.5 * pause, 0.1)


class World:
    """One test's source and store (one database, unless said otherwise)."""

    def __init__(self, server: EmbeddedServer, database: str, plugin: str, folder: Path) -> None:
        self.server = server
        self.database = database
        self.plugin = plugin
        self.folder = folder
        self.slot = database
        self.user = "postgres"
        self.schema = "cdcbridge"
        self.store_dsn: str | None = None
        self.settings: dict[str, Any] = {"heartbeat_interval": "1s"}
        self.store_settings: dict[str, Any] = {}
        self.top_settings: dict[str, Any] = {}
        self.consumers: list[dict[str, Any]] = []
        self.mirrors: list[dict[str, Any]] = []
        self._sql: psycopg.Connection[Any] | None = None
        self._store_session: psycopg.Connection[Any] | None = None
        self._store_is = ("", "")
        self._processes: list[Running] = []

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.database, self.user)

    @property
    def sql(self) -> psycopg.Connection[Any]:
        """An autocommit session on the source."""
        if self._sql is None or self._sql.closed:
            self._sql = psycopg.connect(self.dsn, autocommit=True, client_encoding="UTF8")
        return self._sql

    def execute(self, *statements: str) -> None:
        for statement in statements:
            self.sql.execute(statement.encode())

    def rows(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        """Rows from the store."""
        try:
            return self._store().execute(query.encode(), args or None).fetchall()
        except psycopg.OperationalError:
            if self._store_session is None or not self._store_session.closed:
                raise  # the statement's own error
            return self._store().execute(query.encode(), args or None).fetchall()

    def _store(self) -> psycopg.Connection[Any]:
        """An autocommit session on the store of now: a test may move it, or end all sessions."""
        wanted = (self.store_dsn or self.dsn, self.schema)
        if self._store_session is None or self._store_session.closed or self._store_is != wanted:
            if self._store_session is not None:
                self._store_session.close()
            self._store_session = psycopg.connect(
                wanted[0], autocommit=True, client_encoding="UTF8", prepare_threshold=None
            )
            self._store_session.execute(f"set search_path = {self.schema}, {self.schema}_internal, public".encode())
            self._store_is = wanted
        return self._store_session

    def value(self, query: str, *args: Any) -> Any:
        return self.rows(query, *args)[0][0]

    def consumer(self, name: str = "c", tables: tuple[str, ...] = ("public.t",), **settings: Any) -> None:
        """Declare (or declare anew) a consumer."""
        self.consumers = [c for c in self.consumers if c["name"] != name]
        self.consumers.append({"name": name, "tables": list(tables), **settings})

    def write_config(self) -> Path:
        path = self.folder / "cdcbridge.yaml"
        document: dict[str, Any] = {
            "source": {"dsn": self.dsn, "plugin": self.plugin, "slot": self.slot, **self.settings},
            "http": None,
            **self.top_settings,
            "consumers": self.consumers,
            **({"mirrors": self.mirrors} if self.mirrors else {}),
        }
        store = {"dsn": self.store_dsn} if self.store_dsn else {}
        document["store"] = {"schema": self.schema, **store, **self.store_settings}
        path.write_text(yaml.safe_dump(document))
        return path

    def config(self) -> Config:
        return load(self.write_config())

    @contextlib.contextmanager
    def bridge(self) -> Iterator[Bridge]:
        """A bridge in a thread, streaming; what it raises is raised here."""
        bridge = Bridge(self.config(), reload=lambda: load(self.folder / "cdcbridge.yaml"))
        raised: list[BaseException] = []

        def run() -> None:
            try:
                bridge.run()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            # The bridge knows first. Without that look, a start would be slowed down by the server's answers.
            eventually(lambda: raised or (bridge._streamed and self.active()), "the bridge streams")
            if raised:
                raise raised[0]
            yield bridge
        except AssertionError as error:
            if raised:
                raise raised[0] from error  # the cause, probably
            raise
        finally:
            bridge.stop()
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the bridge did not stop"
            eventually(lambda: not self.active(), "the server freed the slot")
        if raised:
            raise raised[0]

    def bridge_error(self, patience: float = PATIENCE) -> BaseException:
        """Run a bridge that must end by itself within so many seconds; what it raised."""
        bridge = Bridge(self.config())
        timer = threading.Timer(patience, bridge.stop)
        timer.start()
        try:
            bridge.run()
        except BaseException as error:
            return error
        finally:
            timer.cancel()
        raise AssertionError("the bridge raised nothing")

    def active(self) -> bool:
        """Whether a bridge streams from the slot, which is active, too, while the server creates it.

        A role that may not see the state of other sessions gets null there.
        """
        query = (
            "select from pg_replication_slots s join pg_stat_replication r on r.pid = s.active_pid"
            " where slot_name = %s and state is distinct from 'startup'"
        )
        return self.sql.execute(query, (self.slot,)).fetchone() is not None

    def messages(self, count: int, query: str = "select topic, key, data from messages order by seq") -> list[Any]:
        """The log, once it has `count` messages."""
        eventually(lambda: self.value("select count(*) from messages") >= count, f"{count} messages in the log")
        found = self.rows(query)
        assert len(found) == count, found
        return found

    def data(self, count: int) -> list[dict[str, Any]]:
        """The messages' data, once there are `count`."""
        return [data for _, _, data in self.messages(count)]

    # the program as a process

    def run_program(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        arguments = ("-c", str(self.write_config()), *arguments)
        done = complete(arguments, clean_environment(), stdin=(stdin or "").encode(), timeout=120)
        out, err = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def json(self, *arguments: str) -> Any:
        result = self.run_program(*arguments)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def start_process(
        self,
        *options: str,
        crash: tuple[AnyInstant, int] | None = None,
        prefix: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """`cdcbridge run` as a process; `crash`: the instant to die at, and the how manieth time (see
        tests.harness.crash); `prefix`: a command that runs it, and becomes it.
        """
        return self._start(["run", *options], "bridge.log", crash, prefix, environment)

    def start_sinks(
        self,
        *names: str,
        crash: tuple[AnyInstant, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """`cdcbridge sinks run` as a process; `crash` and `environment` as for start_process()."""
        return self._start(["sinks", "run", *names], "sinks.log", crash, None, environment)

    def start_mirrors(
        self,
        *names: str,
        crash: tuple[AnyInstant, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """`cdcbridge mirror run` as a process; `crash` and `environment` as for start_process()."""
        return self._start(["mirror", "run", *names], "mirrors.log", crash, None, environment)

    def _start(
        self,
        command: list[str],
        log_name: str,
        crash: tuple[AnyInstant, int] | None,
        prefix: list[str] | None,
        environment: dict[str, str] | None,
    ) -> Running:
        arguments = ["-c", str(self.write_config()), *command]
        log = self.folder / log_name
        log.touch()
        surroundings = {**clean_environment(), **(environment or {})}
        process = (
            Program(arguments, surroundings, stderr=str(log), crash=crash)
            if prefix is None
            else self._start_behind(prefix, arguments, surroundings, log, crash)
        )
        self._processes.append(process)
        return process

    def _start_behind(
        self,
        prefix: list[str],
        arguments: list[str],
        environment: dict[str, str],
        log: Path,
        crash: tuple[AnyInstant, int] | None,
    ) -> subprocess.Popen[str]:
        program = ["cdcbridge"] if crash is None else ["tests.harness.crash", crash[0], str(crash[1]), "--"]
        with log.open("a") as file:
            return subprocess.Popen(
                [*prefix, sys.executable, "-m", *program, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, text=True, env=environment,
            )  # fmt: skip

    def log(self, name: str = "bridge.log") -> str:
        return (self.folder / name).read_text()

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)  # a stopped one, too
            process.wait()
        self.leave()

    def leave(self) -> None:
        """Close the sessions of this object, for example so that its database can be renamed. They come again by themselves."""
        for session in (self._sql, self._store_session):
            if session is not None:
                session.close()


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("CDCBRIDGE_")}

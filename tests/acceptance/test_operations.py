"""docs/OPERATIONS.md holds: its roles suffice and can no more; secrets are nowhere to be read; TLS to both databases."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from cdcbridge.config import load
from cdcbridge.database import conninfo
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.errors import ConfigError, UsageError
from tests.acceptance.test_docs import BLOCK, ROOT
from tests.conftest import DEBIAN_15, FAST
from tests.harness.programs import Program
from tests.harness.world import World, clean_environment, eventually

ROLES = ("cdcbridge_source", "cdcbridge_store", "billing_app")


@pytest.mark.parametrize("plugin", ["pgoutput", "wal2json"])
def test_the_roles_of_the_manual_suffice_and_can_no_more(own15: EmbeddedServer, tmp_path: Path, plugin: str) -> None:
    world = World(own15, "postgres", plugin, tmp_path)
    with psycopg.connect(own15.dsn(), autocommit=True) as admin:
        admin.execute("create database elsewhere")
    world.store_dsn = own15.dsn("elsewhere")
    world.execute("create table orders (id int primary key, v text)", "create table secrets (v text)")
    world.execute("insert into orders values (1, 'before')")
    blocks = BLOCK.findall((ROOT / "docs" / "OPERATIONS.md").read_text())
    for where, kind, text in blocks:
        if kind == "sql" and "after" not in where:
            database = "postgres" if "source" in where else "elsewhere"
            with psycopg.connect(own15.dsn(database), autocommit=True) as owner:
                owner.execute(text.encode())
    (given,) = (yaml.safe_load(text) for _, kind, text in blocks if kind == "yaml")
    world.consumers = given["consumers"]
    world.user = "cdcbridge_source"
    world.settings["dsn"] = own15.dsn("postgres", "cdcbridge_source")
    world.store_dsn = own15.dsn("elsewhere", "cdcbridge_store")
    checked = world.run_program("check")
    assert (checked.returncode, "ok" in checked.stdout) == (0, True), checked.stdout
    world.user = "postgres"
    with world.bridge():
        world.execute("insert into orders values (2, 'after')")
        eventually(lambda: world.value("select count(*) from messages") == 2, "the row that was there, and the change")
        lag = world.run_program("lag", "--json")
        assert lag.returncode == 0, lag.stderr
        assert world.run_program("verify", "public.orders").returncode == 0
        # The bridge's second life goes as well.
    with world.bridge():
        world.execute("insert into orders values (3, 'again')")
        eventually(lambda: world.value("select count(*) from messages") == 3)
    reader = own15.dsn("elsewhere", "billing_app")
    with psycopg.connect(reader, autocommit=True) as app:
        taken = app.execute("select receipt from cdcbridge.receive('billing')").fetchall()
        assert len(taken) == 3
        assert app.execute("select cdcbridge.ack('billing', %s)", ([r for (r,) in taken],)).fetchone() == (3,)
        refused(app, "select cdcbridge.publish('t', null, '{}')")
        for _, kind, text in [b for b in blocks if "after the first start" in b[0]]:
            assert kind == "sql"
            with psycopg.connect(own15.dsn("elsewhere", "cdcbridge_store"), autocommit=True) as owner:
                owner.execute(text.encode())
        app.execute("select cdcbridge.publish('t', null, '{}')")
        refused(app, "select * from cdcbridge.messages", "select * from cdcbridge.consumers", "create schema mine",
                "select cdcbridge_internal.take_lead('me')", "select cdcbridge_internal.evict_leader('0 s')")  # fmt: skip
    with psycopg.connect(own15.dsn("postgres", "cdcbridge_source"), autocommit=True) as source:
        refused(source, "select * from secrets", "insert into orders values (9, '')", "drop table orders",
                "create schema mine", "alter system set work_mem = '1MB'", "create role other")  # fmt: skip
    with psycopg.connect(own15.dsn("elsewhere", "cdcbridge_store"), autocommit=True) as store:
        refused(store, "create schema another", "create role other", "create publication p for all tables",
                "select pg_create_logical_replication_slot('s', 'pgoutput')")  # fmt: skip
    with psycopg.connect(own15.dsn(), autocommit=True) as admin:
        rights = "select rolname, rolsuper or rolcreaterole or rolcreatedb or rolbypassrls, rolreplication from pg_roles where rolname = any (%s) order by 1"
        assert admin.execute(rights, (list(ROLES),)).fetchall() == [
            ("billing_app", False, False), ("cdcbridge_source", False, True), ("cdcbridge_store", False, False),
        ]  # fmt: skip
    world.close()


def refused(session: psycopg.Connection[tuple[object, ...]], *statements: str) -> None:
    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement.encode())


SECRET = "hush%20hush"


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://postgres:{SECRET}@127.0.0.1:1/app",  # nobody listens
        f"postgres//postgres:{SECRET}@127.0.0.1/app",  # not a URL
        f"host=127.0.0.1 port=1 password={SECRET} dbname",  # cut off
        f"host=127.0.0.1 port=1 password=a {SECRET}",  # not quoted
        f"postgresql://postgres:{SECRET}%zz@127.0.0.1/app",  # not encoded
        f"host=127.0.0.1 port=1 passwort={SECRET}",  # misspelt
    ],
)
def test_a_secret_is_in_no_output_whatever_is_wrong(tmp_path: Path, dsn: str) -> None:
    path = tmp_path / "cdcbridge.yaml"
    path.write_text(yaml.safe_dump({"source": {"dsn": dsn}, "log": {"level": "debug"}, "http": None}))
    for command in (("check",), ("lag",), ("config", "show"), ("config", "show", "--json"), ("run",), ("receive", "x")):
        said = output_of(["-c", str(path), *command], tmp_path / "output")
        assert "hush" not in said, (command, said)
        assert said and "Traceback" not in said, (command, said)


def output_of(arguments: list[str], output: Path) -> str:
    """What a command prints, on both streams. It is asked to end once it has said something."""
    output.write_bytes(b"")
    process = Program(arguments, clean_environment(), stdout=str(output), stderr=str(output))
    eventually(lambda: output.stat().st_size or process.poll() is not None, "it says something")
    if "run" in arguments:  # it tries again for ever where nobody listens
        process.terminate()
    process.wait(60)
    return output.read_text()


def test_libpqs_own_words_stay_without_what_they_quote() -> None:
    with pytest.raises(UsageError, match='invalid connection option "…"'):
        conninfo("password=a hush=1", "test")
    with pytest.raises(UsageError, match='missing "…" in connection info string') as raised:
        conninfo("password=a hush", "test")
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("section", ["source", "store"])
def test_a_dsn_in_the_place_of_its_section_is_not_told(tmp_path: Path, section: str) -> None:
    path = tmp_path / "cdcbridge.yaml"
    path.write_text(yaml.safe_dump({"source": {"dsn": "host=x"}, section: "postgresql://u:hush@h/db"}))
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert section in str(raised.value) and "hush" not in str(raised.value)


def test_a_secret_is_in_no_log_and_no_process_list(own15: EmbeddedServer, tmp_path: Path) -> None:
    world = World(own15, "postgres", "wal2json", tmp_path)
    world.execute("create table t (id int primary key)")
    world.settings["dsn"] = "${TEST_URL}"
    world.store_dsn = "${TEST_URL}"
    world.top_settings["log"] = {"level": "debug", "format": "json"}
    world.consumer()
    url = f"{own15.dsn()} password=hushhush"
    process = world.start_process(environment={"TEST_URL": url})
    eventually(world.active, "it streams")
    world.execute("insert into t values (1)")
    eventually(lambda: "bridge.streaming" in world.log())
    assert b"hushhush" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    own15.stop("immediate")
    eventually(lambda: "bridge.retry" in world.log(), "it tells what is wrong")
    process.terminate()
    assert process.wait(30) == 0
    assert "hushhush" not in world.log()
    own15.start()
    world.close()


# TLS


class TlsServer(EmbeddedServer):
    """Takes nobody over TCP without TLS and a client certificate that names the role."""

    def __init__(self, certificates: Path) -> None:
        files = {"ssl_ca_file": "ca.crt", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key"}
        super().__init__(DEBIAN_15, settings={**FAST, "ssl": "on", **files})
        self._certificates = certificates

    def initialize(self) -> None:
        super().initialize()
        import shutil

        for name in ("ca.crt", "server.crt", "server.key"):
            shutil.copy(self._certificates / name, self.data / name)
            shutil.chown(self.data / name, "nobody" if os.geteuid() == 0 else os.getuid())
            (self.data / name).chmod(0o600)
        hba = "local all all trust\nhostssl all all 127.0.0.1/32 cert\n"
        (self.data / "pg_hba.conf").write_text(hba)


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _certificate(folder: Path, name: str, subject: str, *, authority: str | None = None) -> None:
    new = ["-newkey", "rsa:2048", "-nodes", "-keyout", f"{name}.key", "-subj", f"/CN={subject}"]
    if authority is None:
        _openssl(folder, "req", "-x509", "-days", "2", *new, "-out", f"{name}.crt")
        return
    _openssl(folder, "req", *new, "-out", f"{name}.csr")
    (folder / "names").write_text(f"subjectAltName=DNS:{subject}\n")
    _openssl(folder, "x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", f"{authority}.crt", "-CAkey",
             f"{authority}.key", "-CAcreateserial", "-extfile", "names", "-out", f"{name}.crt")  # fmt: skip
    (folder / f"{name}.key").chmod(0o600)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    _certificate(folder, "ca", "test authority")
    _certificate(folder, "other", "another authority")
    _certificate(folder, "server", "localhost", authority="ca")
    _certificate(folder, "client", "postgres", authority="ca")
    _certificate(folder, "stranger", "postgres", authority="other")
    return folder


@pytest.fixture(scope="module")
def tls(certificates: Path) -> Iterator[TlsServer]:
    with TlsServer(certificates) as server:
        yield server


def tls_dsn(
    server: TlsServer, folder: Path, *, root: str = "ca", client: str = "client", host: str = "localhost"
) -> str:
    return (
        f"postgresql://postgres@{host}:{server.port}/postgres?hostaddr=127.0.0.1&sslmode=verify-full"
        f"&sslrootcert={folder / root}.crt&sslcert={folder / client}.crt&sslkey={folder / client}.key"
    )


@pytest.mark.parametrize("plugin", ["pgoutput", "wal2json"])
def test_every_session_is_encrypted_and_shows_its_certificate(
    tls: TlsServer, certificates: Path, tmp_path: Path, plugin: str
) -> None:
    world = World(tls, "postgres", plugin, tmp_path)
    world.slot = f"tls_{plugin}"
    world.schema = f"tls_{plugin}"
    world.execute(f"create table if not exists t_{plugin} (id int primary key)")
    world.settings["dsn"] = world.store_dsn = tls_dsn(tls, certificates)
    world.consumer("c", (f"public.t_{plugin}",))
    assert world.run_program("check").returncode == 0
    with world.bridge():
        world.execute(f"insert into t_{plugin} values (1)")
        eventually(lambda: world.value("select count(*) from messages") == 1)
        sessions = world.sql.execute(
            "select a.application_name, s.ssl, s.client_dn from pg_stat_activity a join pg_stat_ssl s using (pid)"
            " where a.application_name like 'cdcbridge %'"
        ).fetchall()
    assert {name for name, _, _ in sessions} >= {"cdcbridge replication", "cdcbridge bridge", "cdcbridge lead"}
    assert all(ssl and dn == "/CN=postgres" for _, ssl, dn in sessions), sessions
    world.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"root": "other"}, "certificate verify failed"),
        ({"host": "db.example.com"}, 'does not match host name "db.example.com"'),
        ({"client": "stranger"}, "unknown ca"),
    ],
)
def test_a_wrong_certificate_is_refused_and_said_so(
    tls: TlsServer, certificates: Path, tmp_path: Path, wrong: dict[str, str], said: str
) -> None:
    world = World(tls, "postgres", "pgoutput", tmp_path)
    world.settings["dsn"] = tls_dsn(tls, certificates, **wrong)
    result = world.run_program("check")
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr

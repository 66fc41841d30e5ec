"""docs/ROLES.md is true: each statement is run by every role, and the weakest that may is the one that the page names."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest

from cdcbridge.database import connect_store
from cdcbridge.demo.embedded import EmbeddedServer
from cdcbridge.schemas import both
from cdcbridge.store.migrate import migrate
from tests.acceptance.test_docs import ROOT
from tests.harness.world import World, fresh_database

ROW = re.compile(r"^\| `(.+?)` \| (\w+) \| (\w+) \|$", re.MULTILINE)
WEAKEST_FIRST = ("app", "store", "owner", "creator", "superuser")
LINES = ROW.findall((ROOT / "docs" / "ROLES.md").read_text())


@pytest.fixture(scope="module", params=["pg15", "pg18"])
def shop(request: pytest.FixtureRequest) -> Iterator[tuple[EmbeddedServer, str]]:
    """A database whose roles are named as in the page, with the database's name behind them."""
    server: EmbeddedServer = request.getfixturevalue(request.param)
    with fresh_database(server) as name:
        roles = {role: f"{role}_{name}" for role in (*WEAKEST_FIRST[:-1], "bridge")}
        with psycopg.connect(server.dsn(name), autocommit=True) as admin:
            for role in roles.values():
                admin.execute(f"create role {role} login".encode())
            for statement in (
                f"alter role {roles['creator']} createrole replication bypassrls",
                f"grant {roles['bridge']} to {roles['creator']} with admin option",
                f"alter database {name} owner to {roles['owner']}",
                f"alter schema public owner to {roles['owner']}",
                *(f"create schema {name} authorization {roles['store']}" for name in both("store")),
                "create table orders (id int primary key)",
                f"alter table orders owner to {roles['owner']}",
                "create function noted() returns event_trigger language plpgsql as $$ begin end $$",
            ):
                admin.execute(statement.encode())
            with connect_store(server.dsn(name, roles["store"]), "store") as store:
                migrate(store, "store")
            yield server, name
            for role in roles.values():
                admin.execute(f"reassign owned by {role} to postgres".encode())
                admin.execute(f"drop owned by {role}".encode())
            for role in roles.values():
                admin.execute(f"drop role {role}".encode())


def may(server: EmbeddedServer, database: str, role: str, statement: str) -> bool:
    """Whether the role may run this; nothing stays."""
    for word in ("bridge", "app"):
        statement = re.sub(rf"\b(to|role|authorization) {word}\b", rf"\1 {word}_{database}", statement)
    statement = statement.replace("database shop", f"database {database}").replace("made_here", f"made_{database}")
    user = "postgres" if role == "superuser" else f"{role}_{database}"
    with psycopg.connect(server.dsn(database, user)) as session:
        warnings: list[psycopg.errors.Diagnostic] = []
        session.add_notice_handler(warnings.append)
        try:
            if statement.startswith("alter system"):
                session.autocommit = True  # not in a transaction
                session.execute(statement.encode())
                session.execute("alter system reset max_slot_wal_keep_size")
                return True
            session.execute(statement.encode())
            return not warnings  # no privileges were granted
        except psycopg.errors.InsufficientPrivilege:
            return False
        finally:
            session.rollback()


@pytest.mark.parametrize(("statement", "on15", "on18"), LINES, ids=[line[0] for line in LINES])
def test_the_page_names_the_weakest_role(
    shop: tuple[EmbeddedServer, str], statement: str, on15: str, on18: str
) -> None:
    server, database = shop
    with psycopg.connect(server.dsn(database)) as admin:
        named = on15 if admin.info.server_version < 160000 else on18
    found = [role for role in WEAKEST_FIRST if may(server, database, role, statement)]
    assert found[0] == named, found
    assert found[-1] == "superuser"


def test_the_page_has_the_statements_of_the_manual() -> None:
    assert len(LINES) > 15


def test_a_member_of_rds_replication_is_not_refused_for_want_of_the_attribute(world18: World) -> None:
    role = f"r_{world18.database}"
    world18.execute("create table t (id int primary key)", f"create role {role} login", "create role rds_replication")
    try:
        world18.consumer()
        world18.user = role

        def found() -> dict[str, str]:
            import json

            checked = json.loads(world18.run_program("check", "--json").stdout)
            return {p["code"]: p["fix"] for p in checked["problems"]}

        assert found()["privilege_replication"] == f"grant rds_replication to {role};"
        world18.execute(found()["privilege_replication"])
        assert "privilege_replication" not in found()
        assert "replication_session" in found(), "this server does not know the role, and the trial says so"
    finally:
        world18.user = "postgres"
        world18.execute(f"drop owned by {role}", f"drop role {role}", "drop role rds_replication")


def test_consumers_with_and_without_a_role_are_a_warning(world18: World) -> None:
    role = f"r_{world18.database}"
    world18.execute("create table t (id int primary key)", f"create role {role}")
    try:
        world18.consumer("a", role=role)
        assert world18.json("check", "--json")["problems"] == []
        world18.consumer("b")
        (problem,) = world18.json("check", "--json")["problems"]
        assert (problem["code"], problem["severity"], problem["object"]) == ("roles_mixed", "warning", "b")
        assert "only the store's owner" in problem["message"]
    finally:
        world18.execute(f"drop role {role}")

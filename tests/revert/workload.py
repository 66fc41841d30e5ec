"""Random transactions over four tables: with a default identity, a foreign key, REPLICA IDENTITY FULL, and no key."""

from __future__ import annotations

import random
from typing import Any

import psycopg

TABLES = ("parent", "child", "whole", "keyless")
SETUP = (
    "create table parent (id int primary key, n int, amount numeric, note text, ratio float8)",
    "alter table parent alter note set storage external",
    (
        "create table child (id int, part text, parent_id int references parent on delete cascade on update cascade,"
        " tags text[], doc jsonb, twice int generated always as (id * 2) stored, primary key (id, part))"
    ),
    "create table whole (id bigint generated always as identity primary key, a text, j json, at timestamptz)",
    "alter table whole replica identity full",
    "create table keyless (a int, b text, big text)",
    "alter table keyless replica identity full",
)
_IDS = 40
_TEXTS = ("a", "b", "ü 🚲", r"\n", r"'' \\", '"')
_DOCUMENTS = ("null", "'[1.50, null]'", """'{"a": {"b": 1e400}}'""", "'true'")
_TAGS = ("null", "'{}'", """'{a,"b c",null}'""", "'{{1,2},{3,4}}'")
_JSON = ("""'{ "b" : 1.50,  "b":2}'""", "'[]'", "null", r"""'"\u0000"'""")


class Workload:
    """Random changes from a seed. Without `nan`, there is no NaN, which wal2json 2.5 sends as null."""

    def __init__(self, connection: psycopg.Connection[Any], seed: int, *, nan: bool) -> None:
        self.connection, self.random = connection, random.Random(seed)
        self.special = "'NaN'" if nan else "-0.0"

    def transaction(self) -> None:
        """Run one transaction of one to six statements. A statement that the server refuses is rolled back alone."""
        with self.connection.transaction():
            for _ in range(self.random.randint(1, 6)):
                try:
                    with self.connection.transaction():
                        self.connection.execute(self._statement().encode())
                        if self.random.random() < 0.05:
                            raise psycopg.errors.UniqueViolation  # a savepoint that is rolled back
                except (psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation):
                    pass

    def _statement(self) -> str:
        return getattr(self, f"_{self.random.choice(TABLES)}")()  # type: ignore[no-any-return]

    def _id(self) -> int:
        return self.random.randint(1, _IDS)

    def _text(self) -> str:
        pick = self.random.random()
        if pick < 0.1:
            return "null"
        if pick < 0.3:
            return f"repeat(md5('{self._id()}'), 200)"
        return f"E'{self.random.choice(_TEXTS)}{self._id()}'"

    def _number(self) -> str:
        return self.random.choice(["null", "1.50", "1.5", "1e20", self.special, str(self._id())])

    def _parent(self) -> str:
        one, pick = self._id(), self.random.random()
        if pick < 0.4:
            return (
                f"insert into parent values ({one}, {self._id()}, {self._number()}, {self._text()}, {self._number()})"
                f" on conflict (id) do update set n = {self._id()}"
            )
        if pick < 0.6:
            return f"update parent set n = {self._id()}, amount = {self._number()} where id = {one}"
        if pick < 0.7:
            return (
                f"update parent set note = {self._text()}, ratio = {self._number()} where id < {one} and id > {one} - 4"
            )
        if pick < 0.85:
            return f"update parent set id = {self._id()} where id = {one}"
        return f"delete from parent where id = {one}"

    def _child(self) -> str:
        one, pick = self._id(), self.random.random()
        part = self.random.choice("xy")
        if pick < 0.5:
            doc, tags = self.random.choice(_DOCUMENTS), self.random.choice(_TAGS)
            return f"insert into child (id, part, parent_id, tags, doc) values ({one}, '{part}', {self._id()}, {tags}, {doc})"
        if pick < 0.7:
            return f"update child set parent_id = {self._id()} where id = {one}"
        if pick < 0.85:
            return f"update child set id = {self._id()}, part = '{part}' where id = {one}"
        return f"delete from child where id = {one}"

    def _whole(self) -> str:
        one, pick = self._id(), self.random.random()
        value = self.random.choice(_JSON)
        if pick < 0.4:
            return (
                f"insert into whole (id, a, j, at) overriding system value values ({one}, {self._text()}, {value}, now())"
                " on conflict do nothing"
            )
        if pick < 0.7:
            return f"update whole set a = {self._text()}, j = {value} where id between {one} and {one} + 3"
        return f"delete from whole where id = {one}"

    def _keyless(self) -> str:
        one, pick = self.random.randint(1, 8), self.random.random()
        if pick < 0.4:
            return f"insert into keyless values ({one}, {self._text()}, {self._text()})"
        if pick < 0.7:
            return f"update keyless set b = {self._text()} where a = {one}"
        return f"delete from keyless where a = {one} and b is not distinct from (select min(b) from keyless)"

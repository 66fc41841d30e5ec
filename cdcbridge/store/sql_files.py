"""The SQL files of the package: tables, migrations, functions and views. Pure: reads files, never a database."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

from cdcbridge.errors import OperatorNeeded

_MIGRATION = re.compile(r"(\d{4})_(\w+)\.sql")
# The tables of schema.sql that users see. `migrate` moves them from the internal schema to the store's schema.
PUBLIC_TABLES = ("messages", "consumers", "dead_messages", "audit")
_FUNCTION = re.compile(r"^create or replace function (\w+)", re.MULTILINE)


@dataclass(slots=True, frozen=True)
class PublicFunction:
    """A file under sql/api: the name of its function, the header that explains it, and the whole text."""

    name: str
    header: str
    text: str

    @property
    def needs_grant(self) -> bool:
        """Whether a role needs a grant of its own. All others may be called by every role that may use the schema."""
        return self.name == "publish"


@dataclass(slots=True, frozen=True)
class Code:
    """The functions and views that `cdcbridge migrate` installs anew whenever one of their files changed."""

    public: tuple[PublicFunction, ...]
    views: tuple[str, ...]
    internal: tuple[str, ...]
    templates: tuple[tuple[str, str], ...]  # for example ("per_consumer/claim_waiting", "create or replace ...")

    @property
    def checksum(self) -> str:
        """Return a checksum over all files."""
        texts = [
            *(one.text for one in self.public),
            *self.views,
            *self.internal,
            *(t for pair in self.templates for t in pair),
        ]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def tables() -> str:
    """Return sql/schema.sql, from which a new store is made."""
    return (_root() / "schema.sql").read_text()


def migrations() -> list[tuple[int, str, str]]:
    """Return (version, name, SQL) of each migration, in order.

    The first one has version 2, because a store that schema.sql makes has version 1.
    """
    found = []
    for file in _files("migrations"):
        match = _MIGRATION.fullmatch(file.name)
        if match is None:
            raise OperatorNeeded(f"sql/migrations/{file.name}: not named like 0002_name.sql")
        found.append((int(match[1]), match[2], file.read_text()))
    return sorted(found)


def code() -> Code:
    """Return the functions and views as they are in the files."""
    templates = tuple(
        (f"{folder}/{file.name.removesuffix('.sql')}", file.read_text())
        for folder in ("per_consumer", "dispatch")
        for file in _files("internal", folder)
    )
    views, internal = (tuple(file.read_text() for file in _files(folder)) for folder in ("views", "internal"))
    return Code(tuple(_public(file) for file in _files("api")), views, internal, templates)


def release(program: str) -> tuple[int, ...]:
    """Return the numbers of a version, for example (0, 1, 0) of "0.1.0", so that two versions can be compared."""
    return tuple(map(int, re.findall(r"\d+", program)))


def _public(file: Traversable) -> PublicFunction:
    text = file.read_text()
    lines = text[: text.index("\ncreate ")].splitlines()
    header = "\n".join(line.removeprefix("--").removeprefix(" ") for line in lines)
    (name, *_) = _FUNCTION.findall(text)
    return PublicFunction(name, header, text)


def _files(*folder: str) -> list[Traversable]:
    return sorted((f for f in _root().joinpath(*folder).iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)


def _root() -> Traversable:
    return resources.files("cdcbridge") / "sql"

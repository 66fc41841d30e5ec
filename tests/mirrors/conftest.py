"""Pairs of databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.mirrors.pair import Pair, pair


@pytest.fixture
def pair18(pg18: EmbeddedServer, tmp_path: Path) -> Iterator[Pair]:
    """Two databases on PostgreSQL 18, with pgoutput."""
    with pair(pg18, pg18, tmp_path, ("pgoutput", "pgoutput")) as made:
        yield made


@pytest.fixture
def pair15(pg15: EmbeddedServer, pg18: EmbeddedServer, tmp_path: Path) -> Iterator[Pair]:
    """A database on PostgreSQL 15 with wal2json, and one on PostgreSQL 18 with pgoutput."""
    with pair(pg15, pg18, tmp_path, ("wal2json", "pgoutput")) as made:
        yield made

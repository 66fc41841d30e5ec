"""Worlds with a store in them already, because the sinks' tests need one at once."""

from __future__ import annotations

import pytest

from tests.harness.world import NewDatabase, store_database


@pytest.fixture
def new_database() -> NewDatabase:
    return store_database

"""Short ones; `make soak`, `make soak-streams` and `make faults` are the long ones."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from cdcbridge.demo.embedded import EmbeddedServer
from tests.campaigns import stream_soak
from tests.campaigns.soak import soak


@pytest.mark.parametrize("server", ["pg15", "pg18"])
def test_receivers_and_bridges_are_killed_and_nothing_is_lost_or_overtaken(
    request: pytest.FixtureRequest, tmp_path: Path, server: str
) -> None:
    """With handlers that misbehave in every way, on a database whose default isolation level is serializable."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    soak(request.getfixturevalue(server), tmp_path, 15, seed)


def test_members_are_killed_and_seek_and_each_group_sees_everything(pg15: EmbeddedServer, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    stream_soak.soak(pg15, tmp_path, 12, seed)


def test_half_a_minute_of_faults_loses_nothing_and_repeats_nothing() -> None:
    command = [sys.executable, "-m", "tests.campaigns.faults", "--seconds", "25"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert result.returncode == 0 and ": ok" in result.stdout, result.stdout + result.stderr[-5000:]

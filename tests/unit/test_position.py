"""Positions, and how far things have come."""

from __future__ import annotations

import pytest

from cdcbridge.changes.position import Progress


def test_progress_only_rises_and_never_stores_what_was_not_received() -> None:
    progress = Progress(10, 10, 10, 10)
    progress.receive(20)
    progress.receive(15)
    progress.stored(20)
    progress.stored(12)
    assert progress.confirm() == 10, "nobody has vouched for it"
    progress.vouch(20)
    assert progress.confirm() == 20
    with pytest.raises(ValueError, match="durable only up to"):
        progress.vouch(21)
    with pytest.raises(ValueError, match="received only up to"):
        progress.stored(21)

"""A batch: what an append begins with shares nothing with the batch before it."""

from __future__ import annotations

from dataclasses import fields

from cdcbridge.changes.position import START
from cdcbridge.routing.batch import AppendBatch


def test_an_empty_batch_commits_nothing_and_shares_nothing() -> None:
    one, other = AppendBatch(), AppendBatch()
    assert (one.position, one.end_lsn, one.gap, one.open) == (START, 0, False, False)
    for field in fields(AppendBatch):
        value = getattr(one, field.name)
        if isinstance(value, list | dict | set):
            assert not value and value is not getattr(other, field.name), field.name

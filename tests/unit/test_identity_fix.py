"""What a fix for a replica identity says beside its SQL: nothing that the table has already."""

from __future__ import annotations

import pytest

from cdcbridge.checks.identity import identity_fix
from cdcbridge.source.tables import Column, Index, Table

COLUMNS = tuple(Column(name, "s" if name == "made" else "", False) for name in ("id", "customer_id", "made"))
KEY = Index("t_pkey", ("id",), primary=True, chosen=False, usable=True, suitable=True)
DEFERRABLE = Index("t_pkey", ("id",), primary=True, chosen=False, usable=False, suitable=False)
GENERATED = Index("t_pkey", ("made",), primary=True, chosen=False, usable=True, suitable=False)


def fix(*indexes: Index, key: tuple[str, ...] = ()) -> str:
    table = Table("public", "t", 1, "r", "p", False, "d", COLUMNS, indexes)
    sql, _, comment = identity_fix(table, key, strict=False).partition(" -- ")
    assert sql == 'alter table "public"."t" replica identity full;'
    return comment


@pytest.mark.parametrize(
    ("indexes", "key", "comment"),
    [
        ((), (), "or give it a primary key"),
        ((), ("customer_id",), "or give it a primary key with customer_id"),
        ((KEY,), ("customer_id",), "or leave the consumer's key out, so that the key is the primary key, id"),
        ((DEFERRABLE,), (), "or make its primary key not deferrable"),
        ((DEFERRABLE,), ("customer_id",), "or leave the consumer's key out, and make the primary key not deferrable"),
        ((GENERATED,), (), "or give it a primary key without generated columns"),
    ],
)
def test_the_other_way(indexes: tuple[Index, ...], key: tuple[str, ...], comment: str) -> None:
    assert fix(*indexes, key=key) == comment

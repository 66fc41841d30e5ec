"""Changes are divided so that the last change of each key has the effect of all."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cdcbridge.mirrors.changes import MirroredChange, MirrorRow
from cdcbridge.mirrors.segments import Segment, segments


def change(op: str, key: str | None, *, old_key: str | None = None, unchanged: tuple[str, ...] = ()) -> MirroredChange:
    return MirroredChange(MirrorRow(1, "public.t", "", key, old_key, 1, 0), op, "{}", None, unchanged)


def test_the_last_change_of_a_key_counts() -> None:
    changes = [change("insert", "1"), change("update", "1"), change("update", "2"), change("delete", "1")]
    (found,) = segments(changes)
    assert found.changes == changes
    assert found.net == {"public.t": {"1": changes[3], "2": changes[2]}}
    assert found.fresh == {"public.t": {"1"}}


def test_a_truncate_and_a_new_key_are_alone() -> None:
    found = list(segments([change("insert", "1"), change("truncate", None), change("update", "2", old_key="1")]))
    assert [one.alone.op if one.alone else None for one in found] == [None, "truncate", "update"]


def test_a_change_with_a_part_of_its_row_waits_for_the_one_before() -> None:
    found = list(segments([change("insert", "1"), change("update", "2", unchanged=("v",)),
                           change("update", "1", unchanged=("v",))]))  # fmt: skip
    assert [list(one.net["public.t"]) for one in found] == [["1", "2"], ["1"]]
    assert found[1].fresh["public.t"] == set()


def test_rows_without_a_key_are_all_kept() -> None:
    (found,) = segments([change("insert", None), change("insert", None)])
    assert len(found.keyless["public.t"]) == 2


CHANGES = st.lists(
    st.builds(
        change,
        st.sampled_from(["insert", "update", "delete", "truncate"]),
        st.sampled_from(["1", "2"]),
        old_key=st.sampled_from([None, "1", "2"]),
        unchanged=st.sampled_from([(), ("v",)]),
    )
)


@given(CHANGES, st.booleans())
def test_no_change_is_lost_and_none_changes_its_place(given_changes: list[MirroredChange], in_order: bool) -> None:
    found = list(segments(given_changes, in_order=in_order))
    assert [one for segment in found for one in segment.changes] == given_changes
    for segment in found:
        assert _last_by_key(segment) == (
            {} if segment.alone else {key: one for net in segment.net.values() for key, one in net.items()}
        )


def _last_by_key(segment: Segment) -> dict[Any, MirroredChange]:
    return {} if segment.alone else {one.row.key: one for one in segment.changes}

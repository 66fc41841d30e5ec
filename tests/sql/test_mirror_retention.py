"""Retention keeps the messages that a mirror has not applied yet."""

from __future__ import annotations

from tests.sql.queue import StoreQueue
from tests.sql.test_read_stream import publish

DROP = "select dropped, held_by from cdcbridge_internal.drop_segments('0', %s)"


def test_the_log_keeps_what_a_mirror_has_not_applied(queue: StoreQueue) -> None:
    queue.declare("to_b", mode="stream", topics=("news",), start="earliest")
    queue.session.execute("""update cdcbridge.consumers set config = config || '{"mirror": {}}'""")
    last = publish(queue, "a", "a", "b")[-1]
    queue.next_segment()
    assert queue.all(DROP, None) == [{"dropped": 0, "held_by": "to_b"}]
    queue.session.execute("set search_path = cdcbridge, cdcbridge_internal")  # as a mirror has it
    queue.session.execute(
        "select cdcbridge_internal.move_mirror(id, mirror_end(id, %s), null, 1, 3, 0, now()) from cdcbridge.consumers",
        (last,),
    )
    assert queue.all(DROP, None) == [{"dropped": 1, "held_by": None}]


def test_a_mirror_that_stands_for_too_long_does_not_fill_the_disk(queue: StoreQueue) -> None:
    queue.declare("to_b", mode="stream", topics=("news",), start="earliest")
    queue.session.execute("""update cdcbridge.consumers set config = config || '{"mirror": {}}'""")
    publish(queue, "a")
    queue.next_segment()
    assert queue.all(DROP, "0") == [{"dropped": 1, "held_by": None}]

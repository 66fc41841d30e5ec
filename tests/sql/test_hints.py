"""Who renews the hint that tells a claim where to begin: one receiver of many, or any where that one does not commit."""

from __future__ import annotations

from tests.sql.queue import StoreQueue
from tests.sql.test_queue import receipts


def test_one_receiver_renews_a_hint_and_any_does_when_it_is_four_times_as_old(queue: StoreQueue) -> None:
    queue.declare(max_in_flight=10_000)
    for _ in range(8):
        queue.append(100)
    newest = "select max(id) from cdcbridge_internal.hints"
    drawn = "select last_value from cdcbridge_internal.claim_ids_seq"
    (hint,) = queue.all("select id, claim_floor from cdcbridge_internal.hints")
    renewing = queue.open(autocommit=False)
    while queue.value(drawn) < hint["claim_floor"] + 128:
        queue.receive(1, session=renewing)
    assert queue.value(newest, session=renewing) > hint["id"], "it has renewed the hint, which is not committed"

    while queue.value(drawn) < hint["claim_floor"] + 511:
        queue.ack(*receipts(queue.receive(1)))
        assert queue.value(newest) == hint["id"], "others leave it to the one that renews it"
    queue.ack(*receipts(queue.receive(1)))
    assert queue.value(newest) > hint["id"], "the one that renews it may stay in its transaction for hours"

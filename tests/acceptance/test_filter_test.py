"""`cdcbridge filter test`: what a filter does with the latest messages, and why, before it is applied."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.world import World


@pytest.fixture
def shop(world15: World) -> World:
    """A log with orders and an invoice, and a consumer of the file that was never applied."""
    world = world15
    world.execute("create table orders (id int primary key, status text, amount numeric, note text)",
                  "alter table orders alter note set storage external")  # fmt: skip
    world.consumer("everything", ("public.*",), topics=["invoices"])
    with world.bridge():
        world.execute(
            f"insert into orders values (1, 'paid', 9007199254740993.10, '{'x' * 3000}')",
            "insert into orders values (2, 'open', 2, null), (3, null, 3, null)",
            "update orders set status = 'cancelled' where id = 1",
            "delete from orders where id = 2",
            "truncate orders",
        )
        world.messages(6)  # publish() writes into the log at once: it must not overtake the bridge
        world.rows("select publish('invoices', '7', '{}')")
    return world


def results(world: World, source: str, *options: str, **settings: Any) -> list[tuple[int, str]]:
    world.consumer("billing", ("public.orders",), filter=source, **settings)
    return [(t["seq"], t["result"]) for t in world.json("filter", "test", "billing", "--json", *options)]


def test_results(shop: World) -> None:
    first = shop.value("select min(seq) from messages")
    said = ["delivered", "left out", "left out", "left out", "delivered, undecidable", "delivered, undecidable"]
    assert results(shop, "record.status == 'paid'") == list(enumerate(said, first))
    assert results(shop, "record.status == 'paid'", "--last", "2") == list(enumerate(said, first))[-2:]
    said[3] = "delivered as a delete"
    assert results(shop, "record.status == 'paid'", on_leave="delete") == list(enumerate(said, first))
    fails = ["delivered", "left out", "dead letter", "delivered", *said[4:]]
    assert results(shop, "record.status > 'o' && record.id < 2 || record.status < 'd'") == list(enumerate(fails, first))
    assert [r for _, r in results(shop, "record.note == 'x'", operations=["insert", "update"])] == [
        "left out", "left out", "left out", "delivered, undecidable"]  # fmt: skip
    for status, large in (("paid", "dead letter"), ("open", "left out")):
        assert results(shop, f"record.status == '{status}'", max_message_bytes="1kB")[0] == (first, large)
    published = results(shop, "false", topics=["invoices"])[-1]
    assert published == (first + 6, "delivered")
    assert shop.rows("select name from consumers") == [("everything",)], "it was not applied"


def test_what_people_read(shop: World) -> None:
    shop.consumer("billing", ("public.orders",), filter="record.amount > 5 && op != 'delete'")
    shown = shop.run_program("filter", "test", "billing")
    assert shown.returncode == 0
    assert 'the filter gives true (op is "insert", record.amount is 9007199254740993.10)' in shown.stdout
    assert 'the filter gives false (op is "insert", record.amount is 2)' in shown.stdout
    assert "the WAL did not carry record.amount" in shown.stdout
    assert "filter: record.amount > 5" in shown.stderr and "6 messages: " in shown.stderr
    (value,) = (t["values"]["record.amount"] for t in shop.json("filter", "test", "billing", "--json")[:1])
    assert value == 9007199254740993.10


def test_what_is_refused(shop: World) -> None:
    shop.consumer("reader", ("public.*",), mode="stream")
    for name, said in (
        ("everythin", "Did you mean everything?"),
        ("reader", "is a stream"),
        ("zzz", "Known: everything"),
    ):
        refused = shop.run_program("filter", "test", name)
        assert refused.returncode == 2
        assert said in refused.stderr
    shop.consumer("other", ("sales.*",))
    empty = shop.run_program("filter", "test", "other")
    assert empty.returncode == 0 and "the log has no message" in empty.stderr

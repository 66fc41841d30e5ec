"""Which consumers the bridge feeds, as the store keeps it and people read it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cdcbridge.store.feeds import Fault, Feeds, describe, feed_of, load

REFUSED = Fault("bad", "public.t", "consumer bad: public.t has no key", "Add one.", fed=False)
KEPT = Fault("bad", "bad", "consumer bad: it was a queue", "Remove it.", fed=True, asked="mode: fifo")
FAULTY = Fault("bad", "public.u", "consumer bad: public.u is not there", "Make it.", fed=True)


def feeds(*faults: Fault) -> Feeds:
    return describe(
        7, "db1 pid 4711", "/etc/c.yaml", ["good", "bad", "elsewhere"], ["good", "bad"], faults, {"3": "0/5"}
    )


@pytest.mark.parametrize(
    ("fault", "mark", "silence", "alarm"),
    [
        (REFUSED, "gets nothing", True, "the consumer bad gets nothing: public.t has no key. Fix: Add one."),
        (KEPT, "as before", False, "the consumer bad continues with its earlier settings: the file asks for mode: fifo, which cannot be done: it was a queue. Fix: Remove it."),
        (FAULTY, "faulty", False, "the consumer bad is faulty: public.u is not there. Fix: Make it."),
    ],
)  # fmt: skip
def test_a_consumer_that_cannot_work_as_the_file_has_it(fault: Fault, mark: str, silence: bool, alarm: str) -> None:
    found = feeds(fault)
    assert (found.mark("bad"), bool(found.silence("bad")), found.faulty("bad")) == (mark, silence, alarm)
    assert [(a.code, a.consumer, a.message) for a in found.alarms()] == [("consumer_refused", "bad", alarm)]
    assert feed_of(found, "bad") == {"fed": not silence, "problem": alarm}
    assert found.warnings(["good", "bad"]) == [], "the alarm says it"


def test_several_faults_are_counted_behind_the_first() -> None:
    found = feeds(REFUSED, FAULTY, FAULTY)
    assert found.faulty("bad").endswith("Fix: Add one. (`cdcbridge check` shows 2 more)")
    assert len(found.alarms()) == 1
    question = replace(REFUSED, message="public.s is not there; did you mean public.t?")
    assert "public.t? Fix:" in feeds(question).faulty("bad")


def test_consumers_that_no_file_has_and_that_came_later() -> None:
    found = feeds()
    assert found.mark("good") == found.silence("good") == "" and feed_of(found, "good") == {
        "fed": True,
        "problem": None,
    }
    assert "does not have it in its file /etc/c.yaml" in found.silence("elsewhere")
    assert "was applied after the bridge (db1 pid 4711) began" in found.silence("new")
    assert found.warnings(["good", "elsewhere", "new"]) == [found.silence("elsewhere"), found.silence("new")]
    assert feed_of(None, "good") == {"fed": None, "problem": None}


@pytest.mark.parametrize("faults", [(), (REFUSED,), (KEPT, FAULTY)])
def test_the_store_gives_back_what_it_got(faults: tuple[Fault, ...]) -> None:
    assert load(json.loads(json.dumps(feeds(*faults).dump()))) == feeds(*faults)
    older = feeds(*faults).dump()
    del older["unfed"]  # as a version wrote it that did not know of it
    assert load(older) == replace(feeds(*faults), unfed=None)
    assert load(None) is None


@pytest.mark.parametrize(
    ("fault", "state", "meanwhile"),
    [
        (REFUSED, "refused", "it gets nothing"),
        (KEPT, "as_before", "it continues with its earlier settings"),
        (FAULTY, "fed", "it continues, except for this"),
    ],
)
def test_what_happens_meanwhile(fault: Fault, state: str, meanwhile: str) -> None:
    assert (fault.state, fault.meanwhile) == (state, meanwhile)

"""`cdcbridge mirror …`: what the commands print, and what they change."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.harness.world import eventually
from tests.mirrors.pair import Pair

TABLE = "create table t (id int primary key, v text, n numeric)"


def state(pair: Pair, name: str = "to_b") -> dict[str, object]:
    """The mirror as `mirror list --json` shows it."""
    return next(one for one in pair.a.json("mirror", "list", "--json") if one["name"] == name)


def test_list_and_show(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both(TABLE)
    a.execute("insert into t select n, 'x' from generate_series(1, 5) n")
    pair18.mirror(tables={"public.t": {"columns": {"exclude": ["n"]}}})
    assert state(pair18)["state"] == "new"
    with pair18.running():
        pair18.settle()
        a.execute("insert into t values (6, 'y')")
        pair18.settle()
        shown = eventually(
            lambda: (one := state(pair18))["state"] == "running" and one["changes"] == 6 and one, "running"
        )
        assert shown["behind"] == 0 and shown["lag_seconds"] is None and shown["conflicts"] == shown["held"] == 0
        assert str(shown["target"]).endswith(f"/{b.database}") and shown["transactions"] >= 1
        document = a.json("mirror", "show", "to_b", "--json")
        assert document["place"]["seq"] > 0 and document["settings"]["start"] == "snapshot"
        assert b.dsn not in json.dumps(document)
        text = a.run_program("mirror", "show", "to_b").stdout
        assert "public.t, some columns" in text and "6 changes in" in text
        listed = a.run_program("mirror", "list").stdout
        assert "running" in listed and "to_b" in listed
        assert "to_b" in a.run_program("lag").stdout
    after = eventually(lambda: (one := state(pair18))["state"] == "not running" and one, "no process")
    assert "cdcbridge mirror run" in str(after["reason"])


def test_pause_and_resume(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both(TABLE)
    pair18.mirror(start="now")
    assert "has no mirror yet" in a.run_program("mirror", "pause", "to_b").stderr.replace(" 'to_b'", "")
    with pair18.running():
        pair18.settle()
        assert a.json("mirror", "pause", "to_b") == {"paused": "to_b"}
        eventually(lambda: state(pair18)["state"] == "paused", "paused")
        a.execute("insert into t values (1, 'waits')")
        eventually(lambda: state(pair18)["behind"] == 1, "the message waits")
        assert pair18.table(b, "t") == []
        assert a.json("mirror", "resume", "to_b") == {"resumed": "to_b"}
        pair18.settle("t")


def test_a_stop_is_shown_with_its_hint_and_ended_by_resume(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both(TABLE)
    pair18.mirror(start="now")
    with pair18.running():
        pair18.settle()
        a.execute("alter table t add column extra int", "insert into t values (1, 'x', 1, 7)")
        stopped = eventually(lambda: (one := state(pair18))["state"] == "stopped" and one, "stopped")
        assert "lacks the column extra" in str(stopped["reason"]) and "alter table" in str(stopped["hint"])
        shown = a.run_program("mirror", "show", "to_b").stdout
        assert "lacks the column extra" in shown and "alter table" in shown
        assert "has stopped" in a.run_program("status").stdout
        b.execute("alter table t add column extra int")
        a.json("mirror", "resume", "to_b")
        pair18.settle("t")
        eventually(lambda: state(pair18)["state"] == "running", "running")


def test_a_target_that_is_away_is_the_reason(pair18: Pair) -> None:
    a, b = pair18.sides
    a.execute(TABLE)
    pair18.mirror(target={"dsn": b.dsn.replace(b.database, "nowhere")})
    with pair18.running():
        shown = eventually(lambda: (one := state(pair18))["state"] == "waiting" and one, "waiting")
        assert "nowhere" in str(shown["reason"])
        assert "waits for: " in a.run_program("mirror", "list").stderr
        assert "unknown: " in a.run_program("mirror", "show", "to_b").stdout


def test_config_show_can_be_loaded_again(pair18: Pair) -> None:
    a = pair18.a
    a.consumer("c", ("public.t",))
    pair18.mirror(tables={"public.t": "other.t"})
    shown = yaml.safe_load(a.run_program("config", "show").stdout)
    assert [one["name"] for one in shown["consumers"]] == ["c"]
    assert [one["name"] for one in shown["mirrors"]] == ["to_b"]
    path = a.folder / "again.yaml"
    shown["source"]["dsn"], shown["mirrors"][0]["target"]["dsn"] = a.dsn, pair18.b.dsn
    path.write_text(yaml.safe_dump(shown))
    again = a.run_program("-c", str(path), "config", "show")
    assert again.returncode == 0, again.stderr
    assert yaml.safe_load(again.stdout) == yaml.safe_load(a.run_program("config", "show").stdout)
    assert "1 consumer, 1 mirror" in a.run_program("config", "check").stdout


def test_commands_of_consumers_know_a_mirror(pair18: Pair) -> None:
    a = pair18.a
    pair18.both(TABLE)
    pair18.mirror(start="now")
    with pair18.running():
        a.execute("insert into t values (1, 'x')")
        pair18.settle("t")
        assert [one["name"] for one in a.json("consumers", "list", "--json")] == ["to_b"]
        assert a.run_program("read", "to_b").returncode == a.run_program("offsets", "show", "to_b").returncode == 0
        for command in (["receive", "to_b"], ["dead", "list", "to_b"]):
            refused = a.run_program(*command)
            assert refused.returncode == 2 and "is a mirror" in refused.stderr, (command, refused)
            assert "mirror show to_b" in refused.stderr
        with pytest.raises(Exception, match="is a mirror"):
            a.rows("select * from read_stream('to_b', 10)")
        with pytest.raises(Exception, match="is a mirror"):
            a.rows("select commit_offset('to_b', 0, 1)")
    a.mirrors = []
    a.consumer("other", ("public.t",))
    assert a.run_program("consumers", "remove", "to_b", "--yes").returncode == 0
    assert "to_b" not in a.run_program("consumers", "list").stdout
    assert a.value("select count(*) from mirrors") == 0


def conflicting(pair: Pair, rule: str = "hold") -> None:
    """Make a conflict about the row 1 on both sides, and wait until both have found it."""
    a, b = pair.sides
    pair.both(TABLE)
    pair.two_way(conflict=rule)
    with pair.running():
        a.execute("insert into t values (1, 'both', 0)")
        pair.settle("t")
        pair.pause()
        a.execute("update t set v = 'from a' where id = 1")
        b.execute("update t set v = 'from b' where id = 1")
        pair.resume()
        eventually(lambda: len(pair.conflicts(a)) == len(pair.conflicts(b)) == 1, "a conflict on both sides")
        pair.settle()


def test_a_conflict_on_hold_is_flipped(pair18: Pair) -> None:
    a, b = pair18.sides
    conflicting(pair18)
    with pair18.running():
        pair18.settle()
        (held,) = a.json("mirror", "conflicts", "list", "--held", "--json")
        assert held["state"] == "held" and held["winner"] is None and held["differing"] == ["v"]
        assert held["source_row"]["v"] == "from a" and held["target_row"]["v"] == "from b"
        assert eventually(lambda: state(pair18)["held"] == 1, "the hold is counted")
        assert "1 conflict on hold" in a.run_program("status").stdout
        number = str(held["id"])
        shown = a.run_program("mirror", "conflicts", "show", number).stdout
        assert "from a" in shown and "from b" in shown and "nobody yet" in shown
        assert a.json("mirror", "conflicts", "list", "--table", "public.other", "--json") == []
        done = a.json("mirror", "conflicts", "flip", number, "--json")
        assert done["did"] == "updated" and done["row"]["v"] == "from a" and done["before"]["v"] == "from b"
        eventually(lambda: pair18.table(a, "t") == pair18.table(b, "t"), "both sides are equal")
        assert pair18.table(a, "t")[0][1] == "from a"
        pair18.settle("t")
        assert [one[3] for one in pair18.conflicts(b)] == ["flipped"]
        assert [one[3] for one in pair18.conflicts(a)] == ["superseded"]
        assert state(pair18)["held"] == 0
        again = a.run_program("mirror", "conflicts", "flip", number)
        assert again.returncode == 2 and "was flipped before" in again.stderr


def test_flip_refuses_a_row_that_has_changed(pair18: Pair) -> None:
    a, b = pair18.sides
    conflicting(pair18, "newest")
    with pair18.running():
        pair18.settle("t")
        (decided,) = a.json("mirror", "conflicts", "list", "--json")
        assert decided["state"] == "decided" and decided["winner"] == "target"
        b.execute("update t set v = 'later' where id = 1")
        pair18.settle("t")
        number = str(decided["id"])
        refused = a.run_program("mirror", "conflicts", "flip", number)
        assert refused.returncode == 1 and "has changed since" in refused.stderr, refused
        assert "from b" in refused.stderr and "later" in refused.stderr and "--force" in refused.stderr
        a.json("mirror", "conflicts", "flip", number, "--force", "--json")
        pair18.settle("t")
        assert pair18.table(a, "t")[0][1] == "from a"


def test_flip_deletes_the_row_if_the_delete_lost(pair15: Pair) -> None:
    a, b = pair15.sides
    pair15.both(TABLE, "alter table t replica identity full")
    pair15.two_way(conflict="newest")
    with pair15.running():
        a.execute("insert into t values (1, 'both', 0), (2, 'stays', 0)")
        pair15.settle("t")
        pair15.pause()
        a.execute("delete from t where id = 1")
        b.execute("update t set v = 'from b' where id = 1")
        pair15.resume()
        pair15.settle("t")
        (lost,) = a.json("mirror", "conflicts", "list", "--json")
        assert lost["winner"] == "target" and lost["source_row"] is None
        assert a.json("mirror", "conflicts", "flip", str(lost["id"]), "--json")["did"] == "deleted"
        pair15.settle("t")
        assert [row[0] for row in pair15.table(a, "t")] == [2]


def test_several_mirrors_need_a_name(pair18: Pair) -> None:
    a = pair18.a
    pair18.mirror()
    a.mirrors.append({**a.mirrors[0], "name": "second"})
    refused = a.run_program("mirror", "conflicts", "show", "1")
    assert refused.returncode == 2 and "--mirror NAME" in refused.stderr
    refused = a.run_program("mirror", "conflicts", "show", "1", "--mirror", "second")
    assert refused.returncode == 2 and "no conflict 1" in refused.stderr
    assert "has no mirror 'third'" in a.run_program("mirror", "show", "third").stderr

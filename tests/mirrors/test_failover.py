"""A target that has less than it once had: it gets the rest again, or the mirror says what is missing."""

from __future__ import annotations

from tests.harness.world import eventually
from tests.mirrors.pair import Pair


def test_a_target_that_lost_its_tail_gets_it_again(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key, v text)")
    pair18.mirror(start="now")
    with a.bridge():
        process = a.start_mirrors()
        a.execute("insert into t values (1, 'a')")
        pair18.settle("t")
        saved = b.rows("select mirror, source, seq, commit_lsn from mirror_places")
        a.execute("insert into t values (2, 'b')", "update t set v = 'c' where id = 1")
        pair18.settle("t")
        process.terminate()
        process.wait(30)
        b.execute("truncate t", "insert into t values (1, 'a')", "delete from cdcbridge.mirror_places")
        b.rows(
            "insert into mirror_places (mirror, source, seq, commit_lsn) values (%s, %s, %s, %s) returning 1", *saved[0]
        )
        process = a.start_mirrors()
        eventually(lambda: pair18.table(b, "t") == [(1, "c"), (2, "b")], "the rest arrives again")
        assert "gets those after seq" in a.value("select note from mirrors")
        process.terminate()
        process.wait(30)


def test_a_hole_stops_the_mirror_until_a_person_accepts_it(pair18: Pair) -> None:
    """The target lost more than the log keeps."""
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with a.bridge():
        process = a.start_mirrors()
        a.execute("insert into t values (1)")
        pair18.settle("t")
        process.terminate()
        process.wait(30)
        b.rows("update mirror_places set seq = -5 returning 1")  # as if the log had begun later
        process = a.start_mirrors()
        stopped = eventually(lambda: a.rows("select stopped, hint from mirrors where stopped is not null"), "it stops")
        assert "the log only those from seq 1 on" in stopped[0][0]
        assert "mirror verify to_b --repair source" in stopped[0][1]
        assert a.run_program("mirror", "resume", "to_b").returncode == 0
        a.execute("insert into t values (2)")
        eventually(lambda: pair18.table(b, "t") == [(1,), (2,)], "it continues")
        process.terminate()
        process.wait(30)


def test_a_restart_while_the_rest_arrives_again_loses_nothing(pair18: Pair) -> None:
    a, b = pair18.sides
    pair18.both("create table t (id int primary key)")
    pair18.mirror(start="now")
    with a.bridge():
        process = a.start_mirrors()
        a.execute("insert into t values (1)")
        pair18.settle("t")
        saved = b.rows("select mirror, source, seq, commit_lsn from mirror_places")
        for n in range(2, 40):
            a.execute(f"insert into t values ({n})")
        pair18.settle("t")
        process.terminate()
        process.wait(30)
        b.execute("delete from t where id > 1", "delete from cdcbridge.mirror_places")
        b.rows(
            "insert into mirror_places (mirror, source, seq, commit_lsn) values (%s, %s, %s, %s) returning 1", *saved[0]
        )
        crash = a.start_mirrors(crash=("mirror prepared", 1))
        crash.wait(30)
        behind = a.value("select min(o.seq) from consumers c, newest_offsets(c.id) o where c.name = 'to_b'")
        assert behind == saved[0][2], "the offset went back, so that retention keeps the rest"
        process = a.start_mirrors()
        eventually(lambda: len(pair18.table(b, "t")) == 39, "the rest arrives again")
        process.terminate()
        process.wait(30)

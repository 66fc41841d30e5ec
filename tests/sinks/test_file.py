"""The file sink: order, once each, crashes at each step, full disks, rotation."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cdcbridge.sinks.target import Lane, TargetAway, Unusable
from cdcbridge.sinks.targets import line_file
from cdcbridge.sinks.targets.file import FileTarget
from tests.sinks.messages import LANE, message, messages, opened, target


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def seqs(path: Path) -> list[int]:
    """Return the seqs in a file and in its rotated files, in their order."""
    return [line["seq"] for one in (*reversed(line_file.rotated(path)), path) if one.exists() for line in lines(one)]


async def deliver(path: Path, numbers: range | list[int], lane: Lane | None = LANE, **sink: Any) -> int | None:
    """Deliver one batch with an adapter of its own, and return the position that it found."""
    async with opened(lane, type="file", path=str(path), **sink) as file:
        position = await file.position()
        assert await file.deliver(messages(numbers, to=str(path))) == {}
    return position


async def only_open(lane: Lane | None = LANE, **sink: Any) -> None:
    async with opened(lane, **sink):
        pass


def no_threads() -> None:
    """Wait until the threads of all targets have ended."""
    for thread in threading.enumerate():
        if thread.name.startswith("cdcbridge file sink"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder with 128 kB of space."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_the_last_line_is_the_position(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    assert asyncio.run(deliver(path, range(1, 4))) is None
    assert asyncio.run(deliver(path, range(4, 6))) == 3
    assert seqs(path) == [1, 2, 3, 4, 5]
    assert lines(path)[0]["data"] == {"record": {"id": 1, "note": "ä" * 20}}


@pytest.mark.parametrize("changes", [{"format": "debezium"}, {"transform": "{'id': record.id}"}])
def test_a_body_without_id_and_seq_is_wrapped(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "shop.jsonl"

    async def main() -> None:
        async with opened(type="file", path=str(path), **changes) as file:
            batch = [message(7, body=b'{"op":\n "c"}'), message(8, body=None)]
            assert await file.deliver([one._replace(destination=str(path)) for one in batch]) == {}
            assert await file.position() == 7  # a tombstone has no line

    asyncio.run(main())
    assert lines(path) == [{"id": "7412/1/0/7/0", "seq": 7, "data": {"op": "c"}}]


def test_a_body_with_line_breaks_is_one_line(tmp_path: Path) -> None:
    """A column of type json keeps the line breaks that it was written with."""
    path = tmp_path / "shop.jsonl"
    batch = messages(range(1, 4), to=str(path))
    batch[1] = batch[1]._replace(body=(batch[1].body or b"").replace(b", ", b",\n"))

    async def main() -> None:
        async with opened(type="file", path=str(path)) as file:
            assert await file.deliver(batch) == {}

    asyncio.run(main())
    assert lines(path) == [json.loads(one.body or b"") for one in batch]


def test_long_lines_are_found(tmp_path: Path) -> None:
    """They are longer than a block that is read from the end."""
    path = tmp_path / "shop.jsonl"

    async def main() -> None:
        async with opened(type="file", path=str(path)) as file:
            for seq in (1, 2, 3):
                body = json.dumps({"id": message(seq).id, "seq": seq, "data": "x" * 300_000}).encode()
                await file.deliver([message(seq, to=str(path), body=body)])
        with path.open("ab") as tail:
            tail.write(b'{"id": "' + b"y" * 500_000)
        async with opened(type="file", path=str(path)) as file:
            assert await file.position() == 3

    asyncio.run(main())
    assert seqs(path) == [1, 2, 3]
    opened_file = line_file.LineFile(path)
    assert list(opened_file.ids_since(2)) == [3, 2]
    opened_file.close()


# Crashes


STEPS = ("pwrite", "fdatasync", "fsync", "ftruncate", "rename", "open", "flock")


def die_at(step: int) -> None:
    """Kill this process before its system call number `step`, or after half of it if it writes."""
    count = 0

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                if name == "pwrite":
                    fd, data, offset = arguments
                    call(fd, data[: len(data) // 2 if len(data) > 20 else 0], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    for name in STEPS:
        owner: Any = fcntl if name == "flock" else os
        setattr(owner, name, counted(getattr(owner, name), name))


def killed(step: int, act: Callable[[], Any]) -> bool:
    """Act in a process that is killed at its step, and return whether it came as far as that."""
    if (child := os.fork()) == 0:
        try:
            die_at(step)
            act()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


async def continue_to(end: int, size: int, names: list[str], sink: dict[str, Any]) -> None:
    """Do as the engine does: continue after the position, in batches of `size`. Message n is for file n % 3."""
    async with opened(**sink) as file:
        start = (await file.position() or 0) + 1
        for first in range(start, end + 1, size):
            numbers = range(first, min(first + size, end + 1))
            assert await file.deliver([message(n, to=names[n % len(names)]) for n in numbers]) == {}


@pytest.mark.parametrize("template", ["shop.jsonl", "{topic}.jsonl"])
def test_killed_at_each_step_each_line_is_there_once(tmp_path: Path, template: str) -> None:
    step = 0
    died = True
    while died:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        sink: dict[str, Any] = {"type": "file", "path": str(folder / template), "rotate": {"size": 300}}
        names = [str(folder / template.replace("{topic}", one)) for one in "abc"]
        died = killed(step, lambda: asyncio.run(continue_to(12, 5, names, sink)))  # noqa: B023
        killed(9, lambda: asyncio.run(continue_to(14, 7, names, sink)))  # noqa: B023
        asyncio.run(continue_to(18, 4, names, sink))
        for number, name in enumerate(names if "{" in template else names[:1]):
            expected = [n for n in range(1, 19) if "{" not in template or n % 3 == number]
            assert seqs(Path(name)) == expected, f"killed at step {step}"
            assert line_file.rotated(Path(name))
    assert step > 25


@pytest.mark.parametrize("torn", [b"{", b'{"id": "7412/1/', b"\0\0\0", b'{"id": 1, "seq": 4, "data": {}}'])
def test_half_a_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "shop.jsonl"
    asyncio.run(deliver(path, range(1, 4)))
    with path.open("ab") as tail:
        tail.write(torn)
    asyncio.run(only_open(type="file", path=str(path)))
    assert seqs(path) == [1, 2, 3]
    assert asyncio.run(deliver(path, range(4, 6))) == 3
    assert seqs(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", [b"name,price\n", b"draft", b'{"a": 1}', b'{"a": 1}\n', b'{"seq": "1", "id": 1}\n', b"[" * 5000 + b"\n", b"\n", b"text\n{"])  # fmt: skip
def test_a_file_of_someone_else_is_refused_and_left_alone(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "shop.jsonl"
    path.write_bytes(text)
    with pytest.raises(Unusable, match=r"last line of .*shop.jsonl is not a message of cdcbridge"):
        asyncio.run(deliver(path, [1]))
    if text.endswith(b"\n"):
        (problem,) = asyncio.run(target(type="file", path=str(path)).check())
        assert problem.code == "sink_unusable" and "not a message" in problem.message
    assert path.read_bytes() == text


def test_lines_of_another_log_are_not_taken_for_delivered(tmp_path: Path) -> None:
    """The store was made anew, so the seqs began again. The message would be lost if its seq alone counted."""
    path = tmp_path / "orders.jsonl"
    sink: dict[str, Any] = {"type": "file", "path": str(tmp_path / "{topic}.jsonl")}

    async def main() -> None:
        async with opened(**sink) as file:
            await file.deliver(messages([1, 2, 3], to=str(path)))
        async with opened(**sink) as file:
            assert await file.deliver(messages([2, 3], to=str(path))) == {}  # the same ones
            with pytest.raises(Unusable, match="lines of another log"):
                await file.deliver([message(2, to=str(path), id="9999/1/0/2/0")])
            with pytest.raises(Unusable, match="lines of another log"):
                await file.deliver([message(0, to=str(path))])

    asyncio.run(main())
    assert seqs(path) == [1, 2, 3]


# A second holder


@pytest.mark.parametrize("template", ["shop.jsonl", "{topic}.jsonl", "shop-{partition}.jsonl"])
def test_two_processes_never_write_one_lane(tmp_path: Path, template: str) -> None:
    sink: dict[str, Any] = {"type": "file", "path": str(tmp_path / template)}
    ready, wait = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:

        async def hold() -> None:
            async with opened(**sink):
                os.write(ready[1], b"x")
                os.read(wait[0], 1)

        asyncio.run(hold())
        os._exit(0)

    async def refused() -> None:
        with pytest.raises(TargetAway, match="another process writes to"):
            await only_open(**sink)
        assert await target(**sink).check() == []  # a running sink is no problem

    try:
        os.read(ready[0], 1)
        asyncio.run(refused())
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    asyncio.run(only_open(**sink))


def test_a_holder_whose_file_was_renamed_between_opening_and_locking_is_not_fooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.jsonl"
    asyncio.run(deliver(path, [1]))
    real = fcntl.flock

    def rename_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.rename(f"{path}.20260101T000000.000000Z")
        real(fd, operation)

    async def main() -> None:
        async with opened(type="file", path=str(tmp_path / "{topic}.jsonl")) as file:
            monkeypatch.setattr(fcntl, "flock", rename_first)
            await file.deliver(messages([2], to=str(path)))

    asyncio.run(main())
    assert [one["seq"] for one in lines(path)] == [2]
    assert seqs(path) == [1, 2]


def test_each_partition_is_a_lane_if_it_has_its_own_file(tmp_path: Path) -> None:
    path = str(tmp_path / "shop-{partition}.jsonl")
    assert FileTarget.lanes(target(type="file", path=path).sink, 8) == 8
    assert FileTarget.lanes(target(type="file", path=path.replace("partition", "topic")).sink, 8) == 1

    async def main() -> None:
        async with (
            opened(Lane("shop", "7412", 0, 2), type="file", path=path) as zero,
            opened(Lane("shop", "7412", 1, 2), type="file", path=path) as one,
        ):
            await zero.deliver(messages([1, 3], to=path.replace("{partition}", "0")))
            await one.deliver(messages([2], to=path.replace("{partition}", "1")))
            assert (await zero.position(), await one.position()) == (3, 2)

    asyncio.run(main())


# The disk


@pytest.mark.parametrize("template", ["shop.jsonl", "{topic}.jsonl"])
def test_a_full_disk_leaves_whole_lines_and_is_tried_again(small_disk: Path, template: str) -> None:
    path = small_disk / template.replace("{topic}", "shop")

    async def main() -> None:
        async with opened(type="file", path=str(small_disk / template)) as file:
            await file.deliver(messages(range(1, 11), to=str(path)))
            (small_disk / "filler").write_bytes(bytes(100 << 10))
            for _ in range(2):
                with pytest.raises(TargetAway, match="No space left"):
                    await file.deliver(messages(range(11, 501), to=str(path)))
                assert seqs(path) == list(range(1, 11))
                assert await file.position() == 10
            (small_disk / "filler").unlink()
            await file.deliver(messages(range(11, 501), to=str(path)))

    asyncio.run(main())
    assert seqs(path) == list(range(1, 501))


@pytest.mark.parametrize("lane", [LANE, None])
@pytest.mark.parametrize("name", ["shop.jsonl", "{topic}.jsonl"])
def test_a_disk_that_is_read_only(small_disk: Path, name: str, lane: Lane | None) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    sink: dict[str, Any] = {"type": "file", "path": str(small_disk / name)}
    with pytest.raises(Unusable, match=r"disk.*(Read-only|no right)") as refused:
        asyncio.run(only_open(lane, **sink))
    assert refused.value.hint
    (problem,) = asyncio.run(target(lane, **sink).check())
    assert problem.code == "sink_unusable" and problem.fix


@pytest.mark.parametrize("lane", [LANE, None])
@pytest.mark.parametrize("name", ["shop.jsonl", "{topic}.jsonl"])
def test_a_missing_folder_is_named_with_the_command_that_makes_it(tmp_path: Path, name: str, lane: Lane | None) -> None:
    sink: dict[str, Any] = {"type": "file", "path": str(tmp_path / "none" / name)}
    (problem,) = asyncio.run(target(lane, **sink).check())
    assert problem.fix == f"mkdir -p {tmp_path / 'none'}"
    with pytest.raises(Unusable) as refused:
        asyncio.run(only_open(lane, **sink))
    assert refused.value.hint == problem.fix
    subprocess.run(problem.fix.split(), check=True)
    assert asyncio.run(target(lane, **sink).check()) == []
    assert not list((tmp_path / "none").iterdir()), "check() made a file"


def test_a_missing_folder_of_a_placeholder(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(type="file", path=str(tmp_path / "{schema}" / "x.jsonl")) as file:
            with pytest.raises(Unusable) as refused:
                await file.deliver([message(1, to=str(tmp_path / "public" / "x.jsonl"))])
            assert refused.value.hint == f"mkdir -p {tmp_path / 'public'}"

    asyncio.run(main())


@pytest.mark.parametrize("special", ["folder", "pipe"])
def test_a_path_that_is_not_a_file(tmp_path: Path, special: str) -> None:
    path = tmp_path / "x"
    os.mkfifo(path) if special == "pipe" else path.mkdir()
    for act in (only_open(type="file", path=str(path)), deliver(path, [1])):
        with pytest.raises(Unusable, match=r"/x(: Is a directory| is not a regular file)"):
            asyncio.run(act)
    (problem,) = asyncio.run(target(type="file", path=str(path)).check())
    assert problem.code == "sink_unusable"


def test_lines_that_did_not_reach_the_disk_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync, the file shows lines that a crash of the machine would lose."""
    path = tmp_path / "shop.jsonl"
    real = os.fdatasync

    def fail(fd: int) -> None:
        monkeypatch.setattr(os, "fdatasync", real)
        raise OSError(errno.EIO, "Input/output error")

    async def main() -> None:
        async with opened(type="file", path=str(path)) as file:
            await file.deliver(messages([1], to=str(path)))
            monkeypatch.setattr(os, "fdatasync", fail)
            with pytest.raises(TargetAway, match="Input/output error"):
                await file.deliver(messages([2], to=str(path)))
            assert await file.position() == 1

    asyncio.run(main())
    assert seqs(path) == [1]


def test_lines_that_a_killed_process_wrote_are_on_the_disk_before_they_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.jsonl"
    asyncio.run(deliver(path, [1]))
    real = os.fdatasync
    synced = []

    def sync(fd: int) -> None:
        real(fd)
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(os, "fdatasync", sync)
    asyncio.run(only_open(type="file", path=str(path)))
    assert synced == [path]


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shop.jsonl"
    real, answer = os.fdatasync, threading.Event()

    async def main() -> None:
        async with opened(type="file", path=str(path), timeout="50ms") as file:
            monkeypatch.setattr(os, "fdatasync", lambda fd: (answer.wait(), real(fd)))
            with pytest.raises(TargetAway, match=r"did not answer within 0.05 s \(`timeout`\)"):
                await file.deliver(messages([1], to=str(path)))
        with pytest.raises(TargetAway, match="another process"):  # the write is still in progress
            await deliver(path, [1])
        answer.set()
        await asyncio.to_thread(no_threads)
        assert await deliver(path, [2]) == 1

    asyncio.run(main())


def test_a_cancelled_delivery_has_ended_when_the_target_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shop.jsonl"
    real, begun, answer = os.fdatasync, threading.Event(), threading.Event()

    def slow(fd: int) -> None:
        begun.set()
        answer.wait()
        real(fd)

    async def main() -> None:
        file = target(type="file", path=str(path))
        await file.open()
        monkeypatch.setattr(os, "fdatasync", slow)
        delivery = asyncio.create_task(file.deliver(messages([1], to=str(path))))
        await asyncio.to_thread(begun.wait)
        delivery.cancel()
        with pytest.raises(asyncio.CancelledError):
            await delivery
        closing = asyncio.create_task(file.close())
        ended, _ = await asyncio.wait([closing], timeout=0.05)
        assert not ended
        answer.set()
        await closing
        await file.close()
        no_threads()
        assert await deliver(path, [2]) == 1

    asyncio.run(main())


# Rotation


def test_rotation_by_size(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"

    async def main() -> None:
        async with opened(type="file", path=str(path), rotate={"size": "1kB"}) as file:
            for first in range(1, 100, 3):
                await file.deliver(messages(range(first, first + 3), to=str(path)))

    asyncio.run(main())
    files = line_file.rotated(path)
    assert len(files) > 5 and all(1024 < one.stat().st_size < 2500 for one in files)
    assert seqs(path) == list(range(1, 100))


def test_the_newest_rotated_file_is_asked_while_the_file_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    for number in (1, 2):
        asyncio.run(deliver(path, [number]))
        path.rename(f"{path}.2026010{number}T000000.000000Z")
    (tmp_path / "shop.jsonl.bak").write_text("not rotated by cdcbridge")
    assert asyncio.run(deliver(path, [])) == 2  # there is no file
    assert path.stat().st_size == 0
    assert asyncio.run(deliver(path, [3])) == 2  # there is an empty one
    assert seqs(path) == [1, 2, 3]


def test_rotation_by_time_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    rotate = {"interval": "1d"}
    asyncio.run(deliver(path, [1], rotate=rotate))
    asyncio.run(deliver(path, [2], rotate=rotate))
    assert len(lines(path)) == 2 or line_file.rotated(path)  # unless midnight has just passed
    os.utime(path, (0, path.stat().st_mtime - 86400))  # its last line is of yesterday
    assert asyncio.run(deliver(path, [3], rotate=rotate)) == 2
    assert [one["seq"] for one in lines(path)] == [3]
    assert seqs(path) == [1, 2, 3]


def test_a_clock_that_is_set_back_does_not_mix_up_rotated_files(tmp_path: Path) -> None:
    path = tmp_path / "shop.jsonl"
    asyncio.run(deliver(path, [1]))
    path.rename(f"{path}.29990101T000000.000000Z")
    for number in (2, 3, 4):
        asyncio.run(deliver(path, [number], rotate={"size": 1}))
    assert [one.name[-24:] for one in line_file.rotated(path)] == [
        f"29990101T000000.00000{n}Z".rjust(24, ".") for n in (2, 1, 0)
    ]
    assert seqs(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("act", ["move", "remove", "cut"])
def test_a_file_that_someone_changes_is_opened_anew(tmp_path: Path, act: str) -> None:
    path = tmp_path / "shop.jsonl"

    async def main() -> None:
        async with opened(type="file", path=str(path)) as file:
            await file.deliver(messages([1, 2], to=str(path)))
            if act == "move":
                path.rename(tmp_path / "away")
            elif act == "remove":
                path.unlink()
            else:
                os.truncate(path, 0)
            await file.deliver(messages([3], to=str(path)))

    asyncio.run(main())
    assert seqs(path) == [3]


# Paths with placeholders


@pytest.mark.parametrize("key", ["../../etc/passwd", "..", ".", "", "a/b", "a\0b", "x" * 250, ".cdcbridge-shop"])
def test_a_key_never_leads_to_another_folder(tmp_path: Path, key: str) -> None:
    async def main(lane: Lane | None) -> None:
        async with opened(lane, type="file", path=f"{tmp_path}/{{key}}") as file:
            batch = [message(n, to=f"{tmp_path}/{one}", key=one) for n, one in enumerate(["a", key, "b"])]
            failures = await file.deliver(batch)
        assert failures[1].for_good
        assert "placeholder" in failures[1].reason or "longer than" in failures[1].reason
        if lane is None:
            assert failures.keys() == {1}
        else:  # nothing after the first failure
            assert failures.keys() == {1, 2} and not failures[2].for_good

    for lane, expected in ((LANE, ["a"]), (None, ["a", "b"])):
        asyncio.run(main(lane))
        assert sorted(one.name for one in tmp_path.iterdir() if one.name[0] != ".") == expected


def test_more_files_than_are_open_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(type="file", path=f"{tmp_path}/{{key}}.jsonl") as file:
            for start in range(0, 600, 300):
                batch = [message(start + n, to=f"{tmp_path}/{n}.jsonl", key=str(n)) for n in range(300)]
                assert await file.deliver(batch) == {}
            assert isinstance(file, FileTarget) and len(file._files) <= 128
            assert await file.position() == 599

    asyncio.run(main())
    assert all(seqs(tmp_path / f"{n}.jsonl") == [n, n + 300] for n in range(300))


def test_claims_deliver_at_the_same_time(tmp_path: Path) -> None:
    """A redelivered message is written again: readers know it by its id."""
    path = tmp_path / "shop.jsonl"

    async def main() -> None:
        async with opened(None, type="file", path=str(path)) as file:
            batches = [messages(range(n, n + 10), to=str(path), key=str(n)) for n in (31, 1, 11, 21, 1)]
            assert await asyncio.gather(*map(file.deliver, batches)) == [{}] * 5

    asyncio.run(main())
    assert sorted(seqs(path)) == sorted([*range(1, 41), *range(1, 11)])


def test_later_messages_of_a_key_wait_for_a_refused_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(None, type="file", path=f"{tmp_path}/{{op}}.jsonl") as file:
            good, bad = f"{tmp_path}/c.jsonl", f"{tmp_path}/../c.jsonl"
            batch = [message(1, to=good), message(2, to=bad), message(3, to=good), message(4, to=good, key="other"),
                     message(5, to=bad, key=None), message(6, to=good, key=None)]  # fmt: skip
            failures = await file.deliver(batch)
            assert {index: one.for_good for index, one in failures.items()} == {1: True, 2: False, 4: True}
        assert seqs(Path(good)) == [1, 4, 6]

    asyncio.run(main())

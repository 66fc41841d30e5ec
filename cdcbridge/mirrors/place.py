"""Find the place from which a mirror continues, by what the target and the source's log have.

Never moves a place.
"""

from __future__ import annotations

from typing import Final

import structlog

from cdcbridge.errors import OperatorNeeded
from cdcbridge.lsn import format_lsn
from cdcbridge.mirrors.log_reader import LogReader, MirrorState
from cdcbridge.mirrors.target import Place

_NEW: Final = 0
log = structlog.get_logger()


def begin_at(name: str, state: MirrorState, place: Place | None, reader: LogReader) -> Place:
    """Return the place after which the mirror reads the log.

    The target's own place counts, because it is committed together with the rows. The offset in the source's store may
    be ahead of it, by messages that were not for the target. If the target has less than it once had, it lost its tail,
    for example in a failover, and the log sends the rest again. If the target has more than the log, then the source
    lost its tail.

    Args:
        name: The name of the mirror.
        state: The state in the source's store.
        place: The place in the target, or None before the first transaction.
        reader: Reads the source's log.

    Raises:
        OperatorNeeded: The target lost more than the log still has.
    """
    begin = reader.log_begin()
    if place is None:
        if state.target_seq is None:
            return Place(state.offset, 0)
        _refuse_hole(reader, name, state, _NEW, begin)
        _tell(reader, name, state, "the target lost everything that the mirror had applied")
        reader.go_back(state.consumer_id, _NEW)
        return Place(_NEW, 0)
    if not reader.holds(place.seq, place.lsn):
        seq = min(reader.last_common(place.lsn), place.seq)
        _tell(
            reader,
            name,
            state,
            f"the source lost its newest changes: the target has them up to {format_lsn(place.lsn)}, and the source's"
            " log does not. Compare the tables with `cdcbridge mirror verify`",
        )
        reader.go_back(state.consumer_id, seq)
        return Place(seq, place.lsn)
    if state.target_seq is None:
        return Place(max(place.seq, begin - 1), place.lsn)
    if place.seq < state.target_seq:
        _refuse_hole(reader, name, state, place.seq, begin)
        _tell(reader, name, state, f"the target lost its newest changes, and gets those after seq {place.seq} again")
        reader.go_back(state.consumer_id, place.seq)
        return place
    return Place(max(place.seq, state.offset), place.lsn)


def _refuse_hole(reader: LogReader, name: str, state: MirrorState, seq: int, begin: int) -> None:
    """Stop the mirror if the log no longer has the messages after `seq`. After `mirror resume` it continues.

    Raises:
        OperatorNeeded: The log begins later.
    """
    if seq >= begin - 1:
        return
    reason = (
        f"the target has the changes up to seq {seq}, and the log only those from seq {begin} on: it lost more than the"
        " log keeps (store.retention)"
    )
    hint = (
        f"`cdcbridge mirror resume {name}` continues without the changes between. Then correct the rows with"
        f" `cdcbridge mirror verify {name} --repair source`, or copy each table: `cdcbridge backfill start {name}`."
    )
    reader.stop_at_hole(state.consumer_id, reason, hint)
    raise OperatorNeeded(reason, hint=hint)


def _tell(reader: LogReader, name: str, state: MirrorState, text: str) -> None:
    log.warning("mirror.lost_tail", mirror=name, message=text)
    reader.note(state.consumer_id, text)

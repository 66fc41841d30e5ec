-- commit_offset(consumer, partition, seq, receipt): record that a partition is read up to seq.
--
-- All messages of the partition up to and including seq are then done for the group. When the
-- transaction commits, other members can read the partition again. The offset never moves
-- backwards. Use seek() for that.
--
-- A receipt is stale when its lease has ended, or after a seek() or another commit in the
-- partition.
--
-- Parameters:
--   consumer   the name of a stream consumer
--   partition  the number of the partition, as read_stream() returned it
--   seq        the last message that is done
--   receipt    the receipt of read_stream(), needed if the partition is leased
-- Returns: true if the offset moved, false if it was at seq already.
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is not a stream, or is a mirror
--   CB003  the text is not a receipt of this partition
--   CB004  the log has no such partition, or seq is null, below the offset, or after the log's end
--   CB005  the isolation level is above READ COMMITTED
--   CB006  the partition is leased and the receipt is missing, or the receipt is stale
--   CB008  the caller may not read this consumer
-- Locks: the partition. The call waits for a transaction that reads it.
-- Example:
--   select cdcbridge.commit_offset('audit', 3, 1742, '3-1207');
create or replace function commit_offset(consumer text, partition int, seq bigint,
                                         receipt text default null)
returns boolean
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := stream_named(consumer);
    fence constant bigint := fence_of(receipt, partition);
    at offsets;
begin
    perform require_read_committed('commit_offset()');
    at := locked_offset(c, partition);
    if fence is null and at.leased_until > moment()
        or at.id <> fence or fence is not null and at.leased_until <= moment()
    then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    if seq is null or seq < at.seq then
        raise exception 'seq % is below the offset % of partition % of consumer %',
            coalesce(seq::text, 'null'), at.seq, partition, quote_literal(c.name)
            using errcode = 'CB004', hint = format(
                'To read the partition again: select seek(%L, %L, %s)',
                c.name, coalesce(seq, 0), partition);
    end if;
    if seq > at.seq and seq > coalesce(pg_sequence_last_value('messages_seq'), 0) then
        raise exception 'seq % is after the end of the log, which is seq %', seq,
            coalesce(pg_sequence_last_value('messages_seq'), 0)
            using errcode = 'CB004', hint = 'Pass a seq that read_stream() returned.';
    end if;
    if seq > at.seq or at.leased_until is not null then
        perform put_offset(at, seq, null);
    end if;
    perform set_partitions_read(c.id, array_remove(partitions_read(c.id), partition));
    return seq > at.seq;
end $$;

-- commit_offset(consumer, partition, seq, receipt) -> whether the offset moved: all of the partition up to seq is done. The
-- partition is free again, when the transaction commits.
-- Raises CB001, CB002, CB003 (no receipt), CB004 (no such partition; a seq below the offset, or beyond the log's end),
-- CB006 (under a lease: its receipt is missing or stale), CB008. Locks: the partition; waits for a transaction that reads it.
create or replace function commit_offset(consumer text, partition int, seq bigint, receipt text default null)
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
    if fence is null and at.leased_until > moment() or at.id <> fence or fence is not null and at.leased_until <= moment() then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    if seq is null or seq < at.seq then
        raise exception 'seq % lies below the offset % of partition % of consumer %', coalesce(seq::text, 'null'), at.seq,
            partition, quote_literal(c.name)
            using errcode = 'CB004', hint = format('To go back: select seek(%L, %L, %s)', c.name, coalesce(seq, 0), partition);
    end if;
    if seq > at.seq and seq > coalesce(pg_sequence_last_value('messages_seq'), 0) then
        raise exception 'seq % lies beyond the log''s end, %', seq, coalesce(pg_sequence_last_value('messages_seq'), 0)
            using errcode = 'CB004';
    end if;
    if seq > at.seq or at.leased_until is not null then
        perform put_offset(at, seq, null);
    end if;
    perform set_partitions_read(c.id, array_remove(partitions_read(c.id), partition));
    return seq > at.seq;
end $$;

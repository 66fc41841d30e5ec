-- seek_partitions(consumer, target, chosen): do the same as seek(), and report each partition.
--
-- Errors and locks are those of seek().
--
-- Parameters:
--   consumer  the name of a stream consumer
--   target    a place in the log, as in seek()
--   chosen    the number of the partition, or null for all partitions of the group
-- Returns: one row per partition.
--   partition  the number of the partition
--   old_seq    the offset before the call
--   new_seq    the offset after the call
--   time       the time of the next message after the new offset, or null if there is none yet
-- Example:
--   select * from cdcbridge.seek_partitions('audit', 'earliest');
create or replace function seek_partitions(consumer text, target text, chosen int default null)
returns table (partition int, old_seq bigint, new_seq bigint, "time" timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer, mirrors => true);
    goal bigint;
    wanted int[];
    held int; -- a partition that another transaction holds
    one int;
    at offsets;
begin
    perform require_read_committed('seek()');
    goal := seq_before(target, compacts(c.config));
    wanted := array(select n.partition from newest_offsets(c.id) n
                    where chosen is null or n.partition = chosen order by n.partition);
    loop
        begin
            if held is not null then
                perform locked_offset(c, held);
            end if;
            held := (select w from unnest(wanted) w
                     where not pg_try_advisory_xact_lock(partition_lock(c.id, w)) limit 1);
            exit when held is null;
            raise exception 'held' using errcode = 'CB000'; -- releases the locks taken so far
        exception
            when sqlstate 'CB000' then
                null;
        end;
    end loop;
    if wanted = '{}' then
        perform locked_offset(c, chosen); -- raises CB004
    end if;
    foreach one in array wanted loop
        at := locked_offset(c, one);
        partition := one;
        old_seq := at.seq;
        -- 'latest' never moves back: a group that reads only tables may have read more than
        -- max_safe_seq() allows, which open publishers hold back.
        new_seq := case when target = 'latest' then greatest(goal, at.seq) else goal end;
        perform put_offset(at, new_seq, null);
        "time" := (select coalesce(m.commit_time, m.inserted_at) from messages m
                   where m.partition = one and m.seq > new_seq order by m.seq limit 1);
        return next;
    end loop;
end $$;

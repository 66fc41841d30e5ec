-- redrive_compared(consumer, wanted, unwanted, left_ids, left_keys, documents): redrive or remove.
--
-- The function puts dead letters back at the end of the queue, or removes them, according to the
-- comparison with the consumer's filter. Dead letters that no longer exist, or that another
-- transaction has locked, are skipped. Internal: `cdcbridge dead redrive` calls it.
--
-- Parameters:
--   consumer   the name of a queue or fifo consumer
--   wanted     the ids of dead letters to redrive unchanged
--   unwanted   the ids of dead letters to remove
--   left_ids   the ids of dead letters of rows that left the filter, redriven as deletes
--   left_keys  the keys of these deletes, in the order of left_ids
--   documents  the data of these deletes, in the order of left_ids
-- Returns: one row.
--   redriven  how many dead letters were put back at the end of the queue, in log order
--   removed   how many were removed
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
-- Locks: the dead letters, with SKIP LOCKED, and the gap guard's shared lock, until the transaction
-- ends.
create or replace function redrive_compared(consumer text, wanted bigint[], unwanted bigint[],
                                            left_ids bigint[], left_keys text[], documents text[],
                                            out redriven int, out removed int)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
declare
    c consumers := queue_named(consumer);
    chosen bigint[];
    back bigint[];
begin
    select coalesce(array_agg(d.id), '{}') into chosen
    from (select d.id from dead_messages d
          where d.consumer_id = c.id and d.id = any (wanted || unwanted || left_ids)
          order by d.id for update skip locked) d;
    delete from dead_messages d
    where d.consumer_id = c.id and d.id = any (chosen) and d.id = any (unwanted);
    get diagnostics removed = row_count;
    if cardinality(left_ids) > 0 then
        update dead_messages d set key = l.key, data = l.document::json
        from unnest(left_ids, left_keys, documents) as l (id, key, document)
        where d.consumer_id = c.id and d.id = l.id and d.id = any (chosen)
          -- Unchanged if its message waits or is in flight, because it then stays a dead letter.
          and not exists (
              select from consumer_messages u where u.consumer_id = c.id and u.seq = d.seq);
    end if;
    back := array(select i from unnest(chosen) i where i = any (wanted || left_ids));
    redriven := case when back = '{}' then 0 else bring_back(c, back) end;
end $$;

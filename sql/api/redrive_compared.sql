-- redrive_compared(consumer, wanted, unwanted, left_ids, left_keys, documents) -> how many dead letters went back to the end of the
-- queue, in the order of the log, and how many were removed. wanted: as they are. unwanted: removed. left_ids: rows that left the filter,
-- which come back as deletes, with these keys and data. Letters that are gone, or locked by another, are passed over.
-- Raises CB001, CB002, CB008. Locks: the dead letters; the gap guard's, to the end of the transaction.
create or replace function redrive_compared(consumer text, wanted bigint[], unwanted bigint[], left_ids bigint[], left_keys text[],
                                            documents text[], out redriven int, out removed int)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    c consumers := queue_named(consumer);
    chosen bigint[];
    back bigint[];
begin
    select coalesce(array_agg(d.id), '{}') into chosen
    from (select d.id from dead_messages d where d.consumer_id = c.id and d.id = any (wanted || unwanted || left_ids)
          order by d.id for update skip locked) d;
    delete from dead_messages d where d.consumer_id = c.id and d.id = any (chosen) and d.id = any (unwanted);
    get diagnostics removed = row_count;
    if cardinality(left_ids) > 0 then
        update dead_messages d set key = l.key, data = l.document::json
        from unnest(left_ids, left_keys, documents) as l (id, key, document)
        where d.consumer_id = c.id and d.id = l.id and d.id = any (chosen)
          -- One that stays a dead letter, because its message waits or is in flight, stays as it is.
          and not exists (select from consumer_messages u where u.consumer_id = c.id and u.seq = d.seq);
    end if;
    back := array(select i from unnest(chosen) i where i = any (wanted || left_ids));
    redriven := case when back = '{}' then 0 else bring_back(c, back) end;
end $$;

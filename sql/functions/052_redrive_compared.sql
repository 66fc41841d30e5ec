-- Dead letters that a consumer's filter failed on: the command line compares them once more, because SQL cannot evaluate CEL.

-- dead_ids(consumer, topic, key, reason) -> the ids of dead letters in the order of the log, of these (null: any), and whether the filter
-- failed on them. Raises CB001, CB002, CB008.
create or replace function dead_ids(consumer text, topic text default null, key text default null, reason text default null)
returns table (id bigint, filter_failed boolean)
language plpgsql volatile security definer set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query
        select d.id, starts_with(d.reason, 'filter_error:') from dead_messages d
        where d.consumer_id = c.id and ($2 is null or d.topic = $2) and ($3 is null or d.key = $3)
          and ($4 is null or starts_with(d.reason, $4))
        order by d.seq, d.id;
end $$;

-- dead_to_compare(consumer, ids) -> what a filter reads of these dead letters, less those that are gone, in the order of the log. log_key
-- and old_key: the log's, null where its segment is gone. identity: the columns of the table's replica identity, where the consumer
-- has on_leave: delete. Raises CB001, CB002, CB008.
create or replace function dead_to_compare(consumer text, ids bigint[])
returns table (id bigint, topic text, key text, data text, commit_lsn text, ordinal int, xid bigint, log_key text, old_key text,
               identity jsonb)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query
        with topics as materialized (
            select t.topic,
                   (select e.value -> 'identity' from source s cross join lateral jsonb_each(s.catalog) e
                    where c.config ->> 'on_leave' = 'delete' and e.value ->> 'topic' = t.topic
                    -- the table's own entry rather than a partition's
                    order by regexp_replace(e.key, '/', '.') = t.topic desc limit 1) as identity
            from (select distinct d.topic from dead_messages d where d.consumer_id = c.id and d.id = any ($2)) t)
        select d.id, d.topic, d.key, d.data::text, d.commit_lsn::text, d.ordinal, m.xid, m.key, m.old_key, t.identity
        from dead_messages d
        join topics t on t.topic = d.topic
        left join messages m on m.seq = d.seq
        where d.consumer_id = c.id and d.id = any ($2)
        order by d.seq, d.id;
end $$;

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

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

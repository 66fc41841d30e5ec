-- dead_to_compare(consumer, ids): return the dead letters with the columns that a filter needs.
--
-- Ids without a dead letter are skipped. Internal: `cdcbridge dead redrive` calls it to compare
-- messages with the consumer's filter.
--
-- Parameters:
--   consumer  the name of a queue or fifo consumer
--   ids       the ids of dead letters
-- Returns: one row per dead letter, in log order.
--   log_key   the key that the message has in the log, or null where its segment is gone
--   old_key   the key before an update that changed it. Null for other messages, and where the
--             segment is gone.
--   identity  the columns of the table's replica identity, if the consumer has on_leave: delete
-- Raises:
--   CB001  no consumer has this name
--   CB002  the consumer is a stream
--   CB008  the caller may not read this consumer
create or replace function dead_to_compare(consumer text, ids bigint[])
returns table (id bigint, topic text, key text, data text, commit_lsn text, ordinal int, xid bigint,
               log_key text, old_key text, identity jsonb)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query
        with topics as materialized (
            select t.topic,
                   (select e.value -> 'identity'
                    from source s cross join lateral jsonb_each(s.catalog) e
                    where c.config ->> 'on_leave' = 'delete' and e.value ->> 'topic' = t.topic
                    -- the entry of the table itself, before those of its partitions
                    order by regexp_replace(e.key, '/', '.') = t.topic desc limit 1) as identity
            from (select distinct d.topic from dead_messages d
                  where d.consumer_id = c.id and d.id = any ($2)) t)
        select d.id, d.topic, d.key, d.data::text, d.commit_lsn::text, d.ordinal, m.xid, m.key,
               m.old_key, t.identity
        from dead_messages d
        join topics t on t.topic = d.topic
        left join messages m on m.seq = d.seq
        where d.consumer_id = c.id and d.id = any ($2)
        order by d.seq, d.id;
end $$;

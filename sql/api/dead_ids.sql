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

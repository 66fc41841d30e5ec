-- peek(consumer, max_messages, delayed) -> the messages that are visible now, with the columns of receive(); receipt is null.
-- delayed: those instead that wait for their time, the next one first; not_visible_until is that time. They were given back by nack,
-- or published for later.
-- Raises CB001, CB002, CB008. Takes nothing and locks nothing.
create or replace function peek(consumer text, max_messages int default 10, delayed boolean default false)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query execute format($query$
        select null::text, v.seq, coalesce(m.topic, r.topic), case when v.log_key then m.key else v.key end,
               project(coalesce(r.data, m.data), $3), v.deliver_count, v.not_visible_until,
               coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
               coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
        from %I($2) v
        left join messages m on m.seq = v.seq
        left join redriven r on r.consumer_id = $1 and r.seq = v.seq
        order by v.rank
        $query$, case when delayed then 'delayed_' else 'visible_' end || c.id)
    using c.id, max_messages, c.config -> 'columns';
end $$;

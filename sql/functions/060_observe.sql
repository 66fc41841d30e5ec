-- Looking without touching.

-- peek(consumer, max_messages) → the messages that are visible now, with the columns of receive(); receipt is null.
-- Raises CB001, CB002. Takes nothing and locks nothing.
create or replace function peek(consumer text, max_messages int default 10)
returns table (receipt text, seq bigint, topic text, key text, data json, deliver_count int,
               not_visible_until timestamptz, commit_lsn pg_lsn, ordinal int, commit_time timestamptz,
               inserted_at timestamptz)
language plpgsql stable set search_path from current set jit = off as $$
#variable_conflict use_column
declare
    c consumers := queue_named(consumer);
begin
    return query execute format($query$
        with visible as (
            (select l.seq, l.key, l.deliver_count, l.not_visible_until, false as log_key, 0 as place
             from leases l where l.consumer_id = $1 and l.not_visible_until <= clock_timestamp()
             order by l.seq limit $2)
            union all
            (select d.seq, d.key, d.deliver_count, d.visible_at, false, 1
             from delayed d where d.consumer_id = $1 and d.visible_at <= clock_timestamp()
             order by d.visible_at, d.seq limit $2)
            union all
            (select u.seq, u.key, 0, null, w.keys is null, 2
             from (select * from %I where consumer_id = $1 order by ord, tie limit $2) w cross join lateral unnest(w.seqs, w.keys) as u (seq, key)
             order by w.ord, w.tie, u.seq limit $2))
        select null::text, v.seq, coalesce(m.topic, r.topic), case when v.log_key then m.key else v.key end,
               project(coalesce(m.data, r.data), $3), v.deliver_count, v.not_visible_until,
               coalesce(m.commit_lsn, r.commit_lsn), coalesce(m.ordinal, r.ordinal),
               coalesce(m.commit_time, r.commit_time), coalesce(m.inserted_at, r.inserted_at)
        from (select *, row_number() over (order by place) as n from visible limit $2) v
        left join messages m on m.seq = v.seq
        left join redriven r on r.consumer_id = $1 and r.seq = v.seq
        order by v.n
        $query$, 'waiting_' || c.id)
    using c.id, max_messages, c.config -> 'columns';
end $$;

-- consumer_lag() → per consumer what is left to do. Counts rows: for people and monitors, not for every message.
create or replace function consumer_lag()
returns table (name text, mode text, pending bigint, in_flight bigint, dead bigint, oldest_age_seconds float8)
language sql stable set search_path from current set jit = off as $$
    select c.name, c.mode, w.messages + d.messages + l.expired, l.in_flight, x.dead,
           extract(epoch from clock_timestamp() - least(w.oldest, d.oldest, l.oldest))::float8
    from consumers c
    cross join lateral (select coalesce(sum(cardinality(w.seqs)), 0) as messages, min(w.inserted_at) as oldest
                        from waiting w where w.consumer_id = c.id) w
    cross join lateral (select count(*) as messages, min(d.inserted_at) as oldest
                        from delayed d where d.consumer_id = c.id) d
    cross join lateral (select count(*) filter (where l.not_visible_until > clock_timestamp()) as in_flight,
                               count(*) filter (where l.not_visible_until <= clock_timestamp()) as expired,
                               min(l.inserted_at) as oldest
                        from leases l where l.consumer_id = c.id) l
    cross join lateral (select count(*) as dead from dead_messages x where x.consumer_id = c.id) x
    order by c.name
$$;

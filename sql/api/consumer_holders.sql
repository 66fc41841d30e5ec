-- consumer_holders(only_of, open_for) -> the transactions, open for at least so long, that keep messages from consumers which the caller may
-- read (null: all of them); the oldest first. kind: receiver (of a queue or fifo consumer), member (of a group), or publisher.
-- messages: how many committed messages wait for the transaction at least, null where that is unknown. partitions: of a member.
-- limit_reached: the messages held and those in flight are max_in_flight, so nobody receives any other message either.
-- name, state and query are of the session, or of the prepared transaction, whose pid is null. A consumer's role is not shown the query.
-- age_seconds is null where the function's owner may not see it (pg_read_all_stats).
-- Raises CB001, CB008. Locks nothing. Counts rows: for people and monitors.
create or replace function consumer_holders(only_of text default null, open_for interval default '0')
returns table (consumer text, mode text, kind text, pid int, name text, age_seconds float8, state text, query text, messages bigint,
               partitions int[], limit_reached boolean)
language plpgsql volatile security definer set search_path from current set jit = off as $$
#variable_conflict use_column
begin
    if $1 is not null then
        perform refuse_stranger(consumer_named($1));
    end if;
    return query
        with wanted as materialized (
            select c as c, c.id, c.name as consumer, c.mode from consumers c
            where ($1 is null or c.name = $1) and may_read(c.config ->> 'role')
        ), found as (
            select w.c, w.consumer, w.mode, 'receiver' as kind, h.pid, h.prepared, h.messages, null::int[] as partitions
            from wanted w cross join lateral held_messages(w.id, $2) h where w.mode <> 'stream'
            union all
            select w.c, w.consumer, w.mode, 'member', h.pid, h.prepared,
                   (select coalesce(sum(g.messages), 0)::bigint from group_lag_of(w.id, wish_of(w.c)) g where g.partition = any (h.partitions)),
                   h.partitions
            from wanted w cross join lateral held_partitions(w.id) h where w.mode = 'stream'
            union all
            select w.c, w.consumer, w.mode, 'publisher', h.pid, h.prepared, h.messages, null
            from wanted w cross join lateral publishers_of(w.c) h
        )
        select f.consumer, f.mode, f.kind, f.pid, coalesce(p.gid, nullif(a.application_name, ''), a.usename::text),
               extract(epoch from clock_timestamp() - coalesce(p.prepared, a.xact_start))::float8,
               case when p.gid is null then a.state else 'prepared' end,
               case when may_read(null) then left(a.query, 200) end, f.messages, f.partitions,
               f.kind = 'receiver' and places_used(f.c) >= ((f.c).config ->> 'max_in_flight')::bigint
        from found f
        left join pg_stat_activity a on a.pid = f.pid
        left join pg_prepared_xacts p on p.transaction::text = f.prepared
        where coalesce(clock_timestamp() - coalesce(p.prepared, a.xact_start) >= $2, true)
        order by 6 desc nulls last, f.consumer, f.kind, f.pid;
end $$;

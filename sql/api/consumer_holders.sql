-- consumer_holders(only_of, open_for): list open transactions that keep messages from consumers.
--
-- The list covers the consumers that the caller may read. The transaction that has been open
-- longest is first. The function counts rows, so it is for people and monitors, not for every
-- message.
--
-- Parameters:
--   only_of   the name of a consumer, or null for all consumers that the caller may read
--   open_for  leave out transactions that have been open for less time than this, default 0
-- Returns: one row per consumer and transaction.
--   kind           receiver (of a queue or fifo consumer), member (of a group) or publisher
--   pid            the process id of the session, or null for a prepared transaction
--   name           the session's application_name or user, or the id of the prepared transaction
--   age_seconds    how long the transaction has been open, or null where the function's owner may
--                  not see it (pg_read_all_stats)
--   state          the state of the session, or prepared
--   query          the session's query, or null unless the caller is the store's owner or an
--                  operator, so a consumer's role does not see it
--   messages       how many committed messages wait for the transaction, at least, or null where
--                  unknown
--   partitions     the partitions that a member holds
--   limit_reached  whether the messages held and those in flight reach max_in_flight, so that no
--                  receiver gets any other message either
-- Raises:
--   CB001  no consumer has this name
--   CB008  the caller may not read this consumer
-- Locks: none.
-- Example:
--   select consumer, kind, pid, age_seconds from cdcbridge.consumer_holders(open_for => '1 min');
create or replace function consumer_holders(only_of text default null,
                                            open_for interval default '0')
returns table (consumer text, mode text, kind text, pid int, name text, age_seconds float8,
               state text, query text, messages bigint, partitions int[], limit_reached boolean)
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
            select w.c, w.consumer, w.mode, 'receiver' as kind, h.pid, h.prepared, h.messages,
                   null::int[] as partitions
            from wanted w cross join lateral held_messages(w.id, $2) h where w.mode <> 'stream'
            union all
            select w.c, w.consumer, w.mode, 'member', h.pid, h.prepared,
                   (select coalesce(sum(g.messages), 0)::bigint
                    from group_lag_of(w.id, wish_of(w.c)) g
                    where g.partition = any (h.partitions)),
                   h.partitions
            from wanted w cross join lateral held_partitions(w.id) h where w.mode = 'stream'
            union all
            select w.c, w.consumer, w.mode, 'publisher', h.pid, h.prepared, h.messages, null
            from wanted w cross join lateral publishers_of(w.c) h
        )
        select f.consumer, f.mode, f.kind, f.pid,
               coalesce(p.gid, nullif(a.application_name, ''), a.usename::text),
               extract(epoch from clock_timestamp() - coalesce(p.prepared, a.xact_start))::float8,
               case when p.gid is null then a.state else 'prepared' end,
               case when may_read(null) then left(a.query, 200) end, f.messages, f.partitions,
               f.kind = 'receiver'
                   and capacity_used(f.c) >= ((f.c).config ->> 'max_in_flight')::bigint
        from found f
        left join pg_stat_activity a on a.pid = f.pid
        left join pg_prepared_xacts p on p.transaction::text = f.prepared
        where coalesce(clock_timestamp() - coalesce(p.prepared, a.xact_start) >= $2, true)
        order by 6 desc nulls last, f.consumer, f.kind, f.pid;
end $$;

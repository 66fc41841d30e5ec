-- Open transactions that keep messages from receivers, members of groups and readers of published topics.
--
-- Nothing is written for this: a row that an open transaction has locked or deleted names that transaction in its column xmax, and
-- pg_locks tells which session has that transaction id. So a claim costs nothing more, and a look waits for nobody and locks nothing.

-- open_transactions() -> the ids of all open transactions and subtransactions, with their sessions. pid is null for a prepared one,
-- whose id is then in `prepared`.
create or replace function open_transactions() returns table (xid xid, pid int, prepared text)
language sql volatile as $$
    select l.transactionid, l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end
    from pg_locks l
    where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and l.pid is distinct from pg_backend_pid()
$$;

-- is_open(xid) -> whether this transaction or subtransaction is in progress. False for what is none: where several transactions share a
-- lock, xmax is another kind of number, which may lie ahead of all ids.
create or replace function is_open(xid xid) returns boolean
language plpgsql volatile as $$
declare
    next constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text;
begin
    -- Its upper half is that of the nearest id.
    return pg_xact_status((next - low_half(next - xid::text::bigint))::text::xid8) = 'in progress';
exception
    when invalid_parameter_value or invalid_text_representation or numeric_value_out_of_range then
        return false;
end $$;

-- in_use(relation, open_for) -> whether another transaction that has been open for so long has locked rows of it. A prepared one counts as old.
create or replace function in_use(relation regclass, open_for interval) returns boolean
language sql volatile as $$
    select exists (
        select from pg_locks l left join pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'relation' and l.relation = $1 and l.mode in ('RowShareLock', 'RowExclusiveLock') and l.granted
          and l.database = (select oid from pg_database where datname = current_database())
          and l.pid is distinct from pg_backend_pid() and coalesce(clock_timestamp() - a.xact_start >= $2, true))
$$;

-- locked_messages(consumer_id, open_for) -> how many messages of a queue or fifo consumer have been claimed, or locked after their timeout
-- passed or their delay ended, by which transaction. Some of the transactions have ended. A row of `waiting` counts whole. Where no
-- transaction has used the consumer's part of `waiting` for so long, nobody reads what may be millions of rows.
create or replace function locked_messages(consumer_id int, open_for interval) returns table (xid xid, messages bigint)
language sql volatile as $$
    select h.xid, sum(h.messages)::bigint
    from (select w.xmax as xid, cardinality(w.seqs) as messages from waiting w
          where in_use(to_regclass('waiting_' || $1), $2) and w.consumer_id = $1 and w.xmax <> '0' and (w.not_before is null or w.not_before <= moment())
          union all
          select d.xmax, 1 from delayed d where d.consumer_id = $1 and d.xmax <> '0' and d.visible_at <= moment()
          union all
          select l.xmax, cardinality(l.seqs) - (select count(*) from settled s where s.consumer_id = l.consumer_id
                                                and s.token = l.token and s.part = l.part)
          from leases l where l.consumer_id = $1 and l.xmax <> '0' and l.not_visible_until <= moment()) h
    group by h.xid having sum(h.messages) > 0
$$;

-- claimers(consumer_id) -> open transactions that have called receive().
create or replace function claimers(consumer_id int) returns table (pid int, prepared text)
language sql volatile as $$
    select distinct l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = 'hints'::regclass and l.objsubid = 2 and l.mode = 'ShareLock' and l.granted
      and l.objid::bigint >> 20 = $1 % 4096 and l.pid is distinct from pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
$$;

-- held_messages(consumer_id, open_for) -> how many messages each open transaction keeps from all receivers, at least.
-- Those that it has claimed in a subtransaction which has ended name no open transaction: they are of the one that has claimed and
-- holds nothing else. Where there are several such, messages is null.
create or replace function held_messages(consumer_id int, open_for interval) returns table (pid int, prepared text, messages bigint)
language sql volatile as $$
    with open as materialized (
        select * from open_transactions()
    ), held as materialized (
        select * from locked_messages($1, $2)
    ), known as materialized (
        select o.pid, o.prepared, sum(h.messages)::bigint as messages from held h join open o on o.xid = h.xid group by 1, 2
    ), rest as materialized (
        select sum(h.messages)::bigint as messages from held h
        where h.xid not in (select o.xid from open o) and is_open(h.xid)
    )
    select * from known
    union all
    select c.pid, c.prepared, case when count(*) over () = 1 then r.messages end
    from claimers($1) c cross join rest r
    where r.messages > 0 and not exists (select from known k where (k.pid, k.prepared) is not distinct from (c.pid, c.prepared))
$$;

-- held_partitions(consumer_id) -> the partitions of a group that each open transaction has read or moved the offset of.
create or replace function held_partitions(consumer_id int) returns table (pid int, prepared text, partitions int[])
language sql volatile as $$
    select l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end,
           array_agg((l.objid::bigint % 4096)::int order by l.objid)
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = 'offsets'::regclass and l.objsubid = 1 and l.mode = 'ExclusiveLock' and l.granted
      and l.objid::bigint / 4096 = $1 % 1048576 and l.pid is distinct from pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
    group by 1, 2
$$;

-- publishers_of(consumer) -> open transactions that have published, where the consumer reads published messages in the log's order:
-- from which seq on it waits, and how many messages that are committed wait with it.
create or replace function publishers_of(consumer consumers) returns table (pid int, prepared text, messages bigint)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    w constant stream_wish := wish_of(consumer);
begin
    if consumer.mode = 'queue' or w.topics = '{}' then
        return;
    end if;
    return query
        select h.pid, h.prepared, case when consumer.mode = 'fifo' then
                   (select coalesce(sum(cardinality(x.seqs)), 0) from waiting x where x.consumer_id = consumer.id and x.ord >= h.seq)
               else (select count(*) from newest_offsets(consumer.id) o join messages m on m.partition = o.partition
                     where m.seq > o.seq and m.seq >= h.seq and is_wanted(m.topic, m.data, m.reader, w)) end
        from (select l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end as prepared,
                     min(g.last - ((g.last - l.objid::bigint) & 4294967295) + 1) as seq
              from pg_locks l cross join (select coalesce(pg_sequence_last_value('messages_seq'), 0) as last) g
              where l.locktype = 'advisory' and l.classid = 'messages_seq'::regclass and l.objsubid = 2 and l.mode = 'ShareLock'
                and l.granted and l.pid is distinct from pg_backend_pid()
                and l.database = (select oid from pg_database where datname = current_database())
              group by 1, 2) h;
end $$;

-- places_used(consumer) -> how many of max_in_flight are in use, by deliveries in flight and by claims that are not committed.
create or replace function places_used(consumer consumers) returns bigint
language sql volatile as $$
    select (select coalesce(sum(cardinality(l.seqs) - (select count(*) from settled s where s.consumer_id = l.consumer_id
                                                       and s.token = l.token and s.part = l.part)), 0)
            from leases l where l.consumer_id = consumer.id and l.not_visible_until > moment())
         + (select coalesce(sum(coalesce(p.used, (consumer.config ->> 'max_in_flight')::int / least(64, (consumer.config ->> 'max_in_flight')::int))), 0)
            from claims_in_progress(consumer.id) p)::bigint
$$;

-- Holders: the open transactions that keep messages from consumers.
--
-- Nothing is written for this purpose. If an open transaction has locked or deleted a row, the
-- row's column xmax contains the transaction's id. pg_locks shows which session has that id.
-- Therefore a claim costs nothing more, and these functions wait for no transaction and lock
-- nothing.

-- open_transactions() -> the ids of all open transactions and subtransactions, with their sessions.
--
-- pid is null for a prepared transaction. Then `prepared` contains its id.
create or replace function open_transactions() returns table (xid xid, pid int, prepared text)
language sql volatile as $$
    select l.transactionid, l.pid,
           case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end
    from pg_locks l
    where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted
      and l.pid is distinct from pg_backend_pid()
$$;

-- is_open(xid) -> whether this transaction or subtransaction is in progress.
--
-- The result is false for a number that is no transaction id. If several transactions share a lock,
-- xmax contains another kind of number, which may be higher than all transaction ids.
create or replace function is_open(xid xid) returns boolean
language plpgsql volatile as $$
declare
    next constant bigint := pg_snapshot_xmax(pg_current_snapshot())::text;
begin
    -- Only the low 32 bits are known. The upper half is taken from the nearest transaction id.
    return pg_xact_status((next - low_half(next - xid::text::bigint))::text::xid8) = 'in progress';
exception
    when invalid_parameter_value or invalid_text_representation or numeric_value_out_of_range then
        return false;
end $$;

-- in_use(relation, open_for) -> whether a transaction that is open for so long has locked its rows.
--
-- The caller's own transaction is left out. A prepared transaction always counts as old enough.
create or replace function in_use(relation regclass, open_for interval) returns boolean
language sql volatile as $$
    select exists (
        select from pg_locks l left join pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'relation' and l.relation = $1
          and l.mode in ('RowShareLock', 'RowExclusiveLock') and l.granted
          and l.database = (select oid from pg_database where datname = current_database())
          and l.pid is distinct from pg_backend_pid()
          and coalesce(clock_timestamp() - a.xact_start >= $2, true))
$$;

-- locked_messages(consumer_id, open_for) -> how many messages each transaction has locked.
--
-- The messages are those that a queue or fifo consumer could receive: waiting ones, deliveries
-- whose timeout passed, and delayed ones whose time has come. A transaction in the result may have
-- ended. All messages of a row of `waiting` are counted. The consumer's partition of `waiting` may
-- have millions of rows, so it is read only if a transaction has used it for at least open_for.
create or replace function locked_messages(consumer_id int, open_for interval)
returns table (xid xid, messages bigint)
language sql volatile as $$
    select h.xid, sum(h.messages)::bigint
    from (select w.xmax as xid, cardinality(w.seqs) as messages from waiting w
          where in_use(to_regclass('waiting_' || $1), $2) and w.consumer_id = $1 and w.xmax <> '0'
            and (w.not_before is null or w.not_before <= moment())
          union all
          select d.xmax, 1 from delayed d
          where d.consumer_id = $1 and d.xmax <> '0' and d.visible_at <= moment()
          union all
          select l.xmax, cardinality(l.seqs) - (
                     select count(*) from marks_of(l.consumer_id, l.claim_id, l.part))
          from leases l
          where l.consumer_id = $1 and l.xmax <> '0' and l.not_visible_until <= moment()) h
    group by h.xid having sum(h.messages) > 0
$$;

-- claimers(consumer_id) -> the open transactions that have called receive().
create or replace function claimers(consumer_id int) returns table (pid int, prepared text)
language sql volatile as $$
    select distinct l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = 'hints'::regclass and l.objsubid = 2
      and l.mode = 'ShareLock' and l.granted
      and l.objid::bigint >> 20 = $1 % 4096 and l.pid is distinct from pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
$$;

-- held_messages(consumer_id, open_for) -> at least how many messages each open transaction holds.
--
-- No receiver gets these messages. Messages that were claimed in a subtransaction which has ended
-- name no open transaction. They are counted for the transaction that has called receive() and
-- holds nothing else. If there are several such transactions, their number of messages is null.
create or replace function held_messages(consumer_id int, open_for interval)
returns table (pid int, prepared text, messages bigint)
language sql volatile as $$
    with open as materialized (
        select * from open_transactions()
    ), held as materialized (
        select * from locked_messages($1, $2)
    ), known as materialized (
        select o.pid, o.prepared, sum(h.messages)::bigint as messages
        from held h join open o on o.xid = h.xid group by 1, 2
    ), rest as materialized (
        select sum(h.messages)::bigint as messages from held h
        where h.xid not in (select o.xid from open o) and is_open(h.xid)
    )
    select * from known
    union all
    select c.pid, c.prepared, case when count(*) over () = 1 then r.messages end
    from claimers($1) c cross join rest r
    where r.messages > 0 and not exists (
        select from known k where (k.pid, k.prepared) is not distinct from (c.pid, c.prepared))
$$;

-- held_partitions(consumer_id) -> the partitions of a group that each open transaction has locked.
--
-- The transaction has read them or moved their offset.
create or replace function held_partitions(consumer_id int)
returns table (pid int, prepared text, partitions int[])
language sql volatile as $$
    select l.pid, case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end,
           array_agg((l.objid::bigint % 4096)::int order by l.objid)
    from pg_locks l
    where l.locktype = 'advisory' and l.classid = 'offsets'::regclass and l.objsubid = 1
      and l.mode = 'ExclusiveLock' and l.granted
      and l.objid::bigint / 4096 = $1 % 1048576 and l.pid is distinct from pg_backend_pid()
      and l.database = (select oid from pg_database where datname = current_database())
    group by 1, 2
$$;

-- publishers_of(consumer) -> the open transactions that have published and delay this consumer.
--
-- A fifo or stream consumer reads published messages in the order of the log, so it waits for them.
-- messages is the number of committed messages that wait, because their seq is not below the
-- transaction's first. There are no rows for a queue, or for a consumer that lists no topics.
create or replace function publishers_of(consumer consumers)
returns table (pid int, prepared text, messages bigint)
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
                   (select coalesce(sum(cardinality(x.seqs)), 0) from waiting x
                    where x.consumer_id = consumer.id and x.ord >= h.seq)
               else (select count(*) from newest_offsets(consumer.id) o
                     join messages m on m.partition = o.partition
                     where m.seq > o.seq and m.seq >= h.seq
                       and is_wanted(m.topic, m.data, m.reader, w)) end
        from (select l.pid,
                     case when l.pid is null then split_part(l.virtualtransaction, '/', 2) end
                         as prepared,
                     min(g.last - ((g.last - l.objid::bigint) & 4294967295) + 1) as seq
              from pg_locks l cross join (
                  select coalesce(pg_sequence_last_value('messages_seq'), 0) as last) g
              where l.locktype = 'advisory' and l.classid = 'messages_seq'::regclass
                and l.objsubid = 2 and l.mode = 'ShareLock'
                and l.granted and l.pid is distinct from pg_backend_pid()
                and l.database = (select oid from pg_database where datname = current_database())
              group by 1, 2) h;
end $$;

-- capacity_used(consumer) -> how much of the consumer's max_in_flight is in use.
--
-- They are used by deliveries in flight and by claims that are not committed.
create or replace function capacity_used(consumer consumers) returns bigint
language sql volatile as $$
    select (select coalesce(sum(cardinality(l.seqs) - (
                       select count(*) from marks_of(l.consumer_id, l.claim_id, l.part))), 0)
            from leases l where l.consumer_id = consumer.id and l.not_visible_until > moment())
         + (select coalesce(sum(coalesce(
                       p.used, (consumer.config ->> 'max_in_flight')::int
                               / least(64, (consumer.config ->> 'max_in_flight')::int))), 0)
            from claims_in_progress(consumer.id) p)::bigint
$$;

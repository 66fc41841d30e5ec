-- Groups: their lag, their beginning, and a change of the log's number of partitions.

-- group_lag_of(consumer_id, wish) -> the result of group_lag(), for a group by its id and wish.
create or replace function group_lag_of(consumer_id int, wish stream_wish)
returns table (partition int, seq bigint, messages bigint, seconds float8,
               leased_until timestamptz, lost bigint, updated_at timestamptz)
language sql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
    select o.partition, o.seq, m.number, extract(epoch from moment() - m.oldest)::float8,
           case when o.leased_until > moment() then o.leased_until end, o.lost, o.updated_at
    from newest_offsets($1) o
    cross join lateral (select count(*) as number, min(m.inserted_at) as oldest from messages m
                        where m.partition = o.partition and m.seq > o.seq
                          and is_wanted(m.topic, m.data, m.reader, $2)) m
    order by o.partition
$$;

-- log_partitions() -> the present number of partitions, also for a caller with an older snapshot.
create or replace function log_partitions() returns int
language sql volatile as $$
    select pg_sequence_last_value('partitions_seq')::int
$$;

-- begin_partitions(wanted) -> whether the number of partitions changes.
--
-- From the next seq on, keys are spread over the wanted number of partitions. Groups begin in new
-- partitions at that seq. If the result is true, the session holds the draw lock, so that no seq
-- can be drawn. After this transaction has committed, finish_partitions() must follow. The order
-- matters: groups must know the new partitions before these contain messages.
-- Raises: CB005 if the isolation level is above READ COMMITTED.
-- Locks: groups_lock(), to the end of the transaction. The draw lock of the log's sequence, for the
-- session, if the result is true.
create or replace function begin_partitions(wanted int) returns boolean
language plpgsql volatile set search_path from current as $$
declare
    last bigint;
begin
    perform require_read_committed('begin_partitions()');
    perform pg_advisory_xact_lock(groups_lock());
    if wanted = log_partitions()
        and wanted = (select p.partitions from partitionings p order by p.from_seq desc limit 1)
    then
        return false;
    end if;
    perform pg_advisory_lock(draw_lock('messages_seq'));
    begin
        last := coalesce(pg_sequence_last_value('messages_seq'), 0);
        if last = 0 then
            update partitionings p set partitions = wanted where p.from_seq = 0;
        else
            insert into partitionings as p (from_seq, partitions) values (last + 1, wanted)
            on conflict (from_seq) do update set partitions = wanted;
        end if;
        insert into offsets (consumer_id, partition, seq, updated_at)
        select c.id, n, last, moment() from consumers c cross join generate_series(0, wanted - 1) n
        where c.mode = 'stream' and (newest_offset(c.id, n)).id is null;
    exception
        when others or query_canceled then
            perform pg_advisory_unlock(draw_lock('messages_seq'));
            raise;
    end;
    return true;
end $$;

-- groups_lock() -> the key of the advisory lock for new groups and changes of the partitions.
--
-- Under it, groups are made and the number of partitions is changed, so each group has an offset in
-- every partition.
create or replace function groups_lock() returns bigint
language sql stable as $$
    select ('partitionings'::regclass::oid::bigint << 32) | 1
$$;

-- finish_partitions(wanted): Let publishers use the new number of partitions, and draw seqs again.
--
-- Locks: gives the draw lock back that begin_partitions() took.
create or replace function finish_partitions(wanted int) returns void
language plpgsql volatile set search_path from current as $$
begin
    perform setval('partitions_seq', wanted);
    perform pg_advisory_unlock(draw_lock('messages_seq'));
end $$;

-- safe_seq_holders() -> the open transactions that hold max_safe_seq() back, the oldest first.
--
-- seq is the first seq that the transaction may still commit. age_seconds is its age.
create or replace function safe_seq_holders()
returns table (pid int, seq bigint, age_seconds float8, state text, query text)
language sql volatile security definer set search_path from current as $$
    select a.pid, l.last - ((l.last - l.low) & 4294967295) + 1,
           extract(epoch from clock_timestamp() - a.xact_start)::float8, a.state, left(a.query, 200)
    from (select l.pid, l.objid::bigint as low,
                 coalesce(pg_sequence_last_value('messages_seq'), 0) as last
          from pg_locks l
          where l.locktype = 'advisory' and l.classid = 'messages_seq'::regclass::oid
            and l.objsubid = 2 and l.mode = 'ShareLock' and l.granted
            and l.database = (select oid from pg_database where datname = current_database())) l
    join pg_stat_activity a on a.pid = l.pid
    order by a.xact_start
$$;

-- begin_group(consumer_id, config): Insert the offsets of a new group.
--
-- With `start: earliest` in its configuration, the group begins with the first message of the log.
-- Otherwise it begins after max_safe_seq().
-- Raises: 55P03 as create_partition_indexes() does.
-- Locks: groups_lock(), to the end of the transaction, and those of create_partition_indexes().
create or replace function begin_group(consumer_id int, config jsonb) returns void
language plpgsql volatile set search_path from current as $$
declare
    at constant bigint := case when config ->> 'start' <> 'earliest' then max_safe_seq()
                               when compacts(config) then 0
                               else log_begin() - 1 end;
begin
    perform pg_advisory_xact_lock(groups_lock());
    perform create_partition_indexes();
    insert into offsets (consumer_id, partition, seq, updated_at)
    select begin_group.consumer_id, n, at, moment()
    from generate_series(0, (select max(p.partitions) from partitionings p) - 1) n;
end $$;

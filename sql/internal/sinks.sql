-- Sinks: how processes share the lanes of a consumer, and how they read them.
--
-- Only the sinks' processes call these functions, and they connect as the owner of the store. A
-- lane is a part of a stream consumer's partitions that is delivered in order. The lease of a lane
-- is in sink_lanes, and how far it is delivered in offsets, as for every group.

-- lane_partitions(lane, lanes) -> the partitions of the log that belong to a lane.
create or replace function lane_partitions(lane int, lanes int) returns int[]
language sql stable as $$
    select array_agg(p) from generate_series(0, (select max(x.partitions) - 1
                                                 from partitionings x)) p
    where p % lanes = lane
$$;

-- lease_lanes(consumer_id, member, lanes, lease) -> the lanes that the process may deliver now.
--
-- The function renews the process's leases, and takes free lanes until it has its share: the number
-- of lanes divided by the number of processes that were seen within the time of a lease, rounded
-- up. A process that has more than its share must finish its batch and leave_lane().
--
-- Parameters:
--   member  the process
--   lanes   the number of lanes of the consumer
--   lease   how long the lanes belong to the process from now on
-- Returns: one row per lane that the process holds.
--   seq        the smallest offset of the lane's partitions: everything up to it is done
--   first_seq  where the lane began
--   surplus    whether another process should have this lane
-- Locks: rows of sink_lanes, with SKIP LOCKED.
create or replace function lease_lanes(consumer_id int, member text, lanes int, lease interval)
returns table (lane int, seq bigint, first_seq bigint, surplus boolean)
language plpgsql volatile as $$
#variable_conflict use_column
declare
    c constant int := consumer_id;
    me constant text := member;
    moment constant timestamptz := moment();
    share int;
    held int;
begin
    insert into sink_members as m (consumer_id, member, seen_at) values (c, me, moment)
    on conflict (consumer_id, member) do update set seen_at = excluded.seen_at;
    delete from sink_members m where m.consumer_id = c and m.seen_at < moment - 10 * lease;
    insert into sink_lanes (consumer_id, lane, first_seq)
    select c, n, coalesce((select min(o.seq) from newest_offsets(c) o
                           where o.partition % lanes = n), 0)
    from generate_series(0, lanes - 1) n
    on conflict do nothing;
    share := ceil(lanes::numeric / (select count(*) from sink_members m
                                    where m.consumer_id = c and m.seen_at >= moment - lease));
    update sink_lanes l set leased_until = later(moment, lease)
    where l.consumer_id = c and l.member = me and l.lane < lanes;
    get diagnostics held = row_count;
    update sink_lanes l set member = me, leased_until = later(moment, lease)
    from (select f.lane from sink_lanes f
          where f.consumer_id = c and f.lane < lanes
            and (f.member is null or f.leased_until <= moment)
          order by f.lane limit greatest(share - held, 0) for update skip locked) f
    where l.consumer_id = c and l.lane = f.lane;
    return query
        select l.lane,
               coalesce((select min(o.seq) from newest_offsets(c) o
                         where o.partition % lanes = l.lane), 0),
               l.first_seq, row_number() over (order by l.lane) > share
        from sink_lanes l
        where l.consumer_id = c and l.member = me and l.lane < lanes;
end $$;

-- leave_lane(consumer_id, member, lane): give a lane back, or all lanes for null.
--
-- For null, the process is no longer a member either.
create or replace function leave_lane(consumer_id int, member text, lane int) returns void
language sql volatile as $$
    update sink_lanes l set member = null, leased_until = '-infinity'
    where l.consumer_id = $1 and l.member = $2 and ($3 is null or l.lane = $3);
    delete from sink_members m where m.consumer_id = $1 and m.member = $2 and $3 is null
$$;

-- begin_lane_read(consumer_id, lane, lanes) -> how scan_lane() or scan_partition() is to be called
-- in the same transaction.
--
-- Two statements, because the answer must be older than the snapshot that reads the log, and
-- because PostgreSQL puts a scan_...() into the statement that calls it. A function in PL/pgSQL
-- stores its rows first, which takes as long as everything else that the server does for a message.
--
-- Returns:
--   wish       the messages that the consumer takes
--   columns    the consumer's `columns`, or null
--   upper_end  the last seq that may be read now
--   partition  the partition of the lane, if the lane has only one
-- Locks: ACCESS SHARE on messages, to the end of the transaction, so that retention drops nothing
-- between this look and the reading.
-- Raises:
--   CB009  retention dropped messages that the lane had not read
create or replace function begin_lane_read(consumer_id int, lane int, lanes int)
returns table (wish stream_wish, columns jsonb, upper_end bigint, partition int)
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c consumers;
    w stream_wish;
    safe bigint;
    spots offsets[];
    ours constant int[] := lane_partitions(lane, lanes);
    o offsets;
begin
    lock table only messages in access share mode;
    select x.* into c from consumers x where x.id = consumer_id;
    w := wish_of(c);
    safe := case when w.topics <> '{}' then max_safe_seq() end;
    spots := array(select n from newest_offsets(c.id) n);
    foreach o in array spots loop
        if o.lost is not null and o.partition = any (ours) then
            perform refuse_lost(c.name, o);
        end if;
    end loop;
    return query select w, c.config -> 'columns',
                        least(coalesce(safe, 9223372036854775807), end_of_era(w, spots)),
                        case when cardinality(ours) = 1 then ours[1] end;
end $$;

-- scan_lane(lane, lanes, after, most, wish, columns, upper_end) -> the next messages of a lane.
--
-- Parameters:
--   after                     the seq after which to read
--   most                      the most messages to return
--   wish, columns, upper_end  from begin_lane_read()
-- Returns: the messages, in order of seq.
--   shown  with `columns`: the data with only the columns that the sink gets, or null if they
--          cannot be separated; otherwise null
-- The function has no SET clause, so that PostgreSQL puts it into the calling statement. The
-- session of the sink has the settings instead.
create or replace function scan_lane(lane int, lanes int, after bigint, most int, wish stream_wish,
                                     columns jsonb, upper_end bigint)
returns table (seq bigint, topic text, key text, partition int, data json, shown json,
               commit_lsn pg_lsn, ordinal int, xid bigint, commit_time timestamptz,
               inserted_at timestamptz, old_key text)
language sql stable as $$
    select m.seq, m.topic, m.key, m.partition, m.data,
           case when columns is not null then project(m.data, columns) end, m.commit_lsn, m.ordinal,
           m.xid, m.commit_time, m.inserted_at, m.old_key
    from messages m
    where m.seq > after and m.seq <= upper_end and (lanes = 1 or m.partition % lanes = lane)
      and is_wanted(m.topic, m.data, m.reader, wish)
    order by m.seq limit most
$$;

-- scan_partition(number, after, most, wish, columns, upper_end) -> the next messages of a lane that
-- is one partition.
--
-- It is like scan_lane(), but reads along the index of the partition.
create or replace function scan_partition(number int, after bigint, most int, wish stream_wish,
                                          columns jsonb, upper_end bigint)
returns table (seq bigint, topic text, key text, partition int, data json, shown json,
               commit_lsn pg_lsn, ordinal int, xid bigint, commit_time timestamptz,
               inserted_at timestamptz, old_key text)
language sql stable as $$
    select m.seq, m.topic, m.key, m.partition, m.data,
           case when columns is not null then project(m.data, columns) end, m.commit_lsn, m.ordinal,
           m.xid, m.commit_time, m.inserted_at, m.old_key
    from messages m
    where m.partition = number and m.seq > after and m.seq <= upper_end
      and is_wanted(m.topic, m.data, m.reader, wish)
    order by m.seq limit most
$$;

-- end_of_lane(consumer_id, lane, lanes, after) -> a seq up to which the lane has no messages after
-- `after`, now or later.
--
-- The sink moves its offset there, so that it does not look at other consumers' messages again.
create or replace function end_of_lane(consumer_id int, lane int, lanes int, after bigint)
returns bigint
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0
set plan_cache_mode = force_generic_plan as $$
declare
    safe constant bigint := max_safe_seq(); -- read before the log is
    v record;
    first bigint;
begin
    select b.* into v from begin_lane_read(consumer_id, lane, lanes) b;
    if v.partition is null then
        select s.seq into first
        from scan_lane(lane, lanes, after, 1, v.wish, v.columns, v.upper_end) s;
    else
        select s.seq into first
        from scan_partition(v.partition, after, 1, v.wish, v.columns, v.upper_end) s;
    end if;
    return greatest(least(coalesce(first - 1, safe), safe), after);
end $$;

-- move_lane(consumer_id, member, lane, lanes, seq) -> whether the process still has the lane.
--
-- If it does, the offsets of the lane's partitions move to seq, and never back.
-- Locks: the row of the lane, and the partitions, to the end of the transaction.
create or replace function move_lane(consumer_id int, member text, lane int, lanes int, seq bigint)
returns boolean
language plpgsql volatile as $$
declare
    o offsets;
begin
    perform from sink_lanes l
    where l.consumer_id = move_lane.consumer_id and l.lane = move_lane.lane
      and l.member = move_lane.member and l.leased_until > moment()
    for update;
    if not found then
        return false;
    end if;
    for o in select n.* from newest_offsets(move_lane.consumer_id) n
             where n.partition % lanes = move_lane.lane and n.seq < move_lane.seq
             order by n.partition
    loop
        perform pg_advisory_xact_lock(partition_lock(o.consumer_id, o.partition));
        o := newest_offset(o.consumer_id, o.partition);
        if o.seq < move_lane.seq then
            perform put_offset(o, move_lane.seq, o.leased_until);
        end if;
    end loop;
    return true;
end $$;

-- bury_refused(consumer_id, seqs, keys, reasons) -> the number of new dead letters of a stream.
--
-- A message that already is a dead letter of the consumer is skipped, because a lane may read a
-- message twice.
create or replace function bury_refused(consumer_id int, seqs bigint[], keys text[], reasons text[])
returns int
language plpgsql volatile as $$
declare
    buried int;
begin
    insert into dead_messages (consumer_id, seq, topic, key, data, deliver_count, reason, history,
                               commit_lsn, ordinal, commit_time, inserted_at)
    select bury_refused.consumer_id, m.seq, m.topic, u.key, m.data, 1, u.reason, '[]',
           m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
    from unnest(seqs, keys, reasons) as u (seq, key, reason)
    join messages m on m.seq = u.seq
    where not exists (select from dead_messages d
                      where d.consumer_id = bury_refused.consumer_id and d.seq = u.seq)
    order by m.seq;
    get diagnostics buried = row_count;
    return buried;
end $$;

-- make_dead_letters(consumer_id): Create the partition of dead_messages for a stream with a sink.
--
-- Queue and fifo consumers have theirs from the beginning. Nothing happens if it is there.
-- Locks: SHARE UPDATE EXCLUSIVE on dead_messages, to the end of the transaction.
create or replace function make_dead_letters(consumer_id int) returns void
language plpgsql volatile set search_path from current as $$
begin
    if to_regclass('dead_messages_' || consumer_id) is null then
        execute format('create table %I (like dead_messages including all)',
                       'dead_messages_' || consumer_id);
        execute format('alter table dead_messages attach partition %I for values in (%s)',
                       'dead_messages_' || consumer_id, consumer_id);
    end if;
end $$;

-- note_sink(consumer_id, counts, seconds, error, blocked): Add to the counters of a sink.
--
-- Parameters:
--   counts   the numbers of messages delivered, failed and retried, and of batches, since the last
--            call of this process
--   seconds  how long these batches took
--   error    the present error, or null
--   blocked  the message for which others wait, or null
create or replace function note_sink(consumer_id int, counts bigint[], seconds float8, error text,
                                     blocked jsonb) returns void
language sql volatile as $$
    insert into sinks as s (consumer_id, delivered, failed, retried, batches, seconds, delivered_at,
                            error, error_at, blocked)
    values ($1, $2[1], $2[2], $2[3], $2[4], $3, case when $2[1] > 0 then moment() end, $4,
            case when $4 is not null then moment() end, $5)
    on conflict (consumer_id) do update
    set delivered = s.delivered + excluded.delivered, failed = s.failed + excluded.failed,
        retried = s.retried + excluded.retried, batches = s.batches + excluded.batches,
        seconds = s.seconds + excluded.seconds,
        delivered_at = coalesce(excluded.delivered_at, s.delivered_at),
        error = excluded.error, error_at = excluded.error_at, blocked = excluded.blocked
$$;

-- sink_source() -> the identity of the source, for the identities of messages.
--
-- Returns:
--   slot                  the replication slot, which no other store uses
--   from_seqs, timelines  each timeline of the source, with the first seq that was committed on it
create or replace function sink_source()
returns table (system_identifier text, database text, slot text, from_seqs bigint[],
               timelines int[])
language sql stable as $$
    select s.system_identifier, s.database, s.slot,
           array(select t.from_seq from timelines t order by t.from_seq),
           array(select t.timeline from timelines t order by t.from_seq)
    from source s
$$;

-- put_off(consumer, receipts, delay) -> the number of deliveries that are visible after the delay.
--
-- Unlike nack(), the delivery does not count. A sink with `on_failure: block` puts a message off
-- for ever, so that the later messages of its key wait.
-- In fifo the later messages of the same key in the same claim are given back too.
-- Raises:
--   CB003  one of the texts is not a receipt
create or replace function put_off(consumer text, receipts text[], delay interval) returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
begin
    return give_back_uncounted(queue_named(consumer), receipts, later(moment(), delay));
end $$;

-- bury_claimed(consumer, receipts, reason) -> the number of deliveries that became dead letters,
-- because their form cannot be made or the target refused them.
--
-- Raises:
--   CB003  one of the texts is not a receipt
create or replace function bury_claimed(consumer text, receipts text[], reason text) returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c consumers := queue_named(consumer);
    given receipt[] := parse_receipts(receipts);
    refused delivery[];
begin
    refused := settle_deliveries(c.id, in_flight(c.id, given, moment()),
                                 moment());
    return bury(c.id, array(select with_note(d, moment(), reason) from unnest(refused) d), reason);
end $$;

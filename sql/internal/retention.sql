-- Retention: old segments of the log are dropped whole when no consumer needs them. If groups
-- compact, the messages that compaction keeps are merged into messages_compacted first.

-- drop_segments(retention, max_retention, max_bytes) -> the number of segments dropped.
--
-- A segment is dropped if all of this is true:
--   - Its newest message is older than `retention`, or the log is larger than max_bytes.
--   - Every seq in it is below max_safe_seq(), so nothing in it can still commit. The segment into
--     which the log is growing therefore stays.
--   - No queue or fifo consumer has an unfinished message in it. Redriven messages do not count,
--     because they have their data with them.
--   - No member of a group is reading there now.
--   - Every mirror has applied it, or it is older than max_retention.
-- If groups compact, the messages that they need move to messages_compacted. That table is dropped
-- like a segment when no group compacts any more.
--
-- Parameters:
--   retention      the age at which a segment may be dropped
--   max_retention  the age at which unfinished messages become dead letters; null: never
--   max_bytes      the size of the log in bytes; null: any size
-- Returns:
--   dropped  the number of segments
--   held_by  the consumer that keeps the next segment: it has unfinished messages there, or it is a
--            group with a member that is reading there
--   lost     the number of dropped messages that a group had not read. The next read of the group
--            reports it.
--   expired  the number of unfinished messages that became dead letters. They remain dead letters
--            even if no segment was dropped.
-- Raises: CB005 if the isolation level is above READ COMMITTED.
-- Locks: ACCESS EXCLUSIVE on messages, for the drop only, after all work that needs time. The
-- function waits 50 ms for it, and the bridge waits meanwhile. If a receiver, a publisher or
-- pg_dump keeps its transaction open for longer, the next call drops the segments. If groups
-- compact, each call drops one segment.
create or replace function drop_segments(retention interval, max_retention interval default null,
                                         max_bytes bigint default null, out dropped int,
                                         out held_by text, out lost bigint, out expired bigint)
language plpgsql volatile
set search_path from current set lock_timeout = '50ms' set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    size constant bigint := 1000000;
    safe constant bigint := max_safe_seq();
    bytes bigint := case when max_bytes is not null
                    then (select sum(pg_total_relation_size(s::regclass))
                          from log_segments() s) end;
    compacting constant boolean := is_compacting();
    segment text;
    beyond bigint; -- the first seq after the segment
    newest timestamptz;
    doomed text[] := '{}';
    ends bigint[] := '{}';
begin
    perform require_read_committed('drop_segments()');
    expired := 0;
    for segment, beyond in
        select s, (substring(s from '([0-9]+)"?$')::bigint + 1) * size from log_segments() s
        union all
        select 'messages_compacted', log_begin()
        where not compacting and to_regclass('messages_compacted') is not null
        order by 2
    loop
        exit when beyond > safe;
        execute format('select s.inserted_at from %s s order by s.seq desc limit 1', segment)
        into newest;
        exit when newest > moment() - retention and (bytes <= max_bytes) is not false;
        if newest <= moment() - max_retention then
            expired := expired + expire_before(beyond);
        end if;
        held_by := coalesce(unfinished_before(beyond), reading_before(beyond),
                            case when (newest <= moment() - max_retention) is not true
                                 then mirror_behind(beyond) end);
        exit when held_by is not null;
        bytes := bytes - pg_total_relation_size(segment::regclass);
        doomed := doomed || segment;
        ends := ends || beyond;
        exit when compacting;
    end loop;
    lost := drop_all(doomed, ends, compacting, moment() - max_retention);
    dropped := case when lost is null then 0 else cardinality(doomed) end;
    lost := coalesce(lost, 0);
end $$;

-- drop_all(segments, ends, compacting, too_old) -> the number of messages that groups had not read.
--
-- The result is null if nothing was dropped, because the log is in use. The work that needs time is
-- done before the lock. After the lock, one more check follows, because a consumer may have been
-- added meanwhile.
-- Locks: ACCESS EXCLUSIVE on messages, to the end of the transaction.
create or replace function drop_all(segments text[], ends bigint[], compacting boolean,
                                    too_old timestamptz) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    total bigint := 0;
    beyond bigint;
begin
    if segments = '{}' then
        return 0;
    end if;
    perform refuse_unlockable();
    foreach beyond in array ends loop
        total := total + leave_behind(beyond);
    end loop;
    if compacting then
        return total + compact_segment(segments[1], ends[1], too_old);
    end if;
    lock table only messages in access exclusive mode;
    if unfinished_before(ends[cardinality(ends)]) is not null then
        raise exception 'in use' using errcode = 'lock_not_available';
    end if;
    execute format('drop table %s', array_to_string(segments, ', '));
    return total;
exception
    when lock_not_available then
        return null; -- the work of this function is rolled back
end $$;

-- expire_before(seq) -> the number of unfinished messages below seq that became dead letters.
--
-- These are waiting messages, messages given back, and deliveries whose timeout passed. Their data
-- is kept with them. A delivery in flight is left to its receiver. At most 2,000 rows of waiting
-- are read per consumer. Redriven messages (tie above 0) are left out. Messages that only have data
-- of their own from keep_own() (tie 0) are not left out.
-- Locks: the rows that it removes or changes, with SKIP LOCKED.
create or replace function expire_before(seq bigint) returns bigint
language plpgsql volatile
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    c consumers;
    waiting delivery[];
    returned delivery[];
    leased delivery[];
    total bigint := 0;
begin
    for c in select * from consumers where mode <> 'stream' order by id loop
        execute format($query$
            with old as materialized (
                select w.* from waiting_%1$s w
                where w.consumer_id = %1$s and w.ord < $1
                order by w.ord, w.tie limit 2000 for update skip locked
            ), each as materialized (
                select o.keys is null as log_key,
                       case when cardinality(o.keys) = 1 then o.keys[1] else u.key end as key,
                       o.barrier, o.inserted_at, o.ord, o.tie, u.seq, u.n,
                       u.seq < $1 and not exists (
                           select from redriven r where r.consumer_id = %1$s and r.seq = u.seq
                                                    and r.tie > 0) as expired
                from old o
                cross join lateral unnest(o.seqs, o.keys) with ordinality as u (seq, key, n)
            ), rest as (
                select e.ord, e.tie,
                       array_agg(e.seq order by e.n) filter (where not e.expired) as seqs,
                       case when not bool_or(e.log_key)
                            then array_agg(e.key order by e.n) filter (where not e.expired)
                       end as keys
                from each e group by e.ord, e.tie having bool_or(e.expired)
            ), gone as (
                -- Not by ctid: a row that changed before it was locked has a ctid unknown to this
                -- snapshot.
                delete from waiting_%1$s w using rest r
                where w.consumer_id = %1$s and w.ord = r.ord and w.tie = r.tie and r.seqs is null
            ), cut as (
                update waiting_%1$s w set seqs = r.seqs, keys = r.keys from rest r
                where w.consumer_id = %1$s and w.ord = r.ord and w.tie = r.tie
                  and r.seqs is not null
            )
            select array_agg(row(null, null, null, e.seq,
                                 case when e.log_key then m.key else e.key end, e.barrier, 0, '[]',
                                 null, null, e.inserted_at, e.ord, e.tie)::delivery order by e.seq)
            from each e
            left join lateral (select m.key from messages m where m.seq = e.seq limit 1) m
              on e.log_key
            where e.expired
            $query$, c.id) into waiting using seq;
        with gone as (
            delete from delayed d
            where d.consumer_id = c.id and d.seq = any (array(
                select o.seq from delayed o
                where o.consumer_id = c.id and o.seq < expire_before.seq
                  and not exists (select from redriven r where r.consumer_id = c.id
                                                           and r.seq = o.seq and r.tie > 0)
                for update skip locked))
            returning d.*)
        select array_agg(row(null, null, null, g.seq, g.key, g.barrier, g.deliver_count, g.history,
                             g.last_delivered_at, g.visible_at, g.inserted_at, g.ord,
                             g.tie)::delivery order by g.seq) into returned from gone g;
        leased := array(select d from unnest(
                            lock_expired(c.id, newest_hint(c.id), 100000, 0, 0, moment())) d
                        where d.seq < expire_before.seq
                          and not exists (select from redriven r
                                          where r.consumer_id = c.id and r.seq = d.seq
                                            and r.tie > 0));
        perform remove_locked(c.id, leased);
        total := total + bury(c.id, coalesce(waiting, '{}') || coalesce(returned, '{}') || leased,
                              'expired: older than store.max_retention');
    end loop;
    return total;
end $$;

-- unfinished_before(seq) -> the name of a consumer with an unfinished message below seq, or null.
--
-- Messages whose data is in redriven are left out, because they do not need the log.
create or replace function unfinished_before(seq bigint) returns text
language plpgsql volatile
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    c consumers;
    unfinished boolean;
begin
    for c in select * from consumers where mode <> 'stream' order by id loop
        -- One statement, so that a message that moves between the tables is seen in one of them.
        execute format($query$
            select exists (select from live_waiting_%1$s(newest_hint(%1$s)) w
                           cross join lateral unnest(w.seqs) as u (seq)
                           where w.ord < $1 and u.seq < $1
                             and not exists (select from redriven r
                                             where r.consumer_id = %1$s and r.seq = u.seq))
                or exists (select from live_leases(%1$s, newest_hint(%1$s)) l
                           cross join lateral
                               unsettled(%1$s, l.claim_id, l.part, l.seqs, null) u
                           where u.seq < $1
                             and not exists (select from redriven r
                                             where r.consumer_id = %1$s and r.seq = u.seq))
                or exists (select from delayed d where d.consumer_id = %1$s and d.seq < $1
                             and not exists (select from redriven r
                                             where r.consumer_id = %1$s and r.seq = d.seq))
            $query$, c.id) into unfinished using seq;
        if unfinished then
            return c.name;
        end if;
    end loop;
    return null;
end $$;

-- reading_before(seq) -> the name of a group with a member that is reading below seq, or null.
--
-- The member reads under a lease, or in a transaction that is open. Groups that compact are left
-- out, because they find there the messages that compaction keeps.
-- Locks: the partitions whose offset is below seq, to the end of the transaction, without waiting.
-- So no member can begin to read there.
create or replace function reading_before(seq bigint) returns text
language plpgsql volatile
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return (select c.name from consumers c cross join lateral newest_offsets(c.id) o
            where c.mode = 'stream' and not compacts(c.config) and o.seq < reading_before.seq - 1
              and (o.leased_until > moment()
                   or not pg_try_advisory_xact_lock(partition_lock(c.id, o.partition)))
            limit 1);
end $$;

-- leave_behind(seq) -> the number of messages below seq that groups want and have not read.
--
-- The offsets of these groups move to seq and store the number of lost messages. Groups that
-- compact are left out.
create or replace function leave_behind(seq bigint) returns bigint
language plpgsql volatile
set search_path from current set jit = off
set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    total bigint := 0;
    g record;
    unread bigint;
begin
    for g in select o, wish_of(c) as wish from consumers c cross join lateral newest_offsets(c.id) o
             where c.mode = 'stream' and not compacts(c.config) and o.seq < leave_behind.seq - 1
    loop
        select count(*) into unread from messages m
        where m.partition = (g.o).partition and m.seq > (g.o).seq and m.seq < leave_behind.seq
          and is_wanted(m.topic, m.data, m.reader, g.wish);
        perform put_lost_offset(g.o, leave_behind.seq - 1, unread);
        total := total + unread;
    end loop;
    return total;
end $$;

-- put_lost_offset(old, seq, unread): Move the offset to seq and add `unread` to its lost messages.
create or replace function put_lost_offset(old offsets, seq bigint, unread bigint) returns void
language plpgsql volatile as $$
declare
    moved constant offsets := put_offset(old, seq, null);
begin
    if unread > 0 or old.lost > 0 then
        update offsets o set lost = unread + coalesce(old.lost, 0)
        where o.consumer_id = moved.consumer_id and o.partition = moved.partition
          and o.id = moved.id;
    end if;
end $$;

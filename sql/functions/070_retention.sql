-- The log's old segments: dropped whole, when nobody needs them any more.

-- drop_segments(retention) → how many segments went; held_by: the consumer whose unfinished messages keep the next one, or the group
-- whose member reads there just now; lost: how many messages went that a group had not read, which its next read says.
-- A segment goes when its newest message is older than the retention, nothing in it can still commit, and no queue or fifo
-- consumer has an unfinished message there (redriven ones carry their data with them). The one that the log is in stays.
-- Locks: ACCESS EXCLUSIVE on messages for the drop alone. Waits for it 50 ms, in which the bridge waits behind it, and
-- leaves it to the next call when a receiver that stays in its transaction holds it longer.
create or replace function drop_segments(retention interval, out dropped int, out held_by text, out lost bigint)
language plpgsql volatile
set search_path from current set lock_timeout = '50ms' set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    size constant bigint := 1000000;
    safe constant bigint := max_safe_seq();
    segment text;
    beyond bigint; -- the first seq behind the segment
    newest timestamptz;
begin
    dropped := 0;
    lost := 0;
    for segment in select s from log_segments() s loop
        beyond := (substring(segment from '([0-9]+)"?$')::bigint + 1) * size;
        exit when beyond > safe;
        execute format('select s.inserted_at from %s s order by s.seq desc limit 1', segment) into newest;
        exit when newest > moment() - retention;
        held_by := coalesce(unfinished_before(beyond), reading_before(beyond));
        exit when held_by is not null;
        lost := lost + leave_behind(beyond);
        execute format('drop table %s', segment);
        dropped := dropped + 1;
    end loop;
exception
    when lock_not_available then
        dropped := 0; -- what this call had dropped is there again
        lost := 0;
end $$;

-- unfinished_before(seq) → a consumer that has an unfinished message of the log below seq; null if none has.
create or replace function unfinished_before(seq bigint) returns text
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    c consumers;
    unfinished boolean;
begin
    for c in select * from consumers where mode <> 'stream' order by id loop
        -- One statement: a message that moves is seen in one place.
        execute format($query$
            select exists (select from live_waiting_%1$s(newest_hint(%1$s)) w cross join lateral unnest(w.seqs) as u (seq)
                           where w.ord < $1
                             and not exists (select from redriven r where r.consumer_id = %1$s and r.seq = u.seq))
                or exists (select from live_leases(%1$s, newest_hint(%1$s)) l cross join lateral unnest(l.seqs) as u (seq)
                           where u.seq < $1
                             and not exists (select from redriven r where r.consumer_id = %1$s and r.seq = u.seq)
                             and not exists (select from settled s where s.consumer_id = %1$s and s.token = l.token
                                             and s.part = l.part and s.seq = u.seq))
                or exists (select from delayed d where d.consumer_id = %1$s and d.seq < $1
                             and not exists (select from redriven r where r.consumer_id = %1$s and r.seq = d.seq))
            $query$, c.id) into unfinished using seq;
        if unfinished then
            return c.name;
        end if;
    end loop;
    return null;
end $$;

-- reading_before(seq) → a group of which a member reads below seq just now, under a lease or in its transaction; null if none.
-- Locks: the partitions that stand below seq, to the end of the transaction: nobody begins to read there.
create or replace function reading_before(seq bigint) returns text
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return (select c.name from consumers c cross join lateral newest_offsets(c.id) o
            where c.mode = 'stream' and o.seq < reading_before.seq - 1
              and (o.leased_until > moment() or not pg_try_advisory_xact_lock(partition_lock(c.id, o.partition)))
            limit 1);
end $$;

-- leave_behind(seq) → how many messages below seq groups want and have not read. Their offsets move there, and remember it.
create or replace function leave_behind(seq bigint) returns bigint
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    total bigint := 0;
    g record;
    unread bigint;
    moved offsets;
begin
    for g in select o, wish_of(c.config) as wish from consumers c cross join lateral newest_offsets(c.id) o
             where c.mode = 'stream' and o.seq < leave_behind.seq - 1
    loop
        select count(*) into unread from messages m
        where m.partition = (g.o).partition and m.seq > (g.o).seq and m.seq < leave_behind.seq
          and is_wanted(m.topic, m.data, g.wish);
        moved := put_offset(g.o, leave_behind.seq - 1, null);
        if unread > 0 or (g.o).lost > 0 then
            update offsets o set lost = unread + coalesce((g.o).lost, 0)
            where o.consumer_id = moved.consumer_id and o.partition = moved.partition and o.id = moved.id;
        end if;
        total := total + unread;
    end loop;
    return total;
end $$;

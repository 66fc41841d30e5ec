-- The log's old segments: dropped whole, when nobody needs them any more.

-- drop_segments(retention) → how many segments went; held_by: the consumer whose unfinished messages keep the next one.
-- A segment goes when its newest message is older than the retention, nothing in it can still commit, and no queue or fifo
-- consumer has an unfinished message there (redriven ones carry their data with them). The one that the log is in stays.
-- Locks: ACCESS EXCLUSIVE on messages for the drop alone. Waits for it 50 ms, in which the bridge waits behind it, and
-- leaves it to the next call when a receiver that stays in its transaction holds it longer.
create or replace function drop_segments(retention interval, out dropped int, out held_by text)
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
    for segment in select i.inhrelid::regclass from pg_inherits i join pg_class s on s.oid = i.inhrelid
                   where i.inhparent = 'messages'::regclass order by s.relname
    loop
        beyond := (substring(segment from '([0-9]+)"?$')::bigint + 1) * size;
        exit when beyond > safe;
        execute format('select s.inserted_at from %s s order by s.seq desc limit 1', segment) into newest;
        exit when newest > moment() - retention;
        held_by := unfinished_before(beyond);
        exit when held_by is not null;
        execute format('drop table %s', segment);
        dropped := dropped + 1;
    end loop;
exception
    when lock_not_available then
        dropped := 0; -- what this call had dropped is there again
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
            select exists (select from live_waiting_%1$s(newest_hint(%1$s)) w where w.ord < $1)
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

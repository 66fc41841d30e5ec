-- Merging many rows of one held key into few rows.
--
-- Claims of other keys pass these rows by. Without merging, a key with 100,000 messages would slow
-- them down.

-- merge_runs() -> the number of rows of waiting that were merged into others. The running bridge
-- calls it.
--
-- Raises:
--   CB005  the transaction's isolation level is above READ COMMITTED
create or replace function merge_runs() returns int
language plpgsql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    safe constant bigint := max_safe_seq();
    merged int := 0;
    id int;
begin
    perform require_read_committed('merge_runs()');
    for id in select c.id from consumers c where c.mode = 'fifo' order by c.id loop
        merged := merged + merge_runs(id, newest_hint(id), safe);
    end loop;
    return merged;
end $$;

-- merge_runs(consumer_id, hint, safe) -> the number of rows of one consumer that were merged into
-- others.
--
-- The function reads the first 10,000 rows, up to the first row that it may not merge: a row with
-- several keys, a barrier, a message published for later, or a row after `safe`. A message of the
-- key could still appear before a row after `safe`.
-- Locks: the rows, by SKIP LOCKED. If another session has locked a row of a key, no later row of
-- the key is merged into an earlier one.
create or replace function merge_runs(consumer_id int, hint hints, safe bigint) returns int
language plpgsql volatile as $$
declare
    held constant text[] := array(
        select h.key from held_keys(merge_runs.consumer_id, hint) h
        union
        select d.key from delayed d where d.consumer_id = merge_runs.consumer_id and d.in_order);
    merged int;
begin
    if held = '{}' then
        return 0;
    end if;
    execute replace($query$
        with looked as materialized (
            select l.ord, l.tie, l.keys, cardinality(l.seqs) as size, row_number() over () as n,
                   cardinality(l.keys) = 1 and not l.barrier and l.not_before is null
                   and l.ord <= $2 as mergeable
            from (select * from live_waiting_<id>($1) limit 10000) l
        ), held as (
            -- Rows of at least 512 messages remain as they are and separate the sections of a key.
            select l.*, l.keys[1] as key, count(*) filter (where l.size >= 512)
                                          over (partition by l.keys[1] order by l.n) as section
            from looked l
            where l.n < coalesce((select min(w.n) from looked w where not w.mergeable), 10001)
              and case when true then l.keys[1] in (select h from unnest($3) h) end
        ), candidates as materialized (
            select c.* from (select h.*, count(*) over (partition by h.key, h.section) as rows
                             from held h where h.size < 512) c
            where c.rows >= 16
        ), locked as materialized (
            select c.n, c.key, c.section, w.ord, w.tie, w.seqs
            from candidates c cross join lateral (
                select * from waiting_<id> w
                where w.consumer_id = <id> and w.ord = c.ord and w.tie = c.tie
                for update skip locked) w
        ), walls as (
            select c.key, min(c.n) as n from candidates c left join locked l on l.n = c.n
            where l.n is null group by c.key
        ), in_reach as materialized (
            select l.*, sum(cardinality(l.seqs))
                        over (partition by l.key, l.section order by l.n) / 1024 as run
            from locked l left join walls w on w.key = l.key where w.n is null or l.n < w.n
        ), runs as materialized (
            select i.key, i.section, i.run, min(i.n) as n,
                   array_agg(u.seq order by i.n, u.n) as seqs
            from in_reach i cross join lateral unnest(i.seqs) with ordinality as u (seq, n)
            group by i.key, i.section, i.run having count(distinct i.n) > 1
        ), grown as (
            update waiting_<id> w set seqs = r.seqs from runs r join in_reach i on i.n = r.n
            where w.consumer_id = <id> and w.ord = i.ord and w.tie = i.tie
        ), gone as (
            delete from waiting_<id> w
            using in_reach i join runs r on r.key = i.key and r.section = i.section
                and r.run = i.run
                                         and r.n < i.n
            where w.consumer_id = <id> and w.ord = i.ord and w.tie = i.tie
            returning 1)
        select count(*) from gone
        $query$, '<id>', consumer_id::text)
    into merged using hint, safe, held;
    if merged > 0 then
        -- The old hint may name rows that no longer exist.
        perform renew_hint(consumer_id, hint, hint.waiting_floor);
    end if;
    return merged;
end $$;

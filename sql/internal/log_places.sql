-- Places in the log: which seq is meant by a time, and up to which seq the log is complete.

-- seq_before(target, compacted) -> the seq after which a reader begins that seeks to the target.
--
-- target is earliest, latest, a seq, or a time as time_of() takes it. compacted means that the
-- reader also reads the messages that compaction has kept.
-- Raises: CB004 if the target is null, none of these, ahead of the log, or before the messages that
-- the log still has.
create or replace function seq_before(target text, compacted boolean default false) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    first constant bigint := case when compacted then 1 else log_begin() end;
    last bigint;
    found bigint;
begin
    if target is null then
        raise exception 'the target is null'
            using errcode = 'CB004', hint = 'Give earliest, latest, a seq or a time.';
    end if;
    last := max_safe_seq();
    if target = 'earliest' then
        return first - 1;
    elsif target = 'latest' then
        return last;
    elsif target ~ '^[0-9]{1,18}$' then
        -- Up to the last seq drawn: a group that reads only tables may have read beyond
        -- max_safe_seq().
        last := coalesce(pg_sequence_last_value('messages_seq'), 0);
        if target::bigint > last + 1 then
            raise exception 'seq % is after the end of the log, which is seq %', target, last
                using errcode = 'CB004', hint = 'latest is the end of the log.';
        end if;
        found := target::bigint - 1;
    else
        -- At most max_safe_seq(): a transaction that drew an earlier seq may still commit it.
        found := least(coalesce(seq_at(time_of(target), last) - 1, last), last);
    end if;
    if found < first - 1 and first > 1 then
        raise exception '% is before the beginning of the log, which is seq %',
            quote_literal(target),
            first || coalesce(' of ' || (select m.inserted_at from messages m
                                         where m.seq >= first order by m.seq limit 1), '')
            using errcode = 'CB004', hint = 'earliest is the beginning of the log.';
    end if;
    return greatest(found, 0);
end $$;

-- seq_until(target) -> the last seq of a range that ends before the target.
--
-- For a time, this is the last message that may have been committed before it. seq_before(), in
-- contrast, returns the seq before the first message that may have been committed then or later.
-- Raises: CB004 as seq_before() does.
create or replace function seq_until(target text) returns bigint
language plpgsql volatile
set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    before constant bigint := seq_before(target);
    at timestamptz;
begin
    if target in ('earliest', 'latest') or target ~ '^[0-9]{1,18}$' then
        return before;
    end if;
    at := time_of(target);
    return greatest(before, (select m.seq from messages m
                             where coalesce(m.commit_time, m.inserted_at) < at
                             order by m.seq desc limit 1));
end $$;

-- seq_at(at, safe) -> the first seq that was, or may have been, committed at this time or later.
--
-- The result is null if there is none, and 0 if retention may have dropped earlier ones. safe is
-- max_safe_seq().
--
-- The commit time of a change of a table is given by the source's clock. A published message has
-- only the time at which it was inserted, by the store's clock, and may have been committed much
-- later. It is skipped only if it is known to be committed before `at`: by a safe point, or by a
-- message that was published before `at`. Therefore no message is missed, but some that were
-- committed shortly before may be included.
create or replace function seq_at(at timestamptz, safe bigint) returns bigint
language plpgsql volatile
set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    settled constant bigint := case when at > moment() then safe else coalesce((
        select p.seq from safe_points p where p.at < seq_at.at order by p.seq desc limit 1), 0) end;
    ended bigint; -- all transactions with lower ids had ended by `at`
    segment text;
    newest record;
    found record;
begin
    if settled < safe then
        select m.horizon into ended from messages m
        where m.seq > settled and m.seq <= safe
          and m.horizon is not null and m.inserted_at <= seq_at.at order by m.seq desc limit 1;
    end if;
    for segment in select s from log_segments() s loop
        -- A day of tolerance, because clocks are corrected.
        execute format('select max(s.seq) as seq, max(greatest(s.commit_time, s.inserted_at)) as at
                        from (select * from %s s order by s.seq desc limit 1000) s',
                       segment) into newest;
        continue when newest.seq is null
                      or newest.seq <= settled and newest.at < at - interval '1 day';
        execute format('select s.seq, coalesce(s.commit_time, s.inserted_at) as at from %s s
                        where coalesce(s.commit_time, s.inserted_at) >= $1
                          or s.commit_time is null and s.seq > $2 and (s.publisher < $3) is not true
                        order by s.seq limit 1', segment)
        into found using at, settled, ended;
        if found.seq = log_begin() and found.seq > 1 and found.at >= at then
            return 0; -- the first message that is left matches, so dropped ones may match too
        elsif found.seq is not null then
            return found.seq;
        end if;
    end loop;
    return null;
end $$;

-- note_safe_point(): Record up to which seq the log is complete now.
--
-- From these points seq_at() knows which messages were committed before a time. The running bridge
-- calls the function.
create or replace function note_safe_point() returns void
language plpgsql volatile set search_path from current as $$
declare
    safe constant bigint := max_safe_seq(); -- read before the time is
begin
    insert into safe_points (seq, at) select safe, moment()
    where safe > coalesce((select p.seq from safe_points p order by p.seq desc limit 1), 0)
    on conflict do nothing;
    delete from safe_points p where p.seq < log_begin() - 1;
end $$;

-- log_segments() -> the names of the log's segments, in order, without messages_compacted.
create or replace function log_segments() returns setof text
language sql stable as $$
    select i.inhrelid::regclass::text from pg_inherits i join pg_class s on s.oid = i.inhrelid
    where i.inhparent = 'messages'::regclass and s.relname <> 'messages_compacted'
    order by s.relname
$$;

-- log_begin() -> the first seq that the log can still have, apart from compacted messages.
--
-- It is the first seq of the oldest segment, but at least 1.
create or replace function log_begin() returns bigint
language sql stable as $$
    select greatest(1, (substring((select s from log_segments() s limit 1)
                                  from '([0-9]+)"?$')::bigint) * 1000000)
$$;

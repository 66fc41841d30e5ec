-- Offsets: set, shown, and the number of partitions.

-- seek(consumer, target, partition) -> how many partitions were moved (null: all of the group). target: 'earliest' (what the log
-- still holds), 'latest' (what comes from now on), a seq (the next to be read), or a time as time_of() takes it (what was committed
-- then or later; seq_at() says what that means). Also with a timestamptz or a number: seek('audit', now() - interval '1 hour').
-- Leases end: a commit under one is refused.
-- Raises CB001, CB002, CB004 (a target that is none of these, lies ahead of the log, or before what it still holds), CB008.
-- Locks: the partitions; waits for transactions that read them, as long as the session's lock_timeout allows. While it waits for one
-- partition it holds no other.
create or replace function seek(consumer text, target text, partition int default null) returns int
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
begin
    return (select count(*) from seek_partitions(consumer, target, partition));
end $$;

-- seek(consumer, target, partition) -> the same, for a time.
create or replace function seek(consumer text, target timestamptz, partition int default null) returns int
language plpgsql volatile security definer set search_path from current set timezone = 'UTC' set datestyle = 'ISO, MDY' as $$
begin
    return seek(consumer, target::text, partition);
end $$;

-- seek(consumer, target, partition) -> the same, for a seq.
create or replace function seek(consumer text, target bigint, partition int default null) returns int
language plpgsql volatile security definer set search_path from current as $$
begin
    return seek(consumer, target::text, partition);
end $$;

-- seek_partitions(consumer, target, chosen) -> what seek() does, with where each partition went: the offset that it had and the one
-- that it has now, and the time of the next message behind that; null where there is none yet.
create or replace function seek_partitions(consumer text, target text, chosen int default null)
returns table (partition int, old_seq bigint, new_seq bigint, "time" timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    goal bigint;
    wanted int[];
    held int; -- a partition that another transaction holds
    one int;
    at offsets;
begin
    perform require_read_committed('seek()');
    goal := seq_before(target, compacts(c.config));
    wanted := array(select n.partition from newest_offsets(c.id) n
                    where chosen is null or n.partition = chosen order by n.partition);
    loop
        begin
            if held is not null then
                perform locked_offset(c, held);
            end if;
            held := (select w from unnest(wanted) w where not pg_try_advisory_xact_lock(partition_lock(c.id, w)) limit 1);
            exit when held is null;
            raise exception 'held' using errcode = 'CB000'; -- gives back those that it has
        exception
            when sqlstate 'CB000' then
                null;
        end;
    end loop;
    if wanted = '{}' then
        perform locked_offset(c, chosen); -- says that there is none
    end if;
    foreach one in array wanted loop
        at := locked_offset(c, one);
        partition := one;
        old_seq := at.seq;
        -- 'latest' never leads back: a group of tables alone may have read beyond what publishers hold back.
        new_seq := case when target = 'latest' then greatest(goal, at.seq) else goal end;
        perform put_offset(at, new_seq, null);
        "time" := (select coalesce(m.commit_time, m.inserted_at) from messages m
                   where m.partition = one and m.seq > new_seq order by m.seq limit 1);
        return next;
    end loop;
end $$;

-- peek_stream(consumer, max_messages, place, newest) -> messages that the group reads, in order of seq, with the columns of
-- read_stream(); receipt is null. place: as seek() takes it; null = from the group's offsets on. newest: the last ones.
-- Raises CB001, CB002, CB004 (a bad place), CB008. Moves no offset, and locks nothing.
create or replace function peek_stream(consumer text, max_messages int default 10, place text default null, newest boolean default false)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json, commit_lsn pg_lsn,
               ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
    -- A statement of its own, before those that look into the log.
    safe constant bigint := case when w.topics <> '{}' then max_safe_seq() else 9223372036854775807 end;
    spots offsets[] := array(select n from newest_offsets(c.id) n where place is null order by n.partition);
    after bigint := case when place is null then (select min(s.seq) from unnest(spots) s) else seq_before(place, compacts(c.config)) end;
begin
    if newest then
        return query
            select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
            from (select * from messages m where m.seq > coalesce(case when place is not null then after end, 0) and m.seq <= safe
                    and is_wanted(m.topic, m.data, m.reader, w) order by m.seq desc limit max_messages) m
            order by m.seq;
        return;
    end if;
    return query
        select null::text, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
        from messages m
        where m.seq > after and m.seq <= safe and is_wanted(m.topic, m.data, m.reader, w)
          and (place is not null or m.seq > (select s.seq from unnest(spots) s where s.partition = m.partition))
        order by m.seq limit max_messages;
end $$;

-- seq_before(target, compacted) -> the seq behind which a reader begins that seeks so. compacted: it reads what compaction kept, too.
create or replace function seq_before(target text, compacted boolean default false) returns bigint
language plpgsql volatile set search_path from current as $$
declare
    first constant bigint := case when compacted then 1 else log_begin() end;
    last bigint;
    found bigint;
begin
    if target is null then
        raise exception 'the target is null' using errcode = 'CB004', hint = 'Give earliest, latest, a seq, or a time.';
    end if;
    last := max_safe_seq();
    if target = 'earliest' then
        return first - 1;
    elsif target = 'latest' then
        return last;
    elsif target ~ '^[0-9]{1,18}$' then
        -- By what was drawn: a group of tables alone has read beyond what publishers hold back.
        last := coalesce(pg_sequence_last_value('messages_seq'), 0);
        if target::bigint > last + 1 then
            raise exception 'seq % lies ahead of the log, which ends at %', target, last using errcode = 'CB004';
        end if;
        found := target::bigint - 1;
    else
        -- Not over what can still commit, although it was begun before.
        found := least(coalesce(seq_at(time_of(target), last) - 1, last), last);
    end if;
    if found < first - 1 and first > 1 then
        raise exception '% lies before what the log still holds: it begins at seq %, of %', quote_literal(target), first,
            coalesce((select m.inserted_at::text from messages m where m.seq >= first order by m.seq limit 1), 'no time yet')
            using errcode = 'CB004', hint = '''earliest'' is the first message that is left.';
    end if;
    return greatest(found, 0);
end $$;

-- seq_until(target) -> the last seq of a range that ends there, without the target itself. For a time: the last message that may
-- have been committed before it, as seq_before() gives the first that may have been committed after it.
create or replace function seq_until(target text) returns bigint
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    before constant bigint := seq_before(target);
    at timestamptz;
begin
    if target in ('earliest', 'latest') or target ~ '^[0-9]{1,18}$' then
        return before;
    end if;
    at := time_of(target);
    return greatest(before, (select m.seq from messages m where coalesce(m.commit_time, m.inserted_at) < at
                             order by m.seq desc limit 1));
end $$;

-- time_of(target, what) -> the time that a text names, whatever the session's settings: 2026-05-01 10:00+02; -1h, an hour ago (ms, s, m, h
-- or d); now; today, yesterday or tomorrow, which begin at midnight in UTC. what: the word for it in an error.
-- Raises CB004 for a text that is none, or that names no zone: 10:00 is another moment for each reader.
create or replace function time_of(target text, what text default 'place in the log') returns timestamptz
language plpgsql volatile set search_path from current set datestyle = 'ISO, MDY' set timezone = 'UTC'
set intervalstyle = 'postgres' as $$
declare
    word constant text := lower(btrim(target));
    at timestamptz;
    elsewhere timestamptz;
begin
    if word ~ '^[-+] *[0-9]{1,15}([.][0-9]{1,15})? *(ms|s|m|h|d)$' then
        return later(moment(), word::interval);
    elsif word ~ '^[0-9]{1,15}([.][0-9]{1,15})? *(ms|s|m|h|d)$' then
        raise exception '% is a duration, and no %', quote_literal(target), what
            using errcode = 'CB004', hint = format('-%s is that long ago, and +%1$s that far ahead.', word);
    elsif word in ('now', 'today', 'yesterday', 'tomorrow') then
        return case word when 'now' then moment() else
            date_trunc('day', moment()) + array_position('{yesterday,today,tomorrow}', word) * interval '1 day' - interval '2 days' end;
    end if;
    -- 05.01.2026 is the first of May in one session and the fifth of January in another.
    if target ~ '^ *[0-9]{1,2}[./ -]' then
        raise invalid_datetime_format;
    end if;
    at := target::timestamptz;
    perform set_config('timezone', '+07:30', true); -- to the end of this function
    elsewhere := target::timestamptz;
    if at <> elsewhere then
        raise exception '% names no time zone', quote_literal(target)
            using errcode = 'CB004', hint = 'Add it: 2026-05-01 10:00+02, or 2026-05-01 08:00Z.';
    end if;
    return at;
exception
    when invalid_datetime_format or datetime_field_overflow or invalid_parameter_value or interval_field_overflow then
        raise exception '% is no %', quote_nullable(target), what using errcode = 'CB004',
            hint = case what when 'time' then '' else 'A place is earliest, latest, a seq, or a time. ' end
                || 'A time is 2026-05-01 10:00+02, -1h (an hour ago), or yesterday.';
end $$;

-- seq_at(at, safe) -> the first seq that was committed then or later, or that may have been; null where none was. 0 where
-- retention dropped what came first. safe: max_safe_seq().
-- A change of a table was committed when its source's clock says so. A published message tells when it was inserted, by the
-- store's clock, and may have been committed long after. It is passed over only where a safe point, or a message published
-- before `at`, shows that it was committed by then. So nothing is missed; some that were committed shortly before may come, too.
create or replace function seq_at(at timestamptz, safe bigint) returns bigint
language plpgsql volatile set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    settled constant bigint := case when at > moment() then safe else coalesce((
        select p.seq from safe_points p where p.at < seq_at.at order by p.seq desc limit 1), 0) end;
    ended bigint; -- transactions with lower ids had ended
    segment text;
    newest record;
    found record;
begin
    if settled < safe then
        select m.horizon into ended from messages m
        where m.seq > settled and m.seq <= safe and m.horizon is not null and m.inserted_at <= seq_at.at order by m.seq desc limit 1;
    end if;
    for segment in select s from log_segments() s loop
        -- A day: clocks are corrected.
        execute format('select max(s.seq) as seq, max(greatest(s.commit_time, s.inserted_at)) as at
                        from (select * from %s s order by s.seq desc limit 1000) s', segment) into newest;
        continue when newest.seq is null or newest.seq <= settled and newest.at < at - interval '1 day';
        execute format('select s.seq, coalesce(s.commit_time, s.inserted_at) as at from %s s
                        where coalesce(s.commit_time, s.inserted_at) >= $1
                           or s.commit_time is null and s.seq > $2 and (s.publisher < $3) is not true
                        order by s.seq limit 1', segment)
        into found using at, settled, ended;
        if found.seq = log_begin() and found.seq > 1 and found.at >= at then
            return 0; -- from the log's beginning on, so it may be older than all that is left
        elsif found.seq is not null then
            return found.seq;
        end if;
    end loop;
    return null;
end $$;

-- note_safe_point(): from now on seq_at() can tell that all which is committed now was committed by now. The running bridge calls it.
create or replace function note_safe_point() returns void
language plpgsql volatile set search_path from current as $$
declare
    safe constant bigint := max_safe_seq(); -- before the moment
begin
    insert into safe_points (seq, at) select safe, moment()
    where safe > coalesce((select p.seq from safe_points p order by p.seq desc limit 1), 0)
    on conflict do nothing;
    delete from safe_points p where p.seq < log_begin() - 1;
end $$;

-- log_segments() -> the log's segments by name, in order. Not what compaction has kept of earlier ones.
create or replace function log_segments() returns setof text
language sql stable as $$
    select i.inhrelid::regclass::text from pg_inherits i join pg_class s on s.oid = i.inhrelid
    where i.inhparent = 'messages'::regclass and s.relname <> 'messages_compacted' order by s.relname
$$;

-- log_begin() -> the first seq that the log can still hold: 1, or the first segment's that retention has left.
create or replace function log_begin() returns bigint
language sql stable as $$
    select greatest(1, (substring((select s from log_segments() s limit 1) from '([0-9]+)"?$')::bigint) * 1000000)
$$;

-- group_lag(consumer) -> where the group stands in each partition, and how far behind: messages that it wants, and the age in
-- seconds of the oldest of them (null where there is none). For people and monitors: it counts.
-- Raises CB001, CB002, CB008.
create or replace function group_lag(consumer text)
returns table (partition int, seq bigint, messages bigint, seconds float8, leased_until timestamptz, lost bigint,
               updated_at timestamptz)
language plpgsql volatile security definer set search_path from current as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
begin
    return query select * from group_lag_of(c.id, wish_of(c));
end $$;

-- group_lag_of(consumer_id, wish) -> the same of a group that was looked up.
create or replace function group_lag_of(consumer_id int, wish stream_wish)
returns table (partition int, seq bigint, messages bigint, seconds float8, leased_until timestamptz, lost bigint,
               updated_at timestamptz)
language sql volatile
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
    select o.partition, o.seq, m.number, extract(epoch from moment() - m.oldest)::float8,
           case when o.leased_until > moment() then o.leased_until end, o.lost, o.updated_at
    from newest_offsets($1) o
    cross join lateral (select count(*) as number, min(m.inserted_at) as oldest from messages m
                        where m.partition = o.partition and m.seq > o.seq and is_wanted(m.topic, m.data, m.reader, $2)) m
    order by o.partition
$$;

-- stream_settings(consumer) -> what a client has to know. channel: where appends are notified, as queue_settings() has it.
-- Raises CB001, CB002, CB008.
create or replace function stream_settings(consumer text, out id int, out channel text)
language plpgsql stable security definer set search_path from current as $$
begin
    id := (stream_named(consumer)).id;
    channel := current_schema();
end $$;

-- next_readable(consumer) -> when to look again, in seconds from now: messages wait that others read or hold back, or a lease ends,
-- of which nothing notifies; null where nothing is left.
-- Raises CB001, CB002, CB008.
create or replace function next_readable(consumer text) returns float8
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0 as $$
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
begin
    return (select case when c.paused then 1 else greatest(0.1, extract(epoch from min(o.leased_until) - moment())) end
            from newest_offsets(c.id) o
            -- Lateral, so that it is a look each: an EXISTS may become a join with all there is.
            cross join lateral (select from messages m where m.partition = o.partition and m.seq > o.seq
                                                         and is_wanted(m.topic, m.data, m.reader, w) limit 1) m
            having count(*) > 0);
end $$;

-- log_partitions() -> the number of partitions, as it is now, whatever the caller's snapshot.
create or replace function log_partitions() returns int
language sql volatile as $$
    select pg_sequence_last_value('partitions_seq')::int
$$;

-- begin_partitions(wanted) -> whether the number changes: then the caller's session holds the draw lock, nobody draws a seq, and
-- finish_partitions() must follow when this has committed. From the next seq on keys are spread over so many, and the groups
-- begin in new partitions there. In this order, because partitions must be known before anything is in them.
-- Locks: the draw lock of the log's sequence, for the session.
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

-- groups_lock() -> the advisory lock under which groups are made, and the number of partitions changed: so each group has all.
create or replace function groups_lock() returns bigint
language sql stable as $$
    select ('partitionings'::regclass::oid::bigint << 32) | 1
$$;

-- finish_partitions(wanted): publishers go by the new number, and may draw again.
create or replace function finish_partitions(wanted int) returns void
language plpgsql volatile set search_path from current as $$
begin
    perform setval('partitions_seq', wanted);
    perform pg_advisory_unlock(draw_lock('messages_seq'));
end $$;

-- safe_seq_holders() -> the transactions that hold max_safe_seq() back, the oldest first: from which seq on, since when.
create or replace function safe_seq_holders()
returns table (pid int, seq bigint, age_seconds float8, state text, query text)
language sql volatile security definer set search_path from current as $$
    select a.pid, l.last - ((l.last - l.low) & 4294967295) + 1, extract(epoch from clock_timestamp() - a.xact_start)::float8,
           a.state, left(a.query, 200)
    from (select l.pid, l.objid::bigint as low, coalesce(pg_sequence_last_value('messages_seq'), 0) as last
          from pg_locks l
          where l.locktype = 'advisory' and l.classid = 'messages_seq'::regclass::oid and l.objsubid = 2
            and l.mode = 'ShareLock' and l.granted
            and l.database = (select oid from pg_database where datname = current_database())) l
    join pg_stat_activity a on a.pid = l.pid
    order by a.xact_start
$$;

-- create_partition_indexes(only_one) -> whether one was made: what groups read the log by, on each segment that has none.
-- Without groups nobody pays for it. only_one: on the first such segment alone, before there is a group.
-- Raises 55P03 where a transaction has written into the segment, or makes a segment or an index, and stays open for 500 ms. Names it.
-- Locks: SHARE on a segment while its index is made: the bridge waits for the last one's, about a second for a full one.
-- SHARE UPDATE EXCLUSIVE on messages, so that only one session at a time makes an index.
create or replace function create_partition_indexes(only_one boolean default false) returns boolean
language plpgsql volatile set search_path from current set lock_timeout = '500ms' as $$
declare
    segment regclass;
    index text;
begin
    for segment in select s from log_segments() s where only_one or exists (select from consumers c where c.mode = 'stream') loop
        index := (select c.relname || '_partition' from pg_class c where c.oid = segment);
        continue when to_regclass(quote_ident(index)) is not null; -- not IF NOT EXISTS, which locks first
        lock table messages in share update exclusive mode;
        continue when to_regclass(quote_ident(index)) is not null;
        execute format('create index %I on %s (partition, seq)', index, segment);
        if only_one then
            return true;
        end if;
    end loop;
    return false;
exception
    when lock_not_available then
        raise exception 'an index on % has to wait for transactions that published, or make one too, and stay open: pid %', segment,
            (select string_agg(distinct l.pid::text, ', ') from pg_locks l
             where l.granted and l.pid <> pg_backend_pid()
               and (l.relation = segment and l.mode = 'RowExclusiveLock'
                    or l.relation = 'messages'::regclass and l.mode = 'ShareUpdateExclusiveLock'))
            using errcode = 'lock_not_available', hint = 'End them, and try again.';
end $$;

-- begin_group(consumer_id, config): the offsets of a new group. Its start: earliest, or now.
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

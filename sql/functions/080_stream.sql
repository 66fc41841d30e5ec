-- Streams: reading the log by partition, as a group. What a group has read is the newest row of offsets of each partition.
--
-- A partition is locked by an advisory lock to the end of the transaction that reads it or moves its offset; a lease is in the
-- row. Whoever has the lock looks at the newest row in a statement of its own, whose snapshot is younger than the lock.
-- Pages are said to cost nothing: then the index by partition is the cheaper one for the planner whatever it knows. Else it
-- would read along the primary key, which is in the table's order, and throw away what is of other partitions.

-- read_stream(consumer, max_messages, lease) -> up to max_messages of the least recently read free partition that has something
-- to return, in order of seq, behind the group's offset.
-- lease null: the partition is the caller's until its transaction ends; commit_offset() in the same transaction makes
-- reading, effect and offset one. With a lease it is the holder's of the receipt until the time is over.
-- A second call in a transaction takes another partition. No rows: nothing is held.
-- A group that takes published topics stops before what could still commit a smaller seq (max_safe_seq).
-- Raises CB001 (unknown consumer), CB002 (not a stream), CB004 (bad argument), CB005 (isolation level above READ COMMITTED),
-- CB008 (not this consumer's role), CB009 (retention dropped what the group had not read). Paused: a NOTICE and no rows.
-- Locks: the partition, never waited for.
create or replace function read_stream(consumer text, max_messages int default 100, lease interval default null)
returns table (receipt text, partition int, seq bigint, topic text, key text, data json, commit_lsn pg_lsn,
               ordinal int, commit_time timestamptz, inserted_at timestamptz)
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set random_page_cost = 0 set seq_page_cost = 0
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    c constant consumers := stream_named(consumer);
    w constant stream_wish := wish_of(c);
    held constant int[] := partitions_read(c.id);
    moment constant timestamptz := moment();
    upper_end bigint;
    safe bigint;
    o offsets;
    receipt_ text;
    spots offsets[];
begin
    perform check_read(max_messages, lease);
    if c.paused then
        raise notice 'consumer % is paused', quote_literal(c.name);
        return;
    end if;
    -- A statement of its own, before those that look into the log.
    safe := case when w.topics <> '{}' then max_safe_seq() end;
    spots := array(select n from newest_offsets(c.id) n order by n.id);
    upper_end := least(coalesce(safe, 9223372036854775807), end_of_era(w, spots));
    foreach o in array spots loop
        continue when o.partition = any (held) or o.leased_until > moment;
        if o.lost is not null then
            perform refuse_lost(c.name, o);
        end if;
        if not exists (select from messages m
                       where m.partition = o.partition and m.seq > o.seq and m.seq <= upper_end
                         and is_wanted(m.topic, m.data, m.reader, w))
        then
            perform pass_over(c.id, w, o, upper_end);
            continue;
        end if;
        continue when not pg_try_advisory_xact_lock(partition_lock(c.id, o.partition));
        -- A statement of its own: another member may have read it meanwhile.
        o := newest_offset(c.id, o.partition);
        continue when o.id is null or o.leased_until > moment; -- the consumer was removed; or leased
        if o.lost is not null then
            perform refuse_lost(c.name, o);
        end if;
        if lease is not null then
            o := put_offset(o, o.seq, later(moment, lease));
            receipt_ := o.partition || '-' || o.id;
        end if;
        return query
            select receipt_, m.partition, m.seq, m.topic, m.key, m.data, m.commit_lsn, m.ordinal, m.commit_time, m.inserted_at
            from messages m
            where m.partition = o.partition and m.seq > o.seq and m.seq <= upper_end and is_wanted(m.topic, m.data, m.reader, w)
            order by m.seq limit max_messages;
        if found then
            perform set_partitions_read(c.id, held || o.partition);
            return;
        end if;
        if lease is not null then -- another member took it all between the look and the lock
            perform put_offset(o, o.seq, null);
        end if;
    end loop;
end $$;

-- commit_offset(consumer, partition, seq, receipt) -> whether the offset moved: all of the partition up to seq is done. The
-- partition is free again, when the transaction commits.
-- Raises CB001, CB002, CB003 (no receipt), CB004 (no such partition; a seq below the offset, or beyond the log's end),
-- CB006 (under a lease: its receipt is missing or stale), CB008. Locks: the partition; waits for a transaction that reads it.
create or replace function commit_offset(consumer text, partition int, seq bigint, receipt text default null)
returns boolean
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := stream_named(consumer);
    fence constant bigint := fence_of(receipt, partition);
    at offsets;
begin
    perform require_read_committed('commit_offset()');
    at := locked_offset(c, partition);
    if fence is null and at.leased_until > moment() or at.id <> fence or fence is not null and at.leased_until <= moment() then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    if seq is null or seq < at.seq then
        raise exception 'seq % lies below the offset % of partition % of consumer %', coalesce(seq::text, 'null'), at.seq,
            partition, quote_literal(c.name)
            using errcode = 'CB004', hint = format('To go back: select seek(%L, %L, %s)', c.name, coalesce(seq, 0), partition);
    end if;
    if seq > at.seq and seq > coalesce(pg_sequence_last_value('messages_seq'), 0) then
        raise exception 'seq % lies beyond the log''s end, %', seq, coalesce(pg_sequence_last_value('messages_seq'), 0)
            using errcode = 'CB004';
    end if;
    if seq > at.seq or at.leased_until is not null then
        perform put_offset(at, seq, null);
    end if;
    perform set_partitions_read(c.id, array_remove(partitions_read(c.id), partition));
    return seq > at.seq;
end $$;

-- extend_lease(consumer, partition, receipt, lease): the lease ends so long from now; the receipt stays good.
-- Raises CB001, CB002, CB003, CB004, CB006, CB008. Locks: the partition.
create or replace function extend_lease(consumer text, partition int, receipt text, lease interval) returns void
language plpgsql volatile security definer
set search_path from current set jit = off set enable_seqscan = off set enable_bitmapscan = off
set plan_cache_mode = force_generic_plan as $$
declare
    c constant consumers := stream_named(consumer);
    at offsets;
begin
    perform check_read(1, lease);
    at := locked_offset(c, partition);
    if at.id is distinct from fence_of(receipt, partition) or at.leased_until <= moment() then
        perform refuse_lease(c.name, partition, receipt);
    end if;
    update offsets o set leased_until = later(moment(), extend_lease.lease)
    where o.consumer_id = at.consumer_id and o.partition = at.partition and o.id = at.id;
end $$;

-- refuse_lease(name, partition, receipt): raises CB006.
create or replace function refuse_lease(name text, partition int, receipt text) returns void
language plpgsql immutable as $$
begin
    raise exception 'stale receipt for partition % of consumer %: %', partition, quote_literal(name),
        coalesce(quote_literal(receipt), 'none, and another member has a lease')
        using errcode = 'CB006', hint = 'The lease ended, or the partition was sought in or committed since.';
end $$;

-- check_read(max_messages, lease): raises what read_stream() documents of its arguments.
create or replace function check_read(max_messages int, lease interval) returns void
language plpgsql stable as $$
begin
    perform require_read_committed('read_stream()');
    if max_messages is null or max_messages < 1 then
        raise exception 'max_messages is %; it must be at least 1', coalesce(max_messages::text, 'null')
            using errcode = 'CB004';
    end if;
    if lease <= interval '0' then
        raise exception 'lease is %; it must be positive', lease using errcode = 'CB004';
    elsif lease is not null then
        perform refuse_too_long('lease', lease);
    end if;
end $$;

-- stream_named(name) -> the consumer's row, which must be one that reads the log.
-- Raises CB001 (unknown), CB002 (a queue), CB008 (not its role).
create or replace function stream_named(name text) returns consumers
language plpgsql stable as $$
declare
    found consumers := consumer_named(name);
begin
    if found.mode <> 'stream' then
        raise exception 'consumer % is a %, not a stream', quote_literal(name), found.mode
            using errcode = 'CB002', hint = 'It is read by receive(), by Queue.connect() in Python, and by `cdcbridge receive`.';
    end if;
    perform refuse_stranger(found);
    return found;
end $$;

-- like_patterns(tables, left_out) -> the patterns of `tables` that LIKE has to look at: with left_out those that leave out, else those
-- with a part of a name, such as sales.o_*. Null where there is none.
create or replace function like_patterns(tables jsonb, left_out boolean) returns text[]
language sql immutable as $$
    select array_agg(replace(replace(replace(replace(ltrim(t, '!'), E'\\', E'\\\\'), '%', E'\\%'), '_', E'\\_'), '*', '%'))
    from jsonb_array_elements_text(tables) t
    where starts_with(t, '!') = left_out and (left_out or strpos(t, '*') > 0 and t not like '%.*')
$$;

-- wish_of(consumer) -> what the group reads of the log. tables null: of every schema; operations null: all.
create or replace function wish_of(consumer consumers) returns stream_wish
language sql immutable as $$
    select row(array(select jsonb_array_elements_text(consumer.config -> 'topics')),
               case when not consumer.config -> 'tables' ? '*.*' then array(select jsonb_array_elements_text(consumer.config -> 'tables')) end,
               array(select split_part(t, '.', 1) from jsonb_array_elements_text(consumer.config -> 'tables') t
                     where t like '%.*' and not starts_with(t, '!')),
               case when not consumer.config -> 'operations' @> '["insert", "update", "delete", "truncate"]'
                    then array(select jsonb_array_elements_text(consumer.config -> 'operations')) end,
               consumer.id,
               like_patterns(consumer.config -> 'tables', false),
               like_patterns(consumer.config -> 'tables', true))::stream_wish
$$;

-- is_wanted(topic, data, reader, wish) -> whether the group reads it. Gap messages are everybody's, unless they are one
-- consumer's. Rows of a backfill are its consumer's.
-- No SET clause, so that it is inlined.
create or replace function is_wanted(topic text, data json, reader int, wish stream_wish) returns boolean
language sql immutable as $$
    select topic = any ((wish).topics) or topic = 'cdcbridge.gap' and reader is null or reader = (wish).reader
        or strpos(topic, '.') > 0 and reader is null
           and ((wish).tables is null or topic = any ((wish).tables) or split_part(topic, '.', 1) = any ((wish).schemas)
                or topic like any ((wish).taken))
           and ((wish).left_out is null or not topic like any ((wish).left_out))
           and ((wish).operations is null or op_of(data) = any ((wish).operations))
$$;

-- newest_offsets(consumer_id) -> where the group stands, a row for each partition. No SET clause, so that it is inlined.
create or replace function newest_offsets(consumer_id int) returns setof offsets
language sql stable as $$
    select o.* from generate_series(0, (select max(p.partitions) from partitionings p) - 1) n
    cross join lateral (select * from offsets o where o.consumer_id = $1 and o.partition = n order by o.id desc limit 1) o
$$;

-- newest_offset(consumer_id, partition) -> of one partition; null where there is none.
create or replace function newest_offset(consumer_id int, partition int) returns offsets
language plpgsql volatile as $$
begin
    return (select o from offsets o
            where o.consumer_id = newest_offset.consumer_id and o.partition = newest_offset.partition
            order by o.id desc limit 1);
end $$;

-- locked_offset(consumer, partition) -> the same, locked. Raises CB004 where the log has no such partition.
-- Locks: the partition, to the end of the transaction; waits.
create or replace function locked_offset(consumer consumers, partition int) returns offsets
language plpgsql volatile as $$
declare
    at offsets;
begin
    perform pg_advisory_xact_lock(partition_lock(consumer.id, coalesce(partition, 0)));
    at := newest_offset(consumer.id, partition);
    if at.id is null then
        raise exception 'there is no partition %: the log has %', coalesce(partition::text, 'null'), log_partitions()
            using errcode = 'CB004';
    end if;
    return at;
end $$;

-- partition_lock(consumer_id, partition) -> the advisory lock of a group's partition.
create or replace function partition_lock(consumer_id int, partition int) returns bigint
language sql stable as $$
    select ('offsets'::regclass::oid::bigint << 32) | ((consumer_id::bigint * 4096 + partition) & 4294967295)
$$;

-- put_offset(old, seq, leased_until) -> the row that is the newest now; the partition is locked.
create or replace function put_offset(old offsets, seq bigint, leased_until timestamptz) returns offsets
language plpgsql volatile as $$
declare
    new offsets;
begin
    insert into offsets as o (consumer_id, partition, seq, leased_until, updated_at)
    values (old.consumer_id, old.partition, seq, leased_until, moment()) returning o.* into new;
    delete from offsets o where o.consumer_id = old.consumer_id and o.partition = old.partition and o.id = old.id;
    return new;
end $$;

-- fence_of(receipt, partition) -> the id in a receipt of read_stream(); null for none. Raises CB003.
create or replace function fence_of(receipt text, partition int) returns bigint
language plpgsql immutable as $$
begin
    if receipt is null then
        return null;
    end if;
    if receipt !~ '^[0-9]{1,9}-[0-9]{1,18}$' or split_part(receipt, '-', 1)::int is distinct from partition then
        raise exception '% is not a receipt of partition %', quote_literal(receipt), coalesce(partition::text, 'null')
            using errcode = 'CB003', hint = 'A receipt is what read_stream() returned in the column receipt.';
    end if;
    return split_part(receipt, '-', 2)::bigint;
end $$;

-- partitions_read(consumer_id) -> those that this transaction has read and not committed the offset of.
create or replace function partitions_read(consumer_id int) returns int[]
language plpgsql stable as $$
declare
    noted constant text[] := string_to_array(current_setting('cdcbridge.reading_' || consumer_id, true), ' ');
begin
    if cardinality(noted) = 2 and noted[1] = pg_current_xact_id_if_assigned()::text then
        return noted[2]::int[];
    end if;
    return '{}';
end $$;

-- set_partitions_read(consumer_id, partitions): notes them for the rest of the transaction.
create or replace function set_partitions_read(consumer_id int, partitions int[]) returns void
language plpgsql volatile as $$
begin
    perform set_config('cdcbridge.reading_' || consumer_id, pg_current_xact_id() || ' ' || partitions::text, true);
end $$;

-- pass_over(consumer_id, wish, at, upper_end): nothing that the group wants stands behind `at`; where other messages do, the
-- offset moves over them, so that no later read looks at them again. In a transaction that goes on, which would hold the
-- partition until then, only where they are many.
create or replace function pass_over(consumer_id int, wish stream_wish, at offsets, upper_end bigint) returns void
language plpgsql volatile as $$
declare
    safe bigint;
begin
    perform from messages m where m.partition = at.partition and m.seq > at.seq and m.seq <= upper_end
    offset case when now() = statement_timestamp() then 0 else 1000 end limit 1;
    if not found then
        return;
    end if;
    -- A statement of its own: what is not there by now and below it never will be.
    safe := least(max_safe_seq(), upper_end);
    if safe > at.seq
        and not exists (select from messages m where m.partition = at.partition and m.seq > at.seq and m.seq <= safe
                                               and is_wanted(m.topic, m.data, m.reader, wish))
        and pg_try_advisory_xact_lock(partition_lock(consumer_id, at.partition))
        and (newest_offset(consumer_id, at.partition)).id = at.id
    then
        perform put_offset(at, safe, at.leased_until);
    end if;
end $$;

-- end_of_era(wish, spots) -> the last seq before the number of partitions changed, where the group has not read all up to it;
-- else null. A key may be in another partition from then on: its later messages wait for its earlier ones.
create or replace function end_of_era(wish stream_wish, spots offsets[]) returns bigint
language plpgsql stable as $$
declare
    turn bigint;
begin
    for turn in select p.from_seq - 1 from partitionings p
                where p.from_seq > 0 and p.from_seq - 1 > (select min(s.seq) from unnest(spots) s) order by 1
    loop
        if exists (select from unnest(spots) s
                   cross join lateral (
                       select from messages m where m.partition = s.partition and m.seq > s.seq and m.seq <= turn
                                                and is_wanted(m.topic, m.data, m.reader, wish) limit 1) m
                   where s.seq < turn)
        then
            return turn;
        end if;
    end loop;
    return null;
end $$;

-- refuse_lost(name, at): raises CB009.
create or replace function refuse_lost(name text, at offsets) returns void
language plpgsql immutable as $$
begin
    raise exception 'consumer % was slower than the log''s retention: % messages of partition % are gone that it had not read',
        quote_literal(name), at.lost, at.partition
        using errcode = 'CB009', hint = format('To go on without them: select seek(%L, ''earliest'', %s)', name, at.partition);
end $$;

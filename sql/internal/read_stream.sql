-- Streams: reading the log by partition, as a group. What a group has read is the newest row of offsets of each partition.
--
-- A partition is locked by an advisory lock to the end of the transaction that reads it or moves its offset; a lease is in the
-- row. Whoever has the lock looks at the newest row in a statement of its own, whose snapshot is younger than the lock.
-- Pages are said to cost nothing: then the index by partition is the cheaper one for the planner whatever it knows. Else it
-- would read along the primary key, which is in the table's order, and throw away what is of other partitions.

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

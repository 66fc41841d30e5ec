-- Streams: a group reads the log by partition. The newest row of offsets for each partition shows
-- how far the group has read.
--
-- A transaction that reads a partition or moves its offset holds an advisory lock on the partition
-- until it ends. A lease, in contrast, is stored in the row. After the lock is taken, the newest
-- row is read in a statement of its own, so that its snapshot is taken after the lock.
--
-- The functions that read the log set the planner's costs of pages to 0. Then the planner prefers
-- the index by partition, with any statistics. Otherwise it would scan the primary key, whose order
-- is that of the table, and discard the messages of other partitions.

-- refuse_lease(name, partition, receipt): Raise the error of a missing or stale receipt.
--
-- Raises: CB006 always.
create or replace function refuse_lease(name text, partition int, receipt text) returns void
language plpgsql immutable as $$
begin
    raise exception 'stale receipt for partition % of consumer %: %',
        partition, quote_literal(name),
        coalesce(quote_literal(receipt), 'none was given, but the partition has a lease')
        using errcode = 'CB006',
              hint = 'The lease has ended, or the offset was moved. Read the partition again.';
end $$;

-- check_read(max_messages, lease): Check the arguments of read_stream().
--
-- Raises:
--   CB004  max_messages is below 1, or lease is not positive or longer than store.max_retention
--   CB005  the isolation level is above READ COMMITTED
create or replace function check_read(max_messages int, lease interval) returns void
language plpgsql stable as $$
begin
    perform require_read_committed('read_stream()');
    perform check_max_messages(max_messages);
    if lease <= interval '0' then
        raise exception 'lease is %, but must be more than 0 s', lease using errcode = 'CB004';
    elsif lease is not null then
        perform refuse_too_long('lease', lease);
    end if;
end $$;

-- like_patterns(tables, left_out) -> the patterns in `tables`, in the form of LIKE.
--
-- With left_out, these are the entries that exclude tables, such as !public.audit. Otherwise they
-- are the entries with a part of a name, such as sales.o_*. The result is null if there is none.
create or replace function like_patterns(tables jsonb, left_out boolean) returns text[]
language sql immutable as $$
    select array_agg(replace(replace(replace(replace(ltrim(t, '!'), E'\\', E'\\\\'),
                                             '%', E'\\%'), '_', E'\\_'), '*', '%'))
    from jsonb_array_elements_text(tables) t
    where starts_with(t, '!') = left_out and (left_out or strpos(t, '*') > 0 and t not like '%.*')
$$;

-- wish_of(consumer) -> the part of the log that the group reads.
--
-- tables is null if the group reads the tables of every schema, and operations if it reads all.
create or replace function wish_of(consumer consumers) returns stream_wish
language sql immutable as $$
    select row(array(select jsonb_array_elements_text(consumer.config -> 'topics')),
               case when not consumer.config -> 'tables' ? '*.*'
                    then array(select jsonb_array_elements_text(consumer.config -> 'tables')) end,
               array(select split_part(t, '.', 1)
                     from jsonb_array_elements_text(consumer.config -> 'tables') t
                     where t like '%.*' and not starts_with(t, '!')),
               case when not consumer.config -> 'operations'
                             @> '["insert", "update", "delete", "truncate"]'
                    then array(select jsonb_array_elements_text(
                                   consumer.config -> 'operations')) end,
               consumer.id,
               like_patterns(consumer.config -> 'tables', false),
               like_patterns(consumer.config -> 'tables', true))::stream_wish
$$;

-- is_wanted(topic, data, reader, wish) -> whether the group reads the message.
--
-- All groups read gap messages, except those that are for one consumer. Only the consumer of a
-- backfill reads the rows of the backfill.
-- The function has no SET clause, so that PostgreSQL inlines it.
create or replace function is_wanted(topic text, data json, reader int, wish stream_wish)
returns boolean
language sql immutable as $$
    select topic = any ((wish).topics) or topic = 'cdcbridge.gap' and reader is null
        or reader = (wish).reader
        or strpos(topic, '.') > 0 and reader is null
           and ((wish).tables is null or topic = any ((wish).tables)
                or split_part(topic, '.', 1) = any ((wish).schemas)
                or topic like any ((wish).taken))
           and ((wish).left_out is null or not topic like any ((wish).left_out))
           and ((wish).operations is null or op_of(data) = any ((wish).operations))
$$;

-- partitions_read(consumer_id) -> the partitions that this transaction has read and still holds.
--
-- It has read them by read_stream() and has not committed their offset.
create or replace function partitions_read(consumer_id int) returns int[]
language plpgsql stable as $$
declare
    noted constant text[] := string_to_array(
        current_setting('cdcbridge.reading_' || consumer_id, true), ' ');
begin
    if cardinality(noted) = 2 and noted[1] = pg_current_xact_id_if_assigned()::text then
        return noted[2]::int[];
    end if;
    return '{}';
end $$;

-- set_partitions_read(consumer_id, partitions): Remember these partitions in the transaction.
create or replace function set_partitions_read(consumer_id int, partitions int[]) returns void
language plpgsql volatile as $$
begin
    perform set_config('cdcbridge.reading_' || consumer_id,
                       pg_current_xact_id() || ' ' || partitions::text, true);
end $$;

-- pass_over(consumer_id, wish, at, upper_end): Move the offset past messages that the group does
-- not want, so that later reads do not look at them again.
--
-- The caller has found no message that the group wants between the offset `at` and upper_end.
-- Moving the offset locks the partition to the end of the transaction. If the transaction began
-- before this statement, the offset therefore moves only if there are more than 1,000 messages.
-- Locks: the partition, to the end of the transaction, without waiting.
create or replace function pass_over(consumer_id int, wish stream_wish, at offsets,
                                     upper_end bigint) returns void
language plpgsql volatile as $$
declare
    safe bigint;
begin
    perform from messages m
    where m.partition = at.partition and m.seq > at.seq and m.seq <= upper_end
    offset case when now() = statement_timestamp() then 0 else 1000 end limit 1;
    if not found then
        return;
    end if;
    -- In a statement of its own: a message up to this seq that is not visible by now never will be.
    safe := least(max_safe_seq(), upper_end);
    if safe > at.seq
        and not exists (select from messages m where m.partition = at.partition
                                               and m.seq > at.seq and m.seq <= safe
                                               and is_wanted(m.topic, m.data, m.reader, wish))
        and pg_try_advisory_xact_lock(partition_lock(consumer_id, at.partition))
        and (newest_offset(consumer_id, at.partition)).id = at.id
    then
        perform put_offset(at, safe, at.leased_until);
    end if;
end $$;

-- end_of_era(wish, spots) -> the last seq that the group may read before a change of partitions.
--
-- When the number of partitions changed, a key may have moved to another partition. Its later
-- messages must wait for the earlier ones. The result is the last seq before the change. After the
-- group has read all messages up to it, the result is null.
create or replace function end_of_era(wish stream_wish, spots offsets[]) returns bigint
language plpgsql stable as $$
declare
    turn bigint;
begin
    for turn in select p.from_seq - 1 from partitionings p
                where p.from_seq > 0
                  and p.from_seq - 1 > (select min(s.seq) from unnest(spots) s) order by 1
    loop
        if exists (select from unnest(spots) s
                   cross join lateral (
                       select from messages m
                       where m.partition = s.partition and m.seq > s.seq and m.seq <= turn
                         and is_wanted(m.topic, m.data, m.reader, wish) limit 1) m
                   where s.seq < turn)
        then
            return turn;
        end if;
    end loop;
    return null;
end $$;

-- refuse_lost(name, at): Raise the error of a group for which retention dropped unread messages.
--
-- Raises: CB009 always.
create or replace function refuse_lost(name text, at offsets) returns void
language plpgsql immutable as $$
begin
    raise exception 'consumer % was slower than the log''s retention, which dropped % unread '
        'messages of partition %', quote_literal(name), at.lost, at.partition
        using errcode = 'CB009', hint = format(
            'To continue without them: select seek(%L, ''earliest'', %s)', name, at.partition);
end $$;

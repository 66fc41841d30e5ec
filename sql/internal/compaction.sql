-- Compaction: of the messages that groups with `compact: true` read, retention keeps only the
-- latest one of each key.
--
-- Retention merges each old segment into one table, messages_compacted, and then drops the segment.
-- That table is the first partition of the log. Messages keep their seq and their position, so a
-- compacting group reads the table like the rest of the log.
--
-- Some messages report that a key is gone: a delete, a truncate, or an update that changed the key.
-- Such a message is kept until each compacting group has read it. The same holds for messages
-- without a key.

-- compacts(config) -> whether a consumer with this configuration has `compact: true`.
create or replace function compacts(config jsonb) returns boolean
language sql immutable as $$
    select (config ->> 'compact')::boolean is true
$$;

-- is_compacting() -> whether any consumer has `compact: true`.
create or replace function is_compacting() returns boolean
language sql stable as $$
    select exists (select from consumers c where compacts(c.config))
$$;

-- compact_segment(segment, beyond, too_old) -> the number of messages lost to compacting groups.
--
-- The messages of the segment that compaction keeps become part of messages_compacted, and the
-- segment is dropped. The segment ends before the seq `beyond`. A lost message is older than
-- too_old, was not read by a group, and reports that a key is gone or has no key.
--
-- Raises: 55P03 if the segment cannot be dropped now. Then messages is locked, or a consumer that
-- was added in the meantime has an unfinished message there. drop_all() catches it and drops
-- nothing.
-- Locks: ACCESS EXCLUSIVE on messages, taken after the work that needs time. Also the partitions of
-- compacting groups that lose messages, as reading_before() locks them.
create or replace function compact_segment(segment text, beyond bigint, too_old timestamptz)
returns bigint
language plpgsql volatile
set search_path from current set enable_seqscan = on set enable_bitmapscan = on
set work_mem = '64MB' as $$
declare
    lost bigint;
begin
    perform refuse_unlockable();
    create temp table candidates on commit drop as select * from compaction_candidates(beyond);
    analyze pg_temp.candidates;
    lost := leave_removals(too_old);
    create table messages_compacting (like messages including defaults including constraints);
    insert into messages_compacting
    select m.* from messages m join pg_temp.candidates k using (seq)
    where m.seq < beyond and (k.live or exists (
        select from consumers c cross join lateral newest_offsets(c.id) o
        where compacts(c.config) and o.partition = m.partition and o.seq < m.seq and o.lost is null
          and is_wanted(m.topic, m.data, m.reader, wish_of(c))))
    order by m.seq;
    drop table pg_temp.candidates;
    alter table messages_compacting add primary key (seq);
    create index messages_compacting_partition on messages_compacting (partition, seq);
    execute format(
        'alter table messages_compacting add constraint bounds check (seq >= 0 and seq < %s)',
        beyond);
    lock table only messages in access exclusive mode;
    if unfinished_before(beyond) is not null then -- a consumer that was added in the meantime
        raise exception 'in use' using errcode = 'lock_not_available';
    end if;
    execute format('drop table %s', segment);
    drop table if exists messages_compacted;
    execute format(
        'alter table messages attach partition messages_compacting for values from (0) to (%s)',
        beyond);
    alter table messages_compacting drop constraint bounds;
    alter table messages_compacting rename to messages_compacted;
    alter index messages_compacting_pkey rename to messages_compacted_pkey;
    alter index messages_compacting_partition rename to messages_compacted_partition;
    return lost;
end $$;

-- refuse_unlockable(): Check that messages can be locked now, and give the lock back.
--
-- A caller finds out before its work instead of after it.
-- Raises: 55P03 if it cannot be locked within lock_timeout.
create or replace function refuse_unlockable() returns void
language plpgsql volatile as $$
begin
    lock table only messages in access exclusive mode;
    raise exception 'free' using errcode = 'CB000'; -- gives the lock back
exception
    when sqlstate 'CB000' then
end $$;

-- compaction_candidates(beyond) -> the messages below the seq `beyond` that may be kept.
--
-- A message is live if it is the latest of its key and does not report that the key is gone. Rows
-- that a backfill read are compared for each reader separately, and a later change of the key
-- replaces them. A message that is not live reports that a key is gone, or has no key. It is kept
-- only for groups that have not read it.
create or replace function compaction_candidates(beyond bigint)
returns table (seq bigint, partition int, live boolean)
language sql stable as $$
    with taken as materialized (
        select m.seq, m.partition, m.topic, m.key, m.old_key, m.reader, op_of(m.data) as op,
               op_of(m.data) = 'delete'
               or m.data::text
                  ~ '^[{]"op":"message","record":[[:space:]]*null[[:space:]]*,"old"' as gone
        from messages m
        where m.seq < $1 and exists (select from consumers c
                                     where compacts(c.config)
                                       and is_wanted(m.topic, m.data, m.reader, wish_of(c)))
    ), truncated as (
        select t.topic, max(t.seq) as seq from taken t where t.op = 'truncate' group by t.topic
    ), latest as (
        select distinct on (e.topic, e.key, e.reader) e.*,
               max(e.seq) filter (where e.reader is null) over (partition by e.topic, e.key)
                   as changed
        from (select t.topic, t.key, t.reader, t.seq, t.partition, not t.gone as live
              from taken t where t.key is not null
              union all
              select t.topic, t.old_key, null, t.seq, t.partition, false
              from taken t where t.old_key is not null) e
        order by e.topic, e.key, e.reader, e.seq desc
    ), candidates as (
        select l.seq, l.partition, l.live from latest l left join truncated t using (topic)
        where l.seq > coalesce(t.seq, 0) and l.seq >= coalesce(l.changed, 0)
        union all
        select t.seq, t.partition, false from taken t left join truncated u using (topic)
        where t.key is null and (t.op <> 'truncate' or t.seq = u.seq)
    )
    select c.seq, c.partition, bool_or(c.live) from candidates c group by c.seq, c.partition
$$;

-- leave_removals(too_old) -> the number of messages that groups lose because they are too old.
--
-- The function counts, for each group, the candidates that are not live, are older than too_old and
-- have not been read. The group's next read reports the loss (CB009). Nothing is kept for the group
-- until it seeks. Partitions that a member is reading are left out.
-- Locks: the partitions that lose messages, to the end of the transaction, without waiting.
create or replace function leave_removals(too_old timestamptz) returns bigint
language plpgsql volatile as $$
declare
    total bigint := 0;
    g record;
begin
    for g in
        select o, count(*) as unread
        from consumers c cross join lateral newest_offsets(c.id) o
        join pg_temp.candidates k on k.partition = o.partition and k.seq > o.seq and not k.live
        join messages m on m.seq = k.seq
        where compacts(c.config) and o.lost is null and (o.leased_until > moment()) is not true
          and m.inserted_at <= too_old and is_wanted(m.topic, m.data, m.reader, wish_of(c))
        group by o
    loop
        continue when
            not pg_try_advisory_xact_lock(partition_lock((g.o).consumer_id, (g.o).partition));
        continue when (newest_offset((g.o).consumer_id, (g.o).partition)).id <> (g.o).id;
        perform put_lost_offset(g.o, (g.o).seq, g.unread);
        total := total + g.unread;
    end loop;
    return total;
end $$;

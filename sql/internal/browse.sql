-- The log browser: who may use it, and where a page of it begins.

-- refuse_browsing(): Refuse a caller that may not read the whole log.
--
-- The log has the messages of all consumers, with all their columns. A consumer's role therefore
-- does not suffice.
-- Raises: CB008 if the caller has no SELECT on the table messages.
create or replace function refuse_browsing() returns void
language plpgsql stable as $$
begin
    if not has_table_privilege(calling_role(), 'messages', 'select') then
        raise exception 'the role % may not read the log', calling_role() using errcode = 'CB008',
            hint = format('The owner of the store can allow it: grant select on %I.messages to %I',
                          store_schema(), calling_role());
    end if;
end $$;

-- seq_appended(at, until) -> the seq before which all messages were appended before this time.
--
-- With `until`, the last seq that was appended at this time or before. Null if `at` is null.
--
-- The place is found by halving, in about 25 look-ups. This needs messages in the order of their
-- inserted_at. Published messages are in that order except for the duration of their transaction.
create or replace function seq_appended(at timestamptz, until boolean) returns bigint
language plpgsql volatile
set search_path from current set enable_seqscan = off set enable_bitmapscan = off as $$
declare
    low bigint := 0; -- messages before it were appended earlier
    high bigint := coalesce(pg_sequence_last_value('messages_seq'), 0) + 1; -- the others later
    middle bigint;
    found record;
begin
    if at is null then
        return null;
    end if;
    while low < high loop
        middle := (low + high) / 2;
        select m.seq, m.inserted_at into found from messages m
        where m.seq >= middle order by m.seq limit 1;
        if found.seq is null or found.seq >= high
            or found.inserted_at > at or found.inserted_at = at and not until
        then
            high := middle;
        else
            low := found.seq + 1;
        end if;
    end loop;
    return case when until then low - 1 else low end;
end $$;

-- indexed_partition(key) -> the partition of all messages of a key, or null if the log has to be
-- read without it.
--
-- Null means that the key is null, that a segment has no index by partition, or that the log still
-- has messages from before a change of the number of partitions.
create or replace function indexed_partition(key text) returns int
language sql stable as $$
    select min(partition_of($1, p.partitions))
    from (select p.partitions, lead(p.from_seq) over (order by p.from_seq) as end_seq
          from partitionings p) p
    where $1 is not null
      and (p.end_seq is null
           or p.end_seq > (select m.seq from messages m order by m.seq limit 1))
      and not exists (
          select from pg_inherits i join pg_class s on s.oid = i.inhrelid
          where i.inhparent = 'messages'::regclass and not exists (
              select from pg_class x
              where x.relname = s.relname || '_partition' and x.relnamespace = s.relnamespace))
    having count(distinct p.partitions) = 1
$$;

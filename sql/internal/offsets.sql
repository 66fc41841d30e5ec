-- Offsets: the newest offset of each partition of a group, and the lock under which it moves.

-- newest_offsets(consumer_id) -> the newest offset of each of the group's partitions.
--
-- The function has no SET clause, so that PostgreSQL inlines it.
create or replace function newest_offsets(consumer_id int) returns setof offsets
language sql stable as $$
    select o.* from generate_series(0, (select max(p.partitions) from partitionings p) - 1) n
    cross join lateral (select * from offsets o where o.consumer_id = $1 and o.partition = n
                        order by o.id desc limit 1) o
$$;

-- newest_offset(consumer_id, partition) -> the newest offset of one partition; null if it has none.
create or replace function newest_offset(consumer_id int, partition int) returns offsets
language plpgsql volatile as $$
begin
    return (select o from offsets o
            where o.consumer_id = newest_offset.consumer_id
              and o.partition = newest_offset.partition
            order by o.id desc limit 1);
end $$;

-- locked_offset(consumer, partition) -> the newest offset of the partition, which is locked before.
--
-- Raises: CB004 if the log has no such partition.
-- Locks: the partition, to the end of the transaction. The function waits for the lock.
create or replace function locked_offset(consumer consumers, partition int) returns offsets
language plpgsql volatile as $$
declare
    at offsets;
begin
    perform pg_advisory_xact_lock(partition_lock(consumer.id, coalesce(partition, 0)));
    at := newest_offset(consumer.id, partition);
    if at.id is null then
        raise exception 'there is no partition %', coalesce(partition::text, 'null')
            using errcode = 'CB004',
                  hint = format('The log has the partitions 0 to %s.', log_partitions() - 1);
    end if;
    return at;
end $$;

-- partition_lock(consumer_id, partition) -> the key of the advisory lock of a group's partition.
create or replace function partition_lock(consumer_id int, partition int) returns bigint
language sql stable as $$
    select ('offsets'::regclass::oid::bigint << 32)
           | ((consumer_id::bigint * 4096 + partition) & 4294967295)
$$;

-- put_offset(old, seq, leased_until) -> the new offset, which replaces the old one.
--
-- The caller must hold the partition's lock.
create or replace function put_offset(old offsets, seq bigint, leased_until timestamptz)
returns offsets
language plpgsql volatile as $$
declare
    new offsets;
begin
    insert into offsets as o (consumer_id, partition, seq, leased_until, updated_at, member)
    values (old.consumer_id, old.partition, seq, leased_until, moment(),
            case when leased_until = old.leased_until then old.member -- the same lease
                 when leased_until is not null
                 then nullif(current_setting('application_name'), '') end)
    returning o.* into new;
    delete from offsets o
    where o.consumer_id = old.consumer_id and o.partition = old.partition and o.id = old.id;
    return new;
end $$;

-- fence_of(receipt, partition) -> the offset's id in a receipt of read_stream(), or null for null.
--
-- Raises: CB003 if the text is not a receipt of this partition.
create or replace function fence_of(receipt text, partition int) returns bigint
language plpgsql immutable as $$
begin
    if receipt is null then
        return null;
    end if;
    if receipt !~ '^[0-9]{1,9}-[0-9]{1,18}$'
        or split_part(receipt, '-', 1)::int is distinct from partition
    then
        raise exception '% is not a receipt of partition %',
            quote_literal(receipt), coalesce(partition::text, 'null')
            using errcode = 'CB003',
                  hint = 'Pass a receipt as read_stream() returned it.';
    end if;
    return split_part(receipt, '-', 2)::bigint;
end $$;
